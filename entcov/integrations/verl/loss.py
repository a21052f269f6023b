"""The loss modes in verl's registry, and the loss of one micro-batch."""

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import Tensor

from entcov.controls import CONTROLS
from entcov.integrations.verl.hooks import at_uninstall, check_hooked

MODE = "entcov"  # with the controls of the configuration; entcov_<control> has that one
MicroBatchLoss = Callable[[Tensor, Tensor, "Tensor | None"], tuple[Tensor, dict[str, float]]]

_current: contextvars.ContextVar[MicroBatchLoss | None] = contextvars.ContextVar("entcov_loss", default=None)


def is_entcov(mode: object) -> bool:
    return isinstance(mode, str) and (mode == MODE or mode.startswith(MODE + "_"))


def hook(core_algos: ModuleType) -> None:
    """Adds the modes to verl's registry. Controls of other packages are named, and not imported."""
    registry = core_algos.POLICY_LOSS_REGISTRY
    for mode in [MODE, *(f"{MODE}_{name}" for name in CONTROLS)]:
        if mode in registry:
            raise ValueError(f"there is a policy loss {mode!r} already")
        core_algos.register_policy_loss(mode)(policy_loss)
        at_uninstall(lambda mode=mode: registry.pop(mode, None))


@contextmanager
def using(loss: MicroBatchLoss) -> Iterator[None]:
    """`policy_loss` calls `loss` inside."""
    token = _current.set(loss)
    try:
        yield
    finally:
        _current.reset(token)


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """verl's policy loss of one micro-batch, for every mode of entcov.

    The tokens' other fields, the selections and the denominators are those of the mini-batch (engine.py). This
    function is only a way through verl's `ppo_loss`, which adds the entropy bonus and the KL term of verl's own keys.

    Raises: RuntimeError where no engine of entcov has begun the update.
    """
    loss = _current.get()
    if loss is None:
        check_hooked()
        raise RuntimeError(
            f"a policy loss {MODE}... was called by something else than verl's PPO update: a selection of tokens needs "
            "the whole mini-batch, which an engine of entcov sees (see docs/verl.md)"
        )
    return loss(log_prob, response_mask.bool(), rollout_is_weights)
