"""The recipe: one typed tree, read from YAML plus `key=value` overrides, checked before anything runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from yaml import YAMLError

from entcov.advantages import ADVANTAGES
from entcov.controls import CONTROLS, Control, make_control
from entcov.losses import PolicyLossConfig
from entcov.rl.durable import replace_file

_STRICT = ConfigDict(extra="forbid")
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]


class ConfigError(ValueError):
    """A recipe that cannot be run; every line of the message names a key, the rule and the value."""


@dataclass(config=_STRICT)
class ModelConfig:
    """Which policy is trained. Exactly one of `path` and `config` is given."""

    path: str | None = None  # a folder or hub name that transformers' from_pretrained takes
    config: dict[str, Any] | None = None  # a transformers configuration with model_type: random weights from the seed
    tokenizer: str | None = None  # "char" or a path; default: the model's path
    # Weights and optimizer are float32: at this trade's learning rates bfloat16 weights would round a step away.
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: forward and backward under autocast
    attn_implementation: str = "sdpa"
    gradient_checkpointing: bool = False

    def __post_init__(self):
        if (self.path is None) == (self.config is None):
            raise ValueError("exactly one of path and config must be given")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("tokenizer must be given (char, or a path) where the model comes from config")


@dataclass(config=_STRICT)
class DataConfig:
    """Where prompts come from: a generated task, or files in verl's row format."""

    task: str | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # the task's own arguments
    train_files: list[str] = dataclasses.field(default_factory=list)
    val_files: list[str] = dataclasses.field(default_factory=list)
    max_prompt_length: Count = 1024
    overlong: Literal["error", "filter"] = "error"  # longer prompts: refused, or left out and counted
    reward: str | None = None  # "module:function" instead of the built-in rewards

    def __post_init__(self):
        if (self.task is None) == (not self.train_files):
            raise ValueError("exactly one of task and train_files must be given")


@dataclass(config=_STRICT)
class WarmStartConfig:
    """Supervised steps on the task's worked solutions before reinforcement; 0 steps: none."""

    steps: Whole = 0
    batch_size: Count = 64
    lr: Positive = 1e-3
    warmup_steps: Whole = 20
    cache_dir: str | None = None  # keeps the result, so that runs which differ only after the warm start share it


@dataclass(config=_STRICT)
class VllmConfig:
    """How rollout.engine=vllm samples."""

    # colocated: in the trainer's processes and on their devices; server: a running server, see entcov.rl.vllm_server.
    mode: Literal["colocated", "server"] = "colocated"
    url: str | None = None  # of the server, such as http://node1:8000
    tensor_parallel: Count = 1  # processes that share an engine
    max_num_seqs: Count = 256  # sequences in a batch
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.4  # fraction of a GPU that vLLM may fill
    kv_cache_memory_bytes: Count | None = None  # default: what is left of that; on CPU, room for max_num_seqs sequences
    sleep: bool = False  # GPU: between rollouts vLLM's weights go to the CPU's memory and its cache is freed
    enforce_eager: bool = False  # GPU: no compilation and no CUDA graphs; on CPU it is always so
    engine_args: dict[str, Any] = dataclasses.field(default_factory=dict)  # further arguments of vLLM's engine

    def __post_init__(self):
        if self.mode == "server" and self.url is None:
            raise ValueError("url: must be given for mode server (start one: python -m entcov.rl.vllm_server RECIPE)")
        if self.mode == "colocated" and self.url is not None:
            raise ValueError(f"url: belongs to mode server, got mode colocated and url {self.url!r}")
        if self.mode == "server" and self.sleep:
            raise ValueError("sleep: is for mode colocated, where vLLM shares the trainer's GPUs; got mode server")


@dataclass(config=_STRICT)
class RolloutConfig:
    engine: Literal["in_process", "vllm"] = "in_process"  # in_process: the trainer's own model, nothing to install
    vllm: VllmConfig = dataclasses.field(default_factory=VllmConfig)
    prompts_per_step: Count = 64
    group_size: Count = 8
    temperature: Positive = 1.0
    max_response_length: Count = 1024
    batch_size: Count = 256  # sequences that engine in_process generates at once
    # Steps that rollouts may lag behind. 1: the next step's are sampled while the policy is being updated (vllm only).
    max_staleness: Annotated[int, Field(ge=0, le=1)] = 0
    # Dynamic sampling (DAPO): groups whose rewards are all equal teach nothing; draw until the step is full of others.
    filter_zero_variance: bool = False
    max_draws: Count = 3

    def __post_init__(self):
        if not self.max_staleness:
            return
        if self.engine == "in_process":
            raise ValueError("max_staleness: 1 needs engine vllm; in_process samples from the weights being updated")
        if self.vllm.mode == "colocated" and (self.vllm.sleep or self.vllm.tensor_parallel > 1):
            raise ValueError(
                "max_staleness: 1 lets sampling and updating run side by side, so mode colocated needs sleep false and "
                f"tensor_parallel 1, got sleep {self.vllm.sleep}, tensor_parallel {self.vllm.tensor_parallel}"
            )


@dataclass(config=_STRICT)
class ActorConfig:
    engine: Literal["torch", "megatron"] = "torch"  # megatron: torchrun ... -m megatron_integration train RECIPE
    lr: Positive = 1e-6
    warmup_steps: Whole = 10  # optimizer steps of linear warm-up
    weight_decay: NonNegative = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: Positive = 1.0
    updates_per_rollout: Count = 8  # mini-batches a rollout batch is divided into, per epoch
    epochs: Count = 1
    micro_batch_tokens: Count = 16384  # budget of one forward-backward, padding included where there is any
    packing: bool = False  # one row without padding (best with flash attention) instead of padded rows


@dataclass(config=_STRICT)
class SourceEvalConfig:
    """How one data source is evaluated where it differs from the rest; None: as `eval` says."""

    samples: Count | None = None
    temperature: NonNegative | None = None


@dataclass(config=_STRICT)
class MegatronConfig:
    """How actor.engine=megatron divides the model. Data parallelism is what is left of the processes."""

    tensor_parallel: Count = 1
    pipeline_parallel: Count = 1
    context_parallel: Count = 1
    sequence_parallel: bool = False  # activations between the tensor-parallel regions are split along the sequence
    distributed_optimizer: bool = True  # optimizer state split over data-parallel ranks
    overlap: bool = False  # gradient reduction and parameter gathering go on during the passes
    recompute: Literal["none", "selective", "full"] = "none"  # activations computed again in the backward pass
    optimizer_offload: Annotated[float, Field(ge=0, le=1)] = 0.0  # fraction of the optimizer's state kept on the CPU
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
    sources: dict[str, SourceEvalConfig] = dataclasses.field(default_factory=dict)  # by data_source

    def settings(self, source: str) -> tuple[int, float]:
        """(samples, temperature) for prompts of this data source."""
        own = self.sources.get(source, SourceEvalConfig())
        return (
            self.samples if own.samples is None else own.samples,
            self.temperature if own.temperature is None else own.temperature,
        )


@dataclass(config=_STRICT)
class CheckpointConfig:
    every: Whole = 20  # steps; 0: after the warm start, after the last, and where the run is stopped
    keep: Count = 2


@dataclass(config=_STRICT)
class LoggingConfig:
    tensorboard: bool = True
    wandb: dict[str, Any] | None = None  # arguments of wandb.init; None: off


_LossConfig = dataclass(PolicyLossConfig, frozen=True, config=_STRICT)


@dataclass(config=_STRICT)
class Config:
    """A whole run. `python -m entcov train RECIPE key=value ...` overrides single keys."""

    model: ModelConfig
    data: DataConfig
    run_dir: str
    steps: Whole = 100
    seed: Whole = 0
    device: str = "auto"
    threads: Whole = 0  # CPU threads of torch and of the kernels; 0: leave torch's choice
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    warm_start: WarmStartConfig = dataclasses.field(default_factory=WarmStartConfig)
    actor: ActorConfig = dataclasses.field(default_factory=ActorConfig)
    megatron: MegatronConfig = dataclasses.field(default_factory=MegatronConfig)
    loss: _LossConfig = dataclasses.field(default_factory=_LossConfig)  # type: ignore[valid-type]
    advantage: str = "grpo"
    control: list[str] = dataclasses.field(default_factory=list)  # entropy controls in force, in order
    controls: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # settings of each, in force or not
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)

    def __post_init__(self):
        if self.advantage not in ADVANTAGES:
            raise ValueError(f"advantage: must be one of {', '.join(ADVANTAGES)}, got {self.advantage!r}")
        for name in [*self.control, *self.controls]:
            if name not in CONTROLS:
                raise ValueError(f"control: must be among {', '.join(CONTROLS)}, got {name!r}")
        for name in self.controls:
            _build_control(name, self.controls[name])
        if self.actor.updates_per_rollout > self.rollout.prompts_per_step:
            raise ValueError(
                "actor.updates_per_rollout: must not exceed rollout.prompts_per_step (a mini-batch holds whole "
                f"groups), got {self.actor.updates_per_rollout} > {self.rollout.prompts_per_step}"
            )

    def build_controls(self) -> list[Control]:
        """Fresh controls in force, in order."""
        return [_build_control(name, self.controls.get(name, {})) for name in self.control]


def _build_control(name: str, settings: dict[str, Any]) -> Control:
    try:
        return make_control(name, **settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"controls.{name}: {error}") from None


def load_config(recipe: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads a YAML recipe, applies `a.b=value` overrides, and checks the whole.

    Raises:
        ConfigError: unknown keys, wrong types, values out of range, unreadable YAML: one line for each offence.
    """
    path = Path(recipe)
    if not path.is_file():
        raise ConfigError(f"recipe: {path} is not a file")
    try:
        tree = OmegaConf.load(path)
        for item in overrides or []:
            key, separator, _ = item.partition("=")
            if not separator or not key:
                raise ConfigError(f"override {item!r}: must have the form key=value")
            OmegaConf.update(tree, key, OmegaConf.select(OmegaConf.from_dotlist([item]), key), merge=True)
        data = OmegaConf.to_container(tree, resolve=True)
    except YAMLError as error:
        raise ConfigError(f"recipe {path}: not valid YAML: {error}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"recipe {path}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"recipe {path}: must be a mapping of keys, got {type(data).__name__}")
    return parse_config(data, str(path))


def parse_config(data: dict[str, Any], origin: str = "recipe") -> Config:
    """Checks a plain mapping and makes it a `Config`."""
    try:
        return pydantic.TypeAdapter(Config).validate_python(data)
    except pydantic.ValidationError as error:
        lines = [_explain(e) for e in error.errors()]
        raise ConfigError(f"{origin} cannot be run:\n" + "\n".join(f"  {line}" for line in lines)) from None


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "unexpected_keyword_argument":
        return f"{key}: unknown key"
    if error["type"] == "missing":
        return f"{key}: must be given"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":  # from __post_init__: the message says the value itself
        return f"{key}: {message}" if key and not message.startswith(key) else message
    return f"{key}: {message}, got {error['input']!r}"


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved recipe, loadable by `load_config`."""
    tree = dataclasses.asdict(config)
    replace_file(path, OmegaConf.to_yaml(OmegaConf.create(tree)).encode())
