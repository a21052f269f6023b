"""The tiny recipe trained for a few steps on the device: by the torch actor, and by the Megatron actor with one rank.

A few steps do not train a model. They show that rollouts, scores, entropy controls, updates and checkpoints work there.
"""

import json
import math
import socket
import sys
from pathlib import Path

from benchmarks.gpu.stages import FAILED, PASSED, SKIPPED, Context, command

RECIPE = Path("examples/tiny_cpu.yaml")
NEEDED = ("omegaconf", "pydantic", "transformers", "safetensors", "rich", "matplotlib")
NEEDED_BY_MEGATRON = (*NEEDED, "megatron.core", "mbridge", "einops")
STEPS = 3
SETTINGS = ("control=[clip_cov,aent]", "warm_start.steps=300", "eval.prompts=32", "eval.samples=1", "eval.every=0",
            "checkpoint.every=0", "logging.tensorboard=false")  # fmt: skip
# In a rehearsal also these: the smallest run that goes through every part.
SMALL = ("warm_start.steps=4", "rollout.prompts_per_step=6", "rollout.group_size=4", "actor.updates_per_rollout=2",
         "rollout.max_response_length=12", "eval.prompts=4", "model.config.num_hidden_layers=1")  # fmt: skip
SHOWN = ("critic/score/mean", "actor/entropy", "actor/grad_norm", "training/mismatch", "timing_s/step")
MOST_MISMATCH = 1e-3  # nats, mean of |logprob - rollout logprob|: the same fp32 weights, two orders of rounding
MOST_DIFFERENCE = 0.05  # of the first step's entropy between the actors, relative: a few samples may differ


def torch_actor(context: Context, seconds: float) -> dict:
    """`python -m entcov train`."""
    return _train(context, seconds, "training", NEEDED, ["-m", "entcov"], [])


def megatron_actor(context: Context, seconds: float) -> dict:
    """The same on Megatron-Core, one rank; over NCCL where there is a GPU. Its first step is held against torch's."""
    # What torchrun would set. torchrun would look this machine's name up, which fails on some rented machines.
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(),
            "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # fmt: skip
    layers = [] if _missing(context, ("transformer_engine",)) is None else ["megatron.transformer_impl=local"]
    found = _train(
        context, seconds, "megatron", NEEDED_BY_MEGATRON, ["-m", "megatron_integration"], layers, **rank
    )  # fmt: skip
    theirs, ours = (steps[0] if steps else None for steps in
                    (context.results.get("training", {}).get("steps"), found.get("steps")))  # fmt: skip
    if found["status"] != PASSED or theirs is None:
        return found
    difference = abs(ours["actor/entropy"] / theirs["actor/entropy"] - 1)
    if difference > MOST_DIFFERENCE:
        reason = f"the entropy of step 1 is {difference:.1%} off the torch actor's, of at most {MOST_DIFFERENCE:.0%}"
        return {**found, "status": FAILED, "reason": reason, "off_torch_actor": difference}
    return {**found, "off_torch_actor": difference}


def _train(
    context: Context, seconds: float, name: str, needed: tuple[str, ...], module: list[str], changes: list[str],
    **environment: str,
) -> dict:  # fmt: skip
    if missing := _missing(context, needed):
        return {"status": SKIPPED, "reason": f"not installed here: {missing} (docs/gpu.md, --wheels)"}
    folder = context.scratch / name
    settings = [*SETTINGS, *(SMALL if context.rehearsal else ()), *changes]
    arguments = [sys.executable, *module, "train", RECIPE, f"run_dir={folder}", f"steps={STEPS}",
                 f"device={context.device}", *settings, "--no-display"]  # fmt: skip
    done = command(arguments, context.log(name), seconds, **environment)
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    steps = [{"step": row["step"], **{key: row[key] for key in SHOWN if row.get(key) is not None}}
             for row in rows if row["step"] > 0]  # fmt: skip
    found = {"settings": settings, "steps": steps}
    if done.code != 0:
        return {"status": done.verdict, "reason": done.why(seconds), **found}
    if reason := _wrong(steps):
        return {"status": FAILED, "reason": reason, **found}
    return {"status": PASSED, **found}


def _wrong(steps: list[dict]) -> str | None:
    """What is wrong with the metrics of a training that came to its end; None: nothing."""
    if [step["step"] for step in steps] != list(range(1, STEPS + 1)):
        return f"its metrics must have steps 1 to {STEPS}, got {[step['step'] for step in steps]}"
    for step in steps:
        if bad := [key for key in SHOWN if not math.isfinite(step.get(key, math.nan))]:
            return f"step {step['step']}: {', '.join(bad)} must be finite numbers, got {[step.get(key) for key in bad]}"
        if not step["actor/entropy"] > 0:
            return f"step {step['step']}: actor/entropy must be above 0, got {step['actor/entropy']}"
        if step["training/mismatch"] > MOST_MISMATCH:
            got = step["training/mismatch"]
            return f"step {step['step']}: training/mismatch must be at most {MOST_MISMATCH} nats, got {got}"
    return None


def _missing(context: Context, modules: tuple[str, ...]) -> str | None:
    """The modules that a new process would not find: wheels may have been added to its path."""
    look = (
        "import sys\nfrom importlib.util import find_spec\n"
        "def there(name):\n    try: return find_spec(name) is not None\n    except ImportError: return False\n"
        "print(', '.join(name for name in sys.argv[1:] if not there(name)))"
    )
    done = command([sys.executable, "-c", look, *modules], context.log("packages"), 60)
    if done.code != 0:
        raise RuntimeError(f"cannot look for packages: {done.why(60)}")
    return done.output.strip() or None


def _free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])
