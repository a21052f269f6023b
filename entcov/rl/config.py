"""The keys of a recipe: one typed tree, whose values and combinations are checked when it is made."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import pydantic
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from entcov import arguments as check
from entcov.controls import CONTROLS, Control, check_composition, check_objective
from entcov.objective.advantages import ADVANTAGES, Estimator
from entcov.objective.kl_in_reward import KLInReward
from entcov.objective.mismatch import RolloutRejection
from entcov.objective.tokens import PolicyLossConfig
from entcov.registry import Registry
from entcov.rl.data.prompt_policy import PROMPT_POLICIES, PromptPolicy
from entcov.rl.recipe import naming
from entcov.rl.rewards.shaping import REWARD_SHAPINGS, Overlong, Reactivate, RewardShaping

T = TypeVar("T")
_STRICT = ConfigDict(extra="forbid")
_MOST = 2**31 - 1  # the largest size that all libraries below accept
# Strict: otherwise pydantic would accept true as 1 and "3" as 3.
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Share = Annotated[Number, Field(gt=0, le=1)]
Beta = Annotated[Number, Field(ge=0, lt=1)]
Count = Annotated[int, Field(strict=True, ge=1, le=_MOST)]
Whole = Annotated[int, Field(strict=True, ge=0, le=_MOST)]
Bytes = Annotated[int, Field(strict=True, ge=1)]
Text = Annotated[str, Field(min_length=1)]


@dataclass(config=_STRICT)
class ModelConfig:
    """Which policy is trained. Exactly one of `path` and `config` is given."""

    path: Text | None = None  # a folder or hub name that transformers' from_pretrained takes
    config: dict[str, Any] | None = None  # a transformers configuration with model_type: random weights from the seed
    tokenizer: Text | None = None  # "char" or a path; default: the model's path
    # Weights and optimizer are float32: at this trade's learning rates bfloat16 weights would round a step away.
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: forward and backward under autocast
    attn_implementation: Text = "sdpa"
    gradient_checkpointing: bool = False

    def __post_init__(self):
        if (self.path is None) == (self.config is None):
            both = "both" if self.path is not None else "neither"
            raise ValueError(f"exactly one of path and config must be given, got {both}")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("tokenizer must be given (char, or a path) where the model comes from config")

    def in_folder(self, folder: str | Path) -> ModelConfig:
        """The same with the weights and the tokenizer in `folder`."""
        return dataclasses.replace(self, path=str(folder), config=None, tokenizer=str(folder))


@dataclass(config=_STRICT)
class DataConfig:
    """Where prompts come from: a generated task, or files in verl's row format."""

    task: Text | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # the task's own arguments
    train_files: list[Text] = dataclasses.field(default_factory=list)
    val_files: list[Text] = dataclasses.field(default_factory=list)
    order: Literal["shuffled", "file"] = "shuffled"  # of train_files in each epoch; file: as written, a curriculum
    max_prompt_length: Count = 1024
    overlong: Literal["error", "filter"] = "error"  # longer prompts: refused, or left out and counted
    reward: Text | None = None  # "module:function" instead of the built-in rewards

    def __post_init__(self):
        if (self.task is None) == (not self.train_files):
            both = "both" if self.train_files else "neither"
            raise ValueError(f"exactly one of task and train_files must be given, got {both}")
        if self.task is not None and self.val_files:
            raise ValueError(
                "val_files: goes with train_files, a task has a held-out split of its own; got task "
                f"{self.task!r} and val_files {check.shown(self.val_files)}"
            )
        if self.task is not None and self.order != "shuffled":
            raise ValueError(f"order: goes with train_files, got task {self.task!r} and order {self.order!r}")
        if self.task is None and self.settings:
            raise ValueError(
                f"settings: are those of a task, got train_files and settings {check.shown(self.settings)}"
            )


@dataclass(config=_STRICT)
class WarmStartConfig:
    """Supervised steps on the task's worked solutions before reinforcement; 0 steps: none."""

    steps: Whole = 0
    batch_size: Count = 64
    lr: Positive = 1e-3
    warmup_steps: Whole = 20
    cache_dir: Text | None = None  # keeps the result, so that runs which differ only after the warm start share it


@dataclass(config=_STRICT)
class VllmConfig:
    """How rollout.sampler=vllm samples."""

    # colocated: in the trainer's processes and on their devices; server: a running server, see entcov.rl.vllm.server.
    mode: Literal["colocated", "server"] = "colocated"
    url: str | None = None  # of the server, such as http://node1:8000
    tensor_parallel: Count = 1  # processes that share an engine
    max_num_seqs: Count = 256  # sequences in a batch
    gpu_memory_utilization: Annotated[Positive, Field(le=1)] = 0.4  # fraction of a GPU that vLLM may fill
    kv_cache_memory_bytes: Bytes | None = None  # default: what is left of that; on CPU, room for max_num_seqs sequences
    # GPU: while the trainer works vLLM's cache is freed, and its weights are dropped or, if it is to sample with them
    # again, moved to the CPU's memory.
    sleep: bool = False
    enforce_eager: bool = False  # GPU: no compilation and no CUDA graphs; on CPU it is always so
    engine_args: dict[str, Any] = dataclasses.field(default_factory=dict)  # further arguments of vLLM's engine

    def __post_init__(self):
        if self.mode == "server" and self.url is None:
            raise ValueError("url: must be given for mode server (start one: python -m entcov.rl.vllm.server RECIPE)")
        if self.mode == "colocated" and self.url is not None:
            raise ValueError(f"url: belongs to mode server, got mode colocated and url {self.url!r}")
        if self.mode == "server" and self.sleep:
            raise ValueError("sleep: is for mode colocated, where vLLM shares the trainer's GPUs; got mode server")


@dataclass(config=_STRICT)
class RolloutConfig:
    sampler: Literal["in_process", "vllm"] = "in_process"  # in_process: the trainer's own model, nothing to install
    vllm: VllmConfig = dataclasses.field(default_factory=VllmConfig)
    prompts_per_step: Count = 64
    group_size: Count = 8
    temperature: Positive = 1.0
    max_response_length: Count = 1024
    batch_size: Count = 256  # sequences that sampler in_process generates at once
    # Steps that rollouts may lag behind. 1: the next step's are sampled while the policy is being updated (vllm only).
    max_staleness: Annotated[Whole, Field(le=1)] = 0
    # Dynamic sampling (DAPO): groups of equal rewards have no gradient; draw until the step has enough others.
    filter_zero_variance: bool = False
    max_draws: Count = 10  # draws of prompts_per_step prompts in one step
    # Where they leave too few groups: end the run, as the scripts of DAPO and of Cui et al. do, or train on those.
    on_shortfall: Literal["raise", "accept"] = "raise"

    def __post_init__(self):
        if self.filter_zero_variance and self.group_size == 1:
            raise ValueError(
                "filter_zero_variance: needs group_size > 1, a group of one never differs; got group_size 1"
            )
        for key in ("max_draws", "on_shortfall"):
            value, default = getattr(self, key), getattr(RolloutConfig, key)
            if not self.filter_zero_variance and value != default:
                raise ValueError(
                    f"{key}: has no effect without filter_zero_variance, got {value} and filter_zero_variance false; "
                    f"set that to true, or leave {key} at {default}"
                )
        if not self.max_staleness:
            return
        if self.sampler == "in_process":
            raise ValueError("max_staleness: 1 needs sampler vllm; in_process samples from the weights being updated")
        if self.vllm.mode == "colocated" and (self.vllm.sleep or self.vllm.tensor_parallel > 1):
            raise ValueError(
                "max_staleness: 1 lets sampling and updating run side by side, so mode colocated needs sleep false and "
                f"tensor_parallel 1, got sleep {self.vllm.sleep}, tensor_parallel {self.vllm.tensor_parallel}"
            )


@dataclass(config=_STRICT)
class ActorConfig:
    # megatron: torchrun ... -m megatron_integration train RECIPE
    backend: Literal["transformers", "megatron"] = "transformers"
    lr: Positive = 1e-6
    warmup_steps: Whole = 0  # training steps (rollouts) of linear warm-up: step k has lr * min(1, k / warmup_steps)
    weight_decay: NonNegative = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    max_grad_norm: Positive = 1.0
    updates_per_rollout: Count = 8  # mini-batches a rollout batch is divided into, per epoch
    epochs: Count = 1
    micro_batch_tokens: Count = 16384  # budget of one forward-backward, padding included where there is any
    # No padding. A GPU in bfloat16 takes all sequences of a micro-batch in one row; elsewhere they go one by one.
    packing: bool = False


@dataclass(config=_STRICT)
class PrimeConfig:
    """The reward model of `advantage: prime`, see entcov/rl/reward_model.py. Defaults: the authors' settings."""

    path: Text | None = None  # its first weights, which are also what it is compared with; default: the policy's own
    beta_train: Positive = 0.05  # reward of a token = beta_train * (log pi_rm - log pi_ref)
    update: Literal["before", "after", "none"] = "before"  # its step, before or after the rewards are computed
    updates_per_rollout: Count = 1  # mini-batches a rollout batch is divided into. The authors' script: 4
    lr: Positive = 1e-6
    warmup_steps: Whole = 0
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 10.0


@dataclass(config=_STRICT)
class SourceEvalConfig:
    """How one data source is evaluated where it differs from the rest; None: as `eval` says."""

    samples: Count | None = None
    temperature: NonNegative | None = None
    top_p: Share | None = None
    top_k: Whole | None = None


class Sampling(NamedTuple):
    """How a held-out prompt is sampled: the keys of `EvalConfig` with the same names."""

    samples: int
    temperature: float
    top_p: float
    top_k: int


@dataclass(config=_STRICT)
class MegatronConfig:
    """How actor.backend=megatron divides the model. Data parallelism is what is left of the processes."""

    tensor_parallel: Count = 1
    pipeline_parallel: Count = 1
    context_parallel: Count = 1
    sequence_parallel: bool = False  # activations between the tensor-parallel regions are split along the sequence
    distributed_optimizer: bool = True  # optimizer state split over data-parallel ranks
    overlap: bool = False  # gradient reduction and parameter gathering go on during the passes
    recompute: Literal["none", "selective", "full"] = "none"  # activations computed again in the backward pass
    optimizer_offload: Fraction = 0.0  # fraction of the optimizer's state kept on the CPU
    # local: Megatron-Core's own layers with torch's attention, for a GPU without Transformer Engine; slower. A CPU has
    # no others.
    transformer_impl: Literal["transformer_engine", "local"] = "transformer_engine"
    # What the covariance controls select by on the first update of a rollout, where the policy is still the scored one:
    # a forward pass of its own, or the scores. Later updates always take a pass.
    selection_logprob: Literal["recompute", "old"] = "old"

    def __post_init__(self):
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError("sequence_parallel: needs tensor_parallel > 1, got tensor_parallel 1")
        if self.overlap and not self.distributed_optimizer:
            raise ValueError("overlap: needs distributed_optimizer, got distributed_optimizer false")
        if self.optimizer_offload and not self.distributed_optimizer:
            raise ValueError("optimizer_offload: needs distributed_optimizer, got distributed_optimizer false")


@dataclass(config=_STRICT)
class EvalConfig:
    every: Whole = 20  # steps; 0: only after the last
    prompts: Whole | None = 128  # the first so many of each data source; None: all of val_files; 0: never evaluate
    samples: Count = 4
    temperature: NonNegative = 1.0
    top_p: Share = 1.0  # sample from the fewest likeliest tokens that hold this share of the probability; 1: from all
    top_k: Whole = 0  # and from the so many likeliest; 0: from all. Rollouts have neither: docs/training.md
    sources: dict[str, SourceEvalConfig] = dataclasses.field(default_factory=dict)  # by data_source
    entropy: bool = False  # measure the policy's entropy over the responses: one more forward pass of the actor

    def settings(self, source: str) -> Sampling:
        """How prompts of this data source are sampled."""
        own = self.sources.get(source, SourceEvalConfig())
        values = ((getattr(own, key), getattr(self, key)) for key in Sampling._fields)
        return Sampling(*(default if value is None else value for value, default in values))


@dataclass(config=_STRICT)
class CheckpointConfig:
    every: Whole = 20  # steps; 0: after the warm start, after the last, and where the run is stopped
    keep: Count = 2


@dataclass(config=_STRICT)
class TokenRecordConfig:
    """The record of some responses, token by token, that `python -m entcov report` shows."""

    every: Count = 10  # steps between two records of training responses; held-out ones: at evaluations
    max_mb: Annotated[Whole, Field(le=10_000)] = 8  # bound of all its files, in 10^6 bytes; 0: no record


@dataclass(config=_STRICT)
class LoggingConfig:
    tensorboard: bool = True
    wandb: dict[str, Any] | None = None  # arguments of wandb.init; None: off


_LossConfig = dataclass(PolicyLossConfig, frozen=True, config=_STRICT)
_KLInReward = dataclass(KLInReward, frozen=True, config=_STRICT)
_RolloutRejection = dataclass(RolloutRejection, frozen=True, config=_STRICT)


@dataclass(config=_STRICT)
class Config:
    """A whole run. `python -m entcov train RECIPE key=value ...` overrides single keys.

    interpolated: path of keys -> what the recipe says there, such as ${oc.env:HF_TOKEN}, and the value that it had. Set
        by `load_config`. The value may be a secret, so the recipe's text is stored and shown instead.
    """

    interpolated: ClassVar[dict[tuple[str, ...], tuple[Any, Any]]] = {}

    model: ModelConfig
    data: DataConfig
    run_dir: Text
    steps: Whole = 100
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = 0
    device: Text = "auto"
    threads: Annotated[Whole, Field(le=1024)] = 0  # CPU threads of torch and of the kernels; 0: leave torch's choice
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    warm_start: WarmStartConfig = dataclasses.field(default_factory=WarmStartConfig)
    actor: ActorConfig = dataclasses.field(default_factory=ActorConfig)
    megatron: MegatronConfig = dataclasses.field(default_factory=MegatronConfig)
    loss: _LossConfig = dataclasses.field(default_factory=_LossConfig)  # type: ignore[valid-type]
    # Tokens and responses that leave the loss because the sampler's policy was too far off.
    rollout_rs: _RolloutRejection = dataclasses.field(default_factory=_RolloutRejection)  # type: ignore[valid-type]
    kl_in_reward: _KLInReward = dataclasses.field(default_factory=_KLInReward)  # type: ignore[valid-type]
    advantage: str = "grpo"
    advantages: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # settings of each, used or not
    prime: PrimeConfig = dataclasses.field(default_factory=PrimeConfig)
    control: list[Text] = dataclasses.field(default_factory=list)  # names of the entropy controls to use, in order
    controls: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # settings of each, used or not
    reward_shaping: list[Text] = dataclasses.field(default_factory=list)  # names of what is added to the scores
    reward_shapings: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # settings of each
    prompt_policy: Text | None = None  # which prompts are sampled and how hot; None: the stream's, rollout.temperature
    prompt_policies: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # settings of each
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    token_record: TokenRecordConfig = dataclasses.field(default_factory=TokenRecordConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)

    @pydantic.field_validator("loss", "rollout_rs", "kl_in_reward", mode="before")
    @classmethod
    def _no_flags(cls, loss: Any) -> Any:
        """Refuses true and false: the types of these sections are not strict, and none of their knobs is a bool."""
        for key, value in loss.items() if isinstance(loss, dict) else ():
            if isinstance(value, bool):
                raise ValueError(f"{key} must not be true or false, got {value}")
        return loss

    def __post_init__(self):
        for key, names, known in (
            ("advantage", [self.advantage], ADVANTAGES), ("advantages", self.advantages, ADVANTAGES),
            ("control", self.control, CONTROLS), ("controls", self.controls, CONTROLS),
            ("reward_shaping", self.reward_shaping, REWARD_SHAPINGS),
            ("reward_shapings", self.reward_shapings, REWARD_SHAPINGS),
            ("prompt_policy", [self.prompt_policy] if self.prompt_policy else [], PROMPT_POLICIES),
            ("prompt_policies", self.prompt_policies, PROMPT_POLICIES),
        ):  # fmt: skip
            for name in names:
                if name not in known:
                    raise ValueError(
                        f"{key}: must be one of {', '.join(known)}, got {check.shown(name)}"
                        + check.suggestion(name, known)
                    )
        for key, registry in (
            ("advantages", ADVANTAGES), ("controls", CONTROLS), ("reward_shapings", REWARD_SHAPINGS),
            ("prompt_policies", PROMPT_POLICIES),
        ):  # fmt: skip
            for name, settings in getattr(self, key).items():
                _make(registry, key, name, settings)
        check_composition(self.build_controls())
        check_objective(self.build_controls(), self.loss)
        self._check_data_level()
        if self.rollout.group_size < self.build_estimator().smallest_group:
            raise ValueError(
                f"rollout.group_size: must be at least {self.build_estimator().smallest_group} for advantage "
                f"{self.advantage}, got {self.rollout.group_size}"
            )
        if self.actor.updates_per_rollout > self.rollout.prompts_per_step:
            raise ValueError(
                "actor.updates_per_rollout: must not exceed rollout.prompts_per_step (a mini-batch holds whole "
                f"groups), got {self.actor.updates_per_rollout} > {self.rollout.prompts_per_step}"
            )
        if self.eval.prompts is None and self.data.task is not None:
            raise ValueError(
                "eval.prompts: null means all of data.val_files, and the held-out split of a task has no end; got null "
                f"and data.task {self.data.task!r}"
            )
        if self.eval.prompts != 0 and self.data.task is None and not self.data.val_files:
            raise ValueError(
                f"data.val_files: must be given where eval.prompts is not 0, got none and {self.eval.prompts}"
            )
        longest = self.data.max_prompt_length + self.rollout.max_response_length
        if self.eval.entropy and self.eval.prompts != 0 and self.actor.micro_batch_tokens < longest:
            raise ValueError(
                "actor.micro_batch_tokens: must be at least data.max_prompt_length + rollout.max_response_length where "
                f"eval.entropy is true, got {self.actor.micro_batch_tokens} < {longest}"
            )
        if self.loss.kl_coef == 0 and self.loss.kl_estimator != PolicyLossConfig.kl_estimator:
            raise ValueError(
                f"loss.kl_estimator: has no effect where loss.kl_coef is 0, got {self.loss.kl_estimator!r}; set "
                f"loss.kl_coef, or leave it at {PolicyLossConfig.kl_estimator}"
            )
        if self.actor.backend == "megatron" and self.model.gradient_checkpointing:
            raise ValueError(
                "model.gradient_checkpointing: is for actor.backend transformers, got true and megatron; set "
                "megatron.recompute"
            )

    def build_controls(self) -> list[Control]:
        """The controls that `control` names, in order, in their initial state."""
        return [_make(CONTROLS, "controls", name, self.controls.get(name, {})) for name in self.control]

    def build_estimator(self) -> Estimator:
        """The estimator that `advantage` names."""
        return _make(ADVANTAGES, "advantages", self.advantage, self.advantages.get(self.advantage, {}))

    def build_reward_shapings(self) -> list[RewardShaping]:
        settings = self.reward_shapings
        return [_make(REWARD_SHAPINGS, "reward_shapings", name, settings.get(name, {})) for name in self.reward_shaping]

    def build_prompt_policy(self) -> PromptPolicy | None:
        """The policy that `prompt_policy` names, in its initial state."""
        name = self.prompt_policy
        return name and _make(PROMPT_POLICIES, "prompt_policies", name, self.prompt_policies.get(name, {}))

    def _check_data_level(self) -> None:
        """Raises for reward shapings and prompt policies that cannot be used in this recipe."""
        if len(set(self.reward_shaping)) < len(self.reward_shaping):
            raise ValueError(f"reward_shaping: must not repeat an entry, got {self.reward_shaping}")
        if self.reward_shaping and self.advantage == "gdpo":
            raise ValueError(
                "reward_shaping: has no effect with advantage gdpo, which reads a reward's components alone; got "
                f"{self.reward_shaping}"
            )
        policy = self.build_prompt_policy()
        if policy is not None and policy.needs_rows and self.data.task is not None:
            raise ValueError(
                f"prompt_policy: {policy.name} remembers the rows of a data set, so it needs data.train_files; got "
                f"data.task {self.data.task!r}"
            )
        for shaping in self.build_reward_shapings():
            if isinstance(shaping, Overlong):
                with naming("reward_shapings.overlong"):
                    shaping.check_length(self.rollout.max_response_length)
            if isinstance(shaping, Reactivate) and self.rollout.filter_zero_variance:
                raise ValueError(
                    "reward_shaping: reactivate has no effect with rollout.filter_zero_variance, which drops the "
                    "groups that are all right; got true"
                )
            if isinstance(shaping, Reactivate) and self.advantage not in ("grpo", "dr_grpo", "rloo"):
                raise ValueError(
                    "reward_shaping: reactivate changes the mean of a group, so it needs advantage grpo, dr_grpo or "
                    f"rloo; got {self.advantage}"
                )


def _make(registry: Registry[T], section: str, name: str, settings: dict[str, Any]) -> T:
    """The class of that name with the knobs that the recipe's section has for it."""
    try:
        return registry.make(name, **settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{section}.{name}: {error}") from None
