"""A run from recipe to results: sets the parts up, resumes what is there, drives the loop, evaluates, checkpoints."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import torch

from entcov.rl.config import Config, ConfigError
from entcov.rl.engine import Parts, TorchEngine
from entcov.rl.evaluation import SourceResult, evaluate, summarize
from entcov.rl.interrupts import Interrupts
from entcov.rl.loop import Loop
from entcov.rl.record.checkpoint import Checkpoint, load_checkpoint, load_latest, make_latest
from entcov.rl.record.metrics import RunLogger
from entcov.rl.record.progress import Progress
from entcov.rl.record.run_folder import SAMPLES, check_resume, has_begun, held, keep_evaluation, take_up, write_samples
from entcov.rl.rollouts import derived_seed

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
        RuntimeError: another process runs in the folder.
        KeyboardInterrupt: Ctrl-C or SIGTERM, whose number is its argument. Between the first step and the last it comes
            when a step is done and stored.
    """
    engine = engine or TorchEngine()
    if config.actor.engine != engine.name:
        raise ConfigError(
            f"actor.engine: {config.actor.engine} was asked for, and this command runs {engine.name}. "
            + _COMMANDS[config.actor.engine]
        )
    run_dir = Path(config.run_dir)
    if not has_begun(run_dir):  # a run that began has been checked
        engine.check(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    with Interrupts(tells=engine.leads) as interrupts, ExitStack() as stack:

        def take() -> Checkpoint | None:
            check_resume(run_dir, resume)
            stack.enter_context(held(run_dir))
            return take_up(run_dir, config, resume)

        checkpoint = engine.agree(take)
        if not engine.leads:
            progress = stack.enter_context(Progress(config.steps, run_dir.name, enabled=False))
            return _train(config, engine, checkpoint, run_dir, None, progress, interrupts)
        logger = RunLogger(
            run_dir,
            tensorboard=config.logging.tensorboard,
            wandb=config.logging.wandb,
            resume_step=-1 if checkpoint is None else checkpoint.step,  # -1: nothing is stored yet, start over
        )
        stack.enter_context(logger)
        if checkpoint is not None:
            make_latest(checkpoint)
        progress = stack.enter_context(Progress(config.steps, run_dir.name, enabled=display))
        return _train(config, engine, checkpoint, run_dir, logger, progress, interrupts)


def _train(
    config: Config,
    engine: TorchEngine,
    checkpoint: Checkpoint | None,
    run_dir: Path,
    logger: RunLogger | None,
    progress: Progress,
    interrupts: Interrupts,
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
    run = _Run(config, engine, parts, loop, logger, progress, run_dir, interrupts)
    if checkpoint is not None:
        run.recorded = run.stored = checkpoint.step
    return run.to_the_end(fresh=checkpoint is None)


def evaluate_run(
    config: Config,
    *,
    checkpoint: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    engine: TorchEngine | None = None,
    on_unkept: Callable[[OSError], None] | None = None,
) -> tuple[int, dict[str, float], list[SourceResult]]:
    """Held-out accuracy of the policy in `config.run_dir`, with the settings of `config.eval`.

    Args:
        checkpoint: path of one; default: the run's latest.
        progress: passed to `evaluate`.
        engine: what the policy runs on; default: this process with torch, whatever engine trained it. Another must be
            the one that trained, and every process of it makes the call.
        on_unkept: told why the results could not be written, which are returned all the same; default: that is raised.

    Returns:
        The checkpoint's step, the metrics of `evaluate`, and the results by data source. The metrics and all responses
        are also kept under RUN/eval.

    Raises:
        FileNotFoundError: the run has no checkpoint.
        OSError: the results cannot be written, e.g. on a read-only disk, and `on_unkept` is not given.
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
    result = {"step": found.step, "settings": dataclasses.asdict(config.eval), "metrics": metrics}
    try:
        keep_evaluation(run_dir, found.step, result, rollouts)
    except OSError as error:
        if on_unkept is None:
            raise
        on_unkept(error)
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
    interrupts: Interrupts
    recorded: int = -1  # the last step with metrics
    stored: int = -1  # the step of the latest checkpoint

    def to_the_end(self, *, fresh: bool) -> dict[str, float]:
        metrics: dict[str, float] = {}
        if fresh:
            metrics = self.evaluation(step=0)
            if metrics:
                self.record(0, metrics)
            self.save()
        self.interrupts.waits_for_step = True
        while self.loop.steps_done < self.config.steps:
            metrics = self.step()
            step = self.loop.steps_done
            last = step == self.config.steps
            stop = self.engine.greatest(self.interrupts.received)  # it strikes the processes at different moments
            if last or stop or (self.config.checkpoint.every and step % self.config.checkpoint.every == 0):
                self.save()
            if stop and not last:
                raise KeyboardInterrupt(stop)
        return metrics

    def step(self) -> dict[str, float]:
        """One step, evaluated and recorded; whatever ends the run in it, what was done before is kept if possible."""
        metrics: dict[str, float] = {}
        try:
            metrics = self.loop.step()
            step = self.loop.steps_done
            if step == self.config.steps or (self.config.eval.every and step % self.config.eval.every == 0):
                metrics |= self.evaluation(step)
            self.record(step, metrics)
            return metrics
        except BaseException as error:
            if self.loop.steps_done > self.stored:
                self.keep_last(metrics)
            if self.interrupts.received and isinstance(error, Exception):
                self.say(f"the run was to stop, and failed before it could: {error}")
                raise KeyboardInterrupt(self.interrupts.received) from error
            raise

    def keep_last(self, metrics: dict[str, float]) -> None:
        """Stores the last whole step of a run that is ending early, or says why that cannot be done."""
        done, before = self.loop.steps_done, self.stored
        if self.interrupts.at_once:
            reason = "a second interrupt does not wait for a checkpoint"
        elif self.engine.processes > 1:
            reason = "a checkpoint needs every process, and they have not all come to the same point"
        elif self.loop.unstorable:
            reason = self.loop.unstorable
        else:
            if self.recorded < done:  # its evaluation has failed, or its line in the record
                with suppress(Exception):
                    self.record(done, metrics)
            try:
                self.save(more=1)  # the state may be what made the run fail: nothing earlier is removed for it
                self.say(f"the state after step {done} is stored")
                return
            except Exception as error:
                reason = f"storing the state failed: {error}"
        steps = f"step {done} is" if done == before + 1 else f"steps {before + 1} to {done} are"
        self.say(f"{steps} lost: {reason}. The latest checkpoint is that of step {before}")

    def say(self, text: str) -> None:
        if self.engine.leads:
            print(text, file=sys.stderr)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        if self.logger is not None:
            self.logger.log(step, metrics)
        self.recorded = step
        self.progress.update(step, metrics)

    def save(self, more: int = 0) -> None:
        self.progress.phase("checkpoint")
        self.engine.save(
            self.run_dir / "checkpoints",
            self.loop.steps_done,
            self.parts,
            self.loop.state_dict(),
            self.config.checkpoint.keep + more,
        )
        self.stored = self.loop.steps_done

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
            write_samples(self.run_dir / SAMPLES / f"step_{step}.jsonl", rollouts)
        return metrics
