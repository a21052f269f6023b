"""The same statistics when each process holds half of the vocabulary: python examples/ops_tensor_parallel.py

A training script under torchrun does what `worker` does. Here the script starts the two processes itself.
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from entcov import token_stats

WORLD, TOKENS, VOCAB = 2, 5, 1001  # 1001 columns, padded to 2 x 504 as Megatron would


def worker(rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    whole = torch.nn.functional.pad(3 * torch.randn(TOKENS, VOCAB), (0, 7))
    target = torch.randint(0, VOCAB, (TOKENS,))
    shard = whole.chunk(WORLD, dim=1)[rank].clone().requires_grad_()

    # vocab_start defaults to rank * 504. The 7 columns from vocab_size on are padding and do not count. There is one
    # all-gather for the statistics, one more for the clamp, and none in backward.
    stats = token_stats(shard, target, group=dist.group.WORLD, vocab_size=VOCAB, top_k=100)
    (-stats.logprob - 0.01 * stats.clamped_entropy).mean().backward()

    alone = token_stats(whole, target, vocab_size=VOCAB, top_k=100)
    for name in ("logprob", "entropy", "clamped_entropy"):
        torch.testing.assert_close(getattr(stats, name), getattr(alone, name), rtol=1e-6, atol=1e-6)
    if rank == 0:
        print("entropy on both ranks:", stats.entropy.tolist())
        print("gradient of this rank's columns:", tuple(shard.grad.shape))
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (os.path.join(folder, "rendezvous"),), nprocs=WORLD)
