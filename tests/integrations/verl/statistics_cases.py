"""What two ranks do in the tests of verl's statistics; each function returns names -> errors, or what was raised."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from tests.integrations.verl import engines, worker
from tests.integrations.verl.engines import CLAMP, Found, Rollout

EVERYTHING = {"entcov_clamp": CLAMP, "entcov_moments": True, "calculate_sum_pi_squared": True}
TEMPERATURE = 0.7
PLAIN = ("log_probs", "entropy")  # what verl has


def on_two_ranks(untied: str, tied: str) -> dict[str, dict[str, Any]]:
    """Every case of this file but those that the others call."""
    return {
        "data parallel": data_parallel(untied, tied),
        "sharded logits": sharded_logits(untied),
        "ulysses": ulysses(untied),
        "tensor parallel": tensor_parallel(untied, tied),  # last: Megatron-Core's adaptation to a CPU stays
    }


def fused(backend: str, *, packed: bool = False, **engine: Any) -> dict[str, Any]:
    options = {
        "use_remove_padding": packed,
        "use_fused_kernels": True,
        "fused_kernel_options": {"impl_backend": backend},
    }
    return {"hf_model": options, "engine": engine}


def data_parallel(untied: str, tied: str) -> dict[str, Any]:
    """FSDP2 over two ranks with four rows each, statistics in the output embedding."""
    from entcov.integrations.verl.statistics import FSDPStatistics

    batch, errors = engines.weighted_rollout(rows=[3, 6, 0, 2, 7, 1, 5, 4]), {}
    for name, model in (("untied", untied), ("tied", tied)):
        right = engines.oracle(model, batch, temperature=TEMPERATURE)
        plain = engines.oracle(model, batch, temperature=TEMPERATURE, asked=PLAIN)
        for reshard in (True, False):
            engines.use_engine("fsdp2", FSDPStatistics)
            engine = worker.make_worker(model, **fused("entcov", reshard_after_forward=reshard)).engine
            found = engines.found_by(engine, batch, packed=False, temperature=TEMPERATURE, **EVERYTHING)
            errors[f"entcov {name} reshard={reshard}"] = engines.worst(_gathered(found, batch), right, batch)
        with verls_kernels(model) as engine:

            def verls(engine: Any = engine) -> Found:
                return engines.found_by(engine, batch, packed=False, temperature=TEMPERATURE)

            if name == "untied":
                errors["verl untied"] = engines.raised(verls)
            else:
                errors["verl tied"] = engines.worst(_gathered(verls(), batch), plain, batch)
    return errors


@contextmanager
def verls_kernels(model: str) -> Iterator[Any]:
    """An engine with verl's own fused kernels, which replace the forward of the model's class for the whole process."""
    from transformers import Qwen2ForCausalLM

    forward = Qwen2ForCausalLM.forward
    try:
        engines.use_engine("fsdp2")
        yield worker.make_worker(model, **fused("torch")).engine
    finally:
        Qwen2ForCausalLM.forward = forward


def _gathered(found: Found, batch: Rollout) -> Found:
    return Found({name: batch.gathered(x.contiguous()) for name, x in found.columns.items()}, found.gradients)


def sharded_logits(model: str) -> dict[str, Any]:
    """Logits as DTensors: split over the vocabulary (evenly and not), over the sequences, and whole on every rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    from entcov.integrations.verl import statistics

    engines.use_engine("fsdp2", statistics.FSDPStatistics)
    engine = worker.make_worker(model).engine
    mesh, errors = init_device_mesh("cpu", (2,)), {}
    batch = engines.weighted_rollout(rows=list(range(8)) * 2)
    data = batch.local(use_remove_padding=False, calculate_entropy=True, temperature=TEMPERATURE, **EVERYTHING)
    tokens = data["input_ids"]
    lengths = tokens.offsets().diff()
    arguments = {"input_ids_rmpad_rolled": tokens.values().roll(-1, 0)}
    for columns in (100, 99):
        logits = 8 * torch.randn(8, int(lengths.max()), columns, generator=torch.Generator().manual_seed(3))
        target = torch.zeros(logits.shape[:2], dtype=torch.int64)
        target[torch.arange(target.shape[1]) < lengths[:, None]] = arguments["input_ids_rmpad_rolled"]
        exact = logits.double().requires_grad_()
        right = engines.of_logits(exact, target, TEMPERATURE)
        real = torch.arange(target.shape[1]) < lengths[:, None]
        sum(right[name][real].sum() for name in engines.DIFFERENTIABLE).backward()
        for placement in (Shard(2), Shard(0), Replicate()):
            split = distribute_tensor(logits, mesh, [placement]).requires_grad_()
            with patch.object(DTensor, "full_tensor", autospec=True, side_effect=DTensor.full_tensor) as gathers:
                made = engine.prepare_model_outputs(SimpleNamespace(logits=split), arguments, data, None)
            sum(made[name].values().sum() for name in engines.DIFFERENTIABLE).backward()
            found = {name: float((x.values().double() - right[name][real]).abs().max()) for name, x in made.items()}
            found["d logits"] = float((split.grad.full_tensor() - exact.grad).norm() / exact.grad.norm())
            errors[f"{columns} {placement} gathered {gathers.call_count}"] = found
    return errors


def ulysses(model: str) -> dict[str, Any]:
    """Ulysses sequence parallelism over two ranks that have the same rows; attention on a CPU by torch."""
    from entcov.integrations.verl.statistics import FSDPStatistics

    _register_attention()
    batch, errors = engines.weighted_rollout(rows=list(range(8)) * 2), {}
    right = engines.oracle(model, batch, temperature=TEMPERATURE)
    for name, options in (("logits", {}), ("no logits", fused("entcov")["hf_model"])):
        engines.use_engine("fsdp2", FSDPStatistics)
        keys = {**options, "use_remove_padding": True, "override_config": {"attn_implementation": "ulysses_on_cpu"}}
        engine = worker.make_worker(model, hf_model=keys, engine={"ulysses_sequence_parallel_size": 2}).engine
        found = engines.found_by(engine, batch, packed=True, temperature=TEMPERATURE, **EVERYTHING)
        errors[name] = engines.worst(found, right, batch)
    return errors


def _register_attention() -> None:
    from transformers import AttentionInterface
    from verl.utils import ulysses

    def attention(module, query, key, value, attention_mask, scaling=None, position_ids=None, **unused):
        group = ulysses.get_ulysses_sequence_parallel_group()
        parts = [torch.empty_like(position_ids) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, position_ids.contiguous(), group=group)
        positions = torch.cat(parts, -1)[0]
        q, k, v = (
            ulysses.gather_seq_scatter_heads(x.transpose(1, 2), seq_dim=1, head_dim=2).transpose(1, 2)
            for x in (query, key, value)
        )
        sequence, at = (positions == 0).cumsum(0), torch.arange(len(positions))
        mask = (sequence[:, None] == sequence) & (at[:, None] >= at)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scaling, enable_gqa=True)
        return ulysses.gather_heads_scatter_seq(out.transpose(1, 2), head_dim=2, seq_dim=1), None

    AttentionInterface.register("ulysses_on_cpu", attention)


def tensor_parallel(untied: str, tied: str) -> dict[str, Any]:
    """verl's Megatron engine, its vocabulary over two ranks: verl's own statistics, entcov's, and entcov's without
    logits; and one step of verl's trainer by each."""
    from tests.integrations.verl import megatron_worker

    megatron_worker.start(untied)
    from entcov.integrations.verl.statistics import MegatronStatistics

    batch, errors = engines.weighted_rollout(rows=list(range(8)) * 2), {}
    temperatures = torch.linspace(0.6, 1.3, 8)
    for tied_name, model in (("untied", untied), ("tied", tied)):
        right = engines.oracle(model, batch, temperature=TEMPERATURE)
        plain = engines.oracle(model, batch, temperature=TEMPERATURE, asked=PLAIN)
        each = engines.oracle(model, batch, temperature=temperatures)
        for name, mixins, options, exact in (
            ("verl", (), {}, plain),
            ("entcov", (MegatronStatistics,), {}, right),
            ("entcov without logits", (MegatronStatistics,), {"fused": "entcov"}, right),
            ("entcov without logits or sequence parallelism", (MegatronStatistics,),
             {"fused": "entcov", "sequence_parallel": False}, right),
        ):  # fmt: skip
            if tied_name == "tied" and name in ("verl", "entcov"):
                continue
            engines.use_engine("megatron", *mixins)
            trainer = megatron_worker.make_worker(model, **options)
            engine = trainer.engine
            asked = EVERYTHING if mixins else {}
            found = engines.found_by(engine, batch, packed=True, temperature=TEMPERATURE, **asked)
            errors[f"{tied_name} {name}"] = engines.worst(found, exact, batch)
            if name == "entcov":
                found = engines.found_by(engine, batch, packed=True, temperature=temperatures, **asked)
                errors["temperatures"] = engines.worst(found, each, batch)
                errors |= processors(engine)
            batch.columns["old_log_probs"] = plain.columns["log_probs"].float() * batch.columns["response_mask"]
            errors[f"step {tied_name} {name}"] = megatron_worker.step(trainer, batch)
    return errors


def processors(engine: Any) -> dict[str, Any]:
    """The function that gets the logits of a tensor-parallel rank, verl's and entcov's, on hard logits."""
    from megatron.core import parallel_state
    from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead as Verls

    group, errors = parallel_state.get_tensor_model_parallel_group(), {}
    rank, T, V = dist.get_rank(group), 64, 100
    g = torch.Generator().manual_seed(5)
    for name, scale, dtype, hidden in (
        ("scale 30", 30.0, torch.float32, 0), ("bf16", 30.0, torch.bfloat16, 0), ("-inf", 3.0, torch.float32, 40),
        ("padding", 3.0, torch.float32, 0),
    ):  # fmt: skip
        whole = (scale * torch.randn(1, T, V, generator=g)).to(dtype)
        target = torch.randint(hidden, 97, (1, T), generator=g)
        whole[..., :hidden] = -torch.inf
        exact = whole.double().requires_grad_()
        true_size = engine.model_config.hf_config.vocab_size = 97 if name == "padding" else V
        right = engines.of_logits(exact[..., :true_size], target)
        weights = torch.randn(2, 1, T, generator=g)
        (right["log_probs"] * weights[0] + right["entropy"] * weights[1]).sum().backward()
        for kind, call in (
            ("verl", Verls._lm_head_logits_processor),
            ("entcov", type(engine)._lm_head_logits_processor),
        ):
            leaf = whole.chunk(2, -1)[rank].clone().requires_grad_()
            keys = dict.fromkeys(("calculate_sum_pi_squared", "distillation_use_topk", "distillation_only"), False)
            data = worker.rollout(rows=list(range(8)) * 2).local(calculate_entropy=True)
            made = call(
                engine, leaf.clone(), target, torch.ones(1, T), calculate_entropy=True, logits_processor_func=None,
                batch=data, data_format="thd", **keys,
            )  # fmt: skip
            (made["log_probs"] * weights[0] + made["entropy"] * weights[1]).sum().backward()
            found = {n: float((made[n].double() - right[n]).abs().max()) for n in PLAIN}
            wanted = exact.grad.chunk(2, -1)[rank]
            found["d logits"] = float((leaf.grad.double() - wanted).norm() / wanted.norm())
            errors[f"{name} {kind}"] = found
    engine.model_config.hf_config.vocab_size = V
    return errors
