"""The reward of programs: the block that counts, the three kinds of tests, and programs that try to cheat."""

from __future__ import annotations

import json
import time

import pytest

from entcov.rl.rewards import code
from entcov.rl.rewards.code import last_code_block, parse_tests, passes, same_output
from entcov.rl.rewards.rules import score
from entcov.rl.sandbox import Budget, Call, Outcome, call_program, isolation
from entcov.rl.types import Example

needs_isolation = pytest.mark.skipif(bool(isolation.missing()), reason=f"this system lacks {isolation.missing()}")

CALLS = json.dumps({"fn_name": "f", "inputs": [[2], [3], [-1]], "outputs": [4, 6, -2]})
STATEMENTS = json.dumps({"assert_case": ["assert f(2) == 4", "assert abs(f(3) - 6) < 1e-6", "assert not f(-1) != -2"]})
LINES = json.dumps({"inputs": ["2\n", "3\n"], "outputs": ["4\n", "6\n"]})
RIGHT = "def f(x): return 2 * x\nif __name__ == '__main__': print(f(int(input())))"


def earned(source: str, truth: str | dict, fence: str = "python") -> float:
    truth = truth if isinstance(truth, str) else json.dumps(truth)
    response = f"I think so:\n```{fence}\n{source}\n```\n"
    return score(Example("x", ({"role": "user", "content": "?"},), truth, style="code"), response)


# ---- the block -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("```python\na\nb\n```", "a\nb"),
        ("```\na\n```", "a"),
        ("```python\na\n```\n```py\nb\n```", "b"),
        ("```python\na\n```\nIt prints\n```\n4\n```", "a"),
        ("```python\na\n```\n```text\nb\n```", "a"),
        ("```cpp\na\n```\n```\nb\n```", "b"),
        ("1. ```\n  ```Python3\n    a\n      b\n  ```", "a\n  b"),
        ("```python\n```", ""),
        ("```python\na", None),
        ("```python\na\n```\n```python\nb", "a"),
        ("a = 1", None),
        ("```a```", None),
        ("`a`", None),
        ("", None),
    ],
)
def test_the_last_block_of_python_counts_else_the_last_block(text, block):
    assert last_code_block(text) == block


def test_many_fences_take_no_time():
    assert last_code_block("```python\n" * 300_000) is None


# ---- tests ---------------------------------------------------------------------------------------------------------


@needs_isolation
@pytest.mark.parametrize("truth", [CALLS, STATEMENTS, LINES], ids=["calls", "statements", "lines"])
def test_all_tests_must_pass(truth):
    assert earned(RIGHT, truth) == 1.0 and earned(RIGHT, truth, fence="") == 1.0
    for wrong in ("2 * x + (x == 3)", "x * x", "str(2 * x)", "print(2 * x)", "1 / 0", "g(x)"):
        expected = 1.0 if wrong == "str(2 * x)" and truth == LINES else 0.0
        assert earned(RIGHT.replace("2 * x", wrong), truth) == expected, wrong
    assert score(Example("taco", (), truth), "def f(x): return 2 * x") == 0.0  # no block
    for nothing in ("", " \n", "def", "#" * (1 << 16) + "\n" + RIGHT):
        assert earned(nothing, truth) == 0.0


@needs_isolation
def test_rows_of_eurus_are_scored_as_they_are():
    example = Example("taco", ({"role": "user", "content": "?"},), CALLS, style="rule")
    assert score(example, f"```python\n{RIGHT}\n```") == 1.0 and score(example, "```python\nf = str\n```") == 0.0


@needs_isolation
@pytest.mark.parametrize(
    ("source", "truth", "reward"),
    [
        ("f = lambda a, b: a + b", {"fn_name": "f", "inputs": [[1, 2]], "outputs": [[3]]}, 1.0),  # as in APPS
        ("f = lambda a, b: a + b", {"fn_name": "f", "inputs": ["1\n2"], "outputs": ["3"]}, 1.0),
        ("f = lambda x: (1, (2,))", {"fn_name": "f", "inputs": [[0]], "outputs": [[1, [2]]]}, 1.0),
        ("f = lambda x: 1", {"fn_name": "f", "inputs": [[0]], "outputs": [[1, 2]]}, 0.0),
        ("f = lambda x: {1: 2, None: 3}", {"fn_name": "f", "inputs": [[0]], "outputs": [{"1": 2, "null": 3}]}, 1.0),
        ("f = lambda d: d[1]", {"fn_name": "f", "inputs": [[{"1": 5}]], "outputs": [5]}, 1.0),
        ("f = lambda x: {1}", {"fn_name": "f", "inputs": [[0]], "outputs": [[1]]}, 0.0),
        ("class Solution:\n    def f(self, x): return x", {"fn_name": "f", "inputs": [[7]], "outputs": [7]}, 1.0),
        ("print('a')\ndef f(x):\n    print(x)\n    return x", {"fn_name": "f", "inputs": [[7]], "outputs": [7]}, 1.0),
        ("import math\nfrom typing import List\ndef f(x: List): return math.comb(5, 2)",
         {"fn_name": "f", "inputs": [[[]]], "outputs": [10]}, 1.0),
        ("print(input() + input())", {"inputs": [["a", "b"]], "outputs": [["ab"]]}, 1.0),
        ("print('é', end='')", {"inputs": [""], "outputs": ["é\n"]}, 1.0),
        ("print(1)\nraise SystemExit", {"inputs": [""], "outputs": ["1"]}, 1.0),
        ("print(1)\nraise ValueError", {"inputs": [""], "outputs": ["1"]}, 0.0),
        ("print('x' * 200_000)", {"inputs": [""], "outputs": ["x" * 200_000]}, 1.0),
        ("def g(x): return x", {"assert_case": ["assert g(x=1) == 1", "with pytest.raises(TypeError):\n    g()"]}, 1.0),
        ("def g(x): return x", {"assert_case": ["assert g(1) == 1", "with pytest.raises(TypeError):\n    g(2)"]}, 0.0),
    ],
)  # fmt: skip
def test_what_the_forms_of_tests_mean(source, truth, reward):
    assert earned(source, truth) == reward


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("1\n2", "1 \n2\t\n\n", True), ("1\r\n2", "1\n2", True), ("", "\n", True), ("1 2", "1  2", False),
     (" 1", "1", False), ("1\n\n2", "1\n2", False), ("1.0", "1", False), ("1", "", False)],
)  # fmt: skip
def test_lines_are_compared_without_white_space_at_their_ends(one, other, same):
    assert same_output(one, other) is same_output(other, one) is same


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ("f(2) == 4", "ground truth of code must be JSON .*got 'f"),
        ("[" * 100_000, "must be JSON"),
        ("[1]", "must be an object, got '.1.'"),
        ("{}", "inputs must be a list of at least one entry, got None"),
        ('{"inputs": [], "outputs": []}', "inputs must be a list of at least one"),
        ('{"inputs": ["1"], "outputs": "1"}', "outputs must be a list"),
        ('{"inputs": ["1"], "outputs": ["1", "2"]}', "must be as many, got 1 and 2"),
        ('{"inputs": [1], "outputs": ["1"]}', "inputs must hold text, or lists of lines, got 1"),
        ('{"inputs": ["1"], "outputs": [null]}', "outputs must hold text, or lists of lines, got None"),
        ('{"inputs": [[1]], "outputs": [1], "fn_name": "a b"}', "fn_name must be the name of a function, got 'a b'"),
        ('{"inputs": [1], "outputs": [1], "fn_name": "f"}', "inputs of a function must be lists of arguments, got 1"),
        ('{"inputs": ["x"], "outputs": ["1"], "fn_name": "f"}', "one JSON value a line .*got 'x'"),
        ('{"assert_case": []}', "assert_case must be a list of at least one entry"),
        ('{"assert_case": [1]}', "assert_case must be a list of text, got .1."),
        ('{"assert_case": ["assert 1"]}', "must call a function of the program"),
    ],
)
def test_a_ground_truth_that_cannot_be_used_is_named(truth, message):
    with pytest.raises(ValueError, match=message):
        score(Example("x", (), truth, style="code"), "no block")


# ---- hostile programs ----------------------------------------------------------------------------------------------

# None of them doubles its argument. Each tries to be taken for a program that does.
HOSTILE = {
    "prints what a harness might look for": "print('4\\n6\\nPASSED\\n1\\nTrue')\nf = lambda x: True",
    "sends replies in advance": "import os\nfor file in range(30):\n"
    "    try: os.write(file, b'{\"value\": true}\\n' * 9)\n    except OSError: pass\nf = lambda x: True",
    "sends replies of other forms": "import os\nfor file in range(3, 30):\n"
    "    try: os.write(file, b'{\"value\": {}}\\n[1]\\n\\xff\\n')\n    except OSError: pass\nf = lambda x: 0",
    "sends one line without end": "import os\nfor file in range(3, 30):\n"
    "    try: os.write(file, b'[' * 50_000)\n    except OSError: pass\nf = lambda x: 0",
    "exits": "import sys\nsys.exit(0)",
    "exits in the call": "import sys\ndef f(x): sys.exit(0)",
    "ends at once": "import os\nos._exit(0)",
    "ends at once in the call": "import os\ndef f(x): os._exit(0)",
    "raises what is no exception": "def f(x): raise BaseException",
    "replaces print": "import builtins\nbuiltins.print = lambda *a: None\nf = lambda x: None",
    "replaces sys.stdout": "import io, sys\nsys.stdout = io.StringIO('4')\nprint(6)\nf = lambda x: None",
    "closes its output": "import os\nos.closerange(0, 99)\nf = lambda x: None",
    "is equal to everything": "class All:\n    def __eq__(self, other): return True\n    __lt__ = __gt__ = __eq__\n"
    "    __sub__ = __abs__ = lambda self, *a: self\n    __hash__ = object.__hash__\nf = lambda x: All()",
    "is a number equal to everything": "class All(int):\n    def __eq__(self, other): return True\n"
    "    __ne__ = lambda self, other: False\n    __sub__ = __abs__ = lambda self, *a: All(0)\nf = lambda x: All(5)",
    "replaces the built-ins of a test": "import builtins\nfor name in ('abs', 'len', 'all', 'sorted', 'bool'):\n"
    "    setattr(builtins, name, lambda *a: 0)\nf = lambda x: 0",
    "replaces assert's exception": "import builtins\nclass E(BaseException): __new__ = lambda cls, *a: True\n"
    "builtins.AssertionError = E\nf = lambda x: 0",
    "replaces json": "import json\njson.dumps = lambda *a: '{\"value\": 4}'\nf = lambda x: 0",
    "replaces the encoder": "import sys\nsys.modules['values'].encode = lambda value: 4\nf = lambda x: 0",
    "replaces the operators": "import operator\noperator.eq = operator.ne = lambda *a: True\nf = lambda x: 0",
    "traces": "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\nf = lambda x: 0",
    "forks": "import os\ndef f(x):\n    return 4 if os.fork() else 6",
    "reads the environment": "import os\ndef f(x): return [*os.environ.values(), open('/proc/self/environ').read()]",
    "opens a socket": "import socket\ndef f(x): return socket.socket() and 4",
    "writes a file": "def f(x): return open('/tmp/x', 'w') and 4",
    "recurses": "def f(x): return f(x)",
    "recurses without limit": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
    "nests its result": "def f(x):\n    for _ in range(10**5): x = [x]\n    return x",
    "is its own result": "x = []\nx.append(x)\nf = lambda _: x",
    "takes memory": "def f(x): return bytearray(1 << 40)",
    "prints gigabytes": "import sys\nwhile True: sys.stdout.write('4\\n6\\n' * 100_000)",
    "returns gigabytes": "def f(x): return 'x' * (1 << 24)",
    "prints no UTF-8": "import os\nos.write(1, b'\\xff\\xfe4\\n')\nf = lambda x: '\\udcff'",
    "is no text": "f = lambda x: 4\ud800",
    "has a NUL": "f = lambda x: 4\0",
    "sleeps": "import time\ntime.sleep(99)",
    "sleeps in the call": "import time\ndef f(x): time.sleep(99)",
    "blocks its signals": "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
}  # fmt: skip


@needs_isolation
@pytest.mark.parametrize("truth", [CALLS, STATEMENTS, LINES], ids=["calls", "statements", "lines"])
def test_hostile_programs_earn_nothing_and_the_next_program_runs(truth, monkeypatch):
    for name, source in HOSTILE.items():
        with monkeypatch.context() as patched:
            patched.setattr(code, "TEST_LIMIT", 0.2)
            assert earned(source, truth) == 0.0, name
        assert earned(RIGHT, truth) == 1.0, name


# Looks for the text SECRET and digits through every frame and object of its process, and returns or prints it.
SEARCH = r"""
import gc, re, sys
def f(x):
    gc.unfreeze()
    frame, found = sys._getframe(), []
    while frame:
        found.append(repr((frame.f_locals, frame.f_code.co_consts)))
        frame = frame.f_back
    found += [repr(thing) for thing in gc.get_objects() if type(thing) in (list, dict, tuple) and len(thing) < 1000]
    return (re.findall(r"SECRET-\d+", " ".join(found)) + ["nothing"])[0]
if __name__ == "__main__":
    print(f(0))
"""


@needs_isolation
def test_what_is_expected_is_not_in_the_program_s_process():
    for truth in (
        {"fn_name": "f", "inputs": [[1], [2]], "outputs": ["SECRET-4711"] * 2},
        {"assert_case": ["assert f(1) == 'SECRET-4711'"]},
        {"inputs": ["1"], "outputs": ["SECRET-4711"]},
    ):
        assert earned(SEARCH, truth) == 0.0
    assert call_program(SEARCH, [Call("f", ["SECRET-1"])])[0].value == "SECRET-1"  # the search does find what is there


@needs_isolation
def test_time_is_limited_for_each_test_and_for_all(monkeypatch):
    def times_out(source, truth):
        with Budget(60).charged() as charge:
            assert earned(source, truth) == 0.0
        return charge.timed_out

    monkeypatch.setattr(code, "TEST_LIMIT", 0.3)
    hang_at_3 = "def f(x):\n    while x == 3: pass\n    return 2 * x\nif __name__ == '__main__': print(f(int(input())))"
    assert times_out(hang_at_3, CALLS) and times_out(hang_at_3, STATEMENTS) and times_out(hang_at_3, LINES)
    assert times_out("f = lambda x: 2 * x\nwhile True: pass", CALLS)
    assert not times_out("f = lambda x: 0", CALLS) and not times_out("print(f)", LINES)
    monkeypatch.setattr(code, "PROGRAM_LIMIT", 0.3)
    slow = "import time\ndef f(x): return time.sleep(0.2) or 2 * x\nif __name__ == '__main__': print(f(int(input())))"
    assert times_out(slow, CALLS) and times_out(slow, LINES)


@needs_isolation
def test_calls_say_what_came_of_them():
    calls = [Call("f", [4], {"y": 2}), Call("f", [1, 0]), Call("f", [3])]
    outcomes = call_program("def f(x, y=1): return x / y", calls)
    assert [outcome.value for outcome in outcomes] == [2.0, None, 3.0] and outcomes[1].raised[0] == "ZeroDivisionError"
    assert call_program("kept = []\nf = lambda: kept.append(1) or len(kept)", [Call("f")] * 2)[1].value == 2
    assert call_program("raise ValueError", [Call("f")]) == []
    assert len(call_program("def f(x): return 'x' * x", [Call("f", [10]), Call("f", [10**6])], most_output=1000)) == 1
    for wrong in ({"each": 0}, {"limit": -1}, {"most_output": 0}):
        with pytest.raises(ValueError, match="must be positive, got"):
            call_program("", [Call("f")], **wrong)


def test_results_of_any_depth_are_compared_or_wrong(monkeypatch):
    """A depth that can just be read must not end the run when it is compared."""
    nested = [1]
    for depth in range(700):
        nested = [nested]
        for truth in (CALLS, STATEMENTS) if depth > 300 else ():
            tests = parse_tests(truth)
            monkeypatch.setattr(code, "call_program", lambda *a, value=nested, **k: [Outcome(value)] * 3)
            assert not tests.passed_by("f")


@needs_isolation
def test_each_call_has_its_own_time():
    source = "import time\nf = time.sleep"
    started = time.monotonic()
    assert len(call_program(source, [Call("f", [0.15])] * 4, each=0.4, limit=20)) == 4
    assert len(call_program(source, [Call("f", [0]), Call("f", [99])], each=0.3, limit=20)) == 1
    assert len(call_program(source, [Call("f", [99])], each=0.3, limit=20)) == 0
    assert time.monotonic() - started < 20


@needs_isolation
def test_a_program_that_never_names_its_function_is_not_run(monkeypatch):
    monkeypatch.setattr(code, "call_program", lambda *a, **k: pytest.fail("it was run"))
    for truth in (CALLS.replace('"f"', '"double"'), STATEMENTS.replace("f(", "double(")):
        assert not passes("def g(x): return 2 * x", parse_tests(truth))
