"""Public sets of programs: small files in each set's schema become rows that the reward judges, or are left out."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")
pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

from entcov.cli import main  # noqa: E402
from entcov.rl.data.code_rows import INSTRUCTION, kodcode_statements  # noqa: E402
from entcov.rl.data.prepare import SOURCES, prepare  # noqa: E402
from entcov.rl.data.stream import load_rows  # noqa: E402
from entcov.rl.rewards.rules import score  # noqa: E402
from entcov.rl.sandbox import isolation  # noqa: E402

needs_isolation = pytest.mark.skipif(bool(isolation.missing()), reason=f"this system lacks {isolation.missing()}")


def eurus(question, truth, *, ability="code", source="taco", ending=INSTRUCTION):
    return {
        "data_source": source,
        "prompt": [
            {"content": "\nWhen tackling complex reasoning tasks, you have access to these actions.", "role": "system"},
            {"content": question + ending, "role": "user"},
        ],
        "ability": ability,
        "reward_model": {"ground_truth": truth if isinstance(truth, str) else json.dumps(truth), "style": "rule"},
        "extra_info": {"index": 0, "reference": None, "split": "dummy"},
    }


def ace(question, *tests):
    inference = {"completion": "...", "completion_id": 0, "model_name": "x", "pass_rate": 1.0}
    return {"id": "oss_0", "source": "oss", "question": question, "test_cases": list(tests), "inferences": [inference],
            "context_messages": [{"content": question, "role": "user"}]}  # fmt: skip


def kod(question, solution, test, *declarations, style="instruct"):
    info = [
        {"docstring": "", "function_declaration": one, "function_name": "f", "parameter_list": "(x)"}
        for one in declarations
    ]
    return {"version": "v1.0", "style": style, "subset": "Prefill", "question_id": "Prefill_0_I", "question": question,
            "solution": solution, "test": test, "test_info": info, "gpt_difficulty": "easy"}  # fmt: skip


DOUBLE = "def double(x):\n    return 2 * x"
ECHO = "print(input())"

# set -> rows of its schema, and of each row that is kept: question, a program that passes, one that does not
SAMPLES = {
    "eurus2_code": (
        [
            eurus("Echo.", {"inputs": ["a\n", "b"], "outputs": ["a\n", "b\n"]}),
            eurus("Echo.", {"inputs": ["a\n", "b"], "outputs": ["a\n", "b\n"]}, source="apps"),
            eurus("Double.", {"fn_name": "double", "inputs": [[1], [2]], "outputs": [[2], [4]]},
                  ending=INSTRUCTION.replace("```\nat", "``` at")),
            eurus("2+2?", "4", ability="math", source="numina_olympiads"),
            eurus("No tests.", {"inputs": [], "outputs": []}),
            eurus("Not JSON.", "{'inputs': []}"),
            eurus("Two truths.", {"inputs": ["1"], "outputs": ["1"]}),
            eurus("Two truths.", {"inputs": ["1"], "outputs": ["2"]}),
        ],
        [("Echo.", ECHO, "print(1)"), ("Double.", DOUBLE, "def double(x): return x * x")],
        7,
    ),
    "acecode": (
        [
            ace("Double.", "assert double(1) == 2", "assert double('a') == 'aa'",
                "assert abs(double(0.1) - 0.2) < 1e-9"),
            ace("Random.", "assert double(x) == 2"),
            ace("Nothing."),
        ],
        [("Double.", DOUBLE, "def double(x): return x + 1")],
        3,
    ),
    "kodcode": (
        [
            kod("Double it.", DOUBLE, "from solution import double\n\ndef test_1():\n    assert double(1) == 2\n\n"
                "def test_2():\n    x = [0] * 2\n    result = double(x)\n    assert result == [0, 0, 0, 0], 'no'\n"
                "    assert len(result) == 4\n", "def double(x):"),
            kod("Count.", "class C: ...", "from solution import C\n\ndef test():\n    c = C()\n    c.add(1)\n"
                "    assert c.n == 1\n"),
            kod("Judge.", "print(1)", "{'stdin': ['1'], 'stdout': ['1']}", style="online_judge"),
            kod("Wrong solution.", "def double(x): return x", "from solution import double\ndef test():\n"
                "    assert double(1) == 2\n"),
            kod("Refuse.", "def g(x):\n    raise KeyError", "import pytest\nfrom solution import g\n\ndef test():\n"
                "    with pytest.raises(KeyError):\n        g(1)\n", style="complete"),
        ],
        [("Double it.\n\nDeclare it as `def double(x):`.", DOUBLE, "def double(x): return x"),
         ("Refuse.", "def g(x): return {}[x]", "def g(x): return KeyError")],
        4,
    ),
}  # fmt: skip


def prepared(name, rows, folder):
    path = folder / f"{name}.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    (result,) = prepare(name, folder / "out", source=path, split="train")
    return result, load_rows(result.path)


@needs_isolation
@pytest.mark.parametrize("name", SAMPLES)
def test_every_set_becomes_rows_that_are_paid_for_right_programs(name, tmp_path):
    rows, expected, read = SAMPLES[name]
    result, examples = prepared(name, rows, tmp_path)
    assert f"{len(expected)} rows of {read} " in str(result)
    assert [example.prompt for example in examples] == [
        ({"role": "user", "content": question + INSTRUCTION},) for question, _, _ in expected
    ]
    for example, (_, right, wrong) in zip(examples, expected, strict=True):
        assert (example.data_source, example.ability, example.style) == (name, "code", "code")
        assert score(example, f"```python\n{right}\n```") == 1.0 and score(example, f"```python\n{wrong}\n```") == 0.0
        assert name != "kodcode" or score(example, example.solution) == 1.0


def test_samples_cover_every_set_of_programs():
    assert {*SAMPLES, "classic_programs"} == {name for name, source in SOURCES.items() if source.template == "code"}


@needs_isolation
def test_the_set_of_this_package(tmp_path, capsys):
    """Each problem's own solution earns the reward, and one that answers nothing does not."""
    assert main(["data", "classic_programs", "--out", str(tmp_path)]) == 0
    assert "train.parquet: 57 rows of 57 from entcov" in capsys.readouterr().out
    examples = load_rows(*(tmp_path / "classic_programs" / f"{split}.parquet" for split in ("train", "test")))
    assert len({example.extra_info["index"] for example in examples}) == 57 and len(examples) == 67
    assert len({example.prompt[0]["content"] for example in examples}) == 67
    for example in examples:
        assert example.prompt[0]["content"].endswith(INSTRUCTION) and example.style == "code"
        assert score(example, example.solution) == 1.0, example.prompt
        head = example.solution.partition("(")[0].rpartition("def ")[2]
        assert score(example, f"```python\ndef {head.split()[-1]}(*a): return None\n```") == 0.0, example.prompt


# ---- KodCode's modules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "statements"),  # None: left out
    [
        ("import pytest\nimport math\nfrom solution import f\nN = 1\ndef test_a():\n    'a'\n    assert f(N) == 1, ''",
         ["assert f(1) == 1"]),
        ("from solution import f\ndef test_a():\n    x = 1\n    x = [x, x]\n    y = f(x)\n    assert y == 2 and y != x",
         ["assert f([1, 1]) == 2 and f([1, 1]) != [1, 1]"]),
        ("import pytest\n@pytest.mark.parametrize('a, b', [(1, 2), (3, 4)])\ndef test_a(a, b):\n    assert f(a) == b",
         ["assert f(1) == 2", "assert f(3) == 4"]),
        ("@pytest.mark.parametrize('a', [(1, 2)])\ndef test_a(a):\n    with pytest.raises(KeyError):\n        f(a)",
         ["with pytest.raises(KeyError):\n    f((1, 2))"]),
        ("def test_a():\n    x = [1]\n    f(x)\n    assert x == [2]", None),  # changes its argument
        ("def test_a():\n    for x in range(3):\n        assert f(x) == x", None),
        ("def test_a(tmp_path):\n    assert f(tmp_path) == 1", None),
        ("from solution import f as g\ndef test_a():\n    assert g(1) == 1", None),
        ("from os import system\ndef test_a():\n    assert f(1) == 1", None),
        ("import os, pytest\ndef test_a():\n    assert f(1) == 1", None),
        ("def helper():\n    return 1\ndef test_a():\n    assert f(1) == helper()", None),
        ("class TestF:\n    def test_a(self):\n        assert f(1) == 1", None),
        ("@pytest.fixture\ndef test_a():\n    assert f(1) == 1", None),
        ("@pytest.mark.parametrize('a', range(2))\ndef test_a(a):\n    assert f(a) == 1", None),
        ("@pytest.mark.parametrize('a, b', [(1, 2), 3])\ndef test_a(a, b):\n    assert f(a) == b", None),
        ("@pytest.mark.parametrize('a', [1])\ndef test_a(b):\n    assert f(b) == 1", None),
        ("def test_a():\n    x = 1\n    assert f(2) == [x for x in [1]]", None),
        ("def test_a():\n    pass", None),
        ("def", None),
        ("", None),
    ],
)  # fmt: skip
def test_modules_of_tests_become_statements_or_are_left_out(module, statements):
    assert kodcode_statements(module) == (statements or [])


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("eurus2_code", {**eurus("Q", "{}"), "prompt": "Q"}, "prompt must be a list of messages, got 'Q'"),
        ("eurus2_code", {**eurus("Q", "{}"), "prompt": [{"role": "system"}]}, "have a message of the user"),
        ("eurus2_code", eurus("", "{}"), "must ask something"),
        ("eurus2_code", {"question": "Q"}, "a row must have the column ability, this one has question"),
        ("acecode", {"question": "Q"}, "test_cases is missing"),
        ("acecode", {"question": "Q", "test_cases": "assert 1"}, "test_cases must be a list of tests, got 'assert 1'"),
        ("acecode", ace("Q", "assert 1"), "none of 1 rows has a usable question and answer"),
        ("kodcode", {"question": "Q", "test": ""}, "must have the column style"),
        ("kodcode", {"question": " ", "style": "instruct", "test": ""}, "question must be a non-empty string"),
        ("kodcode", {"question": "Q", "style": "instruct"}, "test is missing"),
        ("kodcode", {"question": "Q", "style": "complete", "test": "def test(): assert f(1)"}, "solution is missing"),
    ],
)
def test_a_row_in_another_schema_is_named(name, row, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        prepared(name, [row], tmp_path)


def test_what_does_not_go_together_is_refused(tmp_path):
    for arguments, message in (
        ({"name": "gsm8k", "template": "code"}, "template: code is for sets of programs .* got 'code' for gsm8k"),
        ({"name": "kodcode", "template": "dapo"}, "they take no other, got 'dapo' for kodcode"),
        ({"name": "classic_programs", "source": "x.jsonl"}, "part of entcov and takes neither, got x"),
        ({"name": "classic_programs", "revision": "v1"}, "classic_programs is part of entcov"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(**arguments, out=tmp_path)
