"""Sleeping engines: which memory goes where, when the loop lets weights be dropped, and that nothing samples then."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from entcov.rl.config import VllmConfig
from entcov.rl.load_config import parse_config
from entcov.rl.loop import Loop
from entcov.rl.vllm import engine as engine_module
from entcov.rl.vllm.engine import Completion, LocalEngine, _sleep_of
from entcov.rl.vllm.sampler import VllmSampler
from entcov.rl.vllm.weight_sync import ByReference, WeightSync
from tests.support.scripted_loop import Actor, Sampler, Stream, reward
from tests.support.tiny_run import prompts, recipe

OPTIONS = {"group_size": 1, "temperature": 1.0, "max_response_length": 4, "seed": 0}


class SleepingLLM:
    """vLLM's sleep mode as vLLM 0.32 documents it: where the weights and the cache are, and what they hold."""

    def __init__(self):
        self.memory = {"weights": 0.0, "kv_cache": 0.0}  # None: given back. NaN: there, with nothing in it
        self.host, self.log, self.version = None, [], None
        self.llm_engine = self

    def sleep(self, *, level):
        self.log.append(f"sleep {level}")
        if self.memory["weights"] is not None:
            self.host = self.memory["weights"] if level == 1 else None
        self.memory = {"weights": None, "kv_cache": None}

    def wake_up(self, *, tags=("weights", "kv_cache")):
        self.log.append(f"wake {' '.join(tags)}")
        for tag in tags:
            if self.memory[tag] is None:
                self.memory[tag] = float("nan")
                if tag == "weights" and self.host is not None:
                    self.memory[tag], self.host = self.host, None

    def start_weight_update(self):
        assert self.memory["weights"] is not None
        self.log.append("update")

    def update_weights(self, info):
        self.memory["weights"] = float(info["update_info"]["weights"][0][1])

    def finish_weight_update(self, version):
        self.version = version

    def reset_prefix_cache(self):
        return True

    def has_unfinished_requests(self):
        assert None not in self.memory.values()
        left, self.left = self.left, []
        self.done = left
        return bool(left)

    def add_request(self, number, prompt, parameters):
        self.left = [*getattr(self, "left", []), number]

    def step(self):
        weight = self.memory["weights"]
        assert weight == float(self.version), "sampled with weights that are not those of the last sync"
        return [SimpleNamespace(finished=True, request_id=number) for number in self.done]


def sampler_of(monkeypatch, **settings) -> tuple[VllmSampler, SleepingLLM]:
    """The project's engine and sampler around the stand-in."""
    llm, engine = SleepingLLM(), object.__new__(LocalEngine)  # its own start needs vLLM, and a GPU to sleep on
    engine._llm, engine._asleep, engine._final = llm, set(), None
    engine._sampling_params = lambda **arguments: arguments
    engine._sleeps, engine._drafts = _sleep_of(VllmConfig(sleep=True, **settings))
    monkeypatch.setattr(engine_module, "_completion", lambda output, request: Completion([7], [-1.0], (llm.version,)))
    expected = SimpleNamespace(check=lambda found: None, tied={}, without_tied=lambda weights: weights)
    tokenizer = SimpleNamespace(eos_token_id=2, decode=lambda tokens, **_: "")
    sync = WeightSync(engine, expected, ByReference(), dtype=torch.float32)
    return VllmSampler(engine, sync, tokenizer, max_model_len=64), llm


def sync(sampler: VllmSampler, version: int) -> None:
    sampler.sync(version, lambda: iter([("weight", torch.tensor(float(version)))]))


def test_weights_are_dropped_before_a_sync_and_kept_before_more_samples(monkeypatch):
    """Two steps of two draws each, with an evaluation between them."""
    sampler, llm = sampler_of(monkeypatch)
    sync(sampler, 0)
    for version in (1, 2):
        for _ in range(2):  # awake between the draws of a step
            sampler.generate(prompts(2), **OPTIONS)
        sampler.sleep(sync_follows=True)
        assert llm.memory == {"weights": None, "kv_cache": None} and llm.host is None
        sync(sampler, version)
        assert llm.memory["kv_cache"] is None  # not needed yet
        sampler.generate(prompts(2), **OPTIONS)
        sampler.sleep(sync_follows=False)
        assert llm.host == version and set(llm.memory.values()) == {None}
    step = ["sleep 2", "wake weights", "update", "wake weights kv_cache", "sleep 1"]
    assert llm.log == ["update", *step, "wake weights kv_cache", *step]


def test_dropped_weights_are_never_sampled_with(monkeypatch):
    sampler, llm = sampler_of(monkeypatch)
    sync(sampler, 0)
    sampler.generate(prompts(1), **OPTIONS)
    sampler.sleep(sync_follows=True)
    for call in (lambda: sampler.generate(prompts(1), **OPTIONS), lambda: sampler.prompt_logprobs(prompts(1))):
        with pytest.raises(RuntimeError, match="vLLM does not hold the trainer's weights; a whole sync must come"):
            call()
    sync(sampler, 1)
    assert len(sampler.generate(prompts(1), **OPTIONS)) == 1


def test_sleeping_twice_keeps_what_the_first_time_kept(monkeypatch):
    """A rank without a prompt in a step goes from an evaluation's sleep into the step's; vLLM cannot go deeper."""
    sampler, llm = sampler_of(monkeypatch)
    sync(sampler, 0)
    sampler.sleep(sync_follows=False)
    sampler.sleep(sync_follows=True)
    assert llm.log == ["update", "sleep 1"] and llm.host == 0
    assert len(sampler.generate(prompts(1), **OPTIONS)) == 1


@pytest.mark.parametrize("key", ["speculative_config", "speculative-config"])
def test_a_draft_models_weights_are_kept(monkeypatch, key):
    sampler, llm = sampler_of(monkeypatch, engine_args={key: {"model": "draft"}})
    sync(sampler, 0)
    sampler.sleep(sync_follows=True)
    assert llm.log[-1] == "sleep 1"
    assert len(sampler.generate(prompts(1), **OPTIONS)) == 1


def test_an_engine_that_was_not_to_sleep_stays_awake(monkeypatch):
    sampler, llm = sampler_of(monkeypatch)
    sampler.engine._sleeps = False
    sync(sampler, 0)
    sampler.sleep(sync_follows=True)
    assert llm.log == ["update"] and len(sampler.generate(prompts(1), **OPTIONS)) == 1


@pytest.mark.parametrize("staleness", [0, 1])
def test_the_loop_promises_a_sync_after_the_last_draw_of_a_step(staleness):
    """With rollouts sampled ahead, those of the next step come before the sync."""
    changes = {"rollout": {"prompts_per_step": 2, "group_size": 2, "sampler": "vllm", "max_staleness": staleness}}
    changes["actor.updates_per_rollout"] = 2
    log, sampler = [], Sampler()
    loop = Loop(parse_config(recipe("unused", **changes)), Actor(), sampler, Stream(), [], reward)
    for name in ("generate", "sync"):
        real = getattr(sampler, name)
        setattr(sampler, name, lambda *a, name=name, real=real, **k: (log.append(name), real(*a, **k))[1])
    sampler.sleep = lambda *, sync_follows: log.append(f"sleep {sync_follows}")
    loop.step()
    if staleness == 0:
        assert log == ["generate", "sleep True", "sync"]
    else:
        loop._next.result()
        assert log[:2] == ["generate", "sleep False"] and sorted(log[2:]) == ["generate", "sync"]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllms_own_sleep_is_what_the_stand_in_has():
    """Its source, not imported here: the arguments, and that level 2 brings back what no sync sends (buffers)."""
    folder = Path(importlib.util.find_spec("vllm").origin).parent

    def method(file: str, name: str) -> ast.FunctionDef:
        tree = ast.parse((folder / file).read_text())
        return next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)

    for file in ("entrypoints/llm.py", "v1/worker/gpu_worker.py"):
        assert [a.arg for a in method(file, "sleep").args.args][:2] == ["self", "level"]
        assert [a.arg for a in method(file, "wake_up").args.args] == ["self", "tags"]
    worker = ast.unparse(method("v1/worker/gpu_worker.py", "sleep"))
    assert "level == 2" in worker and "model.named_buffers()" in worker
    assert "_sleep_saved_buffers" in ast.unparse(method("v1/worker/gpu_worker.py", "wake_up"))
