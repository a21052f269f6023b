"""Every planted fault."""

from tests.planted_faults import (
    advantages,
    confinement,
    controls,
    data_level,
    integrations,
    law,
    megatron,
    objective,
    prime,
    report,
    statistics,
    storage,
    trainer,
)

FAULTS = (
    *objective.FAULTS,
    *advantages.FAULTS,
    *controls.FAULTS,
    *trainer.FAULTS,
    *data_level.FAULTS,
    *storage.FAULTS,
    *confinement.FAULTS,
    *statistics.FAULTS,
    *megatron.FAULTS,
    *prime.FAULTS,
    *report.FAULTS,
    *integrations.FAULTS,
    *law.FAULTS,
)
