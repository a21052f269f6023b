"""Tasks: determinism, splits that never share a question, right solutions, and checkers that believe nothing."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
from fractions import Fraction

import pytest

from entcov.rl import tasks
from entcov.rl.rewards.rules import score
from entcov.rl.sandbox import IsolationError, isolation
from entcov.rl.tasks import ALPHABET, TASKS, countdown, make_task, programs
from entcov.rl.tasks.base import answer_after_mark
from entcov.rl.types import Example

LEFT_OUT = {"reasoning_gym", *(["programs"] if isolation.missing() else [])}  # programs runs its answers in a sandbox
GENERATED = [name for name in sorted(TASKS) if name not in LEFT_OUT]

# Small settings, whose question spaces thousands of draws run through many times over.
SMALL = {
    "carry_arithmetic": {"max_digits": 1, "held_out_fraction": 0.4},
    "countdown": {"numbers": 2, "max_number": 5, "held_out_fraction": 0.4},
    "linear_equations": {"max_coefficient": 3, "max_constant": 3, "max_solution": 4, "held_out_fraction": 0.4},
    "modular_arithmetic": {"max_operand": 4, "max_modulus": 3, "held_out_fraction": 0.4},
    "programs": {"max_coefficient": 3, "max_constant": 3, "held_out_fraction": 0.4},
    "word_problems": {"max_number": 5, "templates": ["compare", "times", "buys"], "held_out_fraction": 0.4},
}


def text(example: Example) -> str:
    return example.prompt[0]["content"]


# ---- every generator -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATED)
def test_solutions_earn_the_reward_and_keep_to_the_alphabet(name):
    task = make_task(name, seed=3)
    few = 5 if name == "programs" else 1  # a process for each answer
    for split, count in (("train", 400 // few), ("held_out", 100 // few)):
        for example in (task.example(split, index) for index in range(count)):
            assert task.score(example, example.solution) == 1.0
            assert score(example, example.solution) == 1.0
            assert set(text(example) + example.solution) <= set(ALPHABET)
            assert (example.data_source, example.extra_info["split"]) == (f"entcov/{name}", split)
            assert len(text(example)) <= 150 and len(example.solution) <= 100


def test_alphabet_is_small_and_without_repeats():
    assert len(ALPHABET) == len(set(ALPHABET)) <= 60


@pytest.mark.parametrize("name", GENERATED)
def test_wrong_and_missing_answers_earn_nothing(name):
    task = make_task(name)
    for example in (task.example("train", index) for index in range(50)):
        answer = answer_after_mark(example.solution)
        after = " or so" if name != "programs" else " and so"  # "2*x or so" is right Python where 2*x is not 0
        for wrong in (answer, "", "#", example.solution + "1", example.solution + "#", "#" + answer + after):
            assert task.score(example, wrong) == 0.0, wrong


@pytest.mark.parametrize("name", GENERATED)
def test_an_example_is_a_function_of_seed_split_and_index(name):
    first, again = make_task(name, seed=5), make_task(name, seed=5)
    forward = [first.example("train", i) for i in range(40)]
    assert forward == [again.example("train", i) for i in reversed(range(40))][::-1]
    questions = [text(example) for example in forward]  # not the examples: they name their seed and index
    assert len(set(questions)) > 20
    assert questions != [text(make_task(name, seed=6).example("train", i)) for i in range(40)]
    assert questions != [text(first.example("held_out", i)) for i in range(40)]


def test_examples_do_not_depend_on_the_process():
    program = (
        "from entcov.rl.tasks import TASKS, make_task\n"
        f"for name in {GENERATED}:\n"
        "    task = make_task(name, seed=2)\n"
        "    for split, i in (('train', 0), ('train', 10**12), ('held_out', 7)):\n"
        "        e = task.example(split, i); print(repr((e.prompt[0]['content'], e.solution)))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(outputs) == 1
    lines = outputs.pop().splitlines()
    assert len(set(lines)) == 3 * len(GENERATED)
    # Pinned: a change of the drawing changes every seeded run, and must be deliberate.
    assert lines[:3] == CARRY_ARITHMETIC_SEED_2


@pytest.mark.parametrize("name", GENERATED)
def test_splits_share_no_question_for_any_seed(name):
    """Brute force: the whole space is drawn from, and no question (in any wording) is seen in both splits."""
    questions = {"train": set(), "held_out": set()}
    drawn = {"train": set(), "held_out": set()}
    for seed in (0, 1):
        task = make_task(name, seed=seed, **SMALL[name])
        for split, seen in questions.items():
            for index in range(1500):
                example = task.example(split, index)
                seen.add(text(example))
                drawn[split].add(canonical(name, example))
    assert not questions["train"] & questions["held_out"]
    assert not drawn["train"] & drawn["held_out"]
    assert min(map(len, drawn.values())) >= 10


def canonical(name: str, example: Example):
    """The question without what does not change it, worked out from the text alone."""
    numbers = tuple(map(int, re.findall(r"\d+", text(example))))
    if name == "carry_arithmetic":
        return tuple(sorted(numbers))
    if name == "countdown":
        return tuple(sorted(numbers[:-1])), numbers[-1]
    if name == "linear_equations":
        a, b, c = read_equation(text(example))
        return a, b, c
    if name == "programs":
        return text(example)  # four values, which no two functions share (below)
    if name == "modular_arithmetic":
        return tuple(sorted(numbers[:2])), "+" in text(example), numbers[2:]
    kind = next(word for word in ("together", "times", "buys") if word in text(example))
    return kind, numbers


def read_equation(equation: str) -> tuple[int, int, int]:
    left, right = equation.removesuffix(", x=").split("=")
    if "x" not in left:
        left, right = right, left
    coefficient = re.search(r"(-?\d+)x", left)
    constant = left.replace(coefficient[0], "", 1)
    return int(coefficient[1]), int(constant.removesuffix("+")), int(right)


def test_the_held_out_part_has_the_size_asked_for():
    task = make_task("carry_arithmetic", held_out_fraction=0.25, min_digits=3)
    keys = [f"{a}+{b}" for a in range(100, 300) for b in range(300, 400)]
    share = sum(task._split(key) == "held_out" for key in keys) / len(keys)
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / len(keys))


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("carry_arithmetic", {"max_digits": 1}, "leave the held_out split 4 distinct questions, it needs at least 10"),
        ("carry_arithmetic", {"max_digits": 0}, r"max_digits must be an integer in \[1, 9\], got 0"),
        ("carry_arithmetic", {"min_digits": 3, "max_digits": 2}, r"min_digits must be an integer in \[1, 2\], got 3"),
        ("carry_arithmetic", {"terms": True}, "terms must be an integer in .*, got True"),
        ("carry_arithmetic", {"styles": []}, "styles must be a list of at least one of direct, .*, got \\[\\]"),
        ("carry_arithmetic", {"styles": ["columns", "rows"]}, "styles must be among direct, .*, got 'rows'"),
        ("carry_arithmetic", {"styles": ["direct", "direct"]}, "styles must not repeat"),
        ("carry_arithmetic", {"held_out_fraction": 10}, "held_out_fraction is a fraction, .* got 10"),
        ("carry_arithmetic", {"seed": -1}, "seed must be an integer"),
        ("countdown", {"numbers": 7}, "numbers must be an integer in"),
        ("countdown", {"numbers": 2, "max_number": 2}, "distinct questions"),
        ("linear_equations", {"max_coefficient": 1}, "max_coefficient must be an integer in"),
        ("modular_arithmetic", {"max_modulus": 1.5}, "max_modulus must be an integer in .* got 1.5"),
        ("word_problems", {"templates": ["boats"]}, "templates must be among"),
        ("programs", {"max_coefficient": 8}, r"max_coefficient must be an integer in \[3, 7\], got 8"),
        ("programs", {"max_constant": 0}, "max_constant must be an integer in .* got 0"),
        ("programs", {"shapes": ["line", "cube"]}, "shapes must be among line, .*, got 'cube'"),
        ("no_such_task", {}, "unknown task 'no_such_task'; known: carry_arithmetic, countdown"),
        ("math:NoSuchClass", {}, "module 'math' has no 'NoSuchClass'"),
        ("no_such_module:Task", {}, "there is no module 'no_such_module'"),
    ],
)
def test_bad_settings_are_named(name, settings, message):
    with pytest.raises(ValueError, match=message):
        make_task(name, **settings)


def test_a_setting_the_task_lacks_is_named():
    with pytest.raises(TypeError, match="'countdown' has no setting 'digits'; it has: seed, .*max_target"):
        make_task("countdown", digits=3)


@pytest.mark.parametrize(("split", "index"), [("test", 0), ("train", -1), ("train", 1.0), ("train", True)])
def test_bad_split_or_index(split, index):
    with pytest.raises(ValueError, match="split must be|index must be"):
        make_task("countdown").example(split, index)


def test_a_task_of_ones_own_is_found_by_module_and_class():
    task = make_task("entcov.rl.tasks.countdown:Countdown", numbers=4)
    assert task == make_task("countdown", numbers=4) and isinstance(task, tasks.Task)


def test_a_taken_name_is_refused():
    with pytest.raises(ValueError, match="'countdown' is already taken by Countdown"):
        tasks.register(type("Other", (), {"name": "countdown"}))


# ---- carry arithmetic ----------------------------------------------------------------------------------------------

CARRY_ARITHMETIC_SEED_2 = [
    "('4+9=', '#13')",
    "('1+5=', '#6')",
    "('85+176=', '5+6=11,7+8+1=16\\n1+1=2#261')",
]


@pytest.mark.parametrize("terms", [2, 4])
def test_every_written_step_of_a_sum_is_true(terms):
    task = make_task("carry_arithmetic", terms=terms, max_digits=4)
    checked = 0
    for example in (task.example("train", index) for index in range(600)):
        carried = 0
        for step in re.split(r"[ ,\n]", example.solution.partition("#")[0]):
            if "c" in step:  # column digit and carry, the carry from the column before being left unwritten
                left, right = step.split("=")
                digit, carry = map(int, right.split("c"))
                assert sum(map(int, left.split("+"))) + carried == 10 * carry + digit
                carried = carry
            elif "=" in step:
                left, right = step.split("=")
                assert sum(map(int, left.split("+"))) == int(right), example
            checked += "=" in step
        assert int(example.ground_truth) == sum(map(int, text(example).removesuffix("=").split("+")))
    assert checked > 1000


def test_one_sum_has_many_right_solutions():
    """What the policy's entropy lives on: over 500 draws of one question's solution, at least 4 bits of choice."""
    import random

    task = make_task("carry_arithmetic", min_digits=2, max_digits=2)
    rng = random.Random(0)
    counts: dict[str, int] = {}
    for _ in range(500):
        solution = task.solve((47, 85), rng)
        assert solution.endswith("#132")
        counts[solution] = counts.get(solution, 0) + 1
    entropy = -sum(n / 500 * math.log(n / 500) for n in counts.values())
    assert entropy > 4 * math.log(2)
    assert 500 / 6 - 5 * 9 < counts["#132"] < 500 / 6 + 5 * 9  # one of six styles; sigma of the count is 8.3


@pytest.mark.parametrize(
    ("style", "pattern"),
    [
        ("direct", r"#132"),
        ("digits", r"2[ ,\n]3#132"),  # the last digit is the sum's own two-digit column
        ("columns", r"(7\+5|5\+7)=12[ ,\n](4|8|1)\+(4|8|1)\+(4|8|1)=13#132"),
        ("carries", r"(7\+5|5\+7)=2c1[ ,\n](4\+8|8\+4)=3c1#132"),
        ("places", r"[\d+=]+[ ,\n][\d+=]+[ ,\n](120\+12|12\+120)=132#132"),
        ("adds", r"(47|85)\+\d+=\d+[ ,\n]\d+\+\d+=132#132"),
    ],
)
def test_the_styles_of_working(style, pattern):
    import random

    task = make_task("carry_arithmetic", styles=[style], max_digits=2)
    pattern = pattern.replace("2[ ,\\n]3#", "2[ ,\\n]3[ ,\\n]1#")
    for seed in range(20):
        assert re.fullmatch(pattern, task.solve((47, 85), random.Random(seed)))


# ---- countdown -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("3*5+8", 23),
        ("8+3*5", 23),
        ("(8+3)*5", 55),
        ("8-3-5", 0),
        ("8/4/2", 1),
        ("1/3*3", 1),
        ("8/(3-8/3)", 24),
        ("2-(3-4)", 3),
        (" ( ( 7 ) ) ", 7),
        ("1/3", Fraction(1, 3)),
    ],
)
def test_evaluate(expression, value):
    assert countdown.evaluate(expression)[0] == value


@pytest.mark.parametrize(
    "expression",
    ["", "()", "3+", "+3", "-3", "3 4+", "3(4)", "(3", "3)", "2**3", "4//2", "1/0", "1/(2-2)", "3+x", "1e3", "0x3",
     "1.5", "３", "__import__('os')", "3;4", "(" * 5000 + "3" + ")" * 5000, "1+" * 5000 + "1", "3=3", "9" * 5000],
)  # fmt: skip
def test_evaluate_refuses(expression):
    assert countdown.evaluate(expression) is None


def test_evaluate_agrees_with_python_on_every_small_expression():
    checked = 0
    for a, b, c, d in itertools.product("0123", repeat=4):
        for one, two, three in itertools.product("+-*/", repeat=3):
            for form in ("{}{}{}{}{}{}{}", "({}{}{}){}({}{}{})", "{}{}({}{}({}{}{}))", "({}{}{}{}{}){}{}"):
                expression = form.format(a, one, b, two, c, three, d)
                exact = re.sub(r"(\d)", r"Fraction(\1)", expression)
                try:
                    expected = eval(exact, {"Fraction": Fraction})
                except ZeroDivisionError:
                    expected = None
                result = countdown.evaluate(expression)
                assert (result and result[0]) == expected, expression
                checked += 1
    assert checked == 4**4 * 4**3 * 4


def countdown_example(ground_truth: str) -> Example:
    return Example("entcov/countdown", ({"role": "user", "content": "?"},), ground_truth)


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("#3*5+8", 1.0),
        ("3*8=24, no. #3*8-1 #8+5*3\n", 1.0),
        ("#(3*5)+(8)", 1.0),
        ("3*5+8", 0.0),  # no mark
        ("#3*5+8#", 0.0),
        ("#23", 0.0),
        ("#3*5+8+0", 0.0),  # a number that is not there
        ("#3*5+8-3+3", 0.0),  # one too often
        ("#15+8", 0.0),
        ("#35-8", 0.0),
        ("#3*5+8=23", 0.0),
    ],
)
def test_countdown_score(response, reward):
    assert score(countdown_example("3 5 8 make 23"), response) == reward


def test_countdown_needs_every_number_exactly_once():
    example = countdown_example("2 2 4 make 8")
    assert [score(example, r) for r in ("#2*4", "#2+2+4", "#2*2+4", "#4+4", "#4*2*2/2")] == [0.0, 1.0, 1.0, 0.0, 0.0]


def test_countdown_refuses_an_unusable_ground_truth():
    with pytest.raises(ValueError, match="ground_truth must read 'N N N make TARGET', got '23'"):
        score(countdown_example("23"), "#3*5+8")


def test_all_solutions_are_all():
    """Against every way of writing three numbers with two operators and one pair of brackets."""
    numbers, target = (2, 3, 6), 1
    expected = set()
    for a, b, c in itertools.permutations(numbers):
        for one, two in itertools.product("+-*/", repeat=2):
            for expression in (f"{a}{one}{b}{two}{c}", f"({a}{one}{b}){two}{c}", f"{a}{one}({b}{two}{c})"):
                result = countdown.evaluate(expression)
                if result and result[0] == target and not has_negative_step(expression):
                    expected.add(value_structure(expression))
    found = countdown.all_solutions(numbers, target)
    assert len(found) == len(set(found)) and all(countdown.evaluate(e)[0] == target for e in found)
    assert {value_structure(e) for e in found} == expected and len(expected) > 5


def has_negative_step(expression: str) -> bool:
    import ast

    for node in ast.walk(ast.parse(expression, mode="eval")):
        if isinstance(node, ast.BinOp) and countdown.evaluate(ast.unparse(node))[0] < 0:
            return True
    return False


def value_structure(expression: str) -> str:
    """The expression without brackets that do not matter: 2+(3+6) and 2+3+6 are written alike."""
    bare = expression.replace("(", "").replace(")", "")
    same = countdown.evaluate(bare)
    return bare if same and same[0] == countdown.evaluate(expression)[0] else expression


# ---- the other generators: answers worked out again from the text --------------------------------------------------


def test_modular_arithmetic_answers_and_steps():
    task = make_task("modular_arithmetic", max_operand=30, max_modulus=20)
    for example in (task.example("train", index) for index in range(500)):
        a, b, sign, c, modulus = re.fullmatch(r"\((\d+)\*(\d+)([+-])(\d+)\) mod (\d+)=", text(example)).groups()
        assert int(example.ground_truth) == eval(f"({a}*{b}{sign}{c}) % {modulus}")
        # Separators may be spaces, and so are those around "mod": a step ends where the next begins, after its result.
        for left, right in re.findall(r"((?:-?\d+ mod \d+)|(?:\d+[*+-]\d+))=(-?\d+)", example.solution):
            assert eval(left.replace("mod", "%")) == int(right), example


def test_linear_equation_answers_and_checks():
    task = make_task("linear_equations")
    forms = set()
    for example in (task.example("train", index) for index in range(500)):
        a, b, c = read_equation(text(example))
        assert a * int(example.ground_truth) + b == c and a >= 2 and b != 0
        for check in re.findall(r"\d+\*\(?-?\d+\)?[+-]\d+=-?\d+", example.solution):
            left, right = check.split("=")
            assert eval(left) == int(right)
        forms.add(re.sub(r"-?\d+", "n", text(example).replace("+", "").replace("-", "")))
    assert len(forms) >= 4


def test_word_problem_steps_lead_to_the_answer():
    task = make_task("word_problems")
    for example in (task.example("train", index) for index in range(600)):
        steps, _, answer = example.solution.partition("#")
        for step in re.split(r"[ ,\n]", steps):
            left, right = step.split("=")
            assert eval(left) == int(right)
        assert int(right) == int(answer) == int(example.ground_truth) >= 0


@pytest.mark.parametrize(
    ("template", "numbers", "question", "answer"),
    [
        ("buys", (5, 3, 2), "tom has 5 pens. he buys 3 more and gives 2 to ann. how many has tom now?", 6),
        ("boxes", (5, 3, 2), "tom fills 5 boxes with 3 pens each. 2 are left over. how many pens are there?", 17),
        ("compare", (5, 3, 2), "tom has 5 pens. ann has 3 more than tom. how many pens have they together?", 13),
        ("times", (5, 3, 2), "tom has 5 pens. ann has 3 times as many. how many more has ann?", 10),
        ("change", (5, 3, 2), "tom pays 17 euro for 5 pens and gets 2 back. what does each cost?", 3),
        ("share", (5, 3, 2), "tom gives 15 pens to 3 friends, all the same. one of them is ann, who had 2 before. "
         "how many has ann now?", 7),
    ],
)  # fmt: skip
def test_word_problems_by_hand(template, numbers, question, answer):
    from entcov.rl.tasks.word_problems import TEMPLATES, Scene

    problem = TEMPLATES[template](Scene("tom", "he", "ann", "pens"), *numbers)
    assert problem.text == question
    assert make_task("word_problems").answer(problem) == str(answer)


# ---- programs ------------------------------------------------------------------------------------------------------


def test_the_values_shown_tell_every_function_from_every_other():
    functions = [
        programs.Question(shape, a, b) for shape in programs.SHAPES for a in range(2, 8) for b in range(-99, 100)
    ]
    seen = {}
    for question in functions:
        shown = tuple(programs.value_of(question, x) for x in programs.SHOWN)
        assert seen.setdefault(shown, question) == question
    assert len(seen) == 5 * 6 * 199


def test_every_way_to_write_a_program_is_the_function_that_was_asked_for():
    import json
    import random

    task, rng, written = make_task("programs"), random.Random(0), set()
    for question in (task.draw(rng) for _ in range(400)):
        source = task.solve(question, rng).removeprefix("#")
        space = {}
        exec(source, space)
        truth = json.loads(task.answer(question))
        assert [space["f"](*arguments) for arguments in truth["inputs"]] == truth["outputs"], source
        assert [f"f({x})={space['f'](x)}" for x in (0, 1, 2, 60)] == task.prompt(question).rstrip(": ").split()
        written.add(re.sub(r"\d+", "n", source))
    assert len(written) > 40 and any("\n" in source for source in written) and any("lambda" in w for w in written)


@pytest.mark.skipif(bool(isolation.missing()), reason=f"this system lacks {isolation.missing()}")
@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("#def f(x): return 3*x+4", 1.0),
        ("not 2*x #f=lambda y: y+4+y+y", 1.0),
        ("#def f(x):\n y=x*3\n return 4+y", 1.0),
        ("def f(x): return 3*x+4", 0.0),  # no mark
        ("#def g(x): return 3*x+4", 0.0),
        ("#def f(x): return 3*x", 0.0),
        ("#def f(x): return 4 if x<1 else 7 if x<2 else 10 if x<3 else 184", 0.0),  # those shown alone
        ("#f", 0.0),
        ("#f(", 0.0),
    ],
)
def test_a_program_is_scored_by_what_it_computes(response, reward):
    task = make_task("programs")
    question = programs.Question("line", 3, 4)
    example = Example("entcov/programs", ({"role": "user", "content": task.prompt(question)},), task.answer(question))
    assert text(example) == "f(0)=4 f(1)=7 f(2)=10 f(60)=184: "
    assert score(example, response) == reward


def test_programs_are_refused_where_they_cannot_be_confined(monkeypatch):
    monkeypatch.setattr(isolation, "missing", lambda: {"seccomp": "none here"})
    with pytest.raises(IsolationError, match="programs must be confined .*no seccomp: none here"):
        make_task("programs")
