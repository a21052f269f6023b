"""Tests that are statements: what they call, when they hold, and what is refused when they are read."""

import math

import pytest

from entcov.rl.rewards.assertions import Assertion
from entcov.rl.sandbox import Call, Outcome
from entcov.rl.sandbox.values import Opaque

# statement -> what f returns in it, values with which it holds, values with which it does not
HOLDS = [
    ("assert f(2) == 4", [4, 4.0], [5, "4", None, [4]]),
    ("assert f(2) == [1, (2, 3)], 'message'", [[1, (2, 3)]], [[1, [2, 3]]]),
    ("assert 4 == f(2)", [4], [3]),
    ("assert f(2) != 4", [3, None], [4]),
    ("assert f(2) is None", [None], [0, False]),
    ("assert f(2) is True", [True], [1, False]),
    ("assert type(f(2)) is int", [1], [True, 1.0]),
    ("assert f(2)", [1, [0]], [0, [], None]),
    ("assert not f(2)", [0, ""], [1]),
    ("assert abs(f(2) - 1.5) < 1e-6", [1.5, 1.5 + 1e-9], [1.6, "1.5", None]),
    ("assert math.isclose(f(2), math.pi, rel_tol=1e-6)", [math.pi], [3.14]),
    ("assert sorted(f(2)) == [1, 2]", [[2, 1], (1, 2), {1, 2}], [[1], 3]),
    ("assert set(f(2)) == {1, 2} and len(f(2)) == 2", [[2, 1]], [[1, 2, 2]]),
    ("assert isinstance(f(2), (int, float)) and type(f(2)) != bool", [1, 2.5], ["1", True]),
    ("assert f(2) in (1, 2) or f(2) == 7", [1, 7], [3]),
    ("assert 1 < f(2) <= 3", [2, 3], [1, 4, "2"]),
    ("assert f(2)[0] == 1 and f(2)[1:] == [2]", [[1, 2]], [[1], [], 5]),
    ("assert f(2)['a'].upper() == 'X'", [{"a": "x"}], [{}, {"a": 1}]),
    ("assert all(x > 0 for x in f(2) if x != 5)", [[1, 2], []], [[1, -1], 3]),
    ("assert [x * y for x in f(2) for y in [1, 2]] == [3, 6]", [[3]], [[4]]),
    ("assert f(2) == [0] * 3 + list(range(2))", [[0, 0, 0, 0, 1]], [[0]]),
    ("assert f(2) == (1 if f(2) < 5 else 9)", [1, 9], [2]),
    ("assert f(2) ** 2 == 4", [2, -2], [3, 10**9, "2"]),
    ("assert f(2) * 'a' == 'aa'", [2], [10**12, "a"]),
    ("assert len(list(range(f(2)))) == 3", [3], [10**12, "3"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "right", "wrong"), HOLDS, ids=[text for text, _, _ in HOLDS])
def test_a_statement_holds_for_right_values_alone(text, right, wrong):
    test = Assertion(text)
    assert set(map(str, test.calls)) == {str(Call("f", [2]))}
    for value in right:
        assert test.holds([Outcome(value)] * len(test.calls)), value
    for value in [*wrong, Opaque("Liar")]:
        assert not test.holds([Outcome(value)] * len(test.calls)) or text == "assert f(2) != 4", value
    assert not test.holds([Outcome(raised=("ValueError", "Exception"))] * len(test.calls))


def test_exceptions_are_expected_by_name():
    test = Assertion("with pytest.raises(ValueError):\n    f(-1, key=2)")
    assert test.calls == [Call("f", [-1], {"key": 2})]
    assert test.holds([Outcome(raised=("UnicodeError", "ValueError", "Exception"))])
    assert not test.holds([Outcome(raised=("TypeError", "Exception"))]) and not test.holds([Outcome("ValueError")])
    assert Assertion("with pytest.raises((KeyError, TypeError)):\n    f()").holds([Outcome(raised=("TypeError",))])


def test_arguments_are_worked_out_once_here():
    calls = Assertion("assert f([1] * 3, -2, x={'a': (1, {2})}) == g(float('inf'), 10 ** 2)").calls
    assert sorted(calls) == [Call("f", [[1, 1, 1], -2], {"x": {"a": (1, {2})}}), Call("g", [math.inf, 100])]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("assert", "is no Python"),
        ("assert f(1)\0", "is no Python"),
        ("f(1) == 2", "must be one assert, or one call under pytest.raises"),
        ("assert f(1) == 2\nassert f(2) == 3", "must be one assert"),
        ("assert 1 == 1", "must call a function of the program, 'assert 1 == 1' calls none"),
        ("assert max([1, 2]) == 2", "calls none"),  # of a task to write max: it would hold for every program
        ("assert f(g(1)) == 2", "whose arguments need another call"),
        ("assert f(x) == 2", "cannot be worked out here: 'x'"),
        ("assert f(lambda: 1) == 2", "cannot be worked out here"),
        ("assert f(10 ** 10 ** 10) == 2", "size .* at most 1000000"),
        ("assert f([0] * 10 ** 9) == 2", "size 1000000000, at most"),
        ("assert f(*[1]) == 2", "cannot be worked out here"),
        ("assert f(**{'a': 1}) == 2", "is not evaluated"),
        ("assert f('%9d' % 1) == 2", "text % values is not evaluated"),
        ("assert [f(i) for i in range(3)] == [0, 1, 2]", "cannot be worked out here: 'i'"),
        ("assert pow(2, f(1)) == 4", "pow is not called in a test"),  # nor taken for a function of the program
        ("assert f(1) is 5", "is must be followed by None, True, False or a type"),
        ("assert f([1]) is not [1]", "is must be followed by"),
        ("assert f(1) == x", "x is not evaluated in a test"),
        ("assert f(1).__class__ == int", "is not evaluated"),
        ("assert f(1).mro() == 1", "f.1..mro is not called in a test"),
        ("assert ().__class__.__base__.__subclasses__() == f(1)", "is not called"),
        ("assert (lambda: f(1))() == 1", "is not called"),
        ("assert f'{f(1)}' == '1'", "is not evaluated"),
        ("assert [a for a, b in f(1)] == [1]", "for .a, b. is not evaluated"),
        ("assert f(1).format(2) == '2'", "is not called"),
        ("with pytest.raises(ValueError, match='x'):\n    f(1)", "must be one assert"),
        ("with pytest.raises(e.Error):\n    f(1)", "takes names of exceptions"),
        ("with pytest.raises(ValueError):\n    len(1)", "must hold one call of the program's function"),
        ("with open('x'):\n    f(1)", "must be one assert"),
        ("assert " + "(" * 500 + "f(1)" + ")" * 500, "is no Python"),
    ],
)
def test_what_cannot_be_judged_is_refused_when_it_is_read(text, message):
    with pytest.raises(ValueError, match=message):
        Assertion(text)


def test_a_statement_that_takes_too_long_does_not_hold():
    test = Assertion("assert sum(x * y for x in f(1) for y in f(1)) == 1")
    assert not test.holds([Outcome(range(10_000))] * 2)
