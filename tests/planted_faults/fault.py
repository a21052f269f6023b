"""What a planted fault is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One mistake that somebody could make, and the tests that would tell.

    name: what breaks, in words with underscores.
    file: relative to the repository's root.
    old: text that is in the file exactly once. Short and stable: it has to be found again after other changes.
    new: what the mistake puts in its place.
    tests: pytest node ids. Each must fail by the fault alone; one without brackets stands for all its parameters, of
        which at least one must fail.
    slow: why the ordinary suite does not try the fault; None: it does, unless an earlier one names the same tests.
    package: without which the tests are not there, so that the fault can only be tried in another environment.
    """

    name: str
    file: str
    old: str
    new: str
    tests: Sequence[str]
    slow: str | None = None
    package: str | None = None

    def planted_in(self, source: str) -> str:
        """The file's text with the fault.

        Raises:
            ValueError: the old text is not there exactly once, or the result is no Python.
        """
        count = source.count(self.old)
        if count != 1:
            raise ValueError(
                f"fault {self.name}: its old text must be in {self.file} exactly once, it is there {count} times:\n"
                f"{self.old}\nThe code has changed: give the fault a text that is there, or another fault in its place"
            )
        planted = source.replace(self.old, self.new)
        try:
            compile(planted, self.file, "exec")
        except SyntaxError as error:
            raise ValueError(f"fault {self.name}: {self.file} with its new text is no Python: {error}") from None
        return planted
