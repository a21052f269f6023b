"""Vocabulary-parallel logits as NeMo-RL's two kinds of worker hand them to a loss, on two ranks."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from entcov.integrations import nemo_rl as plugin
from tests.support.nemo_rl_standin import ClippedPGLossFn, LossInputType, loss_config


def workers(folder, case) -> str | None:
    """Statistics of logits that two tensor-parallel ranks share, as NeMo-RL's two kinds of worker hand them out."""
    draw, rank, vocab = torch.Generator().manual_seed(7), dist.get_rank(), 23
    whole, ids = torch.randn(3, 6, vocab, generator=draw), torch.randint(0, vocab, (3, 6), generator=draw)
    data = {"input_ids": ids, "token_mask": torch.ones(3, 6), "sample_mask": torch.tensor([1.0, 0.0, 1.0])}
    loss = plugin.ControlledLossFn(ClippedPGLossFn(loss_config()), LossInputType.LOGIT, [], None, {})
    own = whole.chunk(2, -1)[rank].clone().requires_grad_()  # 12 and 11 columns
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    divided = DTensor.from_local(own, mesh, [Shard(-1)], shape=whole.shape, stride=whole.stride())
    problem = _differs(loss.statistics(divided, data), whole, ids, own, rank)
    try:
        loss.statistics(DTensor.from_local(whole[:, :3], mesh, [Shard(1)]), data)
        return "a divided sequence went through"
    except ValueError as error:
        if "divided over the vocabulary alone" not in str(error):
            return f"another error: {error}"
    mpu.initialize_model_parallel(2)
    try:
        padded = torch.cat([whole, torch.full((3, 6, 1), -torch.inf)], -1)
        own = padded.chunk(2, -1)[rank].clone().requires_grad_()
        return problem or _differs(loss.statistics(own, data), whole, ids, own, rank)
    finally:
        mpu.destroy_model_parallel()


def _differs(stats, whole, ids, own, rank) -> str | None:
    whole = whole.double().requires_grad_()
    logp = whole.log_softmax(-1)
    kept = torch.tensor([True, False, True])[:, None] & (torch.arange(6) < 5)
    logprob = torch.where(kept, logp.gather(-1, ids.roll(-1, 1)[..., None])[..., 0], 0.0)
    entropy = torch.where(kept, -(logp.exp() * logp).sum(-1), 0.0)
    for name, want in (("logprob", logprob), ("entropy", entropy)):
        if not (getattr(stats, name) - want).abs().max() < 1e-5:
            return f"{name} is off"
    (stats.logprob + 0.5 * stats.entropy).sum().backward()
    (want,) = torch.autograd.grad((logprob + 0.5 * entropy).sum(), whole)
    want = want[..., 12 * rank : 12 * rank + 12]
    return None if (own.grad[..., : want.shape[-1]] - want).abs().max() < 1e-5 else "the gradient is off"
