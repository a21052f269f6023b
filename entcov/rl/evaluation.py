"""Held-out accuracy (verl's mean@k and best@k, unbiased pass@k) and entropy; each data source has its own sampling."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from entcov.intervals import mean_interval
from entcov.rl.batch import pack
from entcov.rl.config import EvalConfig, Sampling
from entcov.rl.interfaces import Actor, Sampler
from entcov.rl.rewards.rules import RewardFunction
from entcov.rl.rewards.scorer import Scorer
from entcov.rl.solve_counts import SolveCounts
from entcov.rl.types import Prompt, Rollout


def evaluate(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    reward_fn: RewardFunction,
    *,
    settings: EvalConfig,
    max_response_length: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    entropy_of: Callable[[Sequence[Rollout]], list[float]] | None = None,
) -> tuple[dict[str, float], list[Rollout]]:
    """Samples every held-out prompt as `settings` says for its data source, and scores responses as they are complete.

    Data sources that are sampled alike are generated together; the first such set draws with `seed`, every further one
    with the next number.

    Args:
        settings: how all are sampled, and under `sources` what differs for a data source.
        progress: called with (sequences done, sequences in all).
        entropy_of: the mean entropy of each response, such as `response_entropy`; None: not measured.

    Returns:
        The metrics of `summarize` under their names, and the scored rollouts, prompt by prompt.
    """
    sets: dict[Sampling, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        sets[settings.settings(prompt.example.data_source)].append(prompt)
    in_all = sum(how.samples * len(members) for how, members in sets.items())
    rollouts: list[Rollout] = []
    with Scorer(reward_fn) as scorer:
        for number, (how, members) in enumerate(sets.items()):
            before = len(rollouts)
            rollouts += sampler.generate(
                members,
                group_size=how.samples,
                temperature=how.temperature,
                top_p=how.top_p,
                top_k=how.top_k,
                max_response_length=max_response_length,
                seed=seed + number,
                progress=progress and (lambda done, _, before=before: progress(before + done, in_all)),
                on_done=scorer.take,
            )
        sampler.sleep(sync_follows=False)  # the next step samples with the same weights
        scorer.finish(rollouts)
    rollouts.sort(key=lambda rollout: (rollout.prompt.uid, rollout.sample))
    if entropy_of is not None:
        for rollout, entropy in zip(rollouts, entropy_of(rollouts), strict=True):
            rollout.entropy = entropy
    metrics: dict[str, float] = {}
    for row in summarize(rollouts):
        metrics |= row.metrics()
    return metrics, rollouts


def response_entropy(actor: Actor, rollouts: Sequence[Rollout], *, at_once: int) -> list[float]:
    """The current policy's entropy over each response, mean over its tokens, nats at temperature 1. Collective.

    Exact: of the whole distribution at every token, whatever the sampler's temperature or truncation was.

    Args:
        at_once: responses in a batch; a training step holds prompts_per_step * group_size.
    """
    means: list[float] = []
    for start in range(0, len(rollouts), at_once):
        batch = actor.once_a_node(partial(pack, rollouts[start : start + at_once]))
        entropy = actor.compute_entropy(batch, temperature=1.0)
        means += actor.once_a_node(partial(batch.response_means, entropy)).tolist()
    return means


@dataclass(frozen=True)
class SourceResult:
    """One data source's results. Rewards are 0 or 1 where the reward is a verdict; lengths are tokens."""

    source: str
    prompts: int
    samples: int  # per prompt
    mean: float  # of all rewards: mean@k
    best: float  # mean over prompts of the best of k: pass@k for 0/1 rewards
    solved: SolveCounts  # right responses of each prompt
    half_width: float  # of the 95 % interval of `mean` over prompts (Student's t); NaN for one prompt
    length: float  # mean response length
    cut: float  # share of responses that reached the length limit
    entropy: float | None  # mean over responses of their mean entropy, nats; None: not measured

    def metrics(self) -> dict[str, float]:
        """Under verl's names, `val-core/<source>/acc/mean@k` and, for k > 1, `val-core/<source>/acc/best@k/mean`;
        `val-aux/<source>/response_length/{mean,clip_ratio}` beside them, and `val-aux/<source>/entropy/mean`. For k > 1
        also `val-core/<source>/acc/pass@j`, j = 1, 2, 4, ... and k, the unbiased estimates from all k samples;
        `val-aux/<source>/distinct_answers`, and where answers can be compared `val-core/<source>/acc/maj@k/mean`, the
        accuracy of each prompt's most common answer, and `val-aux/<source>/calibration/{ece,confidence}` of it.
        """
        core, aux = f"val-core/{self.source}/acc", f"val-aux/{self.source}"
        out = {f"{core}/mean@{self.samples}": self.mean}
        if self.samples > 1:
            out[f"{core}/best@{self.samples}/mean"] = self.best
            out |= {f"{core}/pass@{k}": value for k, value in self.solved.curve().items()}
            answers = self.solved.answers
            out[f"{aux}/distinct_answers"] = answers.distinct
            if (sure := answers.calibration) is not None:
                out[f"{core}/maj@{self.samples}/mean"] = sure.accuracy
                out |= {f"{aux}/calibration/ece": sure.ece, f"{aux}/calibration/confidence": sure.confidence}
        if self.entropy is not None:
            out[f"{aux}/entropy/mean"] = self.entropy
        return out | {f"{aux}/response_length/mean": self.length, f"{aux}/response_length/clip_ratio": self.cut}


def summarize(rollouts: Sequence[Rollout]) -> list[SourceResult]:
    """Results by data source, in alphabetical order, of scored rollouts with equally many samples for every prompt."""
    by_source: dict[str, dict[int, list[Rollout]]] = defaultdict(lambda: defaultdict(list))
    for rollout in rollouts:
        by_source[rollout.prompt.example.data_source][rollout.prompt.uid].append(rollout)
    results, solved = [], SolveCounts.by_source(rollouts)
    for source, groups in sorted(by_source.items()):
        rewards = [[rollout.reward for rollout in group] for group in groups.values()]
        everything = [rollout for group in groups.values() for rollout in group]
        measured = [rollout.entropy for rollout in everything if rollout.entropy is not None]
        _, half_width = mean_interval([sum(group) / len(group) for group in rewards])
        results.append(
            SourceResult(
                source=source,
                prompts=len(groups),
                samples=len(rewards[0]),
                mean=sum(map(sum, rewards)) / len(everything),
                best=sum(map(max, rewards)) / len(rewards),
                solved=solved[source],
                half_width=half_width,
                length=sum(len(rollout.tokens) for rollout in everything) / len(everything),
                cut=sum(not rollout.finished for rollout in everything) / len(everything),
                entropy=sum(measured) / len(measured) if measured else None,
            )
        )
    return results


def report(
    run: str, step: int, results: Sequence[SourceResult], settings: EvalConfig, unkept: OSError | None = None
) -> str:
    """What the eval commands print: which policy, where everything is kept (or why it is not), and the table."""
    kept = f"metrics: {run}/eval/step_{step}.json, responses: {run}/eval/step_{step}.jsonl"
    if unkept is not None:
        kept = f"metrics and responses could not be kept: {unkept}"
    return f"{run}, step {step}; {kept}\n{format_table(results, settings)}"


def format_table(results: Sequence[SourceResult], settings: EvalConfig) -> str:
    """A table for a terminal: one line a data source, accuracies in percent, and their plain mean where all have one k.

    The mean over data sources counts every source once. Published averages may be weighted otherwise: that of Cui et
    al., table 2, is not the plain mean of its columns.
    """
    width = max(len("data source"), *(len(row.source) for row in results))
    head = f"{'data source':<{width}}  prompts    k     T   mean@k   95 % ±   best@k   length   cut"
    lines = [head, "-" * len(head)]
    for row in results:
        temperature = settings.settings(row.source).temperature
        half = "-" if row.half_width != row.half_width else f"{100 * row.half_width:.1f}"
        lines.append(
            f"{row.source:<{width}}  {row.prompts:>7}  {row.samples:>3}  {temperature:>4g}  {100 * row.mean:>7.1f}"
            f"  {half:>7}  {100 * row.best:>7.1f}  {row.length:>7.0f}  {100 * row.cut:>3.0f}%"
        )
    if len(results) > 1:
        mean = sum(row.mean for row in results) / len(results)
        lines.append(f"{'mean of the sources':<{width + 24}}{100 * mean:>7.1f}")
    return "\n".join(lines)
