"""The data of the trainer's loop, without behaviour: `Example -> Prompt -> Rollout`."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

RIGHT = 1.0  # the score of a right response


@dataclass(frozen=True)
class Example:
    """One dataset row, field for field verl's parquet row (`reward_model` flattened), plus an optional worked solution.

    `solution` is a text that earns reward 1; generators provide it for the supervised warm start, data files may.
    """

    data_source: str
    prompt: tuple[dict[str, str], ...]  # chat messages: {"role": ..., "content": ...}
    ground_truth: str
    ability: str = ""
    style: str = "rule"
    extra_info: dict[str, Any] = field(default_factory=dict)
    solution: str | None = None


@dataclass(frozen=True)
class Prompt:
    """An example at its place in the stream of training prompts, tokenised."""

    uid: int  # position in the stream; identifies the group of rollouts that share the prompt
    example: Example
    tokens: tuple[int, ...]
    row: int | None = None  # of the data set, the same in every epoch; None: a generated task has none


@dataclass(eq=False)
class Rollout:
    """One sampled response. `logprob[i]` is the sampler's log-probability of `tokens[i]` under the tempered policy.

    Both are arrays, often slices of those of many responses; any sequences of numbers are taken.
    """

    prompt: Prompt
    sample: int  # index inside the prompt's group, 0 <= sample < group size
    tokens: np.ndarray  # [n] int32: the response alone; ends in the end-of-sequence token when `finished`
    logprob: np.ndarray  # [n] float32, nats
    finished: bool  # False: cut off at the length limit
    weight_version: int  # number of optimizer steps the sampling weights had seen
    text: str = ""  # the response decoded, without the end-of-sequence token
    reward: float | None = None  # None: not scored yet
    timed_out: bool = False  # scored 0 because scoring took too long
    shaped_reward: float | None = None  # after reward shaping; None: not shaped
    components: dict[str, float] | None = None  # of the reward, where the reward function returns several
    baseline: float | None = None  # reward of a greedy response to the same prompt; None: not sampled
    lag: int = 0  # training steps by which the policy that trains on it is newer
    temperature: float | None = None  # that it was sampled at, where prompts have their own; None: the recipe's
    entropy: float | None = None  # the policy's at temperature 1, mean over `tokens`, nats; None: not measured

    def __post_init__(self) -> None:
        self.tokens = np.asarray(self.tokens, dtype=np.int32)
        self.logprob = np.asarray(self.logprob, dtype=np.float32)
