"""Random batches as verl and TRL have them, [B, L] with padding on the right, and the same tokens packed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from entcov.objective.tokens import Tokens


@dataclass
class PaddedBatch:
    """Every field is [B, L] float64, except group, which is [B] int64. Outside the mask values are finite garbage."""

    mask: Tensor  # bool
    group: Tensor
    logprob: Tensor
    old_logprob: Tensor
    rollout_logprob: Tensor
    ref_logprob: Tensor
    entropy: Tensor
    advantage: Tensor  # one number a response

    @classmethod
    def random(cls, seed: int, *, groups: int = 3, group_size: int = 4, longest: int = 9) -> "PaddedBatch":
        """Log ratios of size 0.7, so that every clip acts on some tokens; every response has a token."""
        g = torch.Generator().manual_seed(seed)
        b = groups * group_size
        noise = lambda scale: scale * torch.randn(b, longest, generator=g, dtype=torch.float64)  # noqa: E731
        length = torch.randint(1, longest + 1, (b,), generator=g)
        length[int(torch.randint(b, (), generator=g))] = longest
        old = -torch.empty(b, longest, dtype=torch.float64).exponential_(generator=g) - 2.5
        logprob = (old + noise(0.7)).clamp(max=-1e-3)
        return cls(
            mask=torch.arange(longest) < length[:, None],
            group=torch.arange(groups).repeat_interleave(group_size),
            logprob=logprob.clone().requires_grad_(),
            old_logprob=old,
            rollout_logprob=old + noise(0.3),
            ref_logprob=logprob + noise(0.5),
            entropy=noise(1.0).abs(),
            advantage=noise(1.0)[:, :1].expand(b, longest).clone(),
        )

    @property
    def length(self) -> Tensor:
        """[B] int64."""
        return self.mask.sum(1)

    def tokens(self) -> Tokens:
        """All positions, packed; gradients reach `logprob`."""
        b, longest = self.mask.shape
        names = ("logprob", "old_logprob", "advantage", "entropy", "ref_logprob", "rollout_logprob")
        by_row = lambda value: value[:, None].expand(b, longest).flatten()  # noqa: E731
        return Tokens(
            **{name: getattr(self, name).flatten() for name in names},
            loss_mask=self.mask.flatten(),
            sequence_length=by_row(self.length),
            sequence=by_row(torch.arange(b)),
            group=by_row(self.group),
            position=torch.arange(longest).repeat(b),
            token_id=torch.arange(b * longest),
        )


def assert_same_loss(ours: Tensor, theirs: Tensor, logprob: Tensor, rel: float = 1e-7) -> None:
    """Equal values, and equal gradients in `logprob`; verl's own 1e-8 in denominators is below `rel`."""
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=rel, atol=rel / 100)
    mine, other = (torch.autograd.grad(loss, logprob, retain_graph=True)[0] for loss in (ours, theirs))
    assert mine.any(), "the gradient must not vanish, or nothing is compared"
    torch.testing.assert_close(mine, other, rtol=rel, atol=rel / 100)
