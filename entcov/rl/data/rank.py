"""Rankings of a data set by a policy, before training: SENT's curriculum by semantic entropy, and K-means subsets."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from entcov import arguments as check
from entcov.rl.backend import TransformersBackend
from entcov.rl.batch import micro_batches
from entcov.rl.collect import derived_seed
from entcov.rl.config import Config, ConfigError
from entcov.rl.data.kmeans import nearest_members
from entcov.rl.data.stream import write_rows
from entcov.rl.hf.model import forward
from entcov.rl.interfaces import Sampler
from entcov.rl.record.checkpoint import load_checkpoint
from entcov.rl.record.durable import atomic_write, make_folder
from entcov.rl.rewards.rules import final_answer
from entcov.rl.run import build, for_sampling
from entcov.rl.types import Prompt

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
    rollout, size = config.rollout, config.rollout.prompts_per_step
    settings = {
        "prompts": tokens, "model": asdict(config.model), "checkpoint": checkpoint, "samples": samples,
        "temperature": rollout.temperature, "max_response_length": rollout.max_response_length, "seed": config.seed,
        "sampler": rollout.sampler, "prompts_per_step": size, "warm_start": asdict(config.warm_start),
    }  # fmt: skip
    make_folder(folder)
    stored = folder / "settings.json"
    if stored.exists():
        others = json.loads(stored.read_text())
        differing = [key for key, value in json.loads(json.dumps(settings)).items() if others.get(key) != value]
        if differing:
            raise ValueError(f"{folder}: holds samples made with other {', '.join(differing)}; remove it")
    else:
        atomic_write(stored, json.dumps(settings, indent=1).encode())
    found: list[list[Sample]] = []
    for part, start in enumerate(range(0, len(prompts), size)):
        path, own = folder / f"part_{part:06}.json", prompts[start : start + size]
        if not path.exists():
            rollouts = sampler.generate(
                own,
                group_size=samples,
                temperature=rollout.temperature,
                max_response_length=rollout.max_response_length,
                seed=derived_seed(config.seed, _SEED, part),
            )
            kept = [(final_answer(r.prompt.example, r.text), math.fsum(r.logprob), len(r.tokens)) for r in rollouts]
            atomic_write(path, json.dumps([kept[i : i + samples] for i in range(0, len(kept), samples)]).encode())
        found += [[Sample(*one) for one in group] for group in json.loads(path.read_text())]
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


def _loop(config: Config, checkpoint: str | None):
    """What a run of the recipe is built of, without its evaluation."""
    if config.data.task is not None:
        raise ConfigError(f"data.train_files: must be given to rank their rows, got data.task {config.data.task!r}")
    if config.actor.backend != "transformers":
        raise ConfigError(f"actor.backend: must be transformers for a ranking, got {config.actor.backend}")
    plain = for_sampling(config)
    plain = replace(plain, eval=replace(plain.eval, prompts=0), data=replace(plain.data, val_files=[]))
    return build(plain, TransformersBackend(config.device), None if checkpoint is None else load_checkpoint(checkpoint))
