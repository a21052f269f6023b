"""MegatronActor against TransformersActor: three updates over every layout leave the same weights and metrics."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("megatron.core")
pytest.importorskip("mbridge")

from entcov.controls import Selection
from entcov.rl.config import MegatronConfig  # noqa: E402
from entcov.rl.recipe import ConfigError  # noqa: E402
from megatron_integration.micro_batches import assign_to_replicas, build_inputs, dummy_micro_batch  # noqa: E402
from tests.support.megatron_cases import CONTROLS, METHODS  # noqa: E402
from tests.support.megatron_policies import LLAMA3, MODELS, SHAPE  # noqa: E402
from tests.support.megatron_processes import run_cases  # noqa: E402


def matrix(**megatron) -> list[dict]:
    """One layout with every control; tied and untied, packed and padded take turns."""
    kinds = [("qwen3", True), ("qwen2", False), ("qwen2", True), ("qwen3", False)]
    return [
        {"megatron": megatron, "control": control, "model": model, "packing": packing}
        for control, (model, packing) in zip(CONTROLS, kinds, strict=True)
    ]


def one(model: str, control: str, setting: str = "all", packing: bool = False, **megatron) -> dict:
    return {"megatron": megatron, "control": control, "model": model, "packing": packing, "setting": setting}


def methods(**megatron) -> list[dict]:
    """One layout with every way in which a control acts, and the losses that need sums over responses."""
    kinds = [one("qwen3", control, packing=n % 2 == 0, **megatron) for n, control in enumerate(METHODS)]
    return kinds + [one("qwen2", "entropy_bonus", loss, **megatron) for loss in ("gspo", "geo_mean", "tis")]


TWO = [
    *matrix(tensor_parallel=2),
    *matrix(tensor_parallel=2, sequence_parallel=True),
    *matrix(pipeline_parallel=2),
    *matrix(context_parallel=2),
    *methods(tensor_parallel=2),
    *methods(context_parallel=2),
    *methods(),  # two replicas
    one("llama", "clip_cov", tensor_parallel=2),
    one("qwen3", "clip_cov", "responses", context_parallel=2),
    one("qwen3", "aent", overlap=True),
    one("qwen3", "kl_cov", tensor_parallel=2, recompute="selective", selection_logprob="recompute"),
    one("qwen2", "clip_cov", tensor_parallel=2, sequence_parallel=True, recompute="full", packing=True),
    {"task": "refuses", "model": "qwen3", "megatron": {"pipeline_parallel": 2}},
    {"task": "adaptors", "model": "qwen2", "megatron": {"tensor_parallel": 2}},
    {"task": "prime", "model": "qwen2", "layouts": [{"tensor_parallel": 2}, {"context_parallel": 2}]},
]
FOUR = [
    # And two replicas, with the distributed optimizer, on two nodes: each has one table of the scores.
    *({"nodes": 2} | case for case in matrix(tensor_parallel=2)),
    *matrix(tensor_parallel=2, sequence_parallel=True, distributed_optimizer=False),
    *matrix(tensor_parallel=2, pipeline_parallel=2),
    *matrix(tensor_parallel=2, context_parallel=2),
    {"nodes": 4} | one("qwen3", "clip_cov", "few"),  # three sequences on four replicas
    one("qwen2", "kl_cov", "few", packing=True, pipeline_parallel=2),
    one("qwen2", "entropy_bonus", "kl", tensor_parallel=2, pipeline_parallel=2, sequence_parallel=True),
    one("qwen3", "aent", pipeline_parallel=2, overlap=True),
    one("qwen2", "entropy_bonus", "responses", pipeline_parallel=2, context_parallel=2, packing=True),
    {"task": "refuses", "model": "qwen3", "megatron": {"tensor_parallel": 2}},
]


@pytest.mark.parametrize(("world", "cases"), [(2, TWO), (4, FOUR)], ids=["two processes", "four processes"])
def test_every_layout_updates_as_one_process_does(policies, world, cases):
    folder, add_oracles = policies
    add_oracles(cases)
    problems = run_cases(world, folder, cases)
    assert not problems, "\n\n".join(f"{case}: {problem}" for case, problem in problems.items())


def test_replicas_share_the_tokens_evenly_and_completely():
    lengths = (50, 10, 20, 30, 40, 10, 60, 5)
    shares = assign_to_replicas(lengths, 3, max_tokens=64, padded=False)
    assert sorted(s for share in shares for group in share for s in group) == list(range(len(lengths)))
    loads = [sum(lengths[s] for group in share for s in group) for share in shares]
    assert max(loads) - min(loads) <= 20
    assert all(sum(lengths[s] for s in group) <= 64 for share in shares for group in share)
    assert assign_to_replicas((7,), 2, max_tokens=64, padded=True) == [[[0]], []]


def test_no_micro_batch_of_a_replica_mixes_temperatures():
    lengths, temperatures = (50, 10, 20, 30, 40, 10, 60, 5), (1.0, 1.1) * 4
    shares = assign_to_replicas(lengths, 3, 64, False, temperatures)
    groups = [group for share in shares for group in share]
    assert sorted(s for group in groups for s in group) == list(range(len(lengths)))
    assert all(len({temperatures[s] for s in group}) == 1 for group in groups)
    alone = assign_to_replicas(lengths, 3, 64, False)
    of_replicas = [[{s for group in share for s in group} for share in division] for division in (shares, alone)]
    assert of_replicas[0] == of_replicas[1]
    assert assign_to_replicas(lengths, 3, 64, False, (0.7,) * 8) == alone  # equal: nothing changes
    assert assign_to_replicas((7,), 2, 64, True, (1.2,)) == [[[0]], []]


def test_a_replica_without_a_sequence_runs_one_without_a_loss(policies):
    batch = torch.load(policies[0] / "batch.pt", weights_only=False)
    micro, shortest = dummy_micro_batch(batch), batch.lengths.index(min(batch.lengths))
    assert micro.lengths == (min(batch.lengths),) and torch.equal(batch.subset([shortest]).tokens, micro.tokens)
    assert micro.num_loss_tokens == 0 and bool((micro.target == -100).all())


@pytest.mark.parametrize("packing", [True, False])
def test_context_parallel_ranks_hold_each_loss_token_once(policies, packing):
    batch = torch.load(policies[0] / "batch.pt", weights_only=False)
    seen = []
    for rank in range(3):
        micro = build_inputs(batch, unit=6, packing=packing, context_parallel=3, context_rank=rank)
        at = micro.target != -100
        assert torch.equal(micro.target[at], batch.target[micro.rows])
        assert torch.equal(micro.inputs["position_ids"][at], batch.position[micro.rows])
        assert torch.equal(micro.inputs["input_ids"][at], batch.tokens[micro.rows])
        chosen = batch.token_id[batch.loss_mask] % 3 == 0
        local = micro.local(Selection(chosen, drop=~chosen))
        assert torch.equal(local.mask, batch.token_id[micro.rows] % 3 == 0) and torch.equal(local.drop, ~local.mask)
        seen += micro.rows.tolist()
    assert sorted(seen) == batch.loss_mask.nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_parallel": True}, "needs tensor_parallel > 1"),
        ({"overlap": True, "distributed_optimizer": False}, "needs distributed_optimizer"),
        ({"optimizer_offload": 0.5, "distributed_optimizer": False}, "needs distributed_optimizer"),
        ({"tensor_parallel": 0}, "greater than or equal to 1"),
    ],
)
def test_layouts_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        MegatronConfig(**settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'silu'"),
        ({"model_type": "gemma"}, "model_type must be one of qwen2, qwen3, llama"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type must be default"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 2.0}}, "llama3 RoPE has low_freq_factor = 1"),
        ({"num_key_value_heads": 1}, "must divide the model's num_key_value_heads = 1, got 2"),
        ({"num_hidden_layers": 3}, "must divide the model's num_hidden_layers = 3, got 2"),
    ],
)
def test_models_that_megatron_would_compute_differently(changes, message):
    from transformers import AutoConfig

    from megatron_integration.bridge import refuse_unsupported

    config = AutoConfig.for_model(**({"vocab_size": 53} | SHAPE | MODELS["llama"] | changes))
    with pytest.raises(ConfigError, match=message):
        refuse_unsupported(config, MegatronConfig(tensor_parallel=2, pipeline_parallel=2))


def test_a_hub_name_is_downloaded_with_its_weights_and_a_folder_is_not(tmp_path, monkeypatch):
    from megatron_integration import bridge

    asked = []
    monkeypatch.setattr(bridge, "snapshot_download", lambda name, **options: asked.append((name, options)) or "cache")
    assert bridge.local_folder(str(tmp_path)) == str(tmp_path) and not asked
    assert bridge.local_folder("Qwen/Qwen2.5-7B") == "cache"
    ((name, options),) = asked
    assert name == "Qwen/Qwen2.5-7B" and {"*.json", "*.safetensors"} <= set(options["allow_patterns"])
