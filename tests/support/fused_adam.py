"""A stand-in for Transformer Engine's FusedAdam on a CPU: what it keeps and saves is laid out as in TE 2.20.

Source: transformer_engine/pytorch/optimizers/fused_adam.py of that release. A group has one `step`, an int that its
first `step()` makes and that also counts where the group is empty; a parameter has `exp_avg`, `exp_avg_sq` and, with
master_weights, `master_param`, and no step. The arithmetic is that of AdamW in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch


class FusedAdam(torch.optim.Optimizer):
    made = 0

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *, bias_correction=True,
        adam_w_mode=True, master_weights=False, store_param_remainders=False,
    ):  # fmt: skip
        assert adam_w_mode and bias_correction
        super().__init__(params, {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps,
                                  "weight_decay": weight_decay})  # fmt: skip
        self.master_weights = master_weights
        FusedAdam.made += 1

    def initialize_state(self, param, store_param_remainders=False) -> None:
        names = ("exp_avg", "exp_avg_sq", *(["master_param"] if self.master_weights else []))
        for name in names:
            self.state[param][name] = torch.zeros_like(param, dtype=torch.float32)
        if self.master_weights:
            self.set_scaled_state(param, "master_param", param.detach().float())

    def get_unscaled_state(self, param, state_name: str) -> torch.Tensor:
        return self.state[param][state_name]

    def set_scaled_state(self, param, state_name: str, unscaled_state: torch.Tensor) -> None:
        assert unscaled_state.dtype == torch.float32
        if state_name not in self.state[param]:
            self.state[param][state_name] = torch.empty_like(param, dtype=torch.float32)
        self.state[param][state_name].copy_(unscaled_state)

    def load_state_dict(self, state_dict) -> None:
        """As TE's: torch's own would give the states the dtype of the parameters."""
        super().load_state_dict(state_dict)
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for number, param in zip(numbers, params, strict=True):
            if number in state_dict["state"]:
                self.state[param] = {}
                for name, value in state_dict["state"][number].items():
                    if value is not None:
                        self.set_scaled_state(param, name, value.float())

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), lr = group["betas"], group["lr"]
            corrections = [1 - beta ** group["step"] for beta in (beta1, beta2)]
            for param in group["params"]:
                if param.grad is None:
                    continue
                if not self.state[param]:
                    self.initialize_state(param)
                own = self.state[param]
                value, grad = own.get("master_param", param), param.grad.float()
                own["exp_avg"].lerp_(grad, 1 - beta1)
                own["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                scale = (own["exp_avg_sq"] / corrections[1]).sqrt_().add_(group["eps"])
                value.mul_(1 - lr * group["weight_decay"]).addcdiv_(own["exp_avg"] / corrections[0], scale, value=-lr)
                if value is not param:
                    param.copy_(value)


@contextmanager
def in_megatron() -> Iterator[None]:
    """Megatron-Core takes it as it takes Transformer Engine's where that is installed."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    ours, before = {"Adam": FusedAdam}, FusedAdam.made
    with (
        mock.patch.multiple(optimizer, USING_PYTORCH_OPTIMIZER=False, **ours),
        mock.patch.multiple(distrib_optimizer, HAVE_APEX_OR_TE=True, USING_TE_OPTIMIZER=True, **ours),
    ):
        yield
    assert FusedAdam.made > before
