"""The tests against planted faults: each named test sees a fault, of those that are quick to try one.

`python -m tests.planted_faults` tries all of them.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.planted_faults.catalogue import FAULTS
from tests.planted_faults.fault import Fault
from tests.planted_faults.runner import ROOT, Outcome, survivors
from tests.support import on_device


def test_every_fault_is_in_the_code_and_changes_it():
    """Without trying them; an edit of the code that takes away a fault's place fails here, with the fault's name."""
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        source = (ROOT / fault.file).read_text()
        assert fault.planted_in(source) != source and fault.tests, fault.name


@pytest.mark.skipif(on_device.DEVICE is not None, reason="about Python code, which is the same on every device")
def test_quick_faults_are_caught():
    # In a process of its own: the one that forks must not have imported entcov, and this one has.
    command = [sys.executable, "-m", "tests.planted_faults", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def test_a_place_that_is_gone_or_ambiguous_is_an_error_that_names_the_fault():
    fault = Fault("wrong_sign", "entcov/x.py", "a + b", "a - b", ["tests/test_x.py::test_x"])
    assert fault.planted_in("y = a + b\n") == "y = a - b\n"
    for source, count in (("y = b + a\n", 0), ("y = a + b\nz = a + b\n", 2)):
        with pytest.raises(ValueError, match=f"fault wrong_sign: .*x.py exactly once, it is there {count} times"):
            fault.planted_in(source)
    with pytest.raises(ValueError, match="fault wrong_sign: entcov/x.py with its new text is no Python"):
        Fault("wrong_sign", "entcov/x.py", "a + b", "a +", ["t"]).planted_in("y = a + b\n")
    with pytest.raises(ValueError, match="two faults have the name wrong_sign"):
        survivors([fault, fault])


def test_a_survivor_and_a_fault_that_is_no_working_code_are_told_apart():
    """Of three faults one is caught, one changes nothing that its test looks at, and one breaks the import."""
    program = """
from tests.planted_faults.fault import Fault
from tests.planted_faults.runner import survivors
FILE, TEST = "entcov/intervals.py", "tests/rl/test_evaluation.py::"
table = TEST + "test_the_table_holds_accuracies_in_percent_and_the_interval_over_prompts"
found = survivors([
    Fault("seen", FILE, "/ (count - 1)", "/ count", [table]),
    Fault("unseen", FILE, "/ (count - 1)", "/ count", [table, TEST + "test_every_data_source_has_its_own_protocol"]),
    Fault("name", FILE, "/ (count - 1)", "/ (number - 1)", [table]),
    Fault("import", FILE, "import math", "import maths", [table]),
])
assert list(found) == ["unseen", "name", "import"], found
assert found["unseen"] == "SURVIVED " + TEST + "test_every_data_source_has_its_own_protocol"
assert "NameError" in found["name"] and "breaks more than it says" in found["import"]
"""
    before = (ROOT / "entcov" / "intervals.py").read_bytes()
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (ROOT / "entcov" / "intervals.py").read_bytes() == before


def test_an_outcome_is_a_catch_only_if_every_named_test_failed():
    assert Outcome(failed={"a", "b"}).problem(["a", "b"]) is None
    assert Outcome(failed={"a"}, passed={"b"}).problem(["a", "b"]) == "SURVIVED b"
    assert "breaks more" in Outcome(failed={"a"}, broken={"b": "setup"}).problem(["a"])
