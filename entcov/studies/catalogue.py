"""The studies by name, in the order that documents show them."""

from entcov.studies.base import Study

_ALL: tuple[Study, ...] = ()
STUDIES: dict[str, Study] = {study.name: study for study in _ALL}
