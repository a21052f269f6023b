"""TRL's GRPOTrainer with entcov's controls: `EntcovGRPOTrainer`, docs/trl.md. trl is imported when it is used.

keys.py        what each key of GRPOConfig becomes here, or why it is refused
head.py        the statistics of the policy: in the place of TRL's fused head
fsdp_head.py   the gathered LM head of FSDP2, with its right gradient
trainer.py     the trainer
"""

from typing import Any

from entcov.integrations.trl.keys import TESTED

__all__ = ["TESTED", "EntcovGRPOTrainer"]


def __getattr__(name: str) -> Any:
    if name != "EntcovGRPOTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from entcov.integrations.trl.trainer import EntcovGRPOTrainer

    return EntcovGRPOTrainer
