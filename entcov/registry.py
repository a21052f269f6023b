"""Named classes that a recipe chooses by name, with knobs: controls, advantage estimators, reward shapings, ..."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from entcov import arguments as check

T = TypeVar("T")


class Registry(Mapping[str, type[T]], Generic[T]):
    """The classes of one kind by their `name`: those given, and those that installed packages register.

    A class is a dataclass that derives from `base` and has the class attribute `name`; its fields are its knobs. A
    package registers one in its pyproject.toml, and needs no line of code for it:

        [project.entry-points."entcov.controls"]
        my_control = "my_package.module:MyControl"

    A package is imported when one of its names is looked up, not before.

    Args:
        kind: the word for one of them in messages, such as "control".
        base: what they derive from.
        classes: those of entcov.
        group: the entry-point group of other packages.
    """

    def __init__(self, kind: str, base: type[T], classes: tuple[type[T], ...], group: str):
        self.kind, self.base, self.group = kind, base, group
        self._classes = {cls.name: cls for cls in classes}
        self._others: dict[str, EntryPoint] | None = None

    def _entry_points(self) -> dict[str, EntryPoint]:
        if self._others is None:
            others: dict[str, EntryPoint] = {}
            for entry in entry_points(group=self.group):
                if entry.name in self._classes or entry.name in others:
                    raise ValueError(f"{_origin(entry)}: there is a {self.kind} of the name {entry.name!r} already")
                others[entry.name] = entry
            self._others = others
        return self._others

    def __getitem__(self, name: str) -> type[T]:
        if name in self._classes:
            return self._classes[name]
        entry = self._entry_points()[name]
        try:
            cls = entry.load()
        except Exception as error:
            raise ValueError(f"{_origin(entry)}: loading it failed: {type(error).__name__}: {error}") from error
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise TypeError(f"{_origin(entry)}: must be a class that derives from {self.base.__name__}, got {cls!r}")
        if getattr(cls, "name", None) != name:
            raise ValueError(
                f"{_origin(entry)}: its class must have name = {name!r}, got {getattr(cls, 'name', None)!r}"
            )
        self._classes[name] = cls
        del self._entry_points()[name]
        return cls

    def __contains__(self, name: object) -> bool:  # without importing a package
        return name in self._classes or name in self._entry_points()

    def __iter__(self) -> Iterator[str]:
        return iter([*self._classes, *self._entry_points()])

    def __len__(self) -> int:
        return len(self._classes) + len(self._entry_points())

    def make(self, name: str, **knobs: Any) -> T:
        """The one called `name` with these knobs; an unknown name or knob is an error that lists the known ones."""
        check.one_of(f"{self.kind} name", name, self)
        cls = self[name]
        known = [field.name for field in fields(cls) if field.init]
        for knob in knobs:
            if knob not in known:
                raise ValueError(
                    f"{self.kind} {name} has no knob {knob!r}; it has {', '.join(sorted(known)) or 'none'}"
                    + check.suggestion(knob, known)
                )
        return cls(**knobs)


def _origin(entry: EntryPoint) -> str:
    package = entry.dist.name if entry.dist is not None else "an unknown package"
    return f"entry point {entry.name} = {entry.value} of {package} (group {entry.group})"
