"""Every planted fault."""

from tests.planted_faults import confinement, controls, megatron, objective, statistics, storage, trainer

FAULTS = (
    *objective.FAULTS,
    *controls.FAULTS,
    *trainer.FAULTS,
    *storage.FAULTS,
    *confinement.FAULTS,
    *statistics.FAULTS,
    *megatron.FAULTS,
)
