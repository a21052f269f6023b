"""Rewards: what each data source pays for, and that no response can raise, hang or crash the trainer."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from entcov.rl.rewards import rules
from entcov.rl.rewards.rules import final_answer, last_boxed, load_reward, score
from entcov.rl.sandbox import SandboxPool
from entcov.rl.tasks import TASKS, make_task
from entcov.rl.types import Example

needs_math_verify = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("math_verify"), reason="math-verify is an optional extra"
)


def example(ground_truth: str, source: str = "math", style: str = "rule") -> Example:
    return Example(source, ({"role": "user", "content": "?"},), ground_truth, style=style)


# ---- dispatch ------------------------------------------------------------------------------------------------------


def test_an_unknown_source_is_named_and_the_known_ones_listed():
    with pytest.raises(ValueError) as caught:
        score(example("1", "my/data"), "#1")
    message = str(caught.value)
    assert "data_source 'my/data'" in message and "'module:function'" in message
    for name in [*(f"entcov/{n}" for n in TASKS if n != "reasoning_gym"), "openai/gsm8k", "math_dapo", "aime*"]:
        assert name in message
    with pytest.raises(ValueError, match="no reward for data_source 'entcov/sudoku'"):
        score(example("1", "entcov/sudoku"), "#1")


def test_an_unknown_style_is_named():
    with pytest.raises(ValueError, match="unknown reward style 'model'; known: .*gsm8k, math, math_boxed, code"):
        score(example("1", "entcov/countdown", style="model"), "#1")


def test_the_style_overrules_the_source():
    assert score(example("7", "my/data", style="exact"), "so #7\n") == 1.0
    assert score(example("7", "my/data", style="gsm8k"), "#### 7.0") == 1.0
    assert score(example("7", "my/data", style="math"), r"\boxed{7}") == 1.0
    assert score(example("7", "my/data", style="exact"), r"\boxed{7}") == 0.0


@needs_math_verify
@pytest.mark.parametrize(
    ("response", "reward"),
    [(r"so \boxed{14/2}", 1.0), (r"\boxed{8}, no: \boxed{7}", 1.0), ("Answer: 7", 0.0), (r"7 \boxed{8} Answer: 7", 0.0),
     (r"\boxed{}", 0.0), (r"Answer: 7 \boxed{7", 0.0), ("7", 0.0)],
)  # fmt: skip
def test_math_boxed_reads_the_last_box_and_nothing_else(response, reward):
    assert score(example("7.0", "math_dapo", style="math_boxed"), response) == reward


def test_load_reward():
    assert load_reward(None) is score
    assert load_reward("entcov.rl.tasks.base:score_after_mark")(example("7"), "#7") == 1.0
    for spec, message in [
        ("score", "must be given as 'module:attribute', got 'score'"),
        ("no_such_module:score", "there is no module 'no_such_module'"),
        ("entcov.rl.rewards.rules:scores", "module 'entcov.rl.rewards.rules' has no 'scores'"),
        ("entcov.rl.rewards.rules:MATH_SOURCES", "must be a function of .example, response., got tuple"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_reward(spec)


@pytest.mark.parametrize(
    ("response", "reward"),
    [("#132", 1.0), ("7+5=12#131#132", 1.0), ("# 132 \n", 1.0), ("132", 0.0), ("#132#", 0.0), ("#0132", 0.0),
     ("#132.", 0.0), ("#+132", 0.0), ("#131", 0.0), ("", 0.0), ("#１３２", 0.0)],
)  # fmt: skip
def test_the_answer_after_the_last_mark_is_exact(response, reward):
    assert score(example("132", "entcov/carry_arithmetic"), response) == reward


# ---- GSM8K ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("truth", "response", "reward"),
    [
        ("72", "48 + 24 = 72\n#### 72", 1.0),
        ("72", "#### 71\nno,\n####72", 1.0),
        ("1072", "#### $1,072.00", 1.0),
        ("She has 5.\n#### 1,072", "#### 1072 dollars", 1.0),
        ("-3", "#### -3", 1.0),
        ("-3", "#### -$3", 1.0),
        ("3", r"therefore \boxed{3}", 1.0),
        ("0.5", "#### .5", 0.0),
        ("72", "the answer is 72", 0.0),
        ("72", "#### 72\n#### ", 0.0),
        ("72", "#### 720", 0.0),
        ("72", "#### x", 0.0),
        ("72", "####" + "9" * 100_000, 0.0),
    ],
)
def test_gsm8k(truth, response, reward):
    assert score(example(truth, "openai/gsm8k"), response) == reward


def test_gsm8k_refuses_an_unusable_ground_truth():
    with pytest.raises(ValueError, match="gsm8k ground_truth must be a number, .* got 'many'"):
        score(example("many", "openai/gsm8k"), "#### 3")


# ---- math-verify ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{}", ""),
        (r"\boxed{{a}{b}} {c}", "{a}{b}"),
        (r"\boxed{1", None),
        (r"boxed{1}", None),
        ("", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


@needs_math_verify
@pytest.mark.parametrize(
    ("source", "truth", "response", "reward"),
    [
        ("HuggingFaceH4/MATH-500", r"\frac{1}{2}", r"so it is \boxed{0.5}.", 1.0),
        ("lighteval/MATH", r"\frac{1}{2}", r"\boxed{\dfrac12}", 1.0),
        ("lighteval/MATH", r"\frac{1}{2}", r"\boxed{\frac{1}{3}}", 0.0),
        ("lighteval/MATH", r"\frac{1}{2}", r"\boxed{2}, I mean \boxed{1/2}", 1.0),
        ("lighteval/MATH", r"\frac{1}{2}", r"\boxed{1/2}, I mean \boxed{2}", 0.0),
        ("lighteval/MATH", r"x^2+2x+1", r"\boxed{(x+1)^2}", 1.0),
        ("lighteval/MATH", r"(1,2)", r"\boxed{(1, 2)}", 1.0),
        ("lighteval/MATH", r"(1,2)", r"\boxed{(2, 1)}", 0.0),
        ("lighteval/MATH", r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", 1.0),
        ("lighteval/MATH", r"the whole solution ends in \boxed{10\%}", r"\boxed{10\%}", 1.0),
        ("math_dapo", "34", "Reasoning.\nAnswer: 34", 1.0),
        ("math_dapo", "34", "Answer: 33\nAnswer: **$34$**.", 1.0),
        ("math_dapo", "34", "Answer: 34\nAnswer: 35", 0.0),
        ("math_dapo", "34", "34", 0.0),
        ("math_dapo", "34", "Answer:", 0.0),
        ("aime24", "033", r"\boxed{33}", 1.0),
        ("AIME2025", "70", r"\boxed{70}", 1.0),
        ("amc23", "70", r"\boxed{}", 0.0),
    ],
)
def test_math(source, truth, response, reward):
    assert score(example(truth, source), response) == reward


BOMBS = [
    r"\boxed{9^{9^{9^{9}}}}",  # one integer power: never returns to the interpreter
    r"\boxed{100000000!}",
    r"\boxed{\sum_{i=1}^{10000000000} i^i}",
]


@needs_math_verify
def test_the_time_limit_holds_in_worker_threads(monkeypatch):
    """Each bomb scores 0 within the limit, from a thread that is not the main one; the next response is scored well."""
    limit = 1.0
    pool = SandboxPool("math", limit=limit, extra="train")
    monkeypatch.setattr(rules, "_math_pool", lambda: pool)
    assert score(example("1/2"), r"\boxed{0.5}") == 1.0  # children start outside the measurement
    with ThreadPoolExecutor(3) as executor:
        for bomb in BOMBS:
            start = time.monotonic()
            assert executor.submit(score, example("3"), bomb).result() == 0.0
            assert time.monotonic() - start < limit + 10  # the limit, a new child, and a busy machine
            assert executor.submit(score, example("1/2"), r"\boxed{0.5}").result() == 1.0


@needs_math_verify
def test_many_threads_get_their_own_answers():
    cases = [(str(i), rf"\boxed{{\frac{{{2 * i + i % 2}}}{{2}}}}") for i in range(60)]
    with ThreadPoolExecutor(8) as executor:
        results = list(executor.map(lambda case: score(example(case[0]), case[1]), cases))
    assert results == [1.0, 0.0] * 30


@needs_math_verify
def test_a_child_that_died_is_replaced():
    pool = SandboxPool("math", limit=5.0, extra="train")
    assert pool.score(gold="1/2", answer="0.5") == 1.0
    [child] = pool._idle
    child.process.kill()
    child.process.wait()
    assert pool.score(gold="1/2", answer="0.5") == 1.0  # the request that found it dead gets another child
    [child] = pool._idle
    pool.close()
    assert pool._idle == [] and child.process.returncode is not None


@pytest.mark.parametrize("there", ["not at all", "broken"])
def test_a_missing_package_names_the_extra(monkeypatch, tmp_path, there):
    if there == "broken":
        (tmp_path / "math_verify.py").write_text("raise ImportError('No module named math_verify')")
    installed = [entry for entry in sys.path if "-packages" not in entry]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *installed])
    with pytest.raises(ImportError, match=r'No module named .?math_verify.*pip install "entcov\[train\]"'):
        SandboxPool("math", limit=5.0, extra="train").score(gold="1", answer="2")


@needs_math_verify
def test_children_end_with_the_trainer():
    program = (
        "import os, signal\n"
        "from entcov.rl.sandbox import SandboxPool\n"
        "pool = SandboxPool('math', limit=5.0, extra='train')\n"
        "assert pool.score(gold='1/2', answer='0.5') == 1.0\n"
        "print(pool._idle[0].process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    child = int(done.stdout)
    deadline = time.monotonic() + 10
    while is_running(child) and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    assert not is_running(child)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- robustness ----------------------------------------------------------------------------------------------------

FRAGMENTS = [
    "#", "####", r"\boxed{", "}", "{", r"\frac", r"\sqrt", "$", "Answer:", "<answer>", "</answer>", "\\", "\n", " ",
    "(",
    ")", "+", "-", "*", "/", "^", "=", "0", "1", "7", "99999999999999999999", ".", ",", "x", "é", "\u2028", "\ud800",
    "\0",
    "\U0001f600", "∞", r"\infty", r"\begin{matrix}", r"\text{", "nan", "None", "__class__", "%", "e", "1e999", "Ⅷ", "²",
]  # fmt: skip


def responses(count: int):
    rng = random.Random(0)
    for _ in range(count):
        text = "".join(rng.choices(FRAGMENTS, k=rng.randint(0, 12)))
        yield text
        yield rng.choice(["#", "#### ", r"\boxed{", "<answer>"]) + text + rng.choice(["", "}", "</answer>"])
    yield from ("#" * 100_000, r"\boxed{" * 20_000, "(" * 100_000, "answer :" + " " * 100_000, "a" * 1_000_000)


@needs_math_verify
@pytest.mark.parametrize("source", [f"entcov/{n}" for n in sorted(TASKS) if n != "reasoning_gym"] + ["openai/gsm8k"])
def test_no_response_raises(source):
    if source.startswith("entcov/"):
        target = make_task(source.removeprefix("entcov/")).example("train", 0)
    else:
        target = example("31", source)
    for response in responses(100 if source == "entcov/programs" else 1500):  # a process for each
        assert score(target, response) in (0.0, 1.0)


@needs_math_verify
def test_no_response_raises_in_math():
    target = example(r"\frac{31}{7}")
    values = [score(target, response) for response in responses(400)]
    assert set(values) == {0.0} and score(target, r"\boxed{31/7}") == 1.0


def test_importing_the_package_is_light():
    program = (
        "import sys, entcov.rl.data.stream, entcov.rl.rewards.rules, entcov.rl.tasks, entcov.rl.data.tokenizer\n"
        "print([m for m in ('pyarrow', 'transformers', 'math_verify', 'sympy', 'reasoning_gym') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("source", "response", "answer"),
    [
        ("math", r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("math", "so\nAnswer: **$7$**.\nAnswer: 8.", "8"),
        ("math", "no answer", None),
        ("math", r"\boxed{}", None),
        ("aime24/math_boxed", "Answer: 8", None),
        ("aime24/math_boxed", r"Answer: 8 \boxed{$9$}", "9"),
        ("openai/gsm8k", "#### 1,234.50 dollars", "1234.5"),
        ("openai/gsm8k", "#### 1234.5", "1234.5"),
        ("openai/gsm8k", "1234.5", None),
        ("entcov/countdown", "3+5#3*5", "3*5"),
        ("entcov/countdown", "3+5", None),
        ("entcov/countdown", "3+5#", None),
        ("reasoning_gym/chain_sum", "<answer>1</answer> no, <answer> 2 </answer>", "2"),
        ("reasoning_gym/chain_sum", "2", None),
    ],
)
def test_the_final_answer_is_what_the_score_looks_at(source, response, answer):
    source, _, style = source.partition("/math_")
    assert final_answer(example("1", source, f"math_{style}" if style else "rule"), response) == answer


def test_a_program_is_no_final_answer():
    with pytest.raises(ValueError, match="data_source 'taco': a program is no final answer"):
        final_answer(example("1", "taco"), "#1")
