"""GRPO with Clip-Cov in a bare PyTorch loop, sharded by FSDP2: torchrun --nproc-per-node=2 examples/fsdp2_loop.py

A tiny transformer learns on the CPU to write even numbers. Each process samples and trains on its share of the prompts.
The controls choose their tokens from the whole mini-batch of all processes: the chosen tokens, and the parameters up to
rounding, are the same for --nproc-per-node=1 and 2, and for every --micro-batch.
"""

import argparse
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from entcov import linear_token_stats
from entcov.controls import make_control
from entcov.integrations.controlled_loss import ControlledLoss
from entcov.objective.advantages import make_estimator
from entcov.objective.responses import Responses
from entcov.objective.tokens import PolicyLossConfig, Tokens

UPDATES, PROMPTS, GROUP, LENGTH, VOCABULARY, WIDTH = 2, 4, 8, 8, 50, 32


class Policy(nn.Module):
    """Token ids [B, 1 + LENGTH], the prompt first -> statistics of the LENGTH tokens after it, or the next logits."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(1 + LENGTH, WIDTH)
        layer = {"dim_feedforward": 64, "dropout": 0.0, "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 4, **layer) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, sample: bool = False):
        x = self.embedding(ids) + self.position.weight[: ids.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        if sample:
            return self.head(x[:, -1])
        # In the forward of the module that FSDP2 wraps its weights are plain tensors. FSDP2 warns of outputs that are
        # views, hence the copies.
        stats = linear_token_stats(x[:, :-1], self.head.weight, ids[:, 1:])
        return stats._replace(logprob=stats.logprob.clone(), entropy=stats.entropy.clone())


def sample(policy: Policy, prompts: range, step: int) -> Tensor:
    """Ids [B, 1 + LENGTH]; every response has random numbers of its own, whichever process samples it."""
    rows = [prompt * GROUP + i for prompt in prompts for i in range(GROUP)]
    draws = [torch.rand(LENGTH, generator=torch.Generator().manual_seed(1000 * step + row)) for row in rows]
    ids = torch.tensor([[1 + row // GROUP] for row in rows])
    for t in range(LENGTH):
        chance = policy(ids, sample=True).softmax(-1).cumsum(-1)
        drawn = (chance < torch.stack(draws)[:, t, None]).sum(-1, keepdim=True)
        ids = torch.cat([ids, drawn.clamp(max=VOCABULARY - 1)], dim=1)
    return ids


def tokens_of(stats, rollout: Tokens) -> Tokens:
    """The rollout's tokens with the statistics of the current policy."""
    return replace(rollout, logprob=stats.logprob.flatten(), entropy=stats.entropy.flatten())


def part_of(tokens: Tokens, index: slice) -> Tokens:
    return Tokens(**{name: value[index] for name, value in vars(tokens).items() if value is not None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--micro-batch", type=int, default=4, help="responses in a forward pass")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    policy = Policy()
    for block in policy.blocks:
        fully_shard(block)
    fully_shard(policy)
    optimizer = torch.optim.SGD(policy.parameters(), lr=3.0)

    control = make_control("clip_cov", clip_cov_ratio=0.02, clip_cov_lb=0.1, clip_cov_ub=10.0)
    controlled = ControlledLoss([control], PolicyLossConfig(clip_high=0.28), group=dist.group.WORLD)
    prompts = range(rank * PROMPTS // ranks, (rank + 1) * PROMPTS // ranks)  # whole groups, equally many on every rank

    for step in range(1, options.steps + 1):
        with torch.no_grad():
            ids = sample(policy, prompts, step)
            stats = policy(ids)
        reward = (ids[:, 1:] % 2 == 0).float().mean(1)
        row = torch.arange(prompts.start * GROUP, prompts.stop * GROUP)  # numbers that no other rank has
        length = torch.full_like(row, LENGTH)
        advantage = make_estimator("grpo")(Responses.of(reward, row // GROUP, length)).value
        by_token = lambda value: value.repeat_interleave(LENGTH)  # noqa: B023, E731
        rollout = Tokens(  # and what else the controls read: docs/own_loop.md
            logprob=stats.logprob.flatten(), old_logprob=stats.logprob.flatten(), advantage=by_token(advantage),
            loss_mask=torch.ones(len(row) * LENGTH, dtype=torch.bool), entropy=stats.entropy.flatten(),
            sequence=by_token(row), token_id=torch.arange(row[0] * LENGTH, (row[-1] + 1) * LENGTH),
        )  # fmt: skip
        metrics = controlled.begin(step=step, steps=options.steps, rollout=rollout)

        for _ in range(UPDATES):
            parts = torch.arange(len(row)).split(options.micro_batch)
            own = [part_of(rollout, slice(int(p[0]) * LENGTH, (int(p[-1]) + 1) * LENGTH)) for p in parts]
            current = own
            if controlled.selects:  # the policy before the update, of all micro-batches
                with torch.no_grad():
                    current = [tokens_of(policy(ids[p]), tokens) for p, tokens in zip(parts, own, strict=True)]
            update = controlled.update(current)
            for i, (p, tokens) in enumerate(zip(parts, own, strict=True)):
                loss, _ = update.loss(i, tokens_of(policy(ids[p]), tokens))
                (loss * controlled.ranks).backward()  # losses add up over ranks; FSDP averages gradients
            optimizer.step()
            optimizer.zero_grad()
            metrics |= update.finish()
        metrics |= controlled.after_step()

        chosen = [int(i) for t, s in zip(own, update.selections, strict=True) for i in t.token_id[s[0].mask]]
        everywhere: list = [None] * ranks
        dist.all_gather_object(everywhere, (chosen, float(reward.mean())))
        if rank == 0:
            shown = " ".join(
                f"{name} {metrics[f'actor/{name}']:.4f}" for name in ("entropy", "cov_mean", "cov_clipfrac")
            )
            mean = sum(one for _, one in everywhere) / ranks
            print(f"step {step:2} reward {mean:.4f} {shown} chosen {sorted(sum((ids for ids, _ in everywhere), []))}")
    size = sum(float(p.full_tensor().detach().double().abs().sum()) for p in policy.parameters())
    if rank == 0:
        print(f"sum of the parameters' sizes {size:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
