"""The interfaces of the trainer's parts: an actor, a sampler, and the backend that builds both.

The loop (entcov/rl/loop.py) drives an `Actor` and a `Sampler`; a run (entcov/rl/run.py) is built and stored by a
`Backend`. With several processes every one of them runs the same code: a method that is called collective must be
called by all of them, with the same arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, Protocol, TypedDict, TypeVar

from torch import Tensor, nn

from entcov.controls import Control, Selection
from entcov.objective.tokens import PolicyLossConfig
from entcov.rl.batch import Batch
from entcov.rl.config import ActorConfig, Config, ModelConfig, PrimeConfig, RolloutConfig
from entcov.rl.record.checkpoint import Checkpoint
from entcov.rl.rewards.rules import RewardFunction
from entcov.rl.types import Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

T = TypeVar("T")
NamedWeights = Callable[[], Iterator[tuple[str, Tensor]]]  # (name in a Hugging Face checkpoint, whole weight)


class PolicyStats(TypedDict):
    """Statistics of the policy at the tokens of a batch: [N] float32 on the host, nats, 0 outside `loss_mask`."""

    logprob: Tensor
    entropy: Tensor
    entropy_drift: Tensor
    collision: NotRequired[Tensor]  # sum of the squared probabilities; no unit. Read by one advantage estimator
    clamped_entropy: NotRequired[Tensor]  # where a control needs it
    ref_logprob: NotRequired[Tensor]  # of the reference policy, where there is one


class Actor(Protocol):
    """Owns the policy's weights and its optimizer. Batches come on the host, whole, in every process (in memory that
    the processes of a node share)."""

    weight_version: int  # optimizer steps taken
    # Called in `update` with a control's name, the token_id of the loss tokens of a micro-batch, and its selection of
    # them, for every micro-batch of this process. Set by the loop; None: nobody asks.
    on_selection: Callable[[str, Tensor, Selection], None] | None

    def once_a_node(self, make: Callable[[], T]) -> T:
        """`make()` of one process of each node, in all of its processes, which share the tensors' memory. Collective.

        `make` calls no collective, and what it changes is changed in that process alone; so its value, which must
        pickle where there are several processes, has all that the others need. An error of `make` is an error in all.
        """

    def compute_logprobs(self, batch: Batch) -> PolicyStats:
        """Statistics of the current policy, without gradient. Collective; every rank gets the whole batch's."""

    def compute_entropy(self, batch: Batch, *, temperature: float) -> Tensor:
        """[N] float32, nats: the entropy of the current policy's softmax(logits / temperature), 0 outside the mask.

        Collective; every rank gets the whole batch's.
        """

    def update(self, batch: Batch, *, step: int) -> dict[str, float]:
        """One optimizer step on a mini-batch; returns its metrics. Collective.

        Args:
            batch: with `old_logprob`, and `ref_logprob` where there is a reference policy.
            step: the loop's step, counted from 1: of the warm-up of the learning rate, and for messages.

        Raises:
            RuntimeError: the gradient norm is not finite; nothing was updated.
        """

    def anywhere(self, mask: Tensor) -> Tensor:
        """[n] bool on the host: where one process or more has True in `mask`, which is of the same n tokens in each.

        Collective.
        """

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight, whole, for samplers that keep a copy. Collective: every rank iterates to the end."""

    def state_dict(self) -> dict[str, Any]:
        """What state.pt of a checkpoint keeps of the actor. `Backend.save` stores the weights."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class RewardModel(Protocol):
    """Owns a second model that is trained beside the policy and gives every token a reward."""

    weight_version: int  # optimizer steps taken

    def token_rewards(self, batch: Batch, *, step: int) -> tuple[Tensor, dict[str, float]]:
        """([N] float32 rewards, 0 where `batch.loss_mask` is False; metrics). It may train on the batch. Collective.

        Args:
            batch: the whole scored rollout.
            step: the loop's step, for messages.

        Raises:
            RuntimeError: the gradient norm is not finite.
        """

    def state_dict(self) -> dict[str, Any]:
        """What state.pt of a checkpoint keeps of it. `Backend.save` stores the weights."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Sampler(Protocol):
    """Samples responses from the policy, and records each token's log-probability under it."""

    def sync(self, weight_version: int, named_weights: NamedWeights) -> None:
        """Takes over the actor's weights; must be called before the first `generate`. Collective."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        temperature: float | Sequence[float],
        max_response_length: int,
        seed: int,
        top_p: float = 1.0,
        top_k: int = 0,
        progress: Callable[[int, int], None] | None = None,
        on_done: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        """`group_size` responses to each prompt, prompt by prompt. Collective.

        Args:
            temperature: of all prompts, or one a prompt. The policy is softmax(logits / temperature); 0 takes the
                likeliest token, with the log-probability of softmax(logits).
            seed: fixes every draw.
            top_p, top_k: for evaluations. Tokens are drawn from the `top_k` likeliest (0: from all), and of these from
                the fewest that hold `top_p` of their probability (1: from all). The recorded log-probability is that
                of what is left, renormalised: it is not the policy's, so such responses must not be trained on.
            progress: called with (responses done, responses in all).
            on_done: called with each response as soon as it is complete, in no particular order. A sampler over
                several processes computes the rewards itself and does not call it.
        """

    def sleep(self, *, sync_follows: bool) -> None:
        """Gives back what memory it can until it is called again; called when a step's responses are all here, and
        after those of an evaluation. Collective.

        Args:
            sync_follows: promises that the next call is `sync`, so that its weights may be dropped.
        """

    def prompt_logprobs(self, prompts: Sequence[Prompt]) -> list[list[float]]:
        """Log-probability of each prompt's tokens but the first, nats: of softmax(logits) of the weights that sample.

        Collective; equal on all ranks.
        """


@dataclass(frozen=True)
class Start:
    """Where the weights of a run come from: of a fresh one from the recipe, else from a checkpoint."""

    model: ModelConfig
    seed: int  # of random weights
    run_dir: Path
    checkpoint: Checkpoint | None  # None: the run is fresh
    warm_start: Callable[[nn.Module], None] | None  # trains a fresh policy on worked solutions, in place
    reference: bool = False  # whether more than the loss and the controls compares with the reference policy

    @property
    def stored_model(self) -> ModelConfig:
        """The recipe's model, with the weights and the tokenizer of the checkpoint if there is one."""
        return self.model if self.checkpoint is None else self.model.in_folder(self.checkpoint.path / "model")


A = TypeVar("A", bound=Actor)
R = TypeVar("R", bound=RewardModel)


class Backend(Protocol[A, R]):
    """What trains: transformers in one process, or Megatron-Core in many. Rank 0 alone logs, displays and writes."""

    name: str  # the value of `actor.backend`
    is_rank0: bool
    world_size: int

    def broadcast_from_rank0(self, make: Callable[[], T]) -> T:
        """`make()` of rank 0, on every rank; an error there is an error everywhere. Collective."""

    def max_over_ranks(self, value: int) -> int:
        """The greatest of all ranks' values, on every rank. Collective."""

    def check(self, config: Config) -> None:
        """Raises for a recipe that cannot be run, before anything is written. Collective."""

    def build_actor(
        self, config: ActorConfig, loss: PolicyLossConfig, controls: Sequence[Control], temperature: float, start: Start
    ) -> A:
        """The actor of a fresh run, warm-started, or with the weights of the start's checkpoint. Collective."""

    def build_reward_model(self, config: PrimeConfig, start: Start, actor: A) -> R:
        """PRIME's reward model, of a fresh run (before the actor's first step) or of the checkpoint. Collective."""

    def build_sampler(
        self, config: RolloutConfig, max_prompt_length: int, start: Start, actor: A, tokenizer: Tokenizer,
        reward_fn: RewardFunction,
    ) -> Sampler:  # fmt: skip
        """The sampler that `rollout.sampler` names. Collective."""

    def save(
        self, directory: Path, step: int, actor: A, reward_model: R | None, tokenizer: Tokenizer,
        state: dict[str, Any], keep: int,
    ) -> None:  # fmt: skip
        """Stores a checkpoint as `save_checkpoint` does; `state` is rank 0's. Collective."""

    def close(self) -> None:
        """Ends the connections of the backend's processes, after a run that went well. Collective."""
