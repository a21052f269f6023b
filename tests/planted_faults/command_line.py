"""Faults of the command line: what an option may be, where results go, exit codes."""

from tests.planted_faults.fault import Fault

COMMAND_LINE, EXPERIMENTS, RUNS, DATA = (
    f"entcov/cli/{name}.py" for name in ("command_line", "experiments", "runs", "data")
)
BAD = "tests/test_bad_input.py::test_a_bad_command_line"
OTHERS = "the ordinary suite tries others of this folder"

FAULTS = (
    Fault("a_count_may_be_zero", COMMAND_LINE, "    if value < 1:", "    if value < 0:", [BAD]),
    Fault(
        "a_folder_may_lie_in_a_file",
        COMMAND_LINE,
        "for one in (path, *path.parents) if one.is_file()",
        "for one in (path,) if one.is_file()",
        ["tests/studies/test_parts.py::test_the_command_refuses"],
        slow=OTHERS,
    ),
    Fault(
        "unknown_options_are_dropped",
        COMMAND_LINE,
        'if any(item.startswith("-") for item in rest) or',
        "if",
        [BAD],
        slow=OTHERS,
    ),
    Fault(
        "a_bad_recipe_has_exit_code_1",
        COMMAND_LINE,
        'return f"error: {error}", 2',
        'return f"error: {error}", 1',
        [BAD],
        slow=OTHERS,
    ),
    Fault(
        "arms_may_repeat",
        EXPERIMENTS,
        "if len(set(values)) < len(values):",
        "if len(set(values)) < 0:",
        [BAD],
        slow=OTHERS,
    ),
    Fault(
        "knobs_of_an_arm_are_lost",
        EXPERIMENTS,
        '*(f"controls.{name}.{knob}" for knob in knobs)',
        "",
        [BAD],
    ),
    Fault(
        "a_report_may_replace_a_folder",
        RUNS,
        "    if out.is_dir():\n",
        "    if False:\n",
        [BAD],
        slow=OTHERS,
    ),
    Fault(
        "options_of_another_ranking_are_ignored",
        DATA,
        "if name not in own and getattr(args, name) is not None:",
        "if False:",
        [BAD],
        slow=OTHERS,
    ),
)  # fmt: skip
