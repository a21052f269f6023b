"""Held-out accuracy: mean@k and best@k under verl's metric names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from entcov.rl.rewards import RewardFunction
from entcov.rl.types import Prompt, Rollout


def evaluate(
    sampler,
    prompts: Sequence[Prompt],
    score: RewardFunction,
    *,
    samples: int,
    temperature: float,
    max_response_length: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, float], list[Rollout]]:
    """Samples every held-out prompt `samples` times and scores the responses.

    Returns:
        metrics by data source: `val-core/<source>/acc/mean@k`, the mean reward, and for k > 1
        `val-core/<source>/acc/best@k/mean`, the mean over prompts of the best of k (pass@k for 0/1 rewards); and the
        scored rollouts.
    """
    rollouts = sampler.generate(
        prompts,
        group_size=samples,
        temperature=temperature,
        max_response_length=max_response_length,
        seed=seed,
        progress=progress,
    )
    by_source: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for rollout in rollouts:
        rollout.reward = score(rollout.prompt.example, rollout.text)
        by_source[rollout.prompt.example.data_source][rollout.prompt.uid].append(rollout.reward)
    metrics = {}
    for source, groups in sorted(by_source.items()):
        rewards = list(groups.values())
        metrics[f"val-core/{source}/acc/mean@{samples}"] = sum(map(sum, rewards)) / sum(map(len, rewards))
        if samples > 1:
            metrics[f"val-core/{source}/acc/best@{samples}/mean"] = sum(map(max, rewards)) / len(rewards)
    return metrics, rollouts
