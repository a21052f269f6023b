"""Rankings of a data set by a policy, before training: by semantic entropy (SENT), by solve rate, K-means subsets."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from entcov import arguments as check
from entcov.rl.backend import TransformersBackend
from entcov.rl.batch import micro_batches
from entcov.rl.collect import derived_seed
from entcov.rl.config import Config
from entcov.rl.data.kmeans import nearest_members
from entcov.rl.data.stream import PromptStream, write_rows
from entcov.rl.hf.model import forward
from entcov.rl.interfaces import Sampler
from entcov.rl.loop import Loop
from entcov.rl.recipe import ConfigError
from entcov.rl.record.checkpoint import load_checkpoint
from entcov.rl.record.durable import atomic_write, make_folder
from entcov.rl.rewards.rules import RewardFunction, final_answer
from entcov.rl.rewards.scorer import Scorer
from entcov.rl.run import build, for_sampling
from entcov.rl.solve_counts import SolveCounts
from entcov.rl.types import RIGHT, Prompt, Rollout

_SEED = (1 << 40) + 1  # no step and no evaluation has this number
_AT_ONCE = 8192  # tokens of one forward pass, padding included

OnProgress = Callable[[int, int], None]  # (done, in all)


@dataclass(frozen=True)
class Sample:
    """What is kept of one response."""

    answer: str | None  # see `final_answer`
    logprob: float  # sum over its tokens, nats
    length: int


def semantic_entropy(samples: Sequence[Sample], *, length_normalized: bool = False) -> tuple[float, int]:
    """(entropy over answers in nats, number of different answers) of one prompt's samples.

    Responses with the same final answer are one cluster, those without an answer another. P(C) is the sum of its
    responses' probabilities, divided by the sum over all clusters; H = -sum_C P(C) log P(C). SENT, arXiv 2512.04359.

    Whether a response's probability is normalised by its length, the paper does not say: it is exp(sum of
    log-probabilities), or with `length_normalized` exp(their mean). A repeated response counts as often as it is drawn.
    """
    clusters: dict[str | None, list[float]] = defaultdict(list)
    for sample in samples:
        clusters[sample.answer].append(sample.logprob / sample.length if length_normalized else sample.logprob)
    mass = np.array([np.logaddexp.reduce(logprob) for logprob in clusters.values()])
    log_p = mass - np.logaddexp.reduce(mass)
    return max(0.0, -math.fsum(np.exp(log_p) * log_p)), len(clusters)


def rank_by_entropy(
    config: Config,
    out: str | Path,
    *,
    samples: int = 8,
    stages: int = 2,
    length_normalized: bool = False,
    checkpoint: str | None = None,
    progress: OnProgress | None = None,
) -> list[Path]:
    """SENT's curriculum: OUT/stage_1.parquet to stage_S.parquet, prompts by rising semantic entropy.

    Each row has the columns semantic_entropy (nats), answers (how many different ones) and stage. Responses are sampled
    at rollout.temperature from the recipe's policy, or from a run's checkpoint. They are kept under OUT/samples, so a
    call that was interrupted goes on where it stopped.

    Raises:
        ConfigError: the recipe has no data.train_files.
        ValueError: a data source without a rule for its answers, OUT/samples of other settings, or no response has a
            final answer.
    """
    for name, value, least in (("samples", samples, 2), ("stages", stages, 1)):
        check.integer(name, value, least)
    loop = _loop(config, checkpoint)
    prompts = loop.stream.rows()
    for prompt in prompts:
        final_answer(prompt.example, "")  # raises for a data source without a rule, before anything is sampled
    found = sample_answers(
        loop.sampler, prompts, Path(out) / "samples", samples=samples, config=config, checkpoint=checkpoint,
        progress=progress,
    )  # fmt: skip
    if not any(sample.answer is not None for own in found for sample in own):
        raise ValueError(
            f"data.train_files: none of {samples * len(prompts)} responses has a final answer by the rule of its data "
            f"source (the first is {prompts[0].example.data_source}), so they cannot be clustered"
        )
    scored = [semantic_entropy(own, length_normalized=length_normalized) for own in found]
    order = sorted(range(len(prompts)), key=lambda row: scored[row][0])  # stable: equal ones stay in the file's order
    bounds = [round(i * len(order) / stages) for i in range(stages + 1)]
    if 0 in np.diff(bounds):
        raise ValueError(f"stages: must be at most the number of prompts, {len(order)}, got {stages}")
    paths = []
    for stage in range(1, stages + 1):
        rows = order[bounds[stage - 1] : bounds[stage]]
        columns = {
            "semantic_entropy": [scored[row][0] for row in rows],
            "answers": [scored[row][1] for row in rows],
            "stage": [stage] * len(rows),
        }
        paths.append(Path(out) / f"stage_{stage}.parquet")
        write_rows([prompts[row].example for row in rows], paths[-1], columns)
    return paths


def sample_answers(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    samples: int,
    config: Config,
    checkpoint: str | None = None,
    progress: OnProgress | None = None,
) -> list[list[Sample]]:
    """`samples` responses to each prompt. Each part of rollout.prompts_per_step prompts is stored in `folder` as it is
    done, and read there by the next call; a response depends on the seed and its prompt's place in its part."""
    tokens = hashlib.sha256(repr([prompt.tokens for prompt in prompts]).encode()).hexdigest()

    def sample(own: Sequence[Prompt], seed: int) -> list[Any]:
        rollouts = sampler.generate(own, group_size=samples, seed=seed, **_sampling(config))
        kept = [(final_answer(r.prompt.example, r.text), math.fsum(r.logprob), len(r.tokens)) for r in rollouts]
        return [kept[i : i + samples] for i in range(0, len(kept), samples)]

    settings = {"prompts": tokens, **_settings(config, checkpoint, samples)}
    found = _in_parts(prompts, folder, sample, settings=settings, config=config, progress=progress)
    return [[Sample(*one) for one in group] for group in found]


def rank_by_solve_rate(
    config: Config,
    out: str | Path,
    *,
    samples: int = 32,
    least: int = 0,
    most: int = 3,
    prompts: int | None = None,
    checkpoint: str | None = None,
    progress: OnProgress | None = None,
) -> list[Path]:
    """OUT/subset.parquet: the prompts that the policy solves `least` to `most` times of `samples`, in file order.

    Each row has the columns solved and samples. OUT/solve_counts.json holds {"samples", "histogram", "solved"} of all
    prompts: histogram[c] were solved c times, solved[i] is the count of the i-th. Responses are sampled at
    rollout.temperature from the recipe's policy, or from a run's checkpoint, and scored as the recipe says; one is
    right if its reward is at least 1. Counts are kept under OUT/solves part by part, so a call that was interrupted
    goes on where it stopped, and one with other bounds samples nothing.

    Args:
        prompts: of a data.task, how many: the first different ones after those of the recipe's warm start.

    Raises:
        ConfigError: `prompts` is given with data.train_files, or not given with data.task.
        ValueError: not 0 <= least <= most <= samples, OUT/solves of other settings, no prompt in the range, or the task
            has fewer different prompts.
    """
    check.integer("samples", samples, 1)
    check.integer("least", least, 0)
    check.integer("most", most, least)
    if most > samples:
        raise ValueError(f"most: must be at most samples, {samples}, got {most}")
    if (config.data.task is None) != (prompts is None):
        got = f"data.task {config.data.task!r}" if prompts is None else "data.train_files"
        raise ConfigError(f"prompts: goes with data.task, and must be given there, got {got} and prompts {prompts}")
    if prompts is not None:
        check.integer("prompts", prompts, 1)
    loop = _loop(config, checkpoint, task_too=True)
    shown = config.warm_start.steps * config.warm_start.batch_size
    rows = loop.stream.rows() if prompts is None else different_prompts(loop.stream, shown, prompts)
    solved = count_solved(
        loop.sampler, rows, loop.reward_fn, Path(out) / "solves", samples=samples, config=config, checkpoint=checkpoint,
        progress=progress,
    )  # fmt: skip
    counts = SolveCounts.of(samples, solved)
    chosen = [row for row, count in enumerate(solved) if least <= count <= most]
    if not chosen:
        raise ValueError(
            f"least, most: none of {len(rows)} prompts was solved {least} to {most} times of {samples}; prompts by "
            f"count, from 0 on: {list(counts.histogram)}"
        )
    subset, table = Path(out) / "subset.parquet", Path(out) / "solve_counts.json"
    columns = {"solved": [solved[row] for row in chosen], "samples": [samples] * len(chosen)}
    write_rows([rows[row].example for row in chosen], subset, columns)
    atomic_write(table, (json.dumps(counts.state_dict() | {"solved": solved}) + "\n").encode())
    return [subset, table]


def different_prompts(stream: PromptStream, position: int, count: int) -> list[Prompt]:
    """The first `count` prompts of a task from `position` on that differ in their tokens.

    Raises:
        ValueError: there are fewer among the next 20 * count.
    """
    found: dict[tuple[int, ...], Prompt] = {}
    for place in range(position, position + 20 * count):
        (prompt,) = stream.take(place, 1)
        found.setdefault(prompt.tokens, prompt)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"prompts: {20 * count} draws of the task have {len(found)} different ones, got {count}")


def count_solved(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    reward_fn: RewardFunction,
    folder: Path,
    *,
    samples: int,
    config: Config,
    checkpoint: str | None = None,
    progress: OnProgress | None = None,
) -> list[int]:
    """How many of `samples` responses to each prompt are right. Stored in parts as `sample_answers` does."""
    rows = repr([(p.tokens, p.example.data_source, p.example.ground_truth) for p in prompts])

    def sample(own: Sequence[Prompt], seed: int) -> list[Any]:
        with Scorer(reward_fn) as scorer:
            rollouts: list[Rollout] = sampler.generate(
                own, group_size=samples, seed=seed, on_done=scorer.take, **_sampling(config)
            )
            scorer.finish(rollouts)
        right = [rollout.reward >= RIGHT for rollout in rollouts]
        return [sum(right[i : i + samples]) for i in range(0, len(right), samples)]

    settings = {
        "rows": hashlib.sha256(rows.encode()).hexdigest(), "reward": config.data.reward,
        **_settings(config, checkpoint, samples),
    }  # fmt: skip
    return _in_parts(prompts, folder, sample, settings=settings, config=config, progress=progress)


def _sampling(config: Config) -> dict[str, Any]:
    return {
        "temperature": config.rollout.temperature, "max_response_length": config.rollout.max_response_length
    }  # fmt: skip


def _settings(config: Config, checkpoint: str | None, samples: int) -> dict[str, Any]:
    """What stored samples depend on besides their prompts."""
    return {
        "model": asdict(config.model), "checkpoint": checkpoint, "samples": samples, **_sampling(config),
        "seed": config.seed, "sampler": config.rollout.sampler, "prompts_per_step": config.rollout.prompts_per_step,
        "warm_start": asdict(config.warm_start),
    }  # fmt: skip


def _in_parts(
    prompts: Sequence[Prompt],
    folder: Path,
    sample: Callable[[Sequence[Prompt], int], list[Any]],
    *,
    settings: dict[str, Any],
    config: Config,
    progress: OnProgress | None,
) -> list[Any]:
    """What `sample` (part's prompts, seed) returns for each prompt, stored part by part and read where it is stored."""
    size = config.rollout.prompts_per_step
    make_folder(folder)
    stored = folder / "settings.json"
    if stored.exists():
        others = json.loads(stored.read_text())
        differing = [key for key, value in json.loads(json.dumps(settings)).items() if others.get(key) != value]
        if differing:
            raise ValueError(f"{folder}: holds samples made with other {', '.join(differing)}; remove it")
    else:
        atomic_write(stored, json.dumps(settings, indent=1).encode())
    found: list[Any] = []
    for part, start in enumerate(range(0, len(prompts), size)):
        path, own = folder / f"part_{part:06}.json", prompts[start : start + size]
        if not path.exists():
            atomic_write(path, json.dumps(sample(own, derived_seed(config.seed, _SEED, part))).encode())
        found += json.loads(path.read_text())
        if progress is not None:
            progress(start + len(own), len(prompts))
    return found


def kmeans_subset(
    config: Config,
    out: str | Path,
    *,
    count: int = 616,
    checkpoint: str | None = None,
    progress: OnProgress | None = None,
) -> list[Path]:
    """OUT/subset.parquet: `count` prompts, of each of as many clusters the one nearest to its centre, in file order.

    Jin et al., arXiv 2511.05993, train on 616 prompts that K-means chose of 17,000. On which features is not said;
    here they are the mean over a prompt's tokens of the policy's last hidden state. The column cluster_size says how
    many prompts a row stands for.

    Raises:
        ConfigError: the recipe has no data.train_files.
        ValueError: there are fewer different prompts than `count`.
    """
    check.integer("count", count, 1)
    loop = _loop(config, checkpoint)
    prompts = loop.stream.rows()
    features = prompt_features(loop.actor.model, prompts, progress)
    rows, sizes = nearest_members(features, count, seed=config.seed)
    path = Path(out) / "subset.parquet"
    make_folder(path.parent)
    write_rows([prompts[row].example for row in rows], path, {"cluster_size": sizes.tolist()})
    return [path]


@torch.no_grad()
def prompt_features(model: nn.Module, prompts: Sequence[Prompt], progress: OnProgress | None = None) -> np.ndarray:
    """[N, D] float32: the mean over each prompt's tokens of the model's last hidden state."""
    lengths = [len(prompt.tokens) for prompt in prompts]
    out: list[np.ndarray | None] = [None] * len(prompts)
    was_training, done = model.training, 0
    model.eval()
    for group in micro_batches(lengths, max([_AT_ONCE, *lengths]), padded=True):
        tokens = [torch.tensor(prompts[i].tokens, device=model.device) for i in group]
        ids = pad_sequence(tokens, batch_first=True)
        mask = pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
        states = forward(
            model, input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True, logits_to_keep=1
        ).hidden_states[-1]
        means = (states * mask[..., None]).float().sum(1) / mask.sum(1, keepdim=True)
        for i, mean in zip(group, means.cpu().numpy(), strict=True):
            out[i] = mean
        done += len(group)
        if progress is not None:
            progress(done, len(prompts))
    model.train(was_training)
    return np.stack(out)


def _loop(config: Config, checkpoint: str | None, *, task_too: bool = False) -> Loop:
    """What a run of the recipe is built of, without its evaluation."""
    if config.data.task is not None and not task_too:
        raise ConfigError(f"data.train_files: must be given to rank their rows, got data.task {config.data.task!r}")
    if config.actor.backend != "transformers":
        raise ConfigError(f"actor.backend: must be transformers for a ranking, got {config.actor.backend}")
    plain = for_sampling(config)
    plain = replace(plain, eval=replace(plain.eval, prompts=0), data=replace(plain.data, val_files=[]))
    return build(plain, TransformersBackend(config.device), None if checkpoint is None else load_checkpoint(checkpoint))
