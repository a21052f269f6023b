"""Memory per GPU of a Megatron run with a vLLM engine, by arithmetic alone: whether it fits, and which layouts do.

docs/large_models.md has every formula and its source. Sizes are in bytes unless a name says otherwise.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from entcov.plan.model_shapes import ModelShape, shape_of

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """One accelerator, from its maker's data sheet: dense bfloat16 peak, and link speeds in one direction."""

    name: str
    memory: int
    flops: float  # per second
    bandwidth: float  # of its memory, bytes a second
    node_link: float  # to a GPU of the same node
    network: float  # to another node, one network card a GPU


GPUS = {
    "a100": Gpu("A100 SXM 80 GB", 79 * GIB, 312e12, 2.04e12, 300e9, 25e9),
    "h100": Gpu("H100 SXM 80 GB", 79 * GIB, 989e12, 3.35e12, 450e9, 50e9),
    "h200": Gpu("H200 SXM 141 GB", 140 * GIB, 989e12, 4.8e12, 450e9, 50e9),
    "b200": Gpu("B200 SXM 180 GB", 178 * GIB, 2250e12, 7.7e12, 900e9, 50e9),
}

# Assumed, not measured. Of the trainer: CUDA context, NCCL buffers, workspaces, fragmentation of the allocator. Of the
# engine: all that vLLM needs beside weights and cache.
TRAINER_RESERVE = 5 * GIB
ENGINE_RESERVE = 2 * GIB

# Bytes a token of a rollout batch; tests count them on a batch that is really packed.
ROLLOUT = 8  # tokens and log-probabilities as they were sampled
COLUMNS = 13  # of a packed batch, prompts included
LOSS_VIEW = 69  # of a loss token, as estimators, controls and the loss see it: `Tokens` without the statistics
SELECTION = 150  # what a selection has beside its tokens, at most: entcov/objective/selection.py


def parse_size(text: str) -> int:
    """Bytes of "80GiB", "80GB" or "65536MiB".

    Raises:
        ValueError: another form, or not above 0.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(GiB|GB|MiB|MB)", text.strip())
    if not match or float(match[1]) == 0:
        raise ValueError(f"a memory size must be a number above 0 with GiB, GB, MiB or MB, got {text!r}")
    return round(float(match[1]) * {"GiB": GIB, "GB": 10**9, "MiB": 1 << 20, "MB": 10**6}[match[2]])


@dataclass(frozen=True)
class Settings:
    """The parts of a recipe and a machine that decide memory, traffic and time. `KNOBS` has the recipe's names."""

    shape: ModelShape
    gpu: Gpu
    gpus: int
    gpus_per_node: int = 8
    bf16: bool = True  # model.compute_dtype
    fused: bool = True  # the layers of Transformer Engine with fused kernels; megatron.transformer_impl: local has none
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    context_parallel: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    overlap: bool = False
    recompute: str = "none"
    optimizer_offload: float = 0.0
    reference: bool = False  # a frozen copy of the policy, where the loss or a control compares with it
    reward_model: bool = False  # PRIME's second trained model, taken to have the policy's shape
    reward_model_path: bool = False  # ... which then has a reference of its own
    reward_model_updates: int = 0  # its optimizer steps in a step of the loop
    selection: bool = False  # a control selects tokens by covariance
    select_on_first_update: bool = False  # a forward pass for it on the first update too
    clamped_entropy: bool = False
    micro_batch_tokens: int = 16384
    prompts_per_step: int = 256
    group_size: int = 8
    updates: int = 8  # optimizer steps of one epoch over a rollout batch
    epochs: int = 1
    max_prompt: int = 1024
    max_response: int = 8192
    mean_response: int = 4096
    mean_prompt: int = 256
    engine: str = "colocated"  # colocated | server | in_process
    engine_tensor_parallel: int = 1
    gpu_memory_utilization: float = 0.5
    max_num_seqs: int = 256
    kv_cache_memory_bytes: int | None = None
    sleep: bool = True

    @property
    def replica(self) -> int:
        """GPUs that hold one copy of the model and share one micro-batch."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel

    @property
    def data_parallel(self) -> int:
        return self.gpus // self.replica

    @property
    def value_bytes(self) -> int:
        return 2 if self.bf16 else 4

    @property
    def tokens_on_rank(self) -> int:
        """Tokens of a full micro-batch on one context-parallel rank."""
        return math.ceil(self.micro_batch_tokens / self.context_parallel)

    @property
    def step_tokens(self) -> int:
        return self.prompts_per_step * self.group_size * (self.mean_prompt + self.mean_response)

    @property
    def share(self) -> int:
        """Tokens of one replica in a rollout batch."""
        return math.ceil(self.step_tokens / self.data_parallel)

    @property
    def statistics(self) -> int:
        """Numbers of each token that a scoring pass of the policy tells."""
        return 5 if self.clamped_entropy else 4

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one replica in one optimizer step, if they are full."""
        return self.micro_batches_of(self.updates)

    def micro_batches_of(self, updates: int) -> int:
        """Of one of so many optimizer steps over a rollout batch."""
        return max(1, math.ceil(self.step_tokens / updates / self.data_parallel / self.micro_batch_tokens))

    @property
    def scorings(self) -> int:
        """Forward passes over the rollout batch: of the policy, its reference, the reward model and its reference."""
        return 1 + self.reference + 2 * self.reward_model

    @property
    def references(self) -> int:
        """Frozen models in memory: policy and reward model share one if both started from it."""
        return max(self.reference, self.reward_model) + (
            self.reference and self.reward_model and self.reward_model_path
        )


KNOBS = {
    "tensor_parallel": "megatron.tensor_parallel",
    "pipeline_parallel": "megatron.pipeline_parallel",
    "context_parallel": "megatron.context_parallel",
    "sequence_parallel": "megatron.sequence_parallel",
    "recompute": "megatron.recompute",
    "optimizer_offload": "megatron.optimizer_offload",
    "micro_batch_tokens": "actor.micro_batch_tokens",
    "engine_tensor_parallel": "rollout.vllm.tensor_parallel",
    "gpu_memory_utilization": "rollout.vllm.gpu_memory_utilization",
    "sleep": "rollout.vllm.sleep",
    "gpus": "--gpus",
}


def settings_from(
    config: Any, *, gpus: int, gpu: Gpu, gpus_per_node: int = 8, mean_response: int | None = None
) -> Settings:
    """Settings of a recipe (`entcov.rl.config.Config`) on so many GPUs.

    Args:
        mean_response: tokens of a mean response; default: half of the limit, which is an assumption.

    Raises:
        ValueError: actor.backend is not megatron, the model's shape is not known, or mean_response is out of range.
    """
    if config.actor.backend != "megatron":
        raise ValueError(f"plan: is about actor.backend=megatron, got {config.actor.backend!r}")
    limit = config.rollout.max_response_length
    if mean_response is not None and not 1 <= mean_response <= limit:
        raise ValueError(f"mean_response: must be in [1, rollout.max_response_length = {limit}], got {mean_response}")
    megatron, vllm = config.megatron, config.rollout.vllm
    controls = config.build_controls()
    reward_model = "token_reward" in config.build_estimator().needs
    return Settings(
        shape=shape_of(config.model.path, config.model.config),
        gpu=gpu,
        gpus=gpus,
        gpus_per_node=gpus_per_node,
        bf16=config.model.compute_dtype == "bfloat16",
        fused=megatron.transformer_impl == "transformer_engine",
        **{name: getattr(section, name) for section, names in (
            (megatron, ("tensor_parallel", "pipeline_parallel", "context_parallel", "sequence_parallel",
                        "distributed_optimizer", "overlap", "recompute", "optimizer_offload")),
            (vllm, ("gpu_memory_utilization", "max_num_seqs", "kv_cache_memory_bytes", "sleep")),
            (config.rollout, ("prompts_per_step", "group_size")),
            (config.actor, ("micro_batch_tokens", "epochs")),
        ) for name in names},
        reference=config.loss.kl_coef > 0
        or config.kl_in_reward.coef > 0
        or any("ref_logprob" in c.needs for c in controls),
        reward_model=reward_model,
        reward_model_path=config.prime.path is not None,
        reward_model_updates=config.prime.updates_per_rollout * (reward_model and config.prime.update != "none"),
        selection=any("selection" in c.needs for c in controls),
        select_on_first_update=megatron.selection_logprob == "recompute",
        clamped_entropy=any("clamped_entropy" in c.needs for c in controls),
        updates=config.actor.updates_per_rollout,
        max_prompt=config.data.max_prompt_length,
        max_response=limit,
        mean_response=limit // 2 if mean_response is None else mean_response,
        mean_prompt=min(256, config.data.max_prompt_length),
        engine=vllm.mode if config.rollout.sampler == "vllm" else "in_process",
        engine_tensor_parallel=vllm.tensor_parallel,
    )  # fmt: skip


# ---- memory --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Memory of one GPU of one pipeline stage, and its limit."""

    stage: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int  # main weights and Adam's two moments, the part on the GPU
    reference: int
    reward_model: int  # its weights, gradients and optimizer
    activations: int
    logits: int  # with their gradient and the statistics; 0 but for the last stage
    batch: int  # the replica's share of the rollout batch
    engine_weights: int
    kv_cache: int
    asleep: bool  # the engine gives its memory back while the trainer works
    limit: int

    @property
    def resident(self) -> int:
        """What the trainer holds while it trains and while the engine generates."""
        return self.weights + self.gradients + self.optimizer + self.reference + self.reward_model + TRAINER_RESERVE

    @property
    def engine(self) -> int:
        weights_and_cache = self.engine_weights + self.kv_cache
        return weights_and_cache + ENGINE_RESERVE if weights_and_cache else 0

    @property
    def training(self) -> int:
        return self.resident + self.activations + self.logits + self.batch + (0 if self.asleep else self.engine)

    @property
    def generation(self) -> int:
        return self.resident + self.engine

    @property
    def peak(self) -> int:
        return max(self.training, self.generation)


def layer_activations(s: Settings) -> int:
    """What one layer keeps for the backward pass of one full micro-batch without recomputation."""
    m, t = s.shape, s.tensor_parallel
    around = 4 * m.hidden_size // (t if s.sequence_parallel else 1)  # inputs and outputs of the two norms
    attention = (2 * m.query_width + 2 * m.key_value_width) // t  # queries, keys, values, output
    # Gate, up and their product; without a fused kernel also silu(gate) and a copy of up.
    mlp = (3 if s.fused else 5) * m.intermediate_size // t
    return s.tokens_on_rank * ((around + attention + mlp) * s.value_bytes + 4 * m.num_attention_heads // t)


def activations(s: Settings, stage: int) -> int:
    """The most that a stage keeps. Under one-forward-one-backward stage i holds pipeline_parallel - i micro-batches."""
    in_flight = min(s.pipeline_parallel - stage, s.micro_batches)
    layers = s.shape.num_hidden_layers // s.pipeline_parallel
    layer = layer_activations(s)
    hidden = s.tokens_on_rank * s.shape.hidden_size * s.value_bytes // (s.tensor_parallel if s.sequence_parallel else 1)
    if s.recompute == "full":
        return in_flight * (layers + 1) * hidden + layer
    if s.recompute == "selective":  # the attention core: its output and log-sum-exp
        core = s.shape.query_width * s.value_bytes + 4 * s.shape.num_attention_heads
        layer -= s.tokens_on_rank * core // s.tensor_parallel
    return in_flight * (layers * layer + hidden)


def memory(s: Settings, stage: int) -> Memory:
    """The most that one GPU of `stage` holds during training and during generation."""
    parameters = s.shape.parameters_on_rank(s.tensor_parallel, s.pipeline_parallel, stage)
    # Adam in float32: two moments, and a main copy where the weights are bfloat16.
    state = parameters * (12 if s.bf16 else 8)
    if s.distributed_optimizer:
        state = math.ceil(state / (s.data_parallel * s.context_parallel))
    logits = 0
    if stage == s.pipeline_parallel - 1:
        columns = s.shape.padded_vocab(s.tensor_parallel) // s.tensor_parallel
        logits = s.tokens_on_rank * (2 * columns * s.value_bytes + 36)
    engine_weights, cache = engine_memory(s)
    weights, gradients = parameters * s.value_bytes, parameters * 4
    optimizer = round(state * (1 - s.optimizer_offload))
    return Memory(
        stage=stage,
        parameters=parameters,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        reference=weights * s.references,
        reward_model=weights + gradients + optimizer if s.reward_model else 0,
        activations=activations(s, stage),
        logits=logits,
        batch=batch_share(s),
        engine_weights=engine_weights,
        kv_cache=cache,
        asleep=s.sleep,
        limit=s.gpu.memory,
    )


def batch_share(s: Settings) -> int:
    """The most that a GPU holds of its replica's sequences: while these are scored, or while one update selects tokens.

    Of scores there are four copies: the pass's, those of its loss tokens, these in one piece, another replica's.
    """
    scoring = s.share * (COLUMNS + 4 * 4 * s.statistics)
    kept = COLUMNS + 4 * (1 + s.statistics + s.reference + s.reward_model)
    update = s.share * (kept + LOSS_VIEW + 4 * s.statistics + SELECTION * s.selection)
    return max(scoring, math.ceil(update / s.updates))


def host_memory(s: Settings) -> int:
    """What the rollout batch takes on the host of a node, whose processes share one: its most, while advantages are
    assigned. Weights, the optimizer's offloaded state and texts are not counted."""
    scores = 4 * (s.statistics + s.reference + s.reward_model)
    return s.step_tokens * (ROLLOUT + COLUMNS + scores + LOSS_VIEW + scores)


def engine_memory(s: Settings) -> tuple[int, int]:
    """(weights, key-value cache) of a colocated engine on one GPU. Negative cache: the budget is too small."""
    if s.engine != "colocated":
        return 0, 0
    weights = math.ceil(s.shape.parameters * s.value_bytes / s.engine_tensor_parallel)
    if s.kv_cache_memory_bytes is not None:
        return weights, s.kv_cache_memory_bytes
    return weights, round(s.gpu_memory_utilization * s.gpu.memory) - weights - ENGINE_RESERVE


def engine_sequences(s: Settings) -> float:
    """Sequences of mean length that one engine holds at a time. The memory of a server is not known: no limit by it."""
    if s.engine != "colocated":
        return float(s.max_num_seqs)
    per_token = s.shape.kv_bytes_per_token(s.engine_tensor_parallel, s.value_bytes)
    return min(s.max_num_seqs, engine_memory(s)[1] / (per_token * (s.mean_prompt + s.mean_response)))


def stages(s: Settings) -> list[Memory]:
    """Memory of every pipeline stage."""
    return [memory(s, stage) for stage in range(s.pipeline_parallel)]


# ---- what does not fit, and which changes would make it fit --------------------------------------------------------


def problems(s: Settings) -> list[str]:
    """Why this plan cannot run, one line for each reason, with the key to change; empty if it fits."""
    out = s.shape.layout_errors(s.tensor_parallel, s.pipeline_parallel)
    if s.gpus % s.replica:
        out.append(f"--gpus={s.gpus} is no multiple of tensor x pipeline x context parallel = {s.replica}")
    if s.tensor_parallel > s.gpus_per_node:
        out.append(f"megatron.tensor_parallel={s.tensor_parallel} reaches over a node of {s.gpus_per_node} GPUs")
    longest = s.max_prompt + s.max_response
    if s.micro_batch_tokens < longest:
        out.append(f"actor.micro_batch_tokens={s.micro_batch_tokens} cannot hold a sequence of {longest} tokens")
    if s.engine == "colocated":
        if s.shape.num_attention_heads % s.engine_tensor_parallel:
            out.append(
                f"rollout.vllm.tensor_parallel={s.engine_tensor_parallel} does not divide "
                f"{s.shape.num_attention_heads} heads"
            )
        if s.gpus % s.engine_tensor_parallel:
            out.append(f"--gpus={s.gpus} is no multiple of rollout.vllm.tensor_parallel={s.engine_tensor_parallel}")
        one = s.shape.kv_bytes_per_token(s.engine_tensor_parallel, s.value_bytes) * longest
        cache = engine_memory(s)[1]
        if cache < one:
            out.append(
                f"the engine's cache would have {cache / GIB:.1f} GiB and one sequence of {longest} tokens needs "
                f"{one / GIB:.1f} GiB (rollout.vllm.gpu_memory_utilization, rollout.vllm.tensor_parallel)"
            )
    if out:
        return out
    for phase in ("training", "generation"):
        worst = max(stages(s), key=lambda m: getattr(m, phase))
        need = getattr(worst, phase)
        if need > worst.limit:
            out.append(
                f"{phase} needs {need / GIB:.1f} GiB on stage {worst.stage}, the GPU has {worst.limit / GIB:.1f} GiB"
            )
    return out


def _changes(s: Settings) -> Iterator[dict[str, Any]]:
    """Changes of one key: first those that cost no speed, then those that cost some, last more GPUs."""
    if s.engine == "colocated" and not s.sleep:
        yield {"sleep": True}
    if s.engine == "colocated" and s.kv_cache_memory_bytes is None:
        for tenths in range(9, 1, -1):
            if tenths / 10 != s.gpu_memory_utilization:
                yield {"gpu_memory_utilization": tenths / 10}
        if s.engine_tensor_parallel < s.gpus_per_node:
            yield {"engine_tensor_parallel": 2 * s.engine_tensor_parallel}
    if s.tensor_parallel > 1 and not s.sequence_parallel:
        yield {"sequence_parallel": True}
    longest = s.max_prompt + s.max_response
    if s.micro_batch_tokens != longest:
        yield {"micro_batch_tokens": longest}
    for value in {"none": ("selective", "full"), "selective": ("full",), "full": ()}[s.recompute]:
        yield {"recompute": value}
    if s.tensor_parallel < s.gpus_per_node:
        yield {"tensor_parallel": 2 * s.tensor_parallel, "sequence_parallel": True}
    yield {"pipeline_parallel": 2 * s.pipeline_parallel}
    yield {"context_parallel": 2 * s.context_parallel}
    if s.optimizer_offload < 1:
        yield {"optimizer_offload": 1.0}
    yield {"gpus": 2 * s.gpus}


def remedies(s: Settings, most: int = 4) -> list[list[str]]:
    """Changes that make it fit: single knobs if any does, else pairs, else triples; `most` at most.

    Returns:
        Lists of `key=value` for the command line; empty if it fits already, or if none of these changes helps.
    """
    if not problems(s):
        return []
    frontier: list[tuple[Settings, dict[str, Any]]] = [(s, {})]
    seen: set[frozenset] = set()
    for _ in range(3):
        following, fits = [], []
        for now, changed in frontier:
            for change in _changes(now):
                if change.keys() & changed.keys() - {"sequence_parallel"}:
                    continue
                candidate, total = dataclasses.replace(now, **change), changed | change
                if frozenset(total.items()) in seen:
                    continue
                seen.add(frozenset(total.items()))
                following.append((candidate, total))
                if not problems(candidate):
                    fits.append(total)
        if fits:
            return [[f"{KNOBS[name]}={_shown(value)}" for name, value in total.items()] for total in fits[:most]]
        frontier = following
    return []


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
