"""Every planted fault."""

from tests.planted_faults import megatron, objective, statistics, storage, trainer

FAULTS = objective.FAULTS + trainer.FAULTS + storage.FAULTS + statistics.FAULTS + megatron.FAULTS
