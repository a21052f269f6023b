"""What a step sends, and an estimate of its time with the assumptions. memory.py has the settings."""

import math
from dataclasses import dataclass

from entcov.plan.memory import Settings, engine_sequences, memory

# Bytes that a rank sends of one token: row statistics, and what a clamp adds to them. docs/ops.md has the protocol.
STATISTICS, STATISTICS_WITH_MOMENTS = 16, 28
CLAMP_SKETCH, CLAMP_PART = 256, 664
SELECTION_SUMS = 9 << 19  # that the replicas add up to choose the tokens of one update: `entcov.controls.select`

# Assumptions, all to be replaced by measurements on the machine.
COMPUTE_EFFICIENCY = 0.45  # share of the GPU's dense bfloat16 peak that matrix products reach
LINK_EFFICIENCY = 0.7  # share of a link's one-way speed that a collective of megabytes reaches
MEMORY_EFFICIENCY = 0.6  # share of the memory's speed that a decoding step reaches
DECODE_OVERHEAD = 3e-3  # seconds of a decoding step for launches and sampling, beside memory and compute


@dataclass(frozen=True)
class Traffic:
    """One kind of communication of a GPU in one step of the loop; `bytes_each`: what the GPU sends each time."""

    name: str
    group: str
    count: int
    bytes_each: float
    seconds: float  # of all of them, if none overlaps with computation

    @property
    def bytes(self) -> float:
        return self.count * self.bytes_each


@dataclass(frozen=True)
class Passes:
    """Passes over micro-batches that one replica makes in a step of the loop."""

    scoring: int  # forward alone: old log-probabilities, those of the reference, of a reward model and its reference
    selecting: int  # forward alone: covariance under the current policy
    forward: int  # with a backward pass after it
    recomputed: int

    @property
    def forwards(self) -> int:
        return self.scoring + self.selecting + self.forward + self.recomputed


def passes(s: Settings) -> Passes:
    updates = s.epochs * s.updates * s.micro_batches
    scoring = math.ceil(s.step_tokens / s.data_parallel / s.micro_batch_tokens) * s.scorings
    forward = updates
    if s.reward_model_updates:
        forward += s.reward_model_updates * s.micro_batches_of(s.reward_model_updates)
    selecting = updates if s.select_on_first_update else updates - s.micro_batches
    return Passes(
        scoring=scoring,
        selecting=selecting if s.selection else 0,
        forward=forward,
        recomputed=forward if s.recompute == "full" else 0,
    )


def traffic(s: Settings) -> list[Traffic]:
    """Communication of a GPU of the last stage in one step of the loop, scalars left out.

    Ring algorithms: a rank of n sends (n - 1)/n of a gathered or scattered buffer, twice that of a reduced one.
    """
    n = passes(s)
    layers = s.shape.num_hidden_layers // s.pipeline_parallel
    hidden = s.tokens_on_rank * s.shape.hidden_size * s.value_bytes
    out: list[Traffic] = []

    def send(name: str, group: str, count: int, each: float, speed: float) -> None:
        out.append(Traffic(name, group, count, each, count * each / (speed * LINK_EFFICIENCY)))

    def add(name: str, group: str, ranks: int, count: int, size: float, factor: float, speed: float) -> None:
        if ranks > 1 and count:
            send(name, group, count, factor * (ranks - 1) / ranks * size, speed)

    near, far = s.gpu.node_link, s.gpu.network
    t, p, c = s.tensor_parallel, s.pipeline_parallel, s.context_parallel
    group_speed = near if t * c * p * s.data_parallel <= s.gpus_per_node else far
    crossing = near if t * c * p <= s.gpus_per_node else far
    # A layer reduces twice in each direction; the embedding once forward, the head once backward.
    down, up = n.scoring + n.selecting + n.forward, n.forward
    reductions = layers * 2 * (n.forwards + up) + (down if p == 1 else 0) + up
    if s.sequence_parallel:
        # Each reduction becomes a reduce-scatter, and an all-gather in the other direction. The input of a
        # column-parallel matrix is gathered again for the gradient of its weights: twice a layer, once for the head.
        gathers = layers * (2 * n.forwards + 4 * up) + down + (2 if p == 1 else 1) * up
        add("activations, all-gather", "tensor", t, gathers, hidden, 1, near)
        add("activations, reduce-scatter", "tensor", t, reductions, hidden, 1, near)
    else:
        add("activations, all-reduce", "tensor", t, reductions, hidden, 2, near)
    if c > 1:
        keys = s.tokens_on_rank * 2 * s.shape.key_value_width // t * s.value_bytes
        count = layers * (c - 1) * (n.forwards + 2 * n.forward)
        send("keys and values, ring", "context", count, keys, near if t * c <= s.gpus_per_node else far)
    if p > 1:
        edge = hidden / (t if s.sequence_parallel else 1)
        send("edges of stages, send", "pipeline", n.scoring + n.selecting + 2 * n.forward, edge, crossing)
    # A clamp gathers sketches first, and then its parts with the statistics: in one round for bfloat16 logits, in about
    # two for float32 ones.
    rows, once, rounds = t * s.tokens_on_rank, n.selecting + n.forward, 1
    moments, plain = STATISTICS_WITH_MOMENTS, STATISTICS
    if s.clamped_entropy:
        rounds, moments, plain = 1 if s.bf16 else 2, moments + CLAMP_PART, plain + CLAMP_PART
        add("clamp sketches, all-gather", "tensor", t, n.scoring + once, rows * CLAMP_SKETCH, 1, near)
    add("row statistics with moments, all-gather", "tensor", t, n.scoring * rounds, rows * moments, 1, near)
    add("row statistics, all-gather", "tensor", t, once * rounds, rows * plain, 1, near)
    ranks = s.data_parallel * c
    parameters = max(memory(s, stage).parameters for stage in range(p))
    steps = s.epochs * s.updates + s.reward_model_updates
    if s.distributed_optimizer:
        add("gradients, reduce-scatter", "data", ranks, steps, 4 * parameters, 1, group_speed)
        add("weights, all-gather", "data", ranks, steps, s.value_bytes * parameters, 1, group_speed)
    else:
        add("gradients, all-reduce", "data", ranks, steps, 4 * parameters, 2, group_speed)
    # Each replica tells the others what it has computed: one float32 number for each token and statistic. Before, the
    # ranks that share its sequences add up their parts.
    d, numbers = s.data_parallel, s.statistics + s.scorings - 1
    add("scores, broadcast", "data", d, 1, 4 * s.step_tokens * s.statistics, 1, group_speed)
    if s.scorings > 1:
        add("reference scores, broadcast", "data", d, s.scorings - 1, 4 * s.step_tokens, 1, group_speed)
    add("parts of scores, all-reduce", "context", c, 1, 4 * s.share * numbers, 2, crossing)
    if s.selection:
        add("selections, all-reduce", "data", d, s.epochs * s.updates, SELECTION_SUMS, 2, group_speed)
    whole = s.shape.parameters * s.value_bytes
    add("weight sync", "replica", t * p, 1, whole, 1, crossing)
    return out


@dataclass(frozen=True)
class Time:
    """Seconds of one step of the loop, phase by phase."""

    generation: float  # 0 if the engine is not colocated: then its GPUs are not part of the plan
    scoring: float
    selecting: float
    updates: float
    communication: float  # that does not overlap with the passes
    sync: float

    @property
    def step(self) -> float:
        return self.generation + self.scoring + self.selecting + self.updates + self.communication + self.sync


def estimate(s: Settings) -> Time:
    """Seconds of each phase, from peak speeds and the efficiencies above; meant for comparing layouts."""
    length = s.mean_prompt + s.mean_response
    flops = s.shape.forward_flops(s.step_tokens, length / 2)
    pace = s.gpus * s.gpu.flops * COMPUTE_EFFICIENCY * (1 if s.bf16 else 1 / 16)  # float32: no tensor cores
    bubble = 1 + (s.pipeline_parallel - 1) / s.micro_batches
    n = passes(s)
    once = flops / pace * bubble
    sent = traffic(s)
    hidden = {"gradients, reduce-scatter", "weights, all-gather"} if s.overlap else set()
    return Time(
        generation=_generation(s) if s.engine == "colocated" else 0.0,
        scoring=once * s.scorings,
        selecting=once * n.selecting / (s.updates * s.micro_batches),
        updates=once * (s.epochs + (s.reward_model_updates > 0)) * (4 if s.recompute == "full" else 3),
        communication=sum(one.seconds for one in sent if one.name not in hidden and one.name != "weight sync"),
        sync=sum(one.seconds for one in sent if one.name == "weight sync"),
    )


def _generation(s: Settings) -> float:
    """Seconds of decoding. Each decoding step reads the weights once, and the cache of every running sequence."""
    engines = max(1, s.gpus // s.engine_tensor_parallel)
    sequences = s.prompts_per_step * s.group_size / engines
    running = max(1.0, min(sequences, engine_sequences(s)))
    length = s.mean_prompt + s.mean_response / 2
    read = s.shape.parameters * s.value_bytes / s.engine_tensor_parallel
    read += running * length * s.shape.kv_bytes_per_token(s.engine_tensor_parallel, s.value_bytes)
    compute = s.shape.forward_flops(running, length) / s.engine_tensor_parallel / (s.gpu.flops * COMPUTE_EFFICIENCY)
    # Two all-reduces a layer. Their messages are small: 10 microseconds of latency each.
    latency = 2e-5 * s.shape.num_hidden_layers if s.engine_tensor_parallel > 1 else 0.0
    token = max(read / (s.gpu.bandwidth * MEMORY_EFFICIENCY), compute) + latency + DECODE_OVERHEAD
    # Enough decoding steps for all tokens, and at least as many as the longest sequence has tokens.
    return token * max(sequences * s.mean_response / running, float(s.max_response))
