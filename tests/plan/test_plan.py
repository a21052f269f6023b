"""The plan's arithmetic against models that are really built, autograd's own account, and values worked by hand."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from torch import nn

from entcov.plan.memory import (
    COLUMNS,
    GIB,
    GPUS,
    KNOBS,
    LOSS_VIEW,
    ROLLOUT,
    TRAINER_RESERVE,
    Settings,
    activations,
    engine_memory,
    host_memory,
    layer_activations,
    memory,
    parse_size,
    problems,
    remedies,
    stages,
)
from entcov.plan.model_shapes import PUBLISHED, ModelShape, shape_of
from entcov.plan.traffic import estimate, passes, traffic
from entcov.rl.batch import pack
from entcov.rl.types import Example, Prompt, Rollout

transformers = pytest.importorskip("transformers")

QWEN_7B, QWEN_32B = (shape_of(f"Qwen/Qwen2.5-{size}", None) for size in ("7B", "32B"))
TINY = ModelShape("tiny", 4, 8, 24, 4, 2, 2, 100, False, True, False)


def settings(**changes) -> Settings:
    """32B on 32 GPUs, as in examples/qwen2.5_32b_dapo_math.yaml."""
    base = Settings(
        shape=QWEN_32B, gpu=GPUS["h100"], gpus=32, tensor_parallel=8, sequence_parallel=True, recompute="full",
        micro_batch_tokens=20480, max_prompt=2048, engine_tensor_parallel=8, gpu_memory_utilization=0.45,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


# ---- parameters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - {"Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-Math-1.5B"}))
def test_parameters_are_those_of_the_model_that_transformers_builds(name):
    arguments = {key: value for key, value in PUBLISHED[name].items() if value is not None}
    config = transformers.AutoConfig.for_model(**arguments)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert shape_of(name, None).parameters == sum(p.numel() for p in model.parameters())


def test_parameters_of_the_published_sizes():
    """As the model cards round them."""
    for name, billions in (("Qwen/Qwen2.5-7B", 7.61), ("Qwen/Qwen2.5-32B", 32.8), ("meta-llama/Llama-3.1-8B", 8.03)):
        assert shape_of(name, None).parameters / 1e9 == pytest.approx(billions, rel=2e-3)


def test_parameters_on_a_rank_by_hand():
    """Hidden 8, 4 heads and 2 key-value heads of 2, MLP 24, 4 layers, 100 tokens in 128 rows, biases: a layer has
    16 x 8 + 8 x 8 + 3 x 24 x 8 + 16 = 784 that are divided and two norms of 8 that are not."""
    assert TINY.parameters_on_rank(1, 1, 0) == 4 * (784 + 16) + 2 * 1024 + 8
    assert TINY.parameters_on_rank(2, 2, 0) == 2 * (392 + 16) + 512
    assert TINY.parameters_on_rank(2, 2, 1) == 2 * (392 + 16) + 8 + 512
    tied = dataclasses.replace(TINY, tie_word_embeddings=True)
    assert tied.parameters_on_rank(1, 1, 0) == 4 * (784 + 16) + 1024 + 8
    assert tied.parameters_on_rank(1, 2, 1) == 2 * (784 + 16) + 8 + 1024  # the last of several stages keeps a copy
    assert dataclasses.replace(TINY, qkv_bias=False, qk_norm=True).parameters_on_rank(1, 1, 0) == (
        4 * (768 + 16 + 4) + 2 * 1024 + 8
    )


def test_shapes_come_from_a_folder_a_mapping_or_a_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    with pytest.raises(ValueError, match="num_hidden_layers must be an integer >= 1, got None"):
        shape_of(str(tmp_path), None)
    transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=4, vocab_size=128
    ).save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path), None)
    assert (shape.num_key_value_heads, shape.head_dim, shape.qkv_bias, shape.qk_norm) == (4, 16, False, False)
    with pytest.raises(ValueError, match="model_type must be one of qwen2, qwen3, llama, got 'mamba'"):
        shape_of(None, {"model_type": "mamba"})
    with pytest.raises(ValueError, match="model.path: must be a folder with a config.json or one of .*got 'no/model'"):
        shape_of("no/model", None)


# ---- memory --------------------------------------------------------------------------------------------------------


def test_weights_gradients_and_optimizer_by_hand():
    """Bytes a parameter: bfloat16 2 + 4 + 12 / replicas, float32 4 + 4 + 8 / replicas, as Megatron-LM documents it."""
    held = memory(settings(), 0)
    p = held.parameters
    assert (held.weights, held.gradients, held.optimizer) == (2 * p, 4 * p, 3 * p)  # 4 replicas
    held = memory(settings(bf16=False, distributed_optimizer=False), 0)
    assert (held.weights, held.gradients, held.optimizer) == (4 * p, 4 * p, 8 * p)
    assert memory(settings(optimizer_offload=0.5), 0).optimizer == 1.5 * p
    assert memory(settings(context_parallel=2), 0).optimizer == 3 * p  # 2 replicas of 2 context-parallel ranks each
    assert memory(settings(reference=True), 0).reference == 2 * p
    held = memory(settings(reward_model=True), 0)  # a second model is trained, and both are compared with the first one
    assert (held.reference, held.reward_model) == (2 * p, (2 + 4 + 3) * p)
    assert held.resident == memory(settings(), 0).resident + 11 * p
    both = {"reference": True, "reward_model": True}
    assert memory(settings(**both), 0).reference == 2 * p
    assert memory(settings(**both, reward_model_path=True), 0).reference == 4 * p


class _Norm(torch.autograd.Function):
    """Keeps what a fused RMSNorm keeps: its input."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class _SwiGLU(torch.autograd.Function):
    """Keeps what a fused SwiGLU keeps: gate and up, not their product."""

    @staticmethod
    def forward(ctx, both):
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, -1)
        return nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx, gradient):
        return torch.cat([gradient, gradient], -1)


def unfused_swiglu(gate_and_up):
    """As Megatron-Core's MLP computes it without a fused kernel: the offset of `up` is 0 and makes a copy."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return nn.functional.silu(gate) * (up + 0.0)


@pytest.mark.parametrize("fused", [True, False])
def test_activations_of_a_layer_are_what_autograd_keeps(fused):
    """A layer in bfloat16: every tensor that its graph saves, weights aside, counted once."""
    shape = ModelShape("one layer", 1, 48, 80, 6, 2, 16, 128, False, False, False)
    tokens, saved, weights = 32, {}, []

    def linear(x, width):
        weight = torch.randn(width, x.shape[-1], dtype=torch.bfloat16, requires_grad=True)
        weights.append(weight.untyped_storage().data_ptr())
        return nn.functional.linear(x, weight)

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(1, tokens, shape.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        a = _Norm.apply(x)
        heads = []
        for count in (shape.num_attention_heads, shape.num_key_value_heads, shape.num_key_value_heads):
            heads.append(linear(a, count * shape.head_dim).view(1, tokens, count, shape.head_dim).transpose(1, 2))
        attended = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            heads[0], *(h.repeat_interleave(3, 1) for h in heads[1:]), is_causal=True
        )[0]
        attended = attended.transpose(1, 2).reshape(1, tokens, -1)
        y = x + linear(attended, shape.hidden_size)
        gate_and_up = linear(_Norm.apply(y), 2 * shape.intermediate_size)
        z = _SwiGLU.apply(gate_and_up) if fused else unfused_swiglu(gate_and_up)
        z = y + linear(z, shape.hidden_size)
    kept = sum(size for pointer, size in saved.items() if pointer not in weights)
    # This attention has no grouped queries: keys and values are saved once for each head, not for each group.
    repeated = 2 * tokens * 2 * (shape.query_width - shape.key_value_width)
    layout = dict(tensor_parallel=1, sequence_parallel=False, micro_batch_tokens=tokens, recompute="none")
    s = settings(shape=shape, fused=fused, **layout)
    assert z.requires_grad and layer_activations(s) == kept - repeated


def test_activations_by_hand():
    """Hidden 8, 4 heads of 2, 2 key-value heads, MLP 24, 4 layers; 10 tokens, bfloat16."""
    s = settings(
        shape=TINY, gpus=4, tensor_parallel=1, sequence_parallel=False, micro_batch_tokens=10, recompute="none"
    )  # fmt: skip
    one = 10 * (2 * (4 * 8 + 2 * 8 + 2 * 4 + 3 * 24) + 4 * 4)
    assert layer_activations(s) == one and activations(s, 0) == 4 * one + 10 * 8 * 2
    split = dataclasses.replace(s, tensor_parallel=2)
    assert layer_activations(split) == 10 * (2 * (4 * 8 + 8 + 4 + 36) + 4 * 2)  # the norms stay whole
    assert layer_activations(dataclasses.replace(split, sequence_parallel=True)) == one // 2
    assert activations(dataclasses.replace(s, recompute="full"), 0) == 5 * 10 * 8 * 2 + one
    assert activations(dataclasses.replace(s, recompute="selective"), 0) == 4 * (one - 10 * (8 * 2 + 4 * 4)) + 160
    assert activations(dataclasses.replace(s, context_parallel=2), 0) == activations(s, 0) // 2
    # One-forward-one-backward: the first of two stages holds two micro-batches of half the layers, the last one.
    staged = dataclasses.replace(s, pipeline_parallel=2)
    assert activations(staged, 0) == 2 * (2 * one + 160) and activations(staged, 1) == 2 * one + 160


def test_the_last_stage_holds_logits_their_gradient_and_36_bytes_a_row():
    s = settings(pipeline_parallel=2)
    first, last = stages(s)
    assert first.logits == 0 and last.logits == 20480 * (2 * 19008 * 2 + 36)  # 152064 columns on 8 ranks


def test_bytes_a_token_are_those_of_a_batch_that_is_packed():
    prompt = Prompt(0, Example("test", (), ""), (1, 2))
    rollouts = [Rollout(prompt, 0, [3] * 50, [-1.0] * 50, True, 0, reward=1.0)]
    batch = pack(rollouts)
    columns = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert sum(column.nbytes for column in columns) == COLUMNS * len(batch.tokens)
    assert rollouts[0].tokens.nbytes + rollouts[0].logprob.nbytes == ROLLOUT * 50
    batch.old_logprob = batch.rollout_logprob
    tokens = batch.loss_tokens(batch.loss_mask, batch.old_logprob[batch.loss_mask])
    shown = [value for value in vars(tokens).values() if value is not None]
    assert sum(value.nbytes for value in shown) == LOSS_VIEW * 50


def test_a_gpu_s_share_of_the_rollout_batch_does_not_grow_with_the_replicas():
    """The batch grows as the replicas do: a GPU holds the same, a host more."""
    one = settings(selection=True)
    more = dataclasses.replace(one, gpus=64, prompts_per_step=2 * one.prompts_per_step)
    assert memory(more, 0).batch == memory(one, 0).batch
    assert host_memory(more) == 2 * host_memory(one)
    tokens = 256 * 8 * (256 + 4096)
    assert memory(one, 0).batch == tokens // 4 * (13 + 64)  # while it is scored
    assert memory(dataclasses.replace(one, updates=1), 0).batch == tokens // 4 * (13 + 20 + 69 + 16 + 150)
    assert host_memory(one) == tokens * (8 + 13 + 16 + 69 + 16)  # whatever the number of its processes
    held = memory(one, 0)
    assert held.training == held.resident + held.activations + held.logits + held.batch + held.engine * (
        not held.asleep
    )


def test_the_engine():
    assert QWEN_7B.kv_bytes_per_token(1) == 57344  # 2 * 28 layers * 4 heads * 128 * 2 bytes
    assert QWEN_7B.kv_bytes_per_token(8) == 57344 // 4  # no rank has less than a head
    weights, cache = engine_memory(settings(engine_tensor_parallel=2))
    assert weights == QWEN_32B.parameters and cache == round(0.45 * 79 * GIB) - weights - 2 * GIB
    assert engine_memory(settings(kv_cache_memory_bytes=5 * GIB))[1] == 5 * GIB
    assert engine_memory(settings(engine="server")) == (0, 0)
    awake, asleep = (memory(settings(sleep=sleep), 0) for sleep in (False, True))
    assert awake.training - asleep.training == awake.engine and awake.generation == asleep.generation
    assert asleep.generation == asleep.resident + round(0.45 * 79 * GIB)
    assert asleep.resident == 9 * asleep.parameters + TRAINER_RESERVE


# ---- verdicts ------------------------------------------------------------------------------------------------------


def test_32b_fits_on_32_64_and_128_gpus_and_every_remedy_elsewhere_is_one():
    for gpus in (32, 64, 128):
        assert problems(settings(gpus=gpus)) == [] and remedies(settings(gpus=gpus)) == []
    s = settings(gpus=16, tensor_parallel=4, gpu_memory_utilization=0.6)
    (training, generation) = problems(s)
    assert training.startswith("training needs ") and generation.startswith("generation needs ")
    fields = {key: name for name, key in KNOBS.items()}
    found = remedies(s)
    assert 1 <= len(found) <= 4
    for way in found:
        changes = dict(item.split("=") for item in way)
        parsed = {fields[key]: _parsed(value) for key, value in changes.items()}
        assert problems(dataclasses.replace(s, **parsed)) == [], way
        for left_out in parsed:  # nothing in it is idle; sequence parallelism comes with more tensor parallelism
            if left_out != "sequence_parallel":
                rest = {name: value for name, value in parsed.items() if name != left_out}
                assert problems(dataclasses.replace(s, **rest)), (way, left_out)


def _parsed(value: str):
    if value in ("true", "false"):
        return value == "true"
    return float(value) if "." in value else int(value) if value.isdigit() else value


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tensor_parallel": 16}, "megatron.tensor_parallel=16 does not divide 40 heads"),
        ({"tensor_parallel": 5}, "megatron.tensor_parallel=5 does not divide 8 key-value heads"),
        ({"pipeline_parallel": 3}, "megatron.pipeline_parallel=3 does not divide 64 layers"),
        ({"gpus": 12}, "--gpus=12 is no multiple of tensor x pipeline x context parallel = 8"),
        ({"gpus_per_node": 4}, "megatron.tensor_parallel=8 reaches over a node of 4 GPUs"),
        ({"micro_batch_tokens": 8192}, "actor.micro_batch_tokens=8192 cannot hold a sequence of 10240 tokens"),
        ({"engine_tensor_parallel": 3}, "rollout.vllm.tensor_parallel=3 does not divide 40 heads"),
        ({"gpu_memory_utilization": 0.1}, r"cache would have -1.7 GiB and one sequence of 10240 tokens needs 0.3 GiB"),
    ],
)
def test_what_cannot_run_is_named(changes, message):
    assert any(re.search(message, line) for line in problems(settings(**changes))), problems(settings(**changes))


def test_sizes():
    assert (parse_size("80GiB"), parse_size("80 GB"), parse_size("1.5MiB")) == (80 * GIB, 80 * 10**9, 3 << 19)
    for text in ("80", "80TB", "-1GiB", "0GiB"):
        with pytest.raises(ValueError, match="a memory size must be a number above 0 with GiB"):
            parse_size(text)


# ---- traffic and time ----------------------------------------------------------------------------------------------


def test_passes_by_hand():
    """16 sequences of 10 tokens, 2 replicas, micro-batches of 20 tokens: 4 a replica, 2 in each of 2 updates."""
    s = settings(
        shape=TINY, gpus=2, tensor_parallel=1, sequence_parallel=False, micro_batch_tokens=20, prompts_per_step=4,
        group_size=4, mean_prompt=4, mean_response=6, updates=2, recompute="none",
    )  # fmt: skip
    assert s.micro_batches == 2
    one = passes(s)
    assert (one.scoring, one.selecting, one.forward, one.recomputed) == (4, 0, 4, 0)
    one = passes(dataclasses.replace(s, selection=True, recompute="full", epochs=2, reference=True))
    assert (one.scoring, one.selecting, one.forward, one.recomputed) == (8, 6, 8, 8)
    # A reward model: scores of it and of its reference, and one optimizer step of 4 micro-batches.
    one = passes(dataclasses.replace(s, reward_model=True, reward_model_updates=1, recompute="full"))
    assert (one.scoring, one.forward, one.recomputed) == (12, 8, 8)
    more = estimate(dataclasses.replace(s, reward_model=True, reward_model_updates=1))
    assert (more.scoring, more.updates) == pytest.approx((3 * estimate(s).scoring, 2 * estimate(s).updates))
    assert passes(dataclasses.replace(s, selection=True, select_on_first_update=True)).selecting == 4
    sent = {t.name: t for t in traffic(dataclasses.replace(s, selection=True))}
    p = memory(s, 0).parameters
    assert set(sent) == {
        "gradients, reduce-scatter", "weights, all-gather", "scores, broadcast", "selections, all-reduce",
    }  # fmt: skip
    gradients = sent["gradients, reduce-scatter"]
    assert gradients.count == 2 and gradients.bytes_each == 4 * p / 2 and gradients.bytes == 4 * p
    assert sent["weights, all-gather"].bytes == 2 * p
    assert (sent["scores, broadcast"].count, sent["scores, broadcast"].bytes_each) == (1, 4 * 160 * 4 / 2)
    assert (sent["selections, all-reduce"].count, sent["selections, all-reduce"].bytes_each) == (2, 4.5 * 2**20)


def test_tensor_parallel_traffic_by_hand():
    s = settings(
        shape=TINY, gpus=2, tensor_parallel=2, sequence_parallel=False, micro_batch_tokens=20, prompts_per_step=4,
        group_size=4, mean_prompt=4, mean_response=6, updates=2, recompute="none", clamped_entropy=True,
    )  # fmt: skip
    one = passes(s)
    assert (one.scoring, one.forward) == (8, 8)
    sent = {t.name: t for t in traffic(s)}
    # 4 layers, two all-reduces a layer in each of 16 forward and 8 backward passes, the embedding's 16, the head's 8;
    # 20 tokens of 8 values, both ways.
    reduced = sent["activations, all-reduce"]
    assert (reduced.count, reduced.bytes_each) == (4 * 2 * 24 + 24, 20 * 8 * 2)
    # A rank passes on half of what two ranks hold: 16 bytes a token, 28 with moments, 664 more with a clamp, and the
    # clamp's sketches of 256 bytes: 936 bytes in 2 collectives, and 680 more in a third one for float32 logits.
    statistics, scored = sent["row statistics, all-gather"], sent["row statistics with moments, all-gather"]
    sketches = sent["clamp sketches, all-gather"]
    assert (statistics.count, statistics.bytes_each) == (8, 20 * 680)
    assert (scored.count, scored.bytes_each) == (8, 20 * 692)
    assert (sketches.count, sketches.bytes_each) == (16, 20 * 256)
    assert sketches.bytes_each + statistics.bytes_each == 20 * 936
    fp32 = {t.name: t for t in traffic(dataclasses.replace(s, bf16=False))}
    again = fp32["row statistics, all-gather"]
    assert (again.count, again.bytes_each, fp32["clamp sketches, all-gather"].count) == (16, 20 * 680, 16)
    free = {t.name: t for t in traffic(dataclasses.replace(s, clamped_entropy=False))}
    assert free["row statistics, all-gather"].bytes_each == 20 * 16 and "clamp sketches, all-gather" not in free
    sp = {t.name: t for t in traffic(dataclasses.replace(s, sequence_parallel=True))}
    gathered, scattered = sp["activations, all-gather"], sp["activations, reduce-scatter"]
    assert (gathered.count, scattered.count) == (4 * (2 * 16 + 4 * 8) + 16 + 2 * 8, 4 * (2 * 16 + 2 * 8) + 16 + 8)
    assert gathered.bytes_each == scattered.bytes_each == 20 * 8 * 2 / 2


def test_pipeline_and_context_traffic_by_hand():
    """16 sequences of 10 tokens in one replica: 8 micro-batches of 20, scored, and trained on in two updates of 4."""
    s = settings(
        shape=TINY, gpus=2, tensor_parallel=1, sequence_parallel=False, micro_batch_tokens=20, prompts_per_step=4,
        group_size=4, mean_prompt=4, mean_response=6, updates=2, recompute="none", selection=True,
    )  # fmt: skip
    stages = dataclasses.replace(s, pipeline_parallel=2)
    one = passes(stages)
    assert (one.scoring, one.selecting, one.forward) == (8, 4, 8)
    (edge,) = (t for t in traffic(stages) if t.group == "pipeline")  # forward in all passes, gradients back in 8
    assert (edge.count, edge.bytes_each) == (8 + 4 + 8 + 8, 20 * 8 * 2)
    assert edge.seconds == pytest.approx(28 * 320 / (450e9 * 0.7))
    ring, parts = (t for t in traffic(dataclasses.replace(s, context_parallel=2)) if t.group == "context")
    assert (parts.count, parts.bytes_each) == (1, 160 * 4 * 4)  # half of four float32 numbers a token, both ways
    # Keys and values of two heads of 2 and half of the tokens, once a layer and pass, twice more for the gradients.
    assert (ring.count, ring.bytes_each) == (4 * (20 + 2 * 8), 10 * 2 * 4 * 2)


def test_work_is_six_flops_a_weight_and_token():
    tokens = 1000
    forward = QWEN_32B.forward_flops(tokens, 0)
    matrices = QWEN_32B.parameters - QWEN_32B.vocab_size * QWEN_32B.hidden_size  # the embedding is a look-up
    assert forward == pytest.approx(2 * tokens * matrices, rel=1e-4)  # norms and biases do not multiply
    looked_at = QWEN_32B.forward_flops(tokens, 500) - forward
    assert looked_at == 2 * tokens * 500 * 2 * 64 * 5120


def test_time_scales_as_the_hardware_does():
    s = settings(selection=True)
    one, two = estimate(s), estimate(dataclasses.replace(s, gpus=64))
    assert two.updates == pytest.approx(one.updates / 2) and two.scoring == pytest.approx(one.scoring / 2)
    assert one.selecting == pytest.approx(one.scoring * 7 / 8)  # all updates but the first
    assert one.updates == pytest.approx(4 * one.scoring)  # forward, backward twice that, recomputed forward
    faster = dataclasses.replace(s, gpu=dataclasses.replace(s.gpu, flops=2 * s.gpu.flops))
    assert estimate(faster).updates == pytest.approx(one.updates / 2)
    assert estimate(dataclasses.replace(s, overlap=True)).communication < one.communication
    assert math.isclose(one.step, sum(dataclasses.astuple(one)))
    bubble = estimate(dataclasses.replace(s, pipeline_parallel=2, gpus=64))
    assert bubble.updates == pytest.approx(one.updates / 2 * (1 + 1 / 14))
