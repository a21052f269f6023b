"""Every planted fault."""

from tests.planted_faults import advantages, confinement, megatron, objective, statistics, storage, trainer

FAULTS = (
    *objective.FAULTS,
    *advantages.FAULTS,
    *trainer.FAULTS,
    *storage.FAULTS,
    *confinement.FAULTS,
    *statistics.FAULTS,
    *megatron.FAULTS,
)
