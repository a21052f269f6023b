"""The studies by name, in the order that documents show them."""

from entcov.studies.base import Study
from entcov.studies.training import TrainingStudy

_ALL: tuple[Study, ...] = (TrainingStudy("controls"),)
STUDIES: dict[str, Study] = {study.name: study for study in _ALL}
