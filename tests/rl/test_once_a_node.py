"""A step in a process that gets what another one made: the same state as in that one, without the work."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass, field

import torch
from torch import Tensor

from entcov.controls import Control, Shaping
from entcov.rl.evaluation import response_entropy
from entcov.rl.load_config import parse_config
from entcov.rl.loop import Loop
from entcov.rl.record.token_record import TokenRecord
from tests.support.scripted_loop import Actor, Sampler, Stream, reward
from tests.support.tiny_run import recipe


@dataclass
class Leader(Actor):
    """Keeps what it made, as it travels to other processes."""

    made: list[bytes] = field(default_factory=list)

    def once_a_node(self, make):
        self.made.append(pickle.dumps(make()))
        return pickle.loads(self.made[-1])

    def compute_logprobs(self, batch):
        scored = super().compute_logprobs(batch)
        return scored | {"ref_logprob": scored["logprob"] - 0.25}

    def compute_entropy(self, batch, *, temperature):
        return self.compute_logprobs(batch)["entropy"]


class Follower(Leader):
    """Gets what the leader has `made`, and makes nothing."""

    def once_a_node(self, make):
        return pickle.loads(self.made.pop(0))


class Remembering(Control):
    """Decides in `begin` what it needs later: a number that is stored, and a tensor that is not."""

    name, state = "remembering", ("coef",)

    def __init__(self):
        self.coef, self.updates = 0.0, []

    def begin(self, rollout, progress):
        self.coef += float(rollout.advantage.abs().sum())
        self.weights = rollout.entropy * 2
        return Shaping(drop=rollout.position == 1, metrics={"actor/remembered": self.coef})

    def after_update(self, means, progress):
        self.updates.append(float(self.weights.sum()) + means["entropy"])


def loop_of(actor: Actor) -> Loop:
    changes = {"rollout": {"prompts_per_step": 2, "group_size": 2}, "actor.updates_per_rollout": 2, "seed": 7}
    changes |= {"kl_in_reward": {"coef": 0.1, "target": 0.01}, "advantage": "grpo"}
    record = TokenRecord(None, None, every=1, eval_every=0, max_bytes=8_000_000, steps=3)
    config = parse_config(recipe("unused", **changes))
    return Loop(config, actor, Sampler(), Stream(), [Remembering()], reward, token_record=record)


def plain(value):
    """Tensors as lists, so that `==` compares; the timings left out."""
    if isinstance(value, Tensor):
        return [str(value.dtype), value.tolist()]
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items() if not name.startswith(("timing_s", "perf/"))}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return plain(vars(value)) if hasattr(value, "__dict__") else str(value)


def after_steps(loop: Loop) -> dict:
    found = {"metrics": [loop.step(), loop.step()]}
    watched = {"columns": loop.watched.columns, "chosen": loop.watched.chosen}
    found |= {"watched": watched, "controls": loop.controls, "updates": loop.actor.updates, "state": loop.state_dict()}
    return plain(found | {"kl_reward_coef": loop.kl_reward_coef})


def test_a_follower_ends_every_step_in_the_leader_s_state():
    leader, alone = Leader(), Leader()
    alone.once_a_node = lambda make: make()
    ours = after_steps(loop_of(leader))
    follower = Follower(made=list(leader.made))
    assert after_steps(loop_of(follower)) == ours == after_steps(loop_of(alone))
    assert follower.made == [] and len(leader.made) == 2 * 5  # batch, statistics, advantages, two mini-batches
    columns = ours["watched"]["columns"]
    assert {"advantage", "covariance", "entropy", "logprob", "logprob_after"} == columns.keys()
    assert any(ours["watched"]["chosen"]["dropped"][1]) and ours["kl_reward_coef"] != "0.1"
    assert float(ours["controls"][0]["coef"]) > 0 and len(ours["controls"][0]["updates"]) == 4
    assert not any(math.isnan(float(value)) for value in ours["metrics"][1].values())


def test_the_weights_that_give_nan_are_refused_by_a_follower_too():
    class Broken(Leader):
        def compute_logprobs(self, batch):
            return {name: torch.full_like(value, math.nan) for name, value in super().compute_logprobs(batch).items()}

    leader = Broken()
    said = refusal(loop_of(leader))
    follower = Follower(made=list(leader.made))
    assert said == refusal(loop_of(follower)) and "8 of 8 are not" in said[0] and "NaN" in said[1]
    assert follower.made == []


def refusal(loop: Loop) -> tuple[str, str]:
    try:
        loop.step()
    except RuntimeError as error:
        return str(error), loop.unstorable
    return "nothing", ""


def test_an_evaluation_s_entropy_is_computed_by_the_leader():
    leader, prompts = Leader(), Stream().take(0, 2)
    sampler = Sampler(takes_weights=False)
    rollouts = sampler.generate(prompts, group_size=2, temperature=1.0, max_response_length=8, seed=0)
    found = response_entropy(leader, rollouts, at_once=3)
    follower = Follower(made=list(leader.made))
    assert response_entropy(follower, rollouts, at_once=3) == found and follower.made == []
