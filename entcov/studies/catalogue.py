"""The studies by name, in the order that documents show them."""

from entcov.studies.base import Study
from entcov.studies.clamp import Clamp
from entcov.studies.drift import Drift
from entcov.studies.law_study import LawStudy
from entcov.studies.splits import Splits
from entcov.studies.style_study import StyleStudy
from entcov.studies.temperature import TemperatureStudy
from entcov.studies.training import TrainingStudy

_PLANS = ("controls", "updates", "clips", "bounds", "prompts", "signs", "sparse")
_ALL: tuple[Study, ...] = (
    *map(TrainingStudy, _PLANS), StyleStudy("style"), LawStudy(), TemperatureStudy(), Splits(), Drift(), Clamp(),
)  # fmt: skip
STUDIES: dict[str, Study] = {study.name: study for study in _ALL}
