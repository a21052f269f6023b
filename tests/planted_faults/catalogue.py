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
    statistics,
    storage,
    trainer,
    trl,
    verl,
    verl_statistics,
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
    *integrations.FAULTS,
    *law.FAULTS,
    *verl.FAULTS,
    *trl.FAULTS,
    *verl_statistics.FAULTS,
)
