"""What tests/megatron/test_parity.py runs in several processes: updates over every layout, against one process.

A case returns what went wrong, or None. tests/support/megatron_processes.py starts the processes.
"""

from __future__ import annotations

import copy
import dataclasses
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from entcov.controls import begin, make_control, selects
from entcov.objective.tokens import PolicyLossConfig
from entcov.rl.actor import needs_reference
from entcov.rl.config import ActorConfig, MegatronConfig
from entcov.rl.hf.actor import TransformersActor
from megatron_integration.actor import MegatronActor
from megatron_integration.adaptors import keep_logits_dtype, logits_stats
from megatron_integration.bridge import build_model, load_hf_weights, make_bridge
from megatron_integration.process_groups import make_process_groups
from tests.support.objective_oracle import PROGRESS

# Adam's epsilon in place of 1e-8: a first step is sign-like, so where a gradient is as small as rounding, the default
# moves a weight by lr in one engine and not in the other. It has no bearing on what is compared.
ADAM_EPS = 1e-2
UPDATES = 3
CONTROLS = {
    "entropy_bonus": [("entropy_bonus", {"entropy_coef": 0.01})],
    "aent": [("aent", {"entropy_coef": 0.05, "adaptive": False})],
    "clip_cov": [("clip_cov", {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.1, "clip_cov_ub": 50.0})],
    "kl_cov": [("kl_cov", {"kl_cov_ratio": 0.2})],
}
# The other ways in which a control acts, several of them in one update: in `begin`, by a selection and its numbers,
# against the reference policy, in `apply`.
METHODS = {
    "begin": [
        ("clip_b", {"mu": 0.5}), ("clip_v", {"mu": 1.0, "max_frac": 0.1}), ("relative_entropy", {}),
        ("perplexity_shaping", {"ppl_coef": 0.2}), ("position_shaping", {}),
        ("clip_cov", {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.1, "clip_cov_ub": 50.0, "scope": "rollout"}),
    ],
    "select": [
        ("high_entropy_tokens", {"top_entropy_quantile": 0.5}),
        ("entropic", {"target": 0.5, "prob_threshold": 0.3}),
    ],
    "reference": [("sent", {"semantics": "paper", "low_entropy_ratio": 0.5, "kl_cov_ratio": 0.2, "ppo_kl_coef": 1.0})],
    "ratios": [("entropy_ratio_clip", {"entropy_ratio_low": 0.03}), ("adaptive_clip", {"epsilon": 0.1})],
    "apply": [("entropy_advantage", {}), ("positive_advantage_reweighting", {"weight": 0.3}),
              ("difficulty_bonus", {"entropy_coef": 0.01})],
}  # fmt: skip


def actor_config(**changes: Any) -> ActorConfig:
    return ActorConfig(**({"lr": 1e-2, "warmup_steps": 2, "micro_batch_tokens": 64} | changes))


def updates(actor, batch, controls) -> dict[str, Any]:
    """Scores, then three updates: the first at ratio 1, the others not. What came of it."""
    chosen: list[list[int]] = []
    for control in controls:
        if selects(control):
            control.select = _recording(control.select, chosen)
    scored = actor.compute_logprobs(batch)
    batch = dataclasses.replace(batch)
    batch.assign_scores(scored, 0)
    at = batch.loss_mask
    shown = {name: getattr(batch, name)[at] for name in ("entropy", "entropy_drift")}
    shaped = begin(controls, batch.loss_tokens(at, batch.old_logprob[at], **shown), PROGRESS)
    batch.assign_advantages(shaped.advantage)
    for name, own in shaped.selected.items():
        batch.selected = {name: at.clone().masked_scatter_(at, own)}
    if shaped.drop is not None:
        assert 0 < shaped.drop.sum() < len(shaped.drop)
        batch.drop(shaped.drop)
    metrics = [actor.update(batch, step=1 + number) for number in range(UPDATES)]
    weights = {name: weight.clone() for name, weight in actor.named_weights()}
    return {"scored": scored, "metrics": metrics, "weights": weights, "chosen": chosen}


def _recording(select, chosen: list[list[int]]):
    def record(tokens, **arguments):
        selection = select(tokens, **arguments)
        for part in (selection.mask, selection.drop):
            if part is not None:
                chosen.append(sorted(_everyones(tokens.token_id[part].tolist(), arguments["group"])))
        return selection

    return record


def _everyones(ids: list[int], group: dist.ProcessGroup | None) -> list[int]:
    """Of all replicas; a token of two of them would be there twice."""
    if group is None:
        return ids
    everyone: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, ids, group=group)
    return [one for own in everyone for one in own]


# What is trained: a batch's sequences and a loss. "few" leaves one of two or more replicas without a sequence.
PER_SEQUENCE = "seq-mean-token-mean"
SETTINGS = {
    "all": (None, PolicyLossConfig()),
    "few": (slice(0, 3), PolicyLossConfig(aggregation="seq-mean-token-mean")),
    "kl": (None, PolicyLossConfig(kl_coef=0.1)),
    "gspo": (None, PolicyLossConfig(objective="gspo", aggregation=PER_SEQUENCE, clip_low=3e-4, clip_high=4e-4)),
    "geo_mean": (None, PolicyLossConfig(objective="geo_mean", aggregation=PER_SEQUENCE)),
    "tis": (None, PolicyLossConfig(tis_cap=1.5, tis_level="sequence")),
    "responses": (
        None,
        PolicyLossConfig(
            objective="gspo", clip_low=0.01, clip_high=0.01, aggregation="seq-mean-token-mean", tis_cap=1.05,
            tis_level="sequence",
        ),
    ),
}  # fmt: skip


def setting(name: str, batch):
    chosen, loss = SETTINGS[name]
    return (batch if chosen is None else batch.subset(range(batch.num_sequences)[chosen])), loss


def torch_updates(model, batch, control: str, name: str) -> dict[str, Any]:
    """The one-process oracle."""
    batch, loss = setting(name, batch)
    controls = [make_control(c, **knobs) for c, knobs in (CONTROLS | METHODS)[control]]
    reference = copy.deepcopy(model) if needs_reference(loss, controls) else None
    policy = copy.deepcopy(model)
    actor = TransformersActor(policy, actor_config(), loss, controls, temperature=0.8, reference=reference)
    for group in actor.optimizer.param_groups:
        group["eps"] = ADAM_EPS
    return updates(actor, batch, controls)


def megatron_actor(folder: Path, layout, megatron: MegatronConfig, controls=(), **options: Any) -> MegatronActor:
    dtype = options.pop("dtype", torch.float32)
    bridge = make_bridge(str(folder), megatron, layout, dtype=dtype)
    model, reference = build_model(bridge, layout), None
    load_hf_weights(bridge, model, str(folder), layout)
    config, loss = options.pop("config", None) or actor_config(), options.pop("loss", PolicyLossConfig())
    if needs_reference(loss, controls):
        reference = build_model(bridge, layout).eval()
        load_hf_weights(bridge, reference, str(folder), layout)
    return MegatronActor(
        model, bridge, layout, config, megatron, loss, controls, temperature=0.8, adam_eps=ADAM_EPS,
        reference=reference, **options,
    )  # fmt: skip


def load(path: Path):
    return torch.load(path, weights_only=False)


def parity(folder: Path, case: dict[str, Any]) -> str | None:
    """One layout and one control against the oracle's file. What differs, or None."""
    name = case.get("setting", "all")
    batch, loss = setting(name, load(folder / "batch.pt"))
    with laid_out(**case["megatron"]) as (megatron, layout):
        controls = [make_control(c, **knobs) for c, knobs in (CONTROLS | METHODS)[case["control"]]]
        config = actor_config(packing=case.get("packing", False))
        actor = megatron_actor(folder / case["model"], layout, megatron, controls, config=config, loss=loss)
        norms, grad_norm = [], actor.optimizer.get_grad_norm
        actor.optimizer.get_grad_norm = lambda: norms.append(grad_norm()) or norms[-1]
        got = updates(actor, batch, controls)
    if len(norms) != UPDATES:
        return f"the gradient norm was computed {len(norms)} times in {UPDATES} updates"
    return difference(got, load(folder / oracle_file(case)))


def oracle_file(case: dict[str, Any]) -> str:
    return f"{case['model']}_{case['control']}_{case.get('setting', 'all')}.pt"


@contextmanager
def laid_out(**megatron: Any):
    config = MegatronConfig(**megatron)
    layout = make_process_groups(config, torch.device("cpu"))
    try:
        yield config, layout
    finally:
        layout.destroy()


def refuses(folder: Path, case: dict[str, Any]) -> str | None:
    """A gradient that is not finite on one rank stops the update on all, and changes nothing."""
    batch = load(folder / "batch.pt")
    with laid_out(**case["megatron"]) as (megatron, layout):
        actor = megatron_actor(folder / case["model"], layout, megatron)
        offload = dataclasses.replace(megatron, optimizer_offload=0.5)
        if not raises(lambda: megatron_actor(folder / case["model"], layout, offload), "offload: needs a GPU"):
            return "offload without a GPU went through"
        batch.assign_scores(actor.compute_logprobs(batch), version=-1)
        before = {name: weight.clone() for name, weight in actor.named_weights()}
        asked = torch.arange(dist.get_world_size() + 1) == dist.get_rank()
        if actor.anywhere(asked).tolist() != [True] * dist.get_world_size() + [False]:
            return "a mask of all ranks"
        if dist.get_rank() == dist.get_world_size() - 1:
            next(actor.model.parameters()).register_hook(lambda grad: grad * torch.inf)
        try:
            actor.update(batch, step=5)
        except RuntimeError as error:
            if "step 5: the gradient norm must be finite, got" not in str(error):
                return f"another error: {error}"
        else:
            return "the update went through"
        same = all(torch.equal(weight, before[name]) for name, weight in actor.named_weights())
        return None if same and actor.weight_version == 0 else "weights changed"


def adaptors(folder: Path, case: dict[str, Any]) -> str | None:
    """A bf16 model without our actor: its logits stay bf16 while the handle lives, and the statistics are theirs."""
    batch = load(folder / "batch.pt").subset([0])
    hf = AutoModelForCausalLM.from_pretrained(folder / case["model"], dtype=torch.float32)
    with laid_out(**case["megatron"]) as (megatron, layout), layout.running(), torch.no_grad():
        bridge = make_bridge(str(folder / case["model"]), megatron, layout, dtype=torch.bfloat16)
        model = build_model(bridge, layout)
        load_hf_weights(bridge, model, str(folder / case["model"]), layout)
        ids, target = batch.tokens[None], batch.target[None]
        inputs = {"input_ids": ids, "position_ids": batch.position[None], "attention_mask": None}
        upcast = model(**inputs)
        with keep_logits_dtype(model):
            logits = model(**inputs)
            try:
                keep_logits_dtype(model)
                return "a second handle was given out"
            except RuntimeError:
                pass
        if (upcast.dtype, logits.dtype, model(**inputs).dtype) != (torch.float32, torch.bfloat16, torch.float32):
            return f"dtypes: {upcast.dtype}, {logits.dtype}, {model(**inputs).dtype}"
        kept = logits.clone()
        stats = logits_stats(logits, target, vocab_size=bridge.hf_config.vocab_size)
        if not torch.equal(kept, logits):
            return "the logits were changed"
        shards = [torch.empty_like(logits) for _ in range(dist.get_world_size())]
        dist.all_gather(shards, logits)
        # float64 on the same rounded logits; columns past the vocabulary are left out
        logp = torch.cat(shards, -1)[..., : bridge.hf_config.vocab_size].double().log_softmax(-1)
        at = target != -100
        exact = logp.gather(-1, target.clamp(min=0)[..., None])[..., 0]
        for name, value in (("logprob", exact), ("entropy", -(logp.exp() * logp).sum(-1))):
            worst = (getattr(stats, name) - value)[at].abs().max().item()
            if not worst < 1e-5:
                return f"{name} is off by {worst}"
        # against the float32 model: what bf16 weights and activations cost, and no more
        whole = hf(ids).logits.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
        worst = (stats.logprob - whole)[at].abs().max().item()
        return None if worst < 0.5 else f"bf16 is off by {worst}"


def difference(got: dict[str, Any], want: dict[str, Any]) -> str | None:
    for name, value in want["scored"].items():
        worst = (got["scored"][name] - value).abs().max().item()
        if not worst < 2e-5:  # fp32 rounding of logits of size 10, in two different orders of summation
            return f"score: {name} is off by {worst}"
    if got["chosen"] != want["chosen"]:
        return f"selected tokens differ: {got['chosen']} instead of {want['chosen']}"
    for i, (mine, theirs) in enumerate(zip(got["metrics"], want["metrics"], strict=True)):
        if mine.keys() != theirs.keys():
            return f"update {i}: metrics differ by {mine.keys() ^ theirs.keys()}"
        for name, value in theirs.items():
            if not abs(mine[name] - value) <= 2e-6 + 2e-4 * abs(value):
                return f"update {i}: {name} is {mine[name]} instead of {value}"
    for name, weight in got["weights"].items():
        worst = (weight - want["weights"][name]).abs().max().item()
        if not worst < 1e-6:
            return f"{name} is off by {worst}"
    missing = want["weights"].keys() - got["weights"].keys() - {"lm_head.weight"}
    return f"weights are missing: {missing}" if missing else None


def raises(call, message: str) -> bool:
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return message in str(error)
    return False
