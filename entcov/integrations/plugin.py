"""What plug-ins share besides the loss: replaced names, checked signatures, controls from a mapping, kept state."""

import importlib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

from entcov.controls import Control, make_control
from entcov.integrations import state_file
from entcov.integrations.controlled_loss import ControlledLoss


class Patches(ExitStack):
    """Names of a framework that stand for ours until `remove()`, or the end of a `with` block.

    A second `remove()` does nothing.
    """

    remove = ExitStack.close

    def replace(self, owner: Any, name: str, new: Any) -> Any:
        """Sets owner.name (owner[name] of a dict) to `new` and returns what it was."""
        if isinstance(owner, dict):
            old = owner[name]
            owner[name] = new
            self.callback(owner.__setitem__, name, old)
        else:
            old = vars(owner)[name] if name in vars(owner) else getattr(owner, name)  # a class method as it is written
            setattr(owner, name, new)
            self.callback(setattr, owner, name, old)
        return old


def framework_module(name: str, tested: str) -> ModuleType:
    """The framework's module `name`; RuntimeError that says what is missing, and the version that has it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RuntimeError(f"{name} must be importable, the plug-in hooks into it (read: {tested}): {error}") from error


def check_signature(owner: Any, name: str, parameters: Sequence[str], tested: str) -> Callable[..., Any]:
    """owner.name, which must be a function with these parameters; RuntimeError that names what has changed."""
    where = f"{getattr(owner, '__name__', owner)}.{name}"
    function = getattr(owner, name, None)
    if not callable(function):
        raise RuntimeError(f"{where} must be a function, the plug-in hooks into it (read: {tested}); got {function!r}")
    has = list(inspect.signature(function).parameters)
    missing = [parameter for parameter in parameters if parameter not in has]
    if missing:
        raise RuntimeError(
            f"{where} must have the parameters {', '.join(missing)}, as in the version that was read ({tested}); it "
            f"has {', '.join(has) or 'none'}"
        )
    return function


def make_controls(settings: object) -> list[Control]:
    """Controls from a mapping of names to knobs, such as {"clip_cov": {"clip_cov_ratio": 0.0002}}; None: no knobs."""
    if not isinstance(settings, Mapping):
        raise TypeError(f"controls must be a mapping of names to knobs, got {settings!r}")
    controls = []
    for name, knobs in settings.items():
        if not isinstance(knobs, Mapping | None):
            raise TypeError(f"controls: the knobs of {name} must be a mapping, got {knobs!r}")
        controls.append(make_control(name, **(knobs or {})))
    return controls


def refuse(reasons: Mapping[str, object]) -> None:
    """Raises ValueError for the first key (what must hold, and why) whose value is true."""
    for rule, broken in reasons.items():
        if broken:
            raise ValueError(rule)


def state_path(folder: str | os.PathLike[str] | None, number: int) -> Path:
    """FOLDER/entcov/NUMBER.json, for a trainer whose checkpoint `number` is somewhere in that folder."""
    return Path(folder or "no folder") / "entcov" / f"{number}.json"


def write_state(path: Path, controlled: ControlledLoss) -> None:
    """Keeps the controls' state with a checkpoint of the trainer."""
    state_file.write(path, controlled.state_dict())


def read_state(path: Path, controlled: ControlledLoss) -> None:
    """Loads what `write_state` kept. A run that goes on without it would begin its controllers and draws anew."""
    advice = "With resume False the controls begin anew here"
    controlled.load_state_dict(state_file.read(path, ("updates", "controls"), advice))
