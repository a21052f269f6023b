"""Nothing that runs in an update reads a value from the accelerator: the host would wait for it.

Tensors of torch's device "meta" have no values, and reading one is an error; to entcov they are like a GPU's, and the
ops give them outputs of the right kind. So whatever passes here waits for nothing between its first and last kernel.
"""

import pytest
import torch

from entcov import PolicyLossConfig, Tokens, Totals, linear_token_stats, logit_covariance, policy_loss, token_stats
from entcov.controls import CONTROLS, Progress, make_control, select
from entcov.objective.objectives import OBJECTIVES
from entcov.objective.sequences import SequenceIndex
from entcov.objective.token_covariance import token_covariance
from entcov.objective.tokens import AGGREGATIONS, RESPONSE_AGGREGATIONS
from tests.support.tabular_policy import tokens_of

T, V = 16, 64
CLAMPS = [{}, {"moments": True}, {"clamp_p": 0.3}, {"top_k": 5, "moments": True}, {"temperature": 0.7}]


def floats(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def integers() -> torch.Tensor:
    return torch.empty(T, dtype=torch.int64, device="meta")


def tokens() -> Tokens:
    """Every field, so that whatever a term reads is there."""
    made = {}
    for name, kind in Tokens.__annotations__.items():
        if name != "loss_mask":
            made[name] = integers() if name in INTEGERS else floats(T)
        assert kind.startswith("Tensor")
    made["logprob"].requires_grad_()
    made["entropy"].requires_grad_()
    return Tokens(**made, loss_mask=torch.empty(T, dtype=torch.bool, device="meta"))


INTEGERS = ("sequence_length", "token_id", "sequence", "position", "group", "lag")
SEQUENCES = SequenceIndex(integers(), 4)


def test_the_detector_detects():
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(floats(1))
    with pytest.raises((RuntimeError, NotImplementedError)):
        floats(T)[tokens().loss_mask]


@pytest.mark.parametrize("arguments", CLAMPS, ids=str)
def test_token_stats(arguments):
    logits = floats(T, V, dtype=torch.bfloat16).requires_grad_()
    stats = token_stats(logits, integers(), **arguments)
    total = stats.logprob.sum() + stats.entropy.sum()
    if stats.clamped_entropy is not None:
        total = total + stats.clamped_entropy.sum()
    total.backward()
    assert logits.grad.shape == logits.shape and logits.grad.device.type == "meta"


def test_the_head_and_the_covariance_of_logits():
    hidden, weight = (floats(n, 8, dtype=torch.bfloat16).requires_grad_() for n in (T, V))
    stats = linear_token_stats(hidden, weight, integers())
    (stats.logprob.sum() + stats.entropy.sum()).backward()
    assert weight.grad.shape == weight.shape
    old, new = floats(T, V), floats(T, V).requires_grad_()
    change = logit_covariance(old, new, loss_mask=torch.empty(T, dtype=torch.bool, device="meta"))
    (change.covariance + change.entropy_change + change.kl).sum().backward()
    assert new.grad.shape == (T, V)
    mask = torch.empty(T, dtype=torch.bool, device="meta")
    assert token_covariance(floats(T), floats(T), mask).value.device.type == "meta"


def ready(name: str):
    """A control that `begin` has shown a rollout, on the CPU: that moment may read values."""
    control = make_control(name)
    g = torch.Generator().manual_seed(0)
    logits, action = torch.randn(T, V, generator=g), torch.arange(T)
    shown = tokens_of(logits, action, torch.randn(T, generator=g), reward=(action % 2).float())
    control.begin(shown, Progress(1, 10, 0, epoch=1, epochs=2))
    if getattr(control, "_weights", None) is not None:
        control._weights = tuple(x.to("meta") for x in control._weights)
    return control


@pytest.mark.parametrize("name", CONTROLS)
def test_selection_and_loss_of_every_control(name):
    control, config, own = ready(name), PolicyLossConfig(kl_coef=0.1, tis_cap=2.0), tokens()
    (chosen,), _ = select([control], [own], step=1, config=config)
    loss, metrics = policy_loss(
        own, config, totals=Totals(T, 4), controls=[control], selections=chosen, sequences=SEQUENCES
    )
    loss.backward()
    assert own.logprob.grad.device.type == "meta" and all(value.device.type == "meta" for value in metrics.values())


LOSSES = [
    (objective, aggregation)
    for objective in OBJECTIVES
    for aggregation in AGGREGATIONS
    if aggregation in RESPONSE_AGGREGATIONS.get(objective, AGGREGATIONS)  # else refused
]


@pytest.mark.parametrize(("objective", "aggregation"), LOSSES)
def test_every_objective_and_aggregation(objective, aggregation):
    knobs = {"max_response_length": 9} if aggregation.endswith("norm") else {}
    knobs |= {"dro_beta": 0.1} if objective == "dro" else {}
    knobs |= {"off_policy_mask_threshold": 0.1, "kl_coef": 0.1, "kl_weight": "ratio"}
    config = PolicyLossConfig(objective=objective, aggregation=aggregation, **knobs)
    own = tokens()
    policy_loss(own, config, totals=Totals(T, 4), sequences=SEQUENCES)[0].backward()
    assert own.logprob.grad.shape == (T,)
