"""A run from recipe to results: sets the parts up, resumes what is there, drives the loop, evaluates, checkpoints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from entcov.rl.checkpoint import Checkpoint, load_checkpoint, load_latest, make_latest
from entcov.rl.config import Config, ConfigError, load_config, save_config
from entcov.rl.durable import replace_file
from entcov.rl.engine import Parts, TorchEngine
from entcov.rl.evaluation import SourceResult, evaluate, summarize
from entcov.rl.loop import Loop
from entcov.rl.metrics import RunLogger
from entcov.rl.progress import Progress
from entcov.rl.rollouts import derived_seed
from entcov.rl.types import Rollout

# Keys that may change when a run is taken up again: they say how far and how it is watched, not what is computed.
_FREE_KEYS = (
    "run_dir", "steps", "checkpoint.", "logging.", "eval.", "warm_start.cache_dir", "megatron.", "rollout.vllm.",
)  # fmt: skip
_COMMANDS = {
    "torch": "Start it with: python -m entcov train RECIPE",
    "megatron": "Start it with: torchrun --nproc-per-node=N -m megatron_integration train RECIPE",
}
_EVAL_SEED = 1 << 40  # apart from every step's number


def train(
    config: Config, *, resume: str = "auto", display: bool | str = "auto", engine: TorchEngine | None = None
) -> dict[str, float]:
    """Runs the recipe in `config.run_dir` to its last step, going on from the latest checkpoint if there is one.

    Args:
        resume: "auto" goes on where the run stopped; a checkpoint's path goes back to it; "never" refuses a folder that
            holds a run already.
        display: passed to `Progress`.
        engine: what the run stands on; default: this process with torch. Every process of a larger engine calls
            `train` with the same arguments.

    Returns:
        The last step's metrics, evaluation included.

    Raises:
        ConfigError: the folder holds a run of another recipe; the message lists the keys that differ. Or the recipe
            wants another engine than the one given.
    """
    engine = engine or TorchEngine()
    if config.actor.engine != engine.name:
        raise ConfigError(
            f"actor.engine: {config.actor.engine} was asked for, and this command runs {engine.name}. "
            + _COMMANDS[config.actor.engine]
        )
    run_dir = Path(config.run_dir)
    if not (run_dir / "config.yaml").exists():  # a run that began has been checked
        engine.check(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    checkpoint = engine.agree(lambda: _take_up(run_dir, config, resume))
    if not engine.leads:
        with Progress(config.steps, run_dir.name, enabled=False) as progress:
            return _train(config, engine, checkpoint, run_dir, None, progress)
    logger = RunLogger(
        run_dir,
        tensorboard=config.logging.tensorboard,
        wandb=config.logging.wandb,
        resume_step=-1 if checkpoint is None else checkpoint.step,  # -1: killed before the first checkpoint, start over
    )
    if checkpoint is not None:
        make_latest(checkpoint)
    with logger, Progress(config.steps, run_dir.name, enabled=display) as progress:
        return _train(config, engine, checkpoint, run_dir, logger, progress)


def _take_up(run_dir: Path, config: Config, resume: str) -> Checkpoint | None:
    """Makes the folder this run's; the checkpoint to go on from."""
    checkpoints, checkpoint = run_dir / "checkpoints", None
    if resume not in ("auto", "never"):
        checkpoint = load_checkpoint(resume)
        if checkpoint.path.resolve().parent != checkpoints.resolve():
            raise ValueError(f"resume: must be one of this run's checkpoints in {checkpoints}, got {resume}")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir: the folder {run_dir} cannot be made ({error.strerror})") from None
    _claim(run_dir, config, resume)
    return load_latest(checkpoints) if checkpoint is None else checkpoint


def _train(
    config: Config,
    engine: TorchEngine,
    checkpoint: Checkpoint | None,
    run_dir: Path,
    logger: RunLogger | None,
    progress: Progress,
) -> dict[str, float]:
    if checkpoint is None and config.warm_start.steps:
        progress.phase("warm start")
    steps = config.warm_start.steps
    parts = engine.build(
        config, checkpoint, run_dir, lambda done, loss: progress.sub_bar(done, steps, f"loss {loss:.3f} nats")
    )
    loop = Loop(config, parts.actor, parts.sampler, parts.stream, parts.controls, parts.score, phase=progress.phase)
    # Reinforcement starts after the prompts that the warm start has shown the solutions of.
    loop.position = config.warm_start.steps * config.warm_start.batch_size

    if checkpoint is not None:
        loop.load_state_dict(checkpoint.state)
    return _Run(config, engine, parts, loop, logger, progress, run_dir).to_the_end(fresh=checkpoint is None)


def evaluate_run(
    config: Config,
    *,
    checkpoint: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    engine: TorchEngine | None = None,
) -> tuple[int, dict[str, float], list[SourceResult]]:
    """Held-out accuracy of the policy in `config.run_dir`, with the settings of `config.eval`.

    Args:
        checkpoint: path of one; default: the run's latest.
        progress: passed to `evaluate`.
        engine: what the policy runs on; default: this process with torch, whatever engine trained it. Another must be
            the one that trained, and every process of it makes the call.

    Returns:
        The checkpoint's step, the metrics of `evaluate`, and the results by data source. The metrics and all responses
        are also kept under RUN/eval.

    Raises:
        FileNotFoundError: the run has no checkpoint.
    """
    if config.eval.prompts == 0:
        raise ConfigError("eval.prompts: must be at least 1, or null for all of data.val_files, to evaluate; got 0")
    engine = engine or TorchEngine()
    run_dir = Path(config.run_dir)
    found = engine.agree(lambda: _checkpoint(run_dir, checkpoint))
    # Nothing is compared with a reference policy here, so that none has to be there.
    alone = dataclasses.replace(config, loss=dataclasses.replace(config.loss, kl_coef=0.0))
    parts = engine.build(alone, found, run_dir, lambda done, loss: None)
    parts.sampler.sync(found.step, parts.actor.named_weights)
    metrics, rollouts = evaluate(
        parts.sampler,
        parts.stream.held_out(config.eval.prompts),
        parts.score,
        settings=config.eval,
        max_response_length=config.rollout.max_response_length,
        seed=derived_seed(config.seed, _EVAL_SEED),
        progress=progress if engine.leads else None,
    )
    if not engine.leads:
        return found.step, metrics, summarize(rollouts)
    _write_samples(run_dir / "eval" / f"step_{found.step}.jsonl", rollouts, limit=len(rollouts))
    result = {"step": found.step, "settings": dataclasses.asdict(config.eval), "metrics": metrics}
    replace_file(run_dir / "eval" / f"step_{found.step}.json", (json.dumps(result, indent=1) + "\n").encode())
    return found.step, metrics, summarize(rollouts)


def _checkpoint(run_dir: Path, path: str | None) -> Checkpoint:
    found = load_checkpoint(path) if path else load_latest(run_dir / "checkpoints")
    if found is None:
        raise FileNotFoundError(f"{run_dir / 'checkpoints'}: the run has no checkpoint yet")
    return found


@dataclasses.dataclass
class _Run:
    config: Config
    engine: TorchEngine
    parts: Parts
    loop: Loop
    logger: RunLogger | None  # the leader's
    progress: Progress
    run_dir: Path

    def to_the_end(self, *, fresh: bool) -> dict[str, float]:
        metrics: dict[str, float] = {}
        if fresh:
            metrics = self.evaluation(step=0)
            if metrics:
                self.record(0, metrics)
            self.save()
        while self.loop.steps_done < self.config.steps:
            metrics = self.loop.step()
            step = self.loop.steps_done
            last = step == self.config.steps
            if last or (self.config.eval.every and step % self.config.eval.every == 0):
                metrics |= self.evaluation(step)
            self.record(step, metrics)
            if last or (self.config.checkpoint.every and step % self.config.checkpoint.every == 0):
                self.save()
        return metrics

    def record(self, step: int, metrics: dict[str, float]) -> None:
        if self.logger is not None:
            self.logger.log(step, metrics)
        self.progress.update(step, metrics)

    def save(self) -> None:
        self.progress.phase("checkpoint")
        self.engine.save(
            self.run_dir / "checkpoints",
            self.loop.steps_done,
            self.parts,
            self.loop.state_dict(),
            self.config.checkpoint.keep,
        )

    def evaluation(self, step: int) -> dict[str, float]:
        settings = self.config.eval
        if settings.prompts == 0:
            return {}
        self.progress.phase("eval")
        metrics, rollouts = evaluate(
            self.loop.sampler,
            self.loop.stream.held_out(settings.prompts),
            self.loop.score,
            settings=settings,
            max_response_length=self.config.rollout.max_response_length,
            seed=derived_seed(self.config.seed, _EVAL_SEED),  # the same draws at every step: less noise in the curve
        )
        if self.engine.leads:
            _write_samples(self.run_dir / "samples" / f"step_{step}.jsonl", rollouts)
        return metrics


def _claim(run_dir: Path, config: Config, resume: str) -> None:
    """Makes the folder this run's, or checks that it already is."""
    path = run_dir / "config.yaml"
    if not path.exists():
        save_config(config, path)
        return
    if resume == "never":
        raise ConfigError(f"run_dir: {run_dir} holds a run already; choose another folder, or drop --resume never")
    before, now = (_leaves(dataclasses.asdict(c)) for c in (load_config(path), config))
    different = [key for key in before | now if before.get(key) != now.get(key) and not key.startswith(_FREE_KEYS)]
    if different:
        lines = "\n".join(f"  {key}: was {before.get(key)!r}, is {now.get(key)!r}" for key in different)
        raise ConfigError(
            f"run_dir: {run_dir} holds a run of another recipe; choose another folder or restore these keys:\n{lines}"
        )
    save_config(config, path)


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The tree's values under dotted keys."""
    found = {}
    for key, value in tree.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _write_samples(path: Path, rollouts: list[Rollout], limit: int = 64) -> None:
    """A few scored responses to read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "prompt": [m["content"] for m in r.prompt.example.prompt],
            "response": r.text,
            "ground_truth": r.prompt.example.ground_truth,
            "reward": r.reward,
            "finished": r.finished,
        }
        for r in rollouts[:limit]
    ]
    replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
