"""Trains a recipe, resumes it where it stopped, and evaluates the policy of a run."""

import dataclasses
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from entcov.objective.tokens import PolicyLossConfig
from entcov.rl.backend import TransformersBackend
from entcov.rl.collect import derived_seed
from entcov.rl.config import Config
from entcov.rl.data.stream import PromptStream
from entcov.rl.evaluation import SourceResult, evaluate, response_entropy, summarize
from entcov.rl.hf.model_config import model_tokenizer
from entcov.rl.hf.warm_start import warm_started
from entcov.rl.interfaces import Backend, Start
from entcov.rl.interrupts import Interrupts
from entcov.rl.loop import Loop
from entcov.rl.recipe import ConfigError
from entcov.rl.record.checkpoint import Checkpoint, load_checkpoint, load_latest, make_latest
from entcov.rl.record.law_metrics import LawMetrics
from entcov.rl.record.metrics import RunLogger, read_metrics
from entcov.rl.record.progress import Progress
from entcov.rl.record.run_folder import (
    SAMPLES,
    check_resume,
    has_begun,
    held,
    keep_evaluation,
    prepare_folder,
    write_samples,
)
from entcov.rl.record.token_record import FOLDER, TokenRecord
from entcov.rl.rewards.rules import load_reward
from entcov.rl.solve_counts import write_solve_counts
from entcov.rl.types import Rollout

_COMMANDS = {
    "transformers": "Start it with: python -m entcov train RECIPE",
    "megatron": "Start it with: torchrun --nproc-per-node=N -m megatron_integration train RECIPE",
}
_EVAL_SEED = 1 << 40  # no step has this number


def build(
    config: Config,
    backend: Backend,
    checkpoint: Checkpoint | None,
    *,
    phase: Callable[[str], None] = lambda name: None,
    on_warm_start: Callable[[int, float], None] = lambda done, loss: None,
) -> Loop:
    """Builds the actor, the sampler and the data of a run, fresh or with the weights of `checkpoint`. Collective.

    Args:
        phase: called with the name of each phase, here and in the loop.
        on_warm_start: called with (steps done, loss in nats).
    """
    if checkpoint is None and config.warm_start.steps:
        phase("warm start")

    def warm_start(policy: nn.Module) -> None:
        warm_started(policy, stream=stream, config=config, on_step=on_warm_start)

    start = Start(
        config.model, config.seed, Path(config.run_dir), checkpoint, warm_start if config.warm_start.steps else None,
        reference=config.kl_in_reward.coef > 0,
    )  # fmt: skip
    tokenizer = model_tokenizer(start.stored_model)
    stream = PromptStream.from_config(config.data, tokenizer, seed=config.seed)
    controls, reward_fn = config.build_controls(), load_reward(config.data.reward)
    actor = backend.build_actor(config.actor, config.loss, controls, config.rollout.temperature, start)
    sampler = backend.build_sampler(config.rollout, config.data.max_prompt_length, start, actor, tokenizer, reward_fn)
    reward_model = None
    if "token_reward" in config.build_estimator().needs:
        reward_model = backend.build_reward_model(config.prime, start, actor)
    return Loop(
        config, actor, sampler, stream, controls, reward_fn, reward_model, phase=phase,
        shapings=config.build_reward_shapings(), prompt_policy=config.build_prompt_policy(),
    )  # fmt: skip


def train(
    config: Config, *, resume: str = "auto", display: bool | str = "auto", backend: Backend | None = None
) -> dict[str, float]:
    """Runs the recipe in `config.run_dir` to its last step, from the latest checkpoint if there is one.

    Args:
        resume: "auto" resumes from the latest checkpoint, a checkpoint's path from that one; "never" refuses a folder
            that holds a run already.
        display: passed to `Progress`.
        backend: what trains; default: transformers in this process. Every process of a larger backend calls `train`
            with the same arguments.

    Returns:
        The last step's metrics, evaluation included.

    Raises:
        ConfigError: the folder holds a run of another recipe; the message lists the keys that differ. Or the recipe
            names another backend than the one given.
        RuntimeError: another process runs in the folder.
        KeyboardInterrupt: Ctrl-C or SIGTERM, whose number is its argument. Between the first step and the last it comes
            when a step is done and stored.
    """
    backend = backend or TransformersBackend(config.device)
    if config.actor.backend != backend.name:
        raise ConfigError(
            f"actor.backend: {config.actor.backend} was asked for, and this command runs {backend.name}. "
            + _COMMANDS[config.actor.backend]
        )
    run_dir = Path(config.run_dir)
    if not has_begun(run_dir):  # a run that began has been checked
        backend.check(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    with Interrupts(tells=backend.is_rank0) as interrupts, ExitStack() as stack:

        def take() -> Checkpoint | None:
            check_resume(run_dir, resume)
            stack.enter_context(held(run_dir))
            return prepare_folder(run_dir, config, resume)

        checkpoint = backend.broadcast_from_rank0(take)
        logger = None
        if backend.is_rank0:
            logger = RunLogger(
                run_dir,
                tensorboard=config.logging.tensorboard,
                wandb=config.logging.wandb,
                resume_step=-1 if checkpoint is None else checkpoint.step,  # -1: nothing is stored yet, start over
            )
            stack.enter_context(logger)
            if checkpoint is not None:
                make_latest(checkpoint)
        enabled = display if backend.is_rank0 else False
        progress = stack.enter_context(Progress(config.steps, run_dir.name, enabled=enabled))
        steps = config.warm_start.steps
        loop = build(
            config, backend, checkpoint, phase=progress.phase,
            on_warm_start=lambda done, loss: progress.sub_bar(done, steps, f"loss {loss:.3f} nats"),
        )  # fmt: skip
        if config.token_record.max_mb:
            loop.token_record = _token_record(config, loop, run_dir if backend.is_rank0 else None)
            if backend.is_rank0:
                loop.token_record.go_back(-1 if checkpoint is None else checkpoint.step)
        return _Run(config, backend, loop, logger, progress, interrupts).to_the_end(checkpoint)


def _token_record(config: Config, loop: Loop, run_dir: Path | None) -> TokenRecord:
    """`run_dir` is None on processes that do not write."""
    return TokenRecord(
        run_dir and run_dir / FOLDER, loop.stream.tokenizer, every=config.token_record.every,
        eval_every=config.eval.every, max_bytes=config.token_record.max_mb * 10**6, steps=config.steps,
    )  # fmt: skip


def evaluate_run(
    config: Config,
    *,
    checkpoint: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    backend: Backend | None = None,
    on_unkept: Callable[[OSError], None] | None = None,
) -> tuple[int, dict[str, float], list[SourceResult]]:
    """Held-out accuracy of the policy in `config.run_dir`, with the settings of `config.eval`.

    Args:
        checkpoint: path of one; default: the run's latest.
        progress: passed to `evaluate`, on rank 0.
        backend: what the policy runs on; default: transformers in this process, whatever backend trained it. Another
            must be the one that trained, and every process of it makes the call.
        on_unkept: called with the error if the results cannot be written; they are still returned. None: raise it.

    Returns:
        The checkpoint's step, the metrics of `evaluate`, and the results by data source. The metrics and all responses
        are also kept under RUN/eval.

    Raises:
        FileNotFoundError: the run has no checkpoint.
        OSError: the results cannot be written, e.g. on a read-only disk, and `on_unkept` is not given.
    """
    if config.eval.prompts == 0:
        raise ConfigError("eval.prompts: must be at least 1, or null for all of data.val_files, to evaluate; got 0")
    backend = backend or TransformersBackend(config.device)
    run_dir = Path(config.run_dir)
    found = backend.broadcast_from_rank0(lambda: _checkpoint(run_dir, checkpoint))
    loop = build(for_sampling(config), backend, found)
    metrics, rollouts = _evaluate(config, loop, progress=progress if backend.is_rank0 else None)
    results = summarize(rollouts)
    if backend.is_rank0:
        result = {"step": found.step, "settings": dataclasses.asdict(config.eval), "metrics": metrics}
        result["solve_counts"] = {row.source: row.solved.state_dict() for row in results}
        try:
            keep_evaluation(run_dir, found.step, result, rollouts)
        except OSError as error:
            if on_unkept is None:
                raise
            on_unkept(error)
    return found.step, metrics, results


def for_sampling(config: Config) -> Config:
    """The recipe without what only training needs: neither the reference policy nor a reward model is loaded."""
    loss = dataclasses.replace(config.loss, kl_weight="none", kl_coef=0.0, kl_estimator=PolicyLossConfig.kl_estimator)
    return dataclasses.replace(
        config, loss=loss, kl_in_reward=type(config.kl_in_reward)(), control=[], reward_shaping=[], prompt_policy=None,
        advantage=Config.advantage,
    )  # fmt: skip


def _checkpoint(run_dir: Path, path: str | None) -> Checkpoint:
    found = load_checkpoint(path) if path else load_latest(run_dir / "checkpoints")
    if found is None:
        raise FileNotFoundError(f"{run_dir / 'checkpoints'}: the run has no checkpoint yet")
    return found


def _evaluate(
    config: Config, loop: Loop, progress: Callable[[int, int], None] | None = None
) -> tuple[dict[str, float], list[Rollout]]:
    at_once = config.rollout.prompts_per_step * config.rollout.group_size
    return evaluate(
        loop.sampler,
        loop.stream.held_out(config.eval.prompts),
        loop.reward_fn,
        settings=config.eval,
        max_response_length=config.rollout.max_response_length,
        seed=derived_seed(config.seed, _EVAL_SEED),  # the same draws at every step: less noise in the curve
        progress=progress,
        entropy_of=partial(response_entropy, loop.actor, at_once=at_once) if config.eval.entropy else None,
    )


@dataclass
class _Run:
    """Runs the loop to its last step: logs metrics, evaluates and stores checkpoints, also where the run ends early."""

    config: Config
    backend: Backend
    loop: Loop
    logger: RunLogger | None  # rank 0's
    progress: Progress
    interrupts: Interrupts
    recorded: int = -1  # the last step with metrics
    stored: int = -1  # the step of the latest checkpoint
    law: LawMetrics = dataclasses.field(default_factory=LawMetrics)  # rank 0's

    def to_the_end(self, checkpoint: Checkpoint | None) -> dict[str, float]:
        metrics: dict[str, float] = {}
        if checkpoint is not None:
            self.loop.load_state_dict(checkpoint.state)
            self.recorded = self.stored = checkpoint.step
            if self.logger is not None:  # the record ends at the checkpoint now
                self.law = LawMetrics(read_metrics(self.config.run_dir))
        else:
            # Reinforcement starts after the prompts that the warm start has shown the solutions of.
            self.loop.position = self.config.warm_start.steps * self.config.warm_start.batch_size
            metrics = self.evaluation(step=0)
            if metrics:
                self.record(0, metrics)
            self.save()
        self.interrupts.waits_for_step = True
        while self.loop.steps_done < self.config.steps:
            metrics = self.step()
            step = self.loop.steps_done
            last = step == self.config.steps
            stop = self.backend.max_over_ranks(self.interrupts.received)  # ranks receive a signal at different moments
            if last or stop or (self.config.checkpoint.every and step % self.config.checkpoint.every == 0):
                self.save()
            if stop and not last:
                raise KeyboardInterrupt(stop)
        return metrics

    def step(self) -> dict[str, float]:
        """One step with its evaluation and log line. If it fails, the last whole step is stored where possible."""
        metrics: dict[str, float] = {}
        try:
            metrics = self.loop.step()
            step = self.loop.steps_done
            if self.loop.watched is not None:
                self.loop.token_record.keep_step(step, self.loop.watched)
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
        elif self.backend.world_size > 1:
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
        if self.backend.is_rank0:
            print(text, file=sys.stderr)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        if self.logger is not None:
            metrics |= self.law.observe(step, metrics)
            self.logger.log(step, metrics)
        self.recorded = step
        self.progress.update(step, metrics)

    def save(self, more: int = 0) -> None:
        self.progress.phase("checkpoint")
        step, loop = self.loop.steps_done, self.loop
        folder, keep = Path(self.config.run_dir) / "checkpoints", self.config.checkpoint.keep + more
        models = loop.actor, loop.reward_model
        self.backend.save(folder, step, *models, loop.stream.tokenizer, loop.state_dict(), keep)
        self.stored = step

    def evaluation(self, step: int) -> dict[str, float]:
        if self.config.eval.prompts == 0:
            return {}
        self.progress.phase("eval")
        metrics, rollouts = _evaluate(self.config, self.loop)
        if self.backend.is_rank0:
            write_samples(Path(self.config.run_dir) / SAMPLES / f"step_{step}.jsonl", rollouts)
            write_solve_counts(Path(self.config.run_dir), step, rollouts)
        longest = self.config.data.max_prompt_length + self.config.rollout.max_response_length
        if self.loop.token_record is not None and longest <= self.config.actor.micro_batch_tokens:
            self.loop.token_record.keep_evaluation(step, rollouts, self.loop.actor)
        return metrics
