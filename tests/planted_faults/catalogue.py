"""Every planted fault."""

from tests.planted_faults import advantages, confinement, controls, megatron, objective, statistics, storage, trainer

FAULTS = (
    *objective.FAULTS,
    *advantages.FAULTS,
    *controls.FAULTS,
    *trainer.FAULTS,
    *storage.FAULTS,
    *confinement.FAULTS,
    *statistics.FAULTS,
    *megatron.FAULTS,
)
