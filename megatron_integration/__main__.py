"""`torchrun --nproc-per-node=N -m megatron_integration train RECIPE key=value ...`: the trainer on Megatron-Core.

`... eval RUN key=value ...` evaluates a run's policy on as many processes, for models that one device cannot hold.
"""

import argparse
import os
import sys
import time
import warnings

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from entcov.cli.command_line import add_debug, run_command
from entcov.cli.training import add_train_and_eval
from entcov.rl.config import Config
from entcov.rl.interfaces import Backend
from entcov.rl.recipe import ConfigError

_DESCRIPTION = (
    "Trains and evaluates on Megatron-Core, in as many processes as torchrun starts: a model divided by "
    "megatron.tensor_parallel, megatron.pipeline_parallel and megatron.context_parallel of the recipe. Evaluate only "
    "runs that you trust: Megatron's checkpoints are pickles, and RUN/config.yaml may import modules."
)
# A rank that has lost another waits so long for torchrun to end it: the report then names the one that died first.
_SECONDS_TO_BE_ENDED = 60


@record
def main(argv: list[str] | None = None) -> int:
    """Runs one command on every rank; returns the process's exit code as `entcov.cli.main` does."""
    _quiet()
    return run_command(_parser(), argv, _tell)


def _quiet() -> None:
    """Hides warnings of other packages that a user can do nothing about, unless `python -W` is given."""
    if sys.warnoptions:
        return
    warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf", module="megatron")
    warnings.filterwarnings("ignore", message="full scope is deprecated", module="megatron")
    if not torch.cuda.is_available():  # where there is a GPU, these cost speed
        warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed")
        warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="torchrun ... -m megatron_integration", description=_DESCRIPTION)
    add_debug(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _, evaluate = add_train_and_eval(commands, _megatron, always=["actor.backend=megatron"])
    evaluate.set_defaults(trust_run=True)  # Megatron's checkpoints are pickles: such a run has to be trusted anyway
    for command in commands.choices.values():
        add_debug(command, default=argparse.SUPPRESS)
    return parser


def _megatron(config: Config) -> Backend:
    from entcov.rl.preflight import resolve_device
    from megatron_integration.backend import MegatronBackend

    resolve_device(config.device)
    return MegatronBackend(config.megatron, device=config.device, seed=config.seed)


def _tell(error: Exception, text: str) -> None:
    """Prints the failure on the rank where it happened; one of the recipe on the first rank of each node."""
    from megatron_integration.node import PeerError

    on_every_rank = isinstance(error, ConfigError) or not dist.is_initialized()
    if on_every_rank and os.environ.get("LOCAL_RANK", "0") != "0":
        return
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    if _lost_a_peer(error):
        print(
            f"error: rank {rank} has lost its connection to another rank, which has died or is unreachable; "
            "torchrun's report names the first that failed. The same command goes on from the latest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(_SECONDS_TO_BE_ENDED)
    elif not isinstance(error, PeerError):
        print(text.replace("error: ", f"error: rank {rank}: ", 1), file=sys.stderr, flush=True)


def _lost_a_peer(error: Exception) -> bool:
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "Connection closed by peer" in text


if __name__ == "__main__":
    sys.exit(main())
