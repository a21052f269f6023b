"""Plain Python values as JSON, both ways: the arguments and results of a sandboxed program's functions.

None, booleans, numbers and text stand for themselves; every other value is a list that begins with its kind:

    ["list", ...]  ["tuple", ...]  ["set", ...]  ["frozenset", ...]  ["dict", [key, value], ...]
    ["int", "0x..."] of large integers  ["bytes", "00ff"]  ["complex", real, imaginary]  ["object", "its type's name"]

`decode` makes exact built-in types of what a program sends, so no comparison with the result runs code of the program.
An object of any other class becomes an `Opaque`, which is equal to nothing.

The process that runs programs imports this file without the rest of entcov, so it imports the standard library alone.
"""

from typing import Any

_LARGE = 1 << 1024
_SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_MOST_HASHED = 10_000  # entries of one set or dictionary: chosen hashes make each cost as much as all before it


class Opaque:
    """A value that is no plain one: equal to nothing, not even to itself, and neither true nor false."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = None

    def __bool__(self) -> bool:
        raise TypeError(f"an object of class {self.kind} has no truth value outside of its program")


def encode(value: Any) -> Any:
    """What JSON can hold; a value of a subclass (OrderedDict, IntEnum) as one of its built-in class."""
    if value is None or isinstance(value, (bool, float)):
        return value if value is None or isinstance(value, bool) else float(value)
    if isinstance(value, int):
        return int(value) if -_LARGE < value < _LARGE else ["int", hex(value)]
    if isinstance(value, str):
        return str.__str__(value)
    for kind, cls in _SEQUENCES.items():
        if isinstance(value, cls):
            return [kind, *[encode(entry) for entry in cls.__iter__(value)]]
    if isinstance(value, dict):
        return ["dict", *[[encode(key), encode(entry)] for key, entry in dict.items(value)]]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", bytes(value).hex()]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    return ["object", type(value).__name__]


def decode(message: Any) -> Any:
    """The value that `encode` made `message` of.

    Raises:
        ValueError: it is of no such form, or a set or dictionary has more than 10,000 entries.
    """
    if not isinstance(message, list):
        if isinstance(message, dict):
            raise ValueError("an object of JSON stands for no value")
        return message
    match message:
        case ["int", str(text)]:
            return int(text, 16)
        case ["bytes", str(text)]:
            return bytes.fromhex(text)
        case ["complex", int() | float() as real, int() | float() as imaginary]:
            return complex(real, imaginary)
        case ["object", str(kind)]:
            return Opaque(kind)
        case ["set" | "frozenset" | "dict", *entries] if len(entries) > _MOST_HASHED:
            raise ValueError(f"a set or dictionary has {len(entries)} entries, at most {_MOST_HASHED} are compared")
        case ["dict", *entries] if all(isinstance(entry, list) and len(entry) == 2 for entry in entries):
            pairs = [(decode(key), decode(entry)) for key, entry in entries]
            return _hashed(dict, pairs)
        case [str(kind), *entries] if kind in _SEQUENCES:
            return _hashed(_SEQUENCES[kind], [decode(entry) for entry in entries])
    raise ValueError(f"{str(message)[:80]!r} stands for no value")


def _hashed(cls: type, entries: list) -> Any:
    try:
        return cls(entries)
    except TypeError as error:  # a key that has no hash
        raise ValueError(str(error)) from None
