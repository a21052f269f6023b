"""What is left of `eval` for answers: arithmetic."""

from __future__ import annotations

import pytest

from entcov.rl.sandbox import guard


@pytest.mark.parametrize(
    "code",
    [
        "Integer (1 )+Integer (2 )*Symbol ('x' )**Integer (2 )",
        "Float ('0.5' )*sin (Symbol ('x' ))-exp (-x /Integer (3 ))+C",
        "Abs (log (x ))+sqrt (Integer (2 ))*pi *E",
        "factorial (Integer (5 ))",
        "(Symbol ('x_1' ))",
        "+Integer (1 )",
    ],
)
def test_arithmetic_passes(code):
    guard.check_arithmetic(code, {"x", "C"})


@pytest.mark.parametrize(
    "code",
    [
        "__import__ ('os' )", "Symbol ('x' ).func", "Symbol ('x' )[Integer (0 )]", "lambda :Integer (1 )",
        "Integer ('1;import os')", "Integer ('1', 2)", "Integer (base =Integer (2 ))", "Symbol ('x' , Symbol )",
        "Symbol ('x;y' )", "Symbol ('' )", "Symbol ('a.b' )", "sin ('x' )", "sin (*x )", "sin (x =Integer (1 ))", "sin",
        "(sin )(sin )", "sin (x )(x )", "Integer", "Float ('1e9' )", "Float ('nan' )", "'text'", "b'1'", "True", "None",
        "1j", "...", "x if x else x", "x and x", "not x", "~x", "x <x", "x ==x", "x //x", "x %x", "x <<x", "x |x",
        "x @x",
        "[x ]", "(x ,x )", "{x }", "{x :x }", "[x for x in x ]", "(y :=x )", "y", "eval ('1')", "getattr (x ,x )",
        "f'{x }'",
        "Integral (x ,x )", "expand (x )", "S ('x' )", "Function ('f' )(x )", "x #1", "x ;x", "x =x", "", "await x",
        "yield", "(" * 300 + "x" + ")" * 300, "-" * 100000 + "x", "x" + "+x" * 100000, "x\0",
    ],
)  # fmt: skip
def test_all_else_is_refused(code):
    with pytest.raises(SyntaxError):
        guard.check_arithmetic(code, {"x", "C"})


@pytest.mark.parametrize(
    ("code", "value"),
    [("[[1, 0], [0, -1]]", [[1, 0], [0, -1]]), ("['a', \"b\"]", ["a", "b"]), ("1/2", 0.5), ("(0x5 << 1) | 1", 11),
     ("(7 // 2) % 2", 1), ("{'a': {1, 2}, **{}}", {"a": {1, 2}}), ("None", None), (" 1", 1)],
)  # fmt: skip
def test_literals_and_operators_are_evaluated(code, value):
    assert guard.evaluate(code) == value


@pytest.mark.parametrize(
    "code",
    ["x", "print(1)", "().x", "[1][0]", "[i for i in (1,)]", "lambda: 1", "1 if 1 else 2", "1 < 2", "(x := 1)",
     "f'{1}'", "*[1]", "[*[1]]", "1 # 2", "import os", "1; 2", "", "\0"],
)  # fmt: skip
def test_what_is_no_literal_is_refused(code):
    with pytest.raises(SyntaxError):
        guard.evaluate(code)


def test_a_library_that_evaluates_elsewhere_is_noticed(monkeypatch):
    sympy_parser = pytest.importorskip("sympy.parsing.sympy_parser")
    monkeypatch.setattr(sympy_parser, "stringify_expr", sympy_parser.stringify_expr)  # restored after the test
    with pytest.raises(RuntimeError, match="evaluates code in spite of the guard: this version .* is not supported"):
        guard._must_refuse("sympy's parse_expr", sympy_parser.parse_expr)
    guard.guard_sympy()
    assert str(sympy_parser.parse_expr("2*x**2 + sin(x)")) == "2*x**2 + sin(x)"
    with pytest.raises(SyntaxError):
        sympy_parser.parse_expr("__import__('os').getpid()")
    with pytest.raises(SyntaxError):
        sympy_parser.parse_expr("__import__('os').getpid()", evaluate=False)
