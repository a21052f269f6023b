"""Every planted fault."""

from tests.planted_faults import confinement, megatron, objective, statistics, storage, trainer

FAULTS = (
    *objective.FAULTS,
    *trainer.FAULTS,
    *storage.FAULTS,
    *confinement.FAULTS,
    *statistics.FAULTS,
    *megatron.FAULTS,
)
