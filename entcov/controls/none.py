"""No entropy control: the plain policy gradient, as a named choice for comparisons."""

from dataclasses import dataclass
from typing import ClassVar

from entcov.controls.base import Control


@dataclass
class NoControl(Control):
    """Changes nothing."""

    name: ClassVar[str] = "none"
