"""The torch actor: no division of the mini-batch changes an update, and selections see the current policy."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from entcov.controls import Control, Effect, Selection, make_control
from entcov.diagnostics import ENTROPY_CHANGE
from entcov.objective.tokens import AGGREGATIONS, PolicyLossConfig
from entcov.rl.backend import reference_policy
from entcov.rl.batch import pack
from entcov.rl.config import ActorConfig, ModelConfig
from entcov.rl.hf.actor import TransformersActor
from entcov.rl.hf.model import batch_token_stats, build_model
from entcov.rl.hf.sampler import InProcessSampler
from tests.support.tiny_run import RECIPE, prompts

CONTROLS = {
    "none": [],
    "aent": [("aent", {"entropy_coef": 0.05, "adaptive": False})],
    "clip_cov": [("clip_cov", {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.1, "clip_cov_ub": 50.0})],
    "kl_cov": [("kl_cov", {"kl_cov_ratio": 0.2})],
    "steered": [
        ("entropic", {"target": 1.0, "prob_threshold": 0.3}), ("high_entropy_tokens", {"top_entropy_quantile": 0.3}),
    ],
    "clips": [
        ("entropy_ratio_clip", {"entropy_ratio_low": 0.004, "entropy_ratio_high": 0.006}),
        ("adaptive_clip", {"epsilon": 0.01, "step_size": 0.01, "target": 9.0}),
    ],
    "composed": [("clip_cov", {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.1}), ("entropy_bonus", {"entropy_coef": 0.01})],
}  # fmt: skip


@pytest.fixture(scope="module")
def rolled_out():
    config = ModelConfig(config=RECIPE["model"]["config"] | {"tie_word_embeddings": False}, tokenizer="char")
    model, tokenizer = build_model(config, seed=0, device=torch.device("cpu"))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(15)
    rollouts = InProcessSampler(model, tokenizer, batch_size=64).generate(
        prompts(6), group_size=4, temperature=1.0, max_response_length=10, seed=0
    )
    generator = torch.Generator().manual_seed(4)
    batch = pack(rollouts)
    batch.assign_advantages(torch.randn(len(rollouts), generator=generator))
    return model, batch


def actor_for(model, controls, **settings) -> TransformersActor:
    # eps 1e-2 in Adam's place of 1e-8: the first steps' sign-like updates would blow rounding up to the size of lr
    actor = TransformersActor(
        copy.deepcopy(model), ActorConfig(lr=1e-2, warmup_steps=0, **settings), PolicyLossConfig(),
        [make_control(name, **knobs) for name, knobs in controls], temperature=0.8,
    )  # fmt: skip
    for group in actor.optimizer.param_groups:
        group["eps"] = 1e-2
    return actor


def two_updates(actor: TransformersActor, batch) -> tuple[list[dict], list[torch.Tensor]]:
    scored = actor.compute_logprobs(batch)
    batch = copy.copy(batch)
    batch.assign_scores(scored, actor.weight_version)
    metrics = [actor.update(batch, step=1), actor.update(batch, step=1)]
    return metrics, [p.detach() for p in actor.model.parameters()]


def test_sequences_of_several_temperatures_are_scored_and_trained_at_their_own(rolled_out):
    """Statistics as at each temperature alone; one gradient for every division; nothing changes where all are equal."""
    model, batch = rolled_out
    own = tuple([0.5, 0.8, 1.3][s // 8] for s in range(batch.num_sequences))
    mixed, equal = replace(batch, temperatures=own), replace(batch, temperatures=(0.8,) * batch.num_sequences)
    found = actor_for(model, [], micro_batch_tokens=200).compute_logprobs(mixed)
    for temperature in (0.5, 0.8, 1.3):
        rows = [s for s in range(batch.num_sequences) if own[s] == temperature]
        part = batch.subset(rows)
        stats = batch_token_stats(model, part, packing=False, temperature=temperature, moments=True)
        at = batch.positions(rows)[part.loss_mask]
        for name in ("logprob", "entropy", "entropy_drift"):
            torch.testing.assert_close(found[name][at], getattr(stats, name), atol=2e-5, rtol=1e-5)
    controls, longest = CONTROLS["kl_cov"], max(batch.lengths)
    _, reference = two_updates(actor_for(model, controls, micro_batch_tokens=100_000), mixed)
    _, others = two_updates(actor_for(model, controls, micro_batch_tokens=longest), mixed)
    for a, b in zip(reference, others, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    plain = two_updates(actor_for(model, controls, micro_batch_tokens=3 * longest), batch)
    same = two_updates(actor_for(model, controls, micro_batch_tokens=3 * longest), equal)
    assert plain[0] == same[0] and all(map(torch.equal, plain[1], same[1]))  # the actor's own is 0.8
    assert not all(map(torch.equal, plain[1], reference))


def test_the_entropy_change_is_measured_before_the_tokens_own_update(rolled_out):
    """On the second mini-batch: the first update's change, as a forward pass between the two measures it."""
    model, batch = rolled_out
    actor = actor_for(model, CONTROLS["kl_cov"], micro_batch_tokens=100)
    batch = copy.copy(batch)
    batch.assign_scores(actor.compute_logprobs(batch), actor.weight_version)
    first, second = batch.subset(range(12)), batch.subset(range(12, 24))
    found = actor.update(first, step=1)
    assert [found[name] for name in ENTROPY_CHANGE] == pytest.approx([0, 0, 0], abs=1e-6)
    after = actor.compute_logprobs(second)
    found, at = actor.update(second, step=1), second.loss_mask
    old, new, h, h2 = (x[at].double() for x in (second.old_logprob, after["logprob"], second.entropy, after["entropy"]))
    error = (old + h - 1) * ((new - old).exp() - 1 - (new - old)) + ((new - old).exp() - 1) * (new - old)
    error = ((old - second.rollout_logprob[at]).exp() * error).mean()
    measured = (h2 - h).mean()
    assert abs(measured) > 1e-3 and abs(error) > 1e-5
    expected = [float(x) for x in (measured + error, measured, error)]
    assert [found[name] for name in ENTROPY_CHANGE] == pytest.approx(expected, abs=1e-6)


def test_the_entropy_of_the_rollout_is_what_a_token_is_compared_with(rolled_out):
    """Nothing is stopped in the first update; in the second what an own comparison of entropies says."""
    model, batch = rolled_out
    actor = actor_for(model, [("entropy_ratio_clip", {})], micro_batch_tokens=100)
    batch = copy.copy(batch)
    batch.assign_scores(actor.compute_logprobs(batch), actor.weight_version)
    assert actor.update(batch, step=1)["actor/entropy_ratio_clipfrac"] == 0
    ratio = (actor.compute_logprobs(batch)["entropy"] / batch.entropy)[batch.loss_mask]
    outside = (ratio <= 0.95) | (ratio >= 1.05)
    assert 0 < outside.sum() < len(outside)
    found = actor.update(batch, step=1)["actor/entropy_ratio_clipfrac"]
    assert found == pytest.approx(float(outside.double().mean()), abs=1e-9)


@pytest.mark.parametrize("name", CONTROLS)
def test_no_division_of_the_mini_batch_changes_the_update(rolled_out, name):
    model, batch = rolled_out
    longest = max(batch.lengths)
    reference = None
    for settings in (
        {"micro_batch_tokens": 100_000},
        {"micro_batch_tokens": longest},  # one sequence a micro-batch, or a few short ones
        {"micro_batch_tokens": 3 * longest},
        {"micro_batch_tokens": 100_000, "packing": True},
        {"micro_batch_tokens": 2 * longest, "packing": True},
    ):
        metrics, weights = two_updates(actor_for(model, CONTROLS[name], **settings), batch)
        if reference is None:
            reference = metrics, weights
            assert any(not torch.equal(w, p) for w, p in zip(weights, model.parameters(), strict=True))
            if name == "clips":  # both act on some tokens of the second update
                assert all(
                    0 < metrics[1][f"actor/{key}"] < 1 for key in ("entropy_ratio_clipfrac", "adaptive_clipfrac")
                )
            continue
        for got, want in zip(weights, reference[1], strict=True):
            torch.testing.assert_close(got, want, atol=2e-6, rtol=0)
        for got, want in zip(metrics, reference[0], strict=True):
            assert got.keys() == want.keys()
            assert got == pytest.approx(want, rel=2e-4, abs=2e-6), settings
        if "cov" in name or name == "composed":  # the same tokens, not just nearly the same loss
            key = "actor/cov_klfrac" if name == "kl_cov" else "actor/cov_clipfrac"
            assert [m[key] for m in metrics] == pytest.approx([m[key] for m in reference[0]], abs=1e-12)
            assert all(m[key] > 0 for m in metrics)


def test_padded_and_packed_statistics_agree_with_one_sequence_at_a_time(rolled_out):
    model, batch = rolled_out
    with torch.no_grad():
        alone = [batch_token_stats(model, batch.subset([s]), packing=False) for s in range(batch.num_sequences)]
        for packing in (False, True):
            together = batch_token_stats(model, batch, packing=packing, clamp_p=0.3, moments=True)
            for name in ("logprob", "entropy"):
                expected = torch.cat([getattr(a, name) for a in alone])
                torch.testing.assert_close(getattr(together, name), expected, atol=1e-5, rtol=1e-5)
            assert len(together.clamped_entropy) == len(together.collision) == batch.num_loss_tokens


def plain_statistics(model, batch, temperature):
    """(log-probability, entropy, collision) of every token, 0 outside the mask: one plain forward pass a sequence."""
    logprob, entropy, collision = torch.zeros(3, len(batch.tokens))
    start = 0
    for n in batch.lengths:
        at = slice(start, start + n)
        with torch.no_grad():
            logits = model(input_ids=batch.tokens[None, at]).logits[0].double()
        log_p = (logits / temperature).log_softmax(-1)
        mask = batch.loss_mask[at]
        logprob[at] = torch.where(mask, log_p.gather(1, batch.target[at].clamp(min=0)[:, None])[:, 0], 0.0).float()
        entropy[at] = torch.where(mask, -(log_p.exp() * log_p).sum(-1), 0.0).float()
        collision[at] = torch.where(mask, log_p.exp().square().sum(-1), 0.0).float()
        start += n
    return logprob, entropy, collision


def test_scores_are_the_plain_forward_pass_at_the_samplers_temperature(rolled_out):
    """In the batch's order, although micro-batches are made of the longest sequences first; of either model."""
    model, batch = rolled_out
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.get_output_embeddings().weight.mul_(0.5)
    actor = TransformersActor(
        model, ActorConfig(micro_batch_tokens=40), PolicyLossConfig(kl_coef=0.1), [], temperature=0.8,
        reference=reference,
    )  # fmt: skip
    scored = actor.compute_logprobs(batch)
    logprob, entropy, collision = plain_statistics(model, batch, 0.8)
    torch.testing.assert_close(scored["logprob"], logprob, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(scored["entropy"], entropy, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(scored["collision"], collision, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(scored["ref_logprob"], plain_statistics(reference, batch, 0.8)[0], atol=2e-5, rtol=1e-5)
    entropy = actor.compute_entropy(batch, temperature=1.0)
    torch.testing.assert_close(entropy, plain_statistics(model, batch, 1.0)[1], atol=2e-5, rtol=1e-5)


def test_denominators_are_the_response_tokens_of_the_mini_batch(rolled_out):
    """Metrics are means over response tokens: with any other denominator they would not be those of the scores."""
    model, batch = rolled_out
    actor = actor_for(model, [], micro_batch_tokens=60)
    batch, at = copy.copy(batch), batch.loss_mask
    batch.assign_scores(actor.compute_logprobs(batch), version=-1)
    entropy = float(plain_statistics(model, batch, 0.8)[1][at].mean())
    metrics = actor.update(batch, step=1)
    assert metrics["actor/entropy"] == pytest.approx(entropy, rel=1e-5)
    assert metrics["actor/pg_loss"] == pytest.approx(-float(batch.advantage[at].mean()), rel=1e-4)  # all ratios are 1


def test_updates_are_adamw_by_hand(rolled_out):
    """Three updates of one weight matrix in float64 by the published rule: warm-up, clipped norm, betas, decay."""
    model, batch = rolled_out
    lr, betas, decay, limit, eps = 1e-2, (0.7, 0.9), 0.1, 0.05, 1e-2
    settings = {"betas": betas, "weight_decay": decay, "max_grad_norm": limit, "micro_batch_tokens": 100}
    actor = TransformersActor(
        copy.deepcopy(model), ActorConfig(lr=lr, warmup_steps=2, **settings), PolicyLossConfig(), [], temperature=0.8
    )
    actor.optimizer.param_groups[0]["eps"] = eps
    batch = batch.subset(range(6))
    batch.assign_scores(actor.compute_logprobs(batch), version=-1)
    weight = actor.model.get_output_embeddings().weight
    expected = weight.detach().double().clone()
    m = v = torch.zeros_like(expected)
    for k in range(3):
        gradient, norm = gradient_of(actor.model, batch)
        clipped = gradient * min(1.0, limit / (norm + 1e-6))
        metrics = actor.update(batch, step=k + 1)
        assert norm > limit and metrics["actor/grad_norm"] == pytest.approx(norm, rel=1e-4)
        rate = lr * (0.5, 1.0, 1.0)[k]
        assert metrics["actor/lr"] == pytest.approx(rate, rel=1e-12)
        m, v = betas[0] * m + (1 - betas[0]) * clipped, betas[1] * v + (1 - betas[1]) * clipped.square()
        step = (m / (1 - betas[0] ** (k + 1))) / ((v / (1 - betas[1] ** (k + 1))).sqrt() + eps)
        before, expected = expected, expected * (1 - rate * decay) - rate * step
        moved = (expected - before).abs().max()
        assert (weight.detach().double() - expected).abs().max() < 1e-3 * moved  # float32 gradients
        expected = weight.detach().double().clone()


def gradient_of(model, batch) -> tuple[torch.Tensor, float]:
    """Gradient of the policy loss with respect to the output matrix, and the norm over all weights, on a copy."""
    model, at = copy.deepcopy(model), batch.loss_mask
    total, start = 0.0, 0
    for n in batch.lengths:
        part = slice(start, start + n)
        logits = model(input_ids=batch.tokens[None, part]).logits[0] / 0.8
        logprob = logits.log_softmax(-1).gather(1, batch.target[part].clamp(min=0)[:, None])[:, 0]
        ratio = (logprob - batch.old_logprob[part]).exp()
        advantage = batch.advantage[part]
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
        total = total + loss[at[part]].sum() / at.sum()
        start += n
    model.zero_grad()
    total.backward()
    norm = torch.stack([p.grad.double().square().sum() for p in model.parameters()]).sum().sqrt()
    return model.get_output_embeddings().weight.grad.double(), float(norm)


def test_the_optimizer_goes_on_from_its_state(rolled_out):
    model, batch = rolled_out
    batch = copy.copy(batch)
    straight = actor_for(model, [], micro_batch_tokens=10_000)
    batch.assign_scores(straight.compute_logprobs(batch), version=-1)
    straight.update(batch, step=1)
    resumed = actor_for(straight.model, [], micro_batch_tokens=10_000)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    assert resumed.weight_version == 1
    assert straight.update(batch, step=2) == resumed.update(batch, step=2)
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_fused_adamw_is_the_gpus_and_a_checkpoint_of_either_device_goes_on_at_the_other(rolled_out, monkeypatch):
    """On a CPU the fused step's last bits differ, so a run that goes on there must not take it from its checkpoint."""
    model, batch = rolled_out
    batch = copy.copy(batch)
    cpu = actor_for(model, [], micro_batch_tokens=10_000)
    batch.assign_scores(cpu.compute_logprobs(batch), version=-1)
    with monkeypatch.context() as patch:  # torch's CPU has the fused step too, so it can be taken here
        patch.setattr(type(model), "device", property(lambda self: torch.device("cuda")))
        gpu = actor_for(model, [], micro_batch_tokens=10_000)
    assert [actor.optimizer.param_groups[0]["fused"] for actor in (cpu, gpu)] == [None, True]
    for actor in (cpu, gpu):
        actor.update(batch, step=1)
    cpu_state, gpu_state = (copy.deepcopy(actor.state_dict()) for actor in (cpu, gpu))
    cpu.load_state_dict(gpu_state)
    gpu.load_state_dict(cpu_state)
    assert [actor.optimizer.param_groups[0]["fused"] for actor in (cpu, gpu)] == [None, True]
    for actor, other in ((cpu, gpu_state), (gpu, cpu_state)):
        for i, state in actor.optimizer.state_dict()["state"].items():
            assert all(torch.equal(state[name], other["optimizer"]["state"][i][name]) for name in state)


class FloatsRead(TorchDispatchMode):
    """How often one floating number of a tensor is read, and which lists of them."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.single, self.lists, original = 0, [], torch.Tensor.tolist

        def tolist(x):
            if x.is_floating_point():
                self.lists.append(x)
            return original(x)

        monkeypatch.setattr(torch.Tensor, "tolist", tolist)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.single += func is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CONTROLS)
def test_an_update_reads_its_metrics_at_once(rolled_out, name, monkeypatch):
    """On a GPU every read waits for all that was launched before it."""
    model, batch = rolled_out
    actor = actor_for(model, CONTROLS[name], micro_batch_tokens=3 * max(batch.lengths))
    batch = copy.copy(batch)
    batch.assign_scores(actor.compute_logprobs(batch), actor.weight_version)
    actor._take_step = lambda: None  # on a CPU torch's own reads the number of steps
    with FloatsRead(monkeypatch) as reads:
        metrics = actor.update(batch, step=1)
    (values,) = reads.lists
    assert reads.single == 0 and len(metrics) - 1 == len(values) > 5  # the learning rate is known here


def test_every_update_draws_by_its_own_number(rolled_out):
    model, batch = rolled_out
    actor = actor_for(model, CONTROLS["clip_cov"], micro_batch_tokens=10_000)
    steps, original = [], actor.controls[0].select
    actor.controls[0].select = lambda tokens, **kw: (steps.append(kw["step"]), original(tokens, **kw))[1]
    two_updates(actor, batch)
    assert steps == [0, 1]


def test_the_reference_is_a_copy_that_is_kept_on_disk(rolled_out, tmp_path):
    model, before = copy.deepcopy(rolled_out[0]), rolled_out[0].get_output_embeddings().weight
    made = reference_policy(model, tmp_path, fresh=True)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    assert torch.equal(made.get_output_embeddings().weight, before)
    resumed = reference_policy(model, tmp_path, fresh=False)
    for reference in (made, resumed):
        assert torch.equal(reference.get_output_embeddings().weight, before)
        assert reference is not model and not any(p.requires_grad for p in reference.parameters())
    shutil.rmtree(tmp_path / "reference")
    with pytest.raises(RuntimeError, match="reference is missing; without it a run that compares"):
        reference_policy(model, tmp_path, fresh=False)


def test_the_second_update_selects_under_the_policy_of_the_second_update(rolled_out):
    """A stale selection would be that of the first update; the control sees other log-probabilities."""
    model, batch = rolled_out
    actor = actor_for(model, CONTROLS["kl_cov"], micro_batch_tokens=10_000)
    seen = []
    control = actor.controls[0]
    original = control.select
    control.select = lambda tokens, **kw: (seen.append(tokens.logprob.clone()), original(tokens, **kw))[1]
    two_updates(actor, batch)
    assert (seen[0] - seen[1]).abs().max() > 1e-3


def test_a_gradient_that_is_not_finite_changes_nothing(rolled_out):
    model, batch = rolled_out
    actor = actor_for(model, [], micro_batch_tokens=10_000)
    batch = copy.copy(batch)
    batch.assign_scores(actor.compute_logprobs(batch), version=-1)
    before = [p.clone() for p in actor.model.parameters()]
    actor.model.get_output_embeddings().weight.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(
        RuntimeError, match="step 5: the gradient norm must be finite, got (nan|inf).*DEBUG=DETAIL names what"
    ):
        actor.update(batch, step=5)
    assert actor.weight_version == 0
    assert all(torch.equal(a, b) for a, b in zip(before, actor.model.parameters(), strict=True))


def test_a_reference_model_is_asked_for(rolled_out):
    with pytest.raises(ValueError, match="reference.*kl_coef > 0 .got 0.1"):
        TransformersActor(rolled_out[0], ActorConfig(), PolicyLossConfig(kl_coef=0.1), [], temperature=1.0)


def test_controls_must_agree_on_one_clamp(rolled_out):
    with pytest.raises(ValueError, match="agree on the clamped entropy"):
        actor_for(rolled_out[0], [("aent", {"clamp_p": 0.3}), ("aent", {"clamp_p": 0.2})])


@dataclass
class Even(Control):
    """Selects and drops the tokens of even number: of the mini-batch in `select`, or in `begin`."""

    name: ClassVar[str] = "even"
    needs: ClassVar[frozenset[str]] = frozenset({"selection", "entropy"})
    scope: str = "global"

    def select(self, tokens, *, step, config, group=None):
        assert tokens.entropy.min() > 0
        return Selection(tokens.loss_mask, drop=tokens.token_id % 2 == 0)

    def apply(self, tokens, selection):
        return Effect(keep=~selection.mask) if self.scope == "rollout" else Effect()


@pytest.mark.parametrize("aggregation", AGGREGATIONS[:3])
def test_a_selection_that_drops_tokens_updates_as_if_they_were_not_there(rolled_out, aggregation):
    model, batch = rolled_out
    bare = copy.copy(batch)
    bare.drop(batch.token_id[batch.loss_mask] % 2 == 0)
    weights, losses = [], []
    for controls, given in (([Even()], batch), ([], bare)):
        actor = actor_for(model, [], micro_batch_tokens=64)
        actor.loss, actor.controls = PolicyLossConfig(aggregation=aggregation), controls
        metrics, _ = two_updates(actor, given)
        losses.append([own["actor/loss"] for own in metrics])
        weights.append([w.detach() for w in actor.model.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-7)
    for dropped, absent in zip(*weights, strict=True):
        assert torch.allclose(dropped, absent, atol=1e-6)


def test_what_begin_selected_reaches_every_update_without_a_pass(rolled_out):
    model, batch = rolled_out
    actor, wide = actor_for(model, [], micro_batch_tokens=64), Even(scope="rollout")
    actor.controls = [wide]
    batch = copy.copy(batch)
    batch.assign_scores(actor.compute_logprobs(batch), 0)
    batch.selected = {"even": batch.loss_mask}
    actor._selection_stats = None  # a call of it fails
    before = [w.detach().clone() for w in actor.model.parameters()]
    part = batch.subset([3, 0, 7])
    assert torch.equal(part.selected["even"], part.loss_mask)
    actor.optimizer.param_groups[0]["weight_decay"] = 0.0
    assert actor.update(part, step=1)["actor/pg_loss"] == 0.0
    assert all(map(torch.equal, before, actor.model.parameters()))  # every token was chosen, and none kept
