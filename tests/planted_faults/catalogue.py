"""Every planted fault."""

from tests.planted_faults import objective, statistics, storage, trainer

FAULTS = objective.FAULTS + trainer.FAULTS + storage.FAULTS + statistics.FAULTS
