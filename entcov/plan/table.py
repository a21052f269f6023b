"""`python -m entcov plan`: the plan of a recipe as tables."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from entcov.plan import traffic
from entcov.plan.memory import (
    ENGINE_RESERVE,
    GIB,
    TRAINER_RESERVE,
    Memory,
    Settings,
    host_memory,
    problems,
    remedies,
    stages,
)


def print_plan(s: Settings, console: Console) -> bool:
    """Prints layout, memory, traffic, time and advice; returns whether the plan fits."""
    wrong = problems(s)
    console.print(_heading(s))
    if s.gpus % s.replica == 0 and not s.shape.layout_errors(s.tensor_parallel, s.pipeline_parallel):
        held = stages(s)
        for part in (_memory(s, held), _traffic(s), _time(s)):
            console.print(part)
        console.print(_assumptions(s))
    if not wrong:
        console.print("[bold]Fits.[/bold]")
        return True
    console.print("[bold]Does not fit:[/bold]")
    for line in wrong:
        console.print(f"  {line}", highlight=False)
    ways = remedies(s)
    found = "[bold]What would make it fit[/bold], each line alone:"
    console.print(found if ways else "No change of up to three knobs makes it fit.")
    for way in ways:
        console.print("  " + "  ".join(way), highlight=False)
    return False


def _heading(s: Settings) -> str:
    shape = s.shape
    lines = [
        f"[bold]{shape.name}[/bold]: {shape.parameters / 1e9:.2f} billion parameters, "
        f"{shape.num_hidden_layers} layers, hidden {shape.hidden_size}, vocabulary {shape.vocab_size}",
        f"{s.gpus} x {s.gpu.name}, {s.gpus_per_node} a node: tensor {s.tensor_parallel}"
        f"{' with sequence' if s.sequence_parallel else ''} x pipeline {s.pipeline_parallel} x context "
        f"{s.context_parallel} x data {s.gpus / s.replica:g}; {'bfloat16' if s.bf16 else 'float32'}, recompute "
        f"{s.recompute}, distributed optimizer {'on' if s.distributed_optimizer else 'off'}"
        + (f", {s.optimizer_offload:.0%} of its state on the CPU" if s.optimizer_offload else ""),
        f"A step: {s.prompts_per_step} prompts x {s.group_size} responses, {s.epochs * s.updates} updates of "
        f"{s.micro_batches} micro-batches of {s.micro_batch_tokens} tokens on each replica",
    ]
    engines = s.gpus // s.engine_tensor_parallel
    if s.engine == "colocated":
        asleep = "asleep while training" if s.sleep else "awake while training"
        lines.append(f"Rollouts: {engines} vLLM engines of {s.engine_tensor_parallel} GPUs on the same GPUs, {asleep}")
    else:
        lines.append(f"Rollouts: {s.engine}; its memory is not part of this plan")
    return "\n".join(lines)


def _memory(s: Settings, held: Sequence[Memory]) -> Table:
    title = "Memory of a GPU, GiB"
    shown = list(held) if len(held) <= 4 else [held[0], max(held[1:-1], key=lambda m: m.peak), held[-1]]
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for one in shown:
        table.add_column(f"stage {one.stage}", justify="right")
    table.add_row("parameters on the rank, millions", *(f"{one.parameters / 1e6:.1f}" for one in shown))
    rows = ["weights", "gradients", "optimizer", "reference", "reward_model", "activations", "logits", "batch",
            "engine_weights", "kv_cache"]  # fmt: skip
    names = {
        "gradients": "gradients (float32)",
        "optimizer": "optimizer (main weights, two moments)",
        "reward_model": "reward model, its gradients, its optimizer",
        "logits": "logits, their gradient, statistics",
        "batch": "the replica's share of the rollout batch",
        "engine_weights": "engine: weights",
        "kv_cache": "engine: key-value cache",
    }
    for name in rows:
        values = [getattr(one, name) for one in shown]
        if any(values):
            table.add_row(names.get(name, name), *(f"{value / GIB:.1f}" for value in values))
    table.add_row("reserve of the trainer (assumed)", *(f"{TRAINER_RESERVE / GIB:.1f}" for _ in shown))
    if s.engine == "colocated":
        table.add_row("reserve of the engine (assumed)", *(f"{ENGINE_RESERVE / GIB:.1f}" for _ in shown))
    table.add_section()
    for phase in ("training", "generation"):
        table.add_row(
            f"[bold]{phase}[/bold], of {s.gpu.memory / GIB:.0f}",
            *(_judged(getattr(one, phase), one.limit) for one in shown),
        )
    table.caption = (
        f"Each node's host holds the rollout batch in {host_memory(s) / GIB:.0f} GiB, once for all its processes."
    )
    if s.engine == "colocated":
        table.caption += f" The cache holds {traffic.engine_sequences(s):.0f} sequences of mean length in each engine."
    return table


def _judged(value: int, limit: int) -> str:
    text = f"{value / GIB:.1f}"
    return f"[bold red]{text} does not fit[/bold red]" if value > limit else f"[bold]{text}[/bold]"


def _traffic(s: Settings) -> Table:
    table = Table(title="Communication of a GPU in one step of the loop", title_justify="left")
    for name, justify in (("", "left"), ("group", "left"), ("count", "right"), ("MB each", "right"), ("GB", "right"),
                          ("seconds", "right")):  # fmt: skip
        table.add_column(name, justify=justify)
    for one in traffic.traffic(s):
        table.add_row(
            one.name, one.group, f"{one.count}", f"{one.bytes_each / 1e6:.1f}", f"{one.bytes / 1e9:.1f}",
            f"{one.seconds:.1f}",
        )  # fmt: skip
    table.caption = "Sent by the GPU, without scalars. Seconds if none overlaps with computation."
    return table


def _time(s: Settings) -> Table:
    time = traffic.estimate(s)
    table = Table(title="Time of a step, an estimate", title_justify="left")
    table.add_column("")
    table.add_column("seconds", justify="right")
    for name in ("generation", "scoring", "selecting", "updates", "communication", "sync"):
        shown = {"communication": "communication that does not overlap", "sync": "weight sync"}.get(name, name)
        known = name != "generation" or s.engine == "colocated"
        table.add_row(shown, f"{getattr(time, name):.0f}" if known else "not planned")
    table.add_section()
    table.add_row("[bold]step[/bold]", f"[bold]{time.step:.0f}[/bold]")
    return table


def _assumptions(s: Settings) -> str:
    gpu = s.gpu
    return (
        f"Assumed: mean response {s.mean_response} tokens of {s.max_response}, mean prompt {s.mean_prompt}; one draw a "
        f"step; full micro-batches; matrix products at {traffic.COMPUTE_EFFICIENCY:.0%} of the "
        f"{gpu.flops / 1e12:.0f} TFLOP/s peak, decoding at {traffic.MEMORY_EFFICIENCY:.0%} of "
        f"{gpu.bandwidth / 1e12:.2f} TB/s plus {traffic.DECODE_OVERHEAD * 1e3:.0f} ms a token, links at "
        f"{traffic.LINK_EFFICIENCY:.0%} of {gpu.node_link / 1e9:.0f} (node) and {gpu.network / 1e9:.0f} GB/s "
        "(network). Not measured; the formulas are in docs/large_models.md."
    )
