"""Entropy controls in verl: policy-loss modes `entcov` and `entcov_<control>`. docs/verl.md says how to use them.

verl imports this package in every process by the entry point of the group `verl.plugins`. It costs a hook on the
import of three of verl's modules and nothing else until they are imported:

    verl.trainer.ppo.core_algos     the names of the loss modes                     loss.py
    verl.workers.engine.base        the engine gets the mixins of                   engine.py, statistics.py
    verl.workers.engine_workers     a worker opens and closes a training step       worker.py

config.py      what a user sets: PolicyLossConfig, and the controls and the loss that it stands for
rollout.py     the tokens of a rollout, numbered in the same way for every division over ranks
checkpoint.py  the state of the controls in verl's checkpoints
"""

from typing import TYPE_CHECKING

from entcov.integrations.verl.hooks import TESTED, install, uninstall

if TYPE_CHECKING:
    from entcov.integrations.verl.config import PolicyLossConfig

__all__ = ["TESTED", "PolicyLossConfig", "install", "uninstall"]


def __getattr__(name: str):
    if name == "PolicyLossConfig":  # it derives from verl's, which is not to be imported with this package
        from entcov.integrations.verl.config import PolicyLossConfig

        return PolicyLossConfig
    raise AttributeError(f"module {__name__} has no attribute {name}")


install()
