"""Plain values on their way to a program and back: exact both ways, and no class of a program comes through."""

import collections
import enum
import json
import math

import pytest

from entcov.rl.sandbox.values import Opaque, decode, encode

VALUES = [
    *(None, True, False, 0, -7, 2**1000, 2**5000, -(3**4000), -0.0, math.inf, 1e-320, "", "é\ud800\0", b"", b"\xff\0"),
    *([], [1, [2, (3,)]], (), (1, "a"), set(), {1, 2}, frozenset({"a"}), 2j, {}, {1: "a", "1": [None], (1, 2): {3}}),
    *([[]], [["list"]], ["set", 1], {"value": ["dict"]}),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_plain_values_come_back_exactly(value):
    got = decode(json.loads(json.dumps(encode(value))))
    assert (got, type(got), repr(got)) == (value, type(value), repr(value))


def test_a_subclass_comes_back_as_its_builtin_class():
    class Color(enum.IntEnum):
        RED = 3

    class Liar(list):
        __eq__ = lambda self, other: True  # noqa: E731
        __iter__ = lambda self: iter("lies")  # noqa: E731

    for value, plain in (
        (collections.OrderedDict(a=1), {"a": 1}),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (Color.RED, 3),
        (Liar([1, 2]), [1, 2]),
        (bytearray(b"x"), b"x"),
    ):
        got = decode(json.loads(json.dumps(encode(value))))
        assert type(got) is type(plain) and got == plain


def test_other_objects_are_equal_to_nothing():
    class Equal:
        __eq__ = lambda self, other: True  # noqa: E731
        __hash__ = None

    got = decode(encode([Equal()]))[0]
    assert isinstance(got, Opaque) and got.kind == "Equal"
    assert not got == 4 and not got == got and not [got] == [4] and got != 4
    with pytest.raises(TypeError, match="Equal has no truth value"):
        bool(got)
    assert not math.nan == decode(encode(math.nan))


@pytest.mark.parametrize(
    "message",
    [{}, {"a": 1}, [], ["queue"], [1, 2], ["int", 3], ["int", "x"], ["bytes", "0"], ["complex", "1", 2], ["dict", 1],
     ["dict", [1]], ["set", ["list"]], ["dict", [["list"], 1]], ["object"], ["list", {}], ["set", *range(10_001)],
     ["dict", *[[i, i] for i in range(10_001)]]],
    ids=lambda message: str(message)[:20],
)  # fmt: skip
def test_what_stands_for_no_value_is_refused(message):
    with pytest.raises(ValueError):
        decode(message)
