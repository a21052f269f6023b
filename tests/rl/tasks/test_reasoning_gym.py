"""The reasoning-gym adapter: disjoint splits, binary rewards, and the package's traps."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from entcov.rl.rewards.rules import score
from entcov.rl.sandbox import Budget, SandboxPool, isolation, pool
from entcov.rl.tasks import make_task, reasoning_gym
from entcov.rl.tasks.reasoning_gym import EVALUATED
from entcov.rl.types import Example

pytestmark = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("reasoning_gym"), reason="reasoning-gym is an optional extra"
)
needs_isolation = pytest.mark.skipif(bool(isolation.missing()), reason=f"this system lacks {isolation.missing()}")


def text(example: Example) -> str:
    return example.prompt[0]["content"]


def test_reasoning_gym_splits_and_scores():
    task = make_task("reasoning_gym", dataset="chain_sum", settings={"max_terms": 2, "max_digits": 1})
    train = [task.example("train", i) for i in range(300)]
    held_out = [task.example("held_out", i) for i in range(60)]
    assert not {text(e) for e in train} & {text(e) for e in held_out}
    assert len({text(e) for e in held_out}) > 20
    for example in train[:20] + held_out[:20]:
        assert score(example, example.solution) == 1.0
        assert score(example, example.ground_truth) == 0.0  # no tags
        assert score(example, f"<answer>{int(example.ground_truth) + 1}</answer>") == 0.0
        assert score(example, f"<answer>0</answer> no: <answer> {example.ground_truth}\n</answer>") == 1.0


@needs_isolation
def test_reasoning_gym_partial_credit_is_no_success_and_its_exceptions_are_zeros():
    """countdown gives 0.01 for an answer that is merely there; prime_factorization's scorer raises on words."""
    for dataset in ("countdown", "prime_factorization"):
        example = make_task("reasoning_gym", dataset=dataset).example("train", 1)
        assert score(example, example.solution) == 1.0
        assert score(example, "<answer>zzz</answer>") == 0.0
        assert score(example, "<answer>1 + 1</answer>") == 0.0


def test_reasoning_gym_is_the_same_in_every_process():
    """isomorphic_strings goes through sets: with a random hash seed, (seed, index) gave another question every time."""
    program = (
        "from entcov.rl.tasks import make_task\n"
        "task = make_task('reasoning_gym', dataset='isomorphic_strings', seed=4)\n"
        "print([task.example('train', i).prompt for i in (0, 1, 64)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(outputs) == 1 and "isomorphic" in outputs.pop()


def test_reasoning_gym_composite_takes_plain_settings():
    settings = {"datasets": [{"name": n, "weight": 1, "config": {}} for n in ("gcd", "chain_sum")]}
    task = make_task("reasoning_gym", dataset="composite", settings=settings)
    examples = [task.example("train", i) for i in range(20)]
    assert {"GCD" in text(e) for e in examples} == {True, False}
    assert all(score(e, e.solution) == 1.0 for e in examples)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "no_such"}, "unknown dataset 'no_such'; known: ab, "),
        ({"dataset": "codeio"}, "codeio is refused: its snippets draw unseeded numbers"),
        ({"dataset": "game_of_life_halting"}, "refused: its scorer gives every answer the full score"),
        ({"dataset": "puzzle24"}, "puzzle24 is refused: its scorer takes any four numbers that make 24"),
        (
            {
                "dataset": "composite",
                "settings": {
                    "datasets": [
                        {"name": "composite", "weight": 1, "config": {"datasets": [{"name": "codeio", "weight": 1}]}}
                    ]
                },
            },
            "codeio is refused",
        ),
        ({"dataset": "chain_sum", "settings": {"seed": 1}}, "settings must not hold 'seed', got 1"),
        ({"dataset": "chain_sum", "settings": {"terms": 1}}, "chain_sum with settings .*'terms': 1.*unexpected"),
        ({"dataset": "chain_sum", "settings": {"min_terms": -1}}, "min_terms must be positive"),
    ],
)
def test_reasoning_gym_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make_task("reasoning_gym", **settings)


def test_reasoning_gym_rows_of_another_making_are_refused():
    example = make_task("reasoning_gym", dataset="gcd").example("train", 0)
    changed = Example(**{**example.__dict__, "extra_info": {**example.extra_info, "item": 5, "version": "0.0.1"}})
    with pytest.raises(ValueError, match="item 5 .* comes out differently .written by reasoning-gym 0.0.1, installed"):
        score(changed, "<answer>1</answer>")
    bare = Example(**{**example.__dict__, "extra_info": json.loads('{"dataset": "gcd"}')})
    with pytest.raises(ValueError, match="extra_info must hold dataset, settings, seed, size, item; missing"):
        score(bare, "<answer>1</answer>")


# ---- scorers that evaluate the answer ------------------------------------------------------------------------------


def test_the_datasets_whose_scorers_evaluate_answers_are_known():
    """Every place in reasoning-gym where Python or sympy evaluates text: one more in a new version is noticed."""
    evaluates = re.compile(r"\b(eval|exec|__import__|parse_expr|parse_latex|sympify|lambdify)\(")
    folder = Path(find_spec("reasoning_gym").origin).parent
    found = {file.stem for file in folder.rglob("*.py") if evaluates.search(file.read_text())}
    own_text = {"basic_arithmetic", "bitwise_arithmetic", "codeio", "number_sorting"}
    own_text |= {"generators_00_49", "generators_50_99"}
    own_parser = {"propositional_logic"}
    assert found - own_text - own_parser == EVALUATED


# {mark} is a file that must not come to be.
HOSTILE = [
    "__import__('os').system('touch {mark}')",
    "open('{mark}', 'w')",
    "exec('open({mark!r}, \"w\")')",
    "eval('open({mark!r}, \"w\")')",
    "sympify('open({mark!r}, \"w\")')",
    "S('open({mark!r}, \"w\")')",
    "Integer('open({mark!r}, \"w\")')",
    "sin('open({mark!r}, \"w\")')",
    "print(1, file=open('{mark}', 'w'))",
    "(lambda: open('{mark}', 'w'))()",
    "[open('{mark}', 'w') for _ in [1]]",
    "().__class__.__base__.__subclasses__()",
    "x.func.__globals__",
    "Symbol('x').__class__.__init__.__globals__['sys'].modules['os'].system('touch {mark}')",
    "__import__('os').write(1, b'1')",
    "__import__('os').write(1, b'1') and __import__('os')._exit(0)",
    "__import__('os').kill(__import__('os').getppid(), 9)",
    "__import__('signal').setitimer(0, 0) and [0 for _ in iter(int, 1)]",
    "setattr(__import__('sympy'), 'simplify', lambda x: 0)",
    "setattr(type(24), '__eq__', lambda a, b: True)",
    "globals().update(score_answer=lambda *a: 1.0)",
    "__import__('sys').modules.clear()",
    "__import__('sys').exit(0)",
    "(x := 1)",
    "f'{{open(1)}}'",
    "lambda: 1",
    "type('X', (), dict(__eq__=lambda *a: True))()",
    "Integral(x, x)",
    "preview(x)",
    "factorial(9**9)",
    "9**9**9",
    "[0] * 10**12",
    "'x' * 10**12",
    "(" * 5000,
    "-" * 5000 + "1",
    "1+" * 5000 + "1",
    "{{1: {{2: 3}}}}",
    "\0",
    "\ud800",
    "1 # 2 3 4",
    "...",
    "x" * 100000,
]


@needs_isolation
def test_hostile_answers_earn_nothing_and_leave_no_trace(tmp_path, monkeypatch):
    """Once, nine scorers ran the answer in a process that scored those after it, with the trainer's environment."""
    normal, short = reasoning_gym._pool(), SandboxPool("reasoning_gym", limit=1.0, extra="tasks")
    datasets = sorted(EVALUATED - {"puzzle24"})
    examples = {name: make_task("reasoning_gym", dataset=name).example("train", 0) for name in datasets}
    [worker] = normal._idle
    mark = tmp_path / "mark"
    slow = {"factorial(9**9)", "9**9**9"}
    for number, answer in enumerate(HOSTILE):
        answer = answer.format(mark=str(mark)) if "{" in answer else answer
        monkeypatch.setattr(reasoning_gym, "_pool", lambda: short if answer in slow else normal)  # noqa: B023
        # Each answer to two datasets of both ways to evaluate; the bombs to one, for time.
        for name in [datasets[number % len(datasets)], datasets[(number + 4) % len(datasets)]][
            : 1 + (answer not in slow)
        ]:
            assert score(examples[name], f"<answer>{answer}</answer>") == 0.0, (name, answer)
            assert not mark.exists(), (name, answer)
    monkeypatch.setattr(reasoning_gym, "_pool", lambda: normal)
    for example in examples.values():
        if example.solution is not None:
            assert score(example, example.solution) == 1.0
    assert normal._idle == [worker]  # the same process all the time: nothing that an answer did reached it
    short.close()


@needs_isolation
def test_a_recorded_answer_that_is_the_question_again_is_no_solution():
    """Nine of sixty answers of intermediate_integration are unevaluated integrals, and earned the full score."""
    example = make_task("reasoning_gym", dataset="intermediate_integration").example("train", 1)
    assert "-x**2*sin(3*x) dx" in text(example) and example.solution is None
    found = "x**2*cos(3*x)/3 - 2*x*sin(3*x)/9 - 2*cos(3*x)/27 + C"
    assert score(example, f"<answer>{found}</answer>") == 1.0
    assert score(example, "<answer>-Integral(x**2*sin(3*x), x) + C</answer>") == 0.0


@needs_isolation
def test_an_answer_that_got_past_the_guard_would_still_be_confined(tmp_path, monkeypatch):
    """With a guard that lets everything pass, the answer runs: it leaves no trace and cannot reach other answers."""
    for file in Path(pool.__file__).parent.glob("*.py"):
        shutil.copy(file, tmp_path)
    guard = (tmp_path / "guard.py").read_text()
    guard = re.sub(r"def (check_arithmetic|_must_refuse)\(.*\n", r"\g<0>    return\n", guard)
    (tmp_path / "guard.py").write_text(guard)
    monkeypatch.setattr(pool, "_SCRIPT", tmp_path / "worker.py")
    unguarded = SandboxPool("reasoning_gym", limit=60.0, extra="tasks")
    monkeypatch.setattr(reasoning_gym, "_pool", lambda: unguarded)
    example = make_task("reasoning_gym", dataset="polynomial_multiplication").example("train", 0)
    mark = tmp_path / "mark"
    for answer in (
        f"__import__('os').system('touch {mark}')",
        f"open('{mark}', 'w')",
        "__import__('os').kill(__import__('os').getppid(), 9)",
        "__import__('sys').modules.clear()",
        "__import__('sys').modules['__main__'].__dict__.clear()",
        "setattr(__import__('sympy').Basic, '__eq__', lambda a, b: False)",
        "setattr(__import__('os'), 'write', print)",
        "[__import__('os').write(f, b'{\"score\": 1}') for f in range(2, 64)]",
        "__import__('os')._exit(0)",
        "__import__('os').write(1, b'11')",
    ):
        assert score(example, f"<answer>{answer}</answer>") == 0.0 and not mark.exists(), answer
        assert score(example, example.solution) == 1.0, answer
    # What the guard is for: code in the child could say what it wants about its own answer.
    assert score(example, "<answer>__import__('os').write(1, b'1') and __import__('os')._exit(0)</answer>") == 1.0
    assert len(unguarded._idle) == 1
    unguarded.close()


@needs_isolation
@pytest.mark.parametrize(
    ("dataset", "trick", "plain"),
    [
        # The scorer counts the numbers that are written, so these would be ways to others.
        ("countdown", "{solution} + 0 * pi", None),
        ("countdown", "({solution}) # ", None),
        ("countdown", "({solution}) ** 1", None),
        # The derivative of an integral that nobody worked out is its integrand.
        ("simple_integration", "Integral({integrand}, {variable})", None),
        ("simple_integration", "integrate({integrand}, {variable})", None),
        ("polynomial_multiplication", "expand({solution})", "{solution}"),
        ("polynomial_multiplication", "({solution}).expand()", "{solution}"),
    ],
)
def test_ways_round_the_question_earn_nothing(dataset, trick, plain):
    example = make_task("reasoning_gym", dataset=dataset).example("train", 0)
    question = example.prompt[0]["content"]
    answer = example.ground_truth
    integrand = question.partition("\u222b")[2].partition(" d")[0] if "integration" in dataset else ""
    values = {"solution": answer, "integrand": integrand.strip() or "x", "variable": "x"}
    assert score(example, f"<answer>{trick.format(**values)}</answer>") == 0.0
    assert score(example, f"<answer>{(plain or '{solution}').format(**values)}</answer>") == 1.0


@needs_isolation
def test_an_answer_that_is_stopped_is_ended_and_counted():
    """A stopped child once blocked the trainer for ever."""
    example = make_task("reasoning_gym", dataset="simple_integration").example("train", 0)
    limited = SandboxPool("reasoning_gym", limit=3.0, extra="tasks")
    item = {key: example.extra_info[key] for key in ("dataset", "settings", "seed", "size", "item")}
    question = limited.ask(item=item)["question"]
    [worker] = limited._idle

    def scored() -> tuple[float, bool]:
        with Budget(60).charged() as charge:
            return limited.score(item=item, question=question, answer="9**9**9*x"), charge.timed_out

    with ThreadPoolExecutor(1) as executor:
        result = executor.submit(scored)
        pid, deadline = worker.process.pid, time.monotonic() + 60
        while time.monotonic() < deadline:
            if children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                os.kill(int(children[0]), signal.SIGSTOP)
                break
        assert result.result(60) == (0.0, True)
    assert limited.score(item=item, question=question, answer=example.ground_truth) == 1.0
    limited.close()
