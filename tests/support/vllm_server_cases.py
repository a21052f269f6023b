"""A vLLM server in processes of its own, and a trainer that reaches it by its URL. Run by rl/vllm/test_engine.py."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from entcov.rl.load_config import parse_config
from entcov.rl.run import train
from entcov.rl.vllm.guard import ROUTES
from entcov.rl.vllm.token import VARIABLE, client_token
from tests.support.tiny_run import recipe, timeless
from tests.support.unused_routes import UNUSED
from tests.support.vllm_policies import (
    OPTIONS,
    TOLERANCE,
    gap,
    policy,
    prompt_gap,
    prompts,
    reshuffle,
    settings,
    vllm_sampler,
    weights,
)

RUNNING: list[subprocess.Popen] = []
START_LIMIT = 600  # seconds; a quiet machine needs about 25


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The URL of a server for the recipe of `settings("qwen3")`."""
    folder = tmp_path_factory.mktemp("server")
    model = settings("qwen3").model
    tree = recipe(folder / "run", model={"config": model.config, "tokenizer": "char"})
    tree["rollout"] |= {"sampler": "vllm", "max_response_length": 24, "vllm": {"max_num_seqs": 32}}
    tree["data"]["max_prompt_length"] = 60
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    os.environ["XDG_STATE_HOME"] = str(folder)  # where the server leaves its token, and the trainer looks for it
    log = open(folder / "log", "w")
    command = [sys.executable, "-m", "entcov.rl.vllm.server", str(folder / "recipe.yaml"), "--port", str(port)]
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    RUNNING.append(process)
    try:
        started = time.monotonic()
        while status(url, "GET", "/health") != 200:
            assert process.poll() is None and time.monotonic() - started < START_LIMIT, (folder / "log").read_text()
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait()
        log.close()


def status(url: str, method: str, route: str, token: str | None = None) -> int | None:
    """What a request is answered, with the server's own token by default; None: it is not there."""
    try:
        bearer = client_token(url).value if token is None else token
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {bearer}"} if bearer else {})
        body = b"{}" if method == "POST" else None
        request = urllib.request.Request(url + route, body, headers, method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError):
        return None


def of(url: str, name: str = "qwen3"):
    config = settings(name)
    config.rollout.vllm.mode, config.rollout.vllm.url = "server", url
    return config


def test_logprobs_are_those_of_transformers_before_and_after_updates(server):
    assert "vllm" not in sys.modules  # on CPU the trainer needs no vLLM of its own
    model, tokenizer = policy("qwen3")
    sampler = vllm_sampler(of(server), model, tokenizer)
    seen = []
    for version in (1, 2):
        reshuffle(model, seed=version)
        sampler.sync(version, weights(model))
        announced: list = []
        rollouts = sampler.generate(prompts(6), **OPTIONS, on_done=announced.append)
        assert gap(model, rollouts) < TOLERANCE
        assert {r.weight_version for r in rollouts} == {version}
        assert sorted(map(id, announced)) == sorted(map(id, rollouts))
        assert prompt_gap(model, sampler) < TOLERANCE
        seen.append([r.tokens.tolist() for r in rollouts])
        assert [r.tokens.tolist() for r in sampler.generate(prompts(6), **OPTIONS)] == seen[-1]
    assert seen[0] != seen[1]


def test_without_the_token_every_route_is_closed_and_with_it_those_that_the_trainer_uses_are_open(server):
    """The real server: no other middleware, mount or router of vLLM's answers before the guard does."""
    for method, route in [*sorted(ROUTES), *UNUSED]:
        assert {status(server, method, route, token=wrong) for wrong in ("", "wrong-0123456789abcdef")} == {401}, route
        if (method, route) not in ROUTES:
            assert status(server, method, route) == 404, route
    for route in ("/health", "/server_info", "/get_world_size"):
        assert status(server, "GET", route) == 200


def test_neither_the_process_list_nor_the_log_shows_the_token(server, tmp_path_factory):
    token = client_token(server).value
    commands = b""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            commands += process.read_bytes()
    assert b"entcov.rl.vllm.guard" in commands and token.encode() not in commands
    assert token not in next(tmp_path_factory.getbasetemp().glob("server*/log")).read_text()


def test_the_server_loads_no_file_but_the_trainer_s(server):
    model, tokenizer = policy("qwen3")
    sampler = vllm_sampler(of(server), model, tokenizer)
    sampler.sync(6, weights(model))
    sampler.engine.start_weight_update()
    with pytest.raises(RuntimeError, match="update_info.path: must be a regular .safetensors file"):
        sampler.engine.update_weights({"path": "/dev/zero"})
    sampler.sync(7, weights(model))
    assert gap(model, sampler.generate(prompts(2), **OPTIONS)) < TOLERANCE


def test_an_error_leaves_the_server_usable(server):
    model, tokenizer = policy("qwen3")
    sampler = vllm_sampler(of(server), model, tokenizer)
    sampler.sync(3, weights(model))

    def fails(rollout):
        raise KeyError("reward")

    with pytest.raises(KeyError, match="reward"):
        sampler.generate(prompts(6), **OPTIONS, on_done=fails)
    assert gap(model, sampler.generate(prompts(2), **OPTIONS)) < TOLERANCE
    with pytest.raises(RuntimeError, match="/update_weights: vLLM answered 500: .*start_weight_update must be called"):
        sampler.engine.update_weights({"path": "/nowhere"})
    assert gap(model, sampler.generate(prompts(2), **OPTIONS)) < TOLERANCE


def test_another_trainer_on_the_same_server_is_noticed(server):
    model, tokenizer = policy("qwen3")
    first, second = (vllm_sampler(of(server), model, tokenizer) for _ in range(2))
    first.sync(4, weights(model))
    second.sync(5, weights(model))
    with pytest.raises(RuntimeError, match="came from weights 5, and the trainer's last sync was 4"):
        first.generate(prompts(1), **OPTIONS)


def test_a_server_that_does_not_fit_is_refused_with_every_reason(server, monkeypatch):
    config = of(server, "qwen3 untied")
    config.model.compute_dtype, config.rollout.max_response_length = "bfloat16", 50
    model, tokenizer = policy("qwen3 untied")
    with pytest.raises(ValueError, match="python -m entcov.rl.vllm.server RECIPE") as error:
        vllm_sampler(config, model, tokenizer)
    for reason in ("--dtype: must be torch.bfloat16, .*is torch.float32", "--max-model-len: must be at least 110 .*84",
                   "its weights are not those of the recipe's model"):  # fmt: skip
        assert error.match(reason)
    monkeypatch.setenv(VARIABLE, "wrong-0123456789abcdef")
    with pytest.raises(RuntimeError, match=f"the server refused the token of environment variable {VARIABLE}"):
        vllm_sampler(config, model, tokenizer)
    with pytest.raises(RuntimeError, match="rollout.vllm.url: GET http://127.0.0.1:9/.*no answer of a vLLM server"):
        vllm_sampler(of("http://127.0.0.1:9"), model, tokenizer)


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_with_a_server(server, tmp_path, staleness):
    tree = recipe(tmp_path, model={"config": settings("qwen3").model.config, "tokenizer": "char"})
    vllm = {"mode": "server", "url": server, "max_num_seqs": 32}
    tree["rollout"] |= {"sampler": "vllm", "max_staleness": staleness, "vllm": vllm}
    tree["data"]["reward"] = "tests.support.vllm_run_cases:even"
    train(parse_config(tree), display=False)
    rows = timeless(tmp_path)[1:]
    assert [row["training/staleness"] for row in rows] == [0, staleness, staleness]
    assert all(row["training/mismatch_max"] <= 1e-4 for row in rows[: None if staleness == 0 else 1])
    assert all(row["actor/grad_norm"] > 0 for row in rows)
    assert "vllm" not in sys.modules


def test_on_a_gpu_the_server_gets_the_recipes_settings_and_the_transfer_asked_for(tmp_path):
    from entcov.rl.vllm.server import server_arguments

    tree = recipe(tmp_path, model={"config": settings("qwen3").model.config, "tokenizer": "char"})
    tree["rollout"]["vllm"] = {
        "tensor_parallel": 4, "gpu_memory_utilization": 0.85, "max_num_seqs": 512,
        "engine_args": {"max_num_batched_tokens": 16384, "compilation_config": {"level": 3}},
    }  # fmt: skip
    options = {"host": "10.0.0.1", "port": 8100, "cpu": False}
    command, environment = server_arguments(parse_config(tree), transfer="nccl", **options)
    line = " ".join(command)
    for flag in (
        f"--model {tmp_path}/vllm_model", "--tensor-parallel-size 4", "--gpu-memory-utilization 0.85",
        "--max-num-seqs 512", '--weight-transfer-config {"backend": "nccl"}', "--max-num-batched-tokens 16384",
        '--compilation-config {"level": 3}', "--logprobs-mode processed_logprobs", "--load-format dummy",
        "--enable-scale-out", "--middleware entcov.rl.vllm.guard.Guard", "--host 10.0.0.1", "--port 8100",
    ):  # fmt: skip
        assert flag in line, flag
    assert "--enforce-eager" not in line and "worker-extension" not in line
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in environment
    command, environment = server_arguments(parse_config(tree), transfer="ipc", **options)
    assert '{"backend": "ipc"}' in command and environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "1"


def test_a_server_that_dies_ends_the_step_with_its_address(server):
    """The last one: there is no server afterwards."""
    model, tokenizer = policy("qwen3")
    sampler = vllm_sampler(of(server), model, tokenizer)
    sampler.sync(9, weights(model))
    sampler.generate(prompts(1), **OPTIONS)
    RUNNING[0].terminate()
    RUNNING[0].wait()
    with pytest.raises(RuntimeError, match=f"POST {server}/inference/v1/generate: no answer of a vLLM server"):
        sampler.generate(prompts(6), **OPTIONS)
