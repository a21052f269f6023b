"""vLLM in this process, which it changes, against transformers: rl/vllm/test_engine.py runs this in one of its own."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import transformers

from entcov.rl.hf.sampler import InProcessSampler, likeliest
from entcov.rl.vllm import transfer
from entcov.rl.vllm.weight_sync import ByReference, ExpectedWeights, WeightSync
from tests.support.recording_engine import RecordingEngine
from tests.support.vllm_policies import (
    MODELS,
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

SET_NUM_THREADS = torch.set_num_threads


def another_sync(sampler) -> WeightSync:
    return WeightSync(sampler.engine, sampler._sync.expected, ByReference(), dtype=torch.float32)


@pytest.fixture(scope="module")
def samplers() -> Iterator:
    """name -> (model, sampler), each made once."""
    made = {}

    def get(name: str):
        if name not in made:
            model, tokenizer = policy(name)
            made[name] = model, vllm_sampler(settings(name), model, tokenizer)
        return made[name]

    yield get
    for _, sampler in made.values():
        sampler.engine.close()


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_are_those_of_transformers_before_and_after_updates(samplers, name):
    model, sampler = samplers(name)
    if sampler._sync.version is None:
        with pytest.raises(RuntimeError, match="does not hold the trainer's weights"):
            sampler.generate(prompts(1), **OPTIONS)
    for version in (5, 8, 13):  # the same prompts each time: a stale prefix cache would show
        reshuffle(model, seed=version)
        sampler.sync(version, weights(model))
        rollouts = sampler.generate(prompts(6), **OPTIONS)
        assert gap(model, rollouts) < TOLERANCE
        assert {r.weight_version for r in rollouts} == {version}
        assert min(p for r in rollouts for p in r.logprob) < -2 and max(p for r in rollouts for p in r.logprob) > -0.5
    greedy = sampler.generate(prompts(4), **(OPTIONS | {"temperature": 0.0, "group_size": 1}))
    assert gap(model, greedy, temperature=1.0) < TOLERANCE  # at 0 the log-probability is that of softmax(logits)
    mine = InProcessSampler(model, sampler.tokenizer, batch_size=8)
    other = mine.generate(prompts(4), **(OPTIONS | {"temperature": 0.0, "group_size": 1}))
    assert [r.tokens.tolist() for r in greedy] == [r.tokens.tolist() for r in other]


def test_prompts_are_scored_and_sampled_at_temperatures_of_their_own(samplers):
    model, sampler = samplers("qwen3")
    reshuffle(model, seed=3)
    sampler.sync(15, weights(model))
    assert prompt_gap(model, sampler) < TOLERANCE
    own = [0.5, 1.0, 1.6, 0.7, 1.0, 0.5]
    rollouts = sampler.generate(prompts(6), **(OPTIONS | {"temperature": own}))
    for temperature in set(own):
        of_it = [r for r in rollouts if own[r.prompt.uid] == temperature]
        assert gap(model, of_it, temperature=temperature) < TOLERANCE
    plain = sampler.generate(prompts(6), **OPTIONS)
    assert [r.tokens.tolist() for r in sampler.generate(prompts(6), **(OPTIONS | {"temperature": [0.7] * 6}))] == [
        r.tokens.tolist() for r in plain
    ]
    with pytest.raises(ValueError, match="temperature: vLLM samples at temperatures from 0.01 to 2.*got 2.5"):
        sampler.generate(prompts(2), **(OPTIONS | {"temperature": [1.0, 2.5]}))
    another = another_sync(sampler)
    sampler._sync, kept = another, sampler._sync
    with pytest.raises(RuntimeError, match="does not hold the trainer's weights"):
        sampler.prompt_logprobs(prompts(1))
    sampler._sync = kept


def test_truncated_samples_are_those_of_the_in_process_sampler_s_rule(samplers):
    """Top-p of the top-k, with the log-probability of what is left; a sampler that ignored one would leave the set."""
    model, sampler = samplers("qwen3")
    sampler.sync(17, weights(model))
    rollouts = sampler.generate(prompts(6), **OPTIONS, top_p=0.8, top_k=5)
    assert len({tuple(r.tokens) for r in rollouts}) > 6
    for rollout in rollouts:
        with torch.no_grad():
            logits = model.eval()(torch.tensor([[*rollout.prompt.tokens, *rollout.tokens]])).logits[0]
        logprob = likeliest(logits / 0.7, 0.8, 5).log_softmax(-1)[len(rollout.prompt.tokens) - 1 : -1]
        expected = logprob.gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.logprob), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("guard", ["prefix cache", "tied head"])
def test_without_its_guard_the_gap_is_nats(samplers, monkeypatch, guard):
    """The two silent failures of an update, so that the test above is known to see them."""
    model, sampler = samplers("qwen3")
    reshuffle(model, seed=20)
    sampler.sync(20, weights(model))
    sampler.generate(prompts(6), **OPTIONS)
    with monkeypatch.context() as patch:
        if guard == "prefix cache":
            patch.setattr(sampler.engine, "reset_prefix_cache", lambda: True)
        else:
            patch.setattr(transfer, "_repack_heads", lambda model: None)
        reshuffle(model, seed=21)
        sampler.sync(21, weights(model))
    assert gap(model, sampler.generate(prompts(6), **OPTIONS)) > 0.5
    sampler.sync(22, weights(model))
    assert gap(model, sampler.generate(prompts(6), **OPTIONS)) < TOLERANCE


def test_a_cache_that_is_not_emptied_stops_the_run(samplers, monkeypatch):
    model, sampler = samplers("llama")
    sampler.sync(30, weights(model))
    broken = another_sync(sampler)
    monkeypatch.setattr(sampler.engine, "reset_prefix_cache", lambda: False)
    with pytest.raises(RuntimeError, match="did not empty its prefix cache"):
        broken(31, weights(model))
    assert broken.version is None
    with pytest.raises(RuntimeError, match="start the engine anew"):
        broken(32, weights(model))
    monkeypatch.undo()
    sampler.sync(33, weights(model))
    assert gap(model, sampler.generate(prompts(2), **OPTIONS)) < TOLERANCE


def test_a_missing_k_proj_is_refused_and_the_engine_goes_on(samplers):
    """vLLM itself takes such a set and computes with the old values."""
    model, sampler = samplers("qwen3 untied")
    sampler.sync(40, weights(model))
    fresh = another_sync(sampler)
    left_out = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(ValueError, match=rf"nothing was sent\n  missing: {left_out}$"):
        fresh(41, lambda: ((n, w) for n, w in weights(model)() if n != left_out))
    rollouts = sampler.generate(prompts(2), **OPTIONS)
    assert gap(model, rollouts) < TOLERANCE and rollouts[0].weight_version == 40


def test_weights_of_somebody_else_are_noticed(samplers):
    model, sampler = samplers("llama")
    sampler.sync(50, weights(model))
    sampler.engine._llm.update_weight_version("other")
    with pytest.raises(RuntimeError, match="came from weights other, and the trainer's last sync was 50"):
        sampler.generate(prompts(1), **OPTIONS)
    sampler.sync(51, weights(model))
    sampler.generate(prompts(1), **OPTIONS)


def test_responses_belong_to_their_seed_and_not_to_their_batch(samplers):
    model, sampler = samplers("qwen2")
    sampler.sync(60, weights(model))
    everything = sampler.generate(prompts(12), **OPTIONS)
    assert [(r.prompt.uid, r.sample) for r in everything] == [(i, g) for i in range(12) for g in range(3)]
    some = sampler.generate(prompts(12)[7:2:-2], **(OPTIONS | {"group_size": 2}))
    assert [r.tokens.tolist() for r in some] == [
        everything[3 * i + g].tokens.tolist() for i in (7, 5, 3) for g in range(2)
    ]
    other = sampler.generate(prompts(12), **(OPTIONS | {"seed": 4}))
    assert sum(a.tokens.tolist() == b.tokens.tolist() for a, b in zip(everything, other, strict=True)) < 6
    assert len({tuple(r.tokens) for r in everything}) > 30  # the samples of a group differ


def test_responses_end_at_the_end_token_or_at_the_limit(samplers):
    model, sampler = samplers("qwen2")
    sampler.sync(70, weights(model))
    eos = sampler.tokenizer.eos_token_id
    rollouts = sampler.generate(prompts(12), **(OPTIONS | {"temperature": 2.0}))
    assert {r.finished for r in rollouts} == {True, False}
    with pytest.raises(ValueError, match="must fit into 84 tokens, got 60 after a prompt of"):
        sampler.generate(prompts(2), **(OPTIONS | {"max_response_length": 60}))
    for rollout in rollouts:
        assert len(rollout.tokens) == len(rollout.logprob)
        assert eos not in rollout.tokens[:-1]
        assert rollout.finished == (rollout.tokens[-1] == eos)
        assert rollout.finished or len(rollout.tokens) == 24
        shown = rollout.tokens[:-1] if rollout.finished else rollout.tokens
        assert rollout.text == sampler.tokenizer.decode(shown)


def test_each_response_is_announced_when_it_is_complete_and_an_error_leaves_the_engine_usable(samplers):
    model, sampler = samplers("qwen2")
    sampler.sync(80, weights(model))
    announced, counted = [], []
    options = OPTIONS | {"temperature": 2.0}
    rollouts = sampler.generate(
        prompts(6), **options, on_done=announced.append, progress=lambda done, all_of: counted.append((done, all_of))
    )
    assert sorted(map(id, announced)) == sorted(map(id, rollouts))
    lengths = [len(r.tokens) for r in announced]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]  # they all start together: the shortest comes first
    assert counted == [(n + 1, 18) for n in range(18)]

    def fails(rollout):
        raise KeyError("reward")

    with pytest.raises(KeyError, match="reward"):
        sampler.generate(prompts(6), **options, on_done=fails)
    assert not sampler.engine._llm.llm_engine.has_unfinished_requests()
    assert [r.tokens.tolist() for r in sampler.generate(prompts(6), **options)] == [r.tokens.tolist() for r in rollouts]


def test_the_trainers_random_numbers_and_threads_are_left_alone(samplers):
    torch.manual_seed(123), np.random.seed(123), random.seed(123)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    model, tokenizer = policy("llama", seed=1)
    sampler = vllm_sampler(settings("llama"), model, tokenizer)
    sampler.sync(0, weights(model))
    sampler.generate(prompts(2), **OPTIONS)
    sampler.engine.close()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1] and np.random.get_state()[1].tolist() == before[2]
    assert torch.set_num_threads is SET_NUM_THREADS


def test_a_bfloat16_engine_takes_float32_weights(samplers):
    config = settings("qwen3")
    config.model.compute_dtype = "bfloat16"
    model, tokenizer = policy("qwen3")
    sampler = vllm_sampler(config, model, tokenizer)
    sampler.sync(0, weights(model))
    rollouts = sampler.generate(prompts(6), **OPTIONS)
    sampler.engine.close()
    assert TOLERANCE < gap(model, rollouts) < 2.0  # weights of 8 bits, on a policy that is made to be peaked
    assert isinstance(model, transformers.Qwen3ForCausalLM)


def test_settings_that_cannot_hold_here():
    model, tokenizer = policy("llama")
    config = settings("llama")
    config.rollout.temperature = 0.001
    with pytest.raises(ValueError, match="rollout.temperature: vLLM samples at .* got 0.001"):
        vllm_sampler(config, model, tokenizer)
    for key, value, message in (
        ("sleep", True, "rollout.vllm.sleep: vLLM's sleep mode needs a GPU"),
        ("engine_args", {"logprobs_mode": "raw_logprobs"}, "engine_args: logprobs_mode .*remove them"),
        ("tensor_parallel", 2, "tensor_parallel: must divide the number of processes .*got 2 for 1"),
    ):
        config = settings("llama")
        setattr(config.rollout.vllm, key, value)
        with pytest.raises(ValueError, match=message):
            vllm_sampler(config, model, tokenizer)


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_vllms_nccl_sender_gets_whole_updates(monkeypatch, name):
    """vLLM's own sender for GPUs, all of it but the communicator and the packing into its buffers."""
    from vllm.distributed.weight_transfer import nccl_engine

    model, _ = policy(name)
    engine, arrived, asked = RecordingEngine(), {}, []
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: asked.append(info) or object())
    monkeypatch.setattr(
        nccl_engine, "packed_nccl_broadcast_producer", lambda iterator, **options: arrived.update(iterator)
    )
    monkeypatch.setattr(engine, "update_weights", lambda info: engine.calls.append(info))
    expected = ExpectedWeights(model.config)
    sync = WeightSync(engine, expected, transfer.Native("nccl", workers=4), dtype=torch.bfloat16)
    for version in (3, 6):
        reshuffle(model, seed=version)
        engine.calls.clear()
        sync(version, weights(model))
        calls = [call for call in engine.calls if call != "init"]
        assert [calls[0], *calls[2:]] == ["start", f"finish {version}", "reset"]
        sent = {n: w for n, w in model.state_dict().items() if n not in expected.tied}
        assert calls[1]["names"] == list(sent) and set(calls[1]["dtype_names"]) == {"bfloat16"}
        assert calls[1]["shapes"] == [list(w.shape) for w in sent.values()]
        assert all(torch.equal(arrived[n], w.to(torch.bfloat16)) for n, w in sent.items()) and len(arrived) == len(sent)
    assert len(asked) == 1 and (asked[0].world_size, asked[0].rank) == (5, 0)  # the trainer and four workers
    assert transfer.Native("ipc", workers=1)._init_info().packed


def test_the_order_of_sleeping_and_waking(samplers, monkeypatch):
    """vLLM's own bookkeeping and scheduler; on a CPU its workers alone have no memory to give back."""
    model, sampler = samplers("llama")
    sampler.sync(90, weights(model))
    engine, calls = sampler.engine, []
    monkeypatch.setattr(engine, "_sleeps", True)
    monkeypatch.setattr(engine, "_drafts", False)

    def watch(name: str) -> None:
        real = getattr(engine._llm, name)
        monkeypatch.setattr(engine._llm, name, lambda **kwargs: (calls.append((name, kwargs)), real(**kwargs))[1])

    for name in ("sleep", "wake_up", "start_weight_update"):
        watch(name)
    moved, dropped = ("sleep", {"level": 1}), ("sleep", {"level": 2})
    weights_only, all_of_it = ("wake_up", {"tags": ["weights"]}), ("wake_up", {})
    update = ("start_weight_update", {})
    rollouts = sampler.generate(prompts(2), **OPTIONS)
    sampler.sleep(sync_follows=True)
    assert calls == [dropped] and engine._llm.llm_engine.is_sleeping()
    with pytest.raises(RuntimeError, match="a whole sync must come first"):
        sampler.generate(prompts(2), **OPTIONS)
    for version in (91, 92):  # the cache stays away while the weights change, also when they change twice
        sampler.sync(version, weights(model))
    assert calls[1:] == [weights_only, update, update] and engine._llm.llm_engine.is_sleeping()
    again = sampler.generate(prompts(2), **OPTIONS)
    sampler.sleep(sync_follows=False)
    assert calls[4:] == [all_of_it, moved]
    assert [r.tokens.tolist() for r in again] == [r.tokens.tolist() for r in rollouts] and gap(model, again) < TOLERANCE
    sampler.generate(prompts(2), **OPTIONS)  # an evaluation, then the next step
    sampler.sleep(sync_follows=True)
    assert calls[6:] == [all_of_it, dropped]
    sampler.sync(93, weights(model))
    engine._wake()


def test_an_engine_that_is_gone_leaves_the_process_groups_and_other_engines_alone(samplers):
    """vLLM itself destroys every group of the process when an engine is collected as garbage."""
    model, sampler = samplers("llama")
    for closed in (True, False):
        other = vllm_sampler(settings("llama"), model, sampler.tokenizer)
        if closed:
            other.engine.close()
        del other
        gc.collect()
        assert torch.distributed.is_initialized()
    sampler.sync(100, weights(model))
    assert gap(model, sampler.generate(prompts(2), **OPTIONS)) < TOLERANCE
