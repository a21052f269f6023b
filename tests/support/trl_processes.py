"""What each of two processes runs for tests/integrations/trl: `python -m tests.support.trl_processes OUT`, with the
variables of torchrun. Process 0 writes what the tests read."""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from trl.trainer.utils import add_fused_lm_head

from entcov.integrations.trl.head import PolicyHead
from tests.support.trl_runs import Recorded, finished, made, tiny_model
from tests.support.trl_steps import LAYOUT_CONTROLS

IDS = torch.arange(64).reshape(4, 16) * 7 % 98


def runs(folder: Path) -> dict:
    """[controls] -> parameters, chosen tokens of both processes, logs. Without controls: parameters by grpo."""
    knobs = {"rows": 4, "gradient_accumulation_steps": 2}
    found = {"grpo": finished(made(folder / "grpo", [], loss_type="grpo", **knobs)).parameters}
    for name, controls in LAYOUT_CONTROLS.items():
        run = finished(made(folder / name, controls(), cls=Recorded, **knobs))
        each = [None, None]
        dist.all_gather_object(each, run.trainer.chosen)
        chosen = [[sorted(a + b) for a, b in zip(*step, strict=True)] for step in zip(*each, strict=True)]
        found[name] = {"parameters": run.parameters, "chosen": chosen, "logs": run.logs}
    return found


def head_gradients(theirs: bool, alone: bool) -> torch.Tensor:
    """The gradient of the LM head under FSDP2, each process with half of IDS; gradients are averaged over both.

    alone: fully_shard(lm_head); otherwise in one group with the final norm, as accelerate 1.15 wraps it.
    """
    model, mesh = tiny_model(), init_device_mesh("cpu", (2,))
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    if not theirs:
        PolicyHead(1.0).install(model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model.lm_head if alone else [model.model.norm, model.lm_head], mesh=mesh)
    fully_shard(model, mesh=mesh)
    own = IDS.chunk(2)[dist.get_rank()]
    out = model(input_ids=own, labels=own, fused_lm_head=True)
    (-2 * out.log_probs.sum()).backward()
    return model.lm_head.weight.grad.full_tensor()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    found = {"runs": runs(out)}
    for theirs in (True, False):
        for alone in (True, False):
            found["TRL" if theirs else "entcov", alone] = head_gradients(theirs, alone)
    if dist.get_rank() == 0:
        torch.save(found, out / "found.pt")
    dist.destroy_process_group()
