"""The studies by name, in the order that documents show them."""

from entcov.studies.base import Study
from entcov.studies.clamp import Clamp
from entcov.studies.drift import Drift
from entcov.studies.splits import Splits

_ALL: tuple[Study, ...] = (Splits(), Drift(), Clamp())
STUDIES: dict[str, Study] = {study.name: study for study in _ALL}
