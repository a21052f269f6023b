"""The trainer's own code on a policy of four numbers: what it does with files, without what takes time."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
from torch import nn

from entcov.rl.backend import TransformersBackend, reference_policy
from entcov.rl.config import Config
from entcov.rl.interfaces import Start
from entcov.rl.load_config import parse_config
from entcov.rl.record.checkpoint import save_checkpoint
from entcov.rl.run import train
from entcov.rl.types import Rollout
from tests.support.tiny_run import recipe, timeless, token_files


def toy_config(run_dir: Path, **overrides) -> Config:
    settings = {
        "steps": 2,
        "warm_start": {"steps": 0},
        "rollout": {"prompts_per_step": 2, "group_size": 2, "max_response_length": 4},
        "actor.updates_per_rollout": 1,
        "eval": {"every": 1, "prompts": 2, "samples": 1},
        "checkpoint": {"every": 1, "keep": 1},
        "loss": {"kl_coef": 0.1},  # so that there is a reference policy to keep
    }
    return parse_config(recipe(run_dir, **settings | overrides))


def toy_train(run_dir: Path, backend: ToyBackend | None = None, **overrides) -> None:
    with (  # the toy's checkpoints have no tokenizer, and its rewards come from its texts
        mock.patch.object(Start, "stored_model", property(lambda start: start.model)),
        mock.patch("entcov.rl.run.load_reward", lambda spec: reward),
    ):
        train(toy_config(run_dir, **overrides), display=False, backend=backend or ToyBackend())


def outcome(run_dir: Path) -> tuple:
    """Everything that a finished run must have in common with another of the same recipe."""
    name = (run_dir / "checkpoints" / "latest").read_text().strip()
    weights = (run_dir / "checkpoints" / name / "model").read_bytes()
    samples = {path.name: path.read_bytes() for path in (run_dir / "samples").iterdir()}
    return timeless(run_dir), name, weights, samples, token_files(run_dir)


def unfinished(run_dir: Path) -> list[Path]:
    """What carries a temporary name."""
    return [path for path in run_dir.rglob(".*") if path.name.startswith((".tmp_", ".old_", ".probe"))]


class ToyBackend(TransformersBackend):
    """One process, one linear layer. Tests replace `sampler` and `actor` to make them fail."""

    def build_actor(self, config, loss, controls, temperature, start: Start) -> ToyActor:
        model = nn.Linear(4, 1, bias=False)
        nn.init.constant_(model.weight.requires_grad_(False), 0.5)
        if start.checkpoint is not None:
            weights = torch.frombuffer(bytearray(start.checkpoint.file("model").read_bytes()), dtype=torch.float32)
            model.weight.data = weights.view(1, 4)
        reference = reference_policy(model, start.run_dir, fresh=start.checkpoint is None)
        return self.actor(ToyActor(model, reference))

    def build_sampler(self, config, max_prompt_length, start, actor, tokenizer, reward_fn) -> ToySampler:
        return self.sampler(ToySampler())

    def save(self, directory, step, actor, reward_model, tokenizer, state, keep) -> None:
        writers = {"model": lambda path: path.write_bytes(actor.model.weight.numpy().tobytes())}
        save_checkpoint(directory, step, writers, state, keep)

    def actor(self, actor: ToyActor) -> ToyActor:
        return actor

    def sampler(self, sampler: ToySampler) -> ToySampler:
        return sampler


class ToySampler:
    def sync(self, weight_version, named_weights) -> None:
        self.version = weight_version

    def sleep(self, *, sync_follows) -> None: ...

    def generate(self, prompts, *, group_size, seed, **settings) -> list[Rollout]:
        out = []
        for prompt in prompts:
            for sample in range(group_size):
                tokens = [1 + (seed + prompt.uid + sample) % 7, 2]
                out.append(Rollout(prompt, sample, tokens, [-1.0, -1.0], True, self.version, text=str(tokens[0])))
        return out


class ToyActor:
    def __init__(self, model: nn.Module, reference: nn.Module | None):
        self.model, self.reference, self.weight_version, self.momentum = model, reference, 0, torch.zeros(4)

    def once_a_node(self, make):
        return make()

    def anywhere(self, mask):
        return mask

    def named_weights(self):
        return iter(self.model.state_dict().items())

    def compute_logprobs(self, batch):
        values = {"logprob": -self._value(self.model), "entropy": 0.5, "entropy_drift": 0.1}
        values["ref_logprob"] = -self._value(self.reference)
        return {name: torch.full((len(batch.tokens),), value) * batch.loss_mask for name, value in values.items()}

    def update(self, batch, *, step) -> dict[str, float]:
        self.momentum = 0.9 * self.momentum + batch.tokens.sum() / 100 + (batch.old_logprob - batch.ref_logprob).sum()
        self.model.weight.data = self.model.weight.data - 0.01 * self.momentum
        self.weight_version += 1
        return {"actor/pg_loss": self._value(self.model)}

    def state_dict(self):
        return {"momentum": self.momentum, "weight_version": self.weight_version}

    def load_state_dict(self, state) -> None:
        self.momentum, self.weight_version = state["momentum"], state["weight_version"]

    def _value(self, model: nn.Module) -> float:
        return float(model.weight.sum())


def reward(example, response: str) -> float:
    return float(int(response) % 2)
