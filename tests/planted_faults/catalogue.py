"""Every planted fault."""

from tests.planted_faults import (
    advantages,
    confinement,
    megatron,
    objective,
    prime,
    statistics,
    storage,
    trainer,
)

FAULTS = (
    *objective.FAULTS,
    *advantages.FAULTS,
    *trainer.FAULTS,
    *storage.FAULTS,
    *confinement.FAULTS,
    *statistics.FAULTS,
    *megatron.FAULTS,
    *prime.FAULTS,
)
