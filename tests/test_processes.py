"""tests/support/processes.py: a command that hangs fails its test, says where it stood and leaves nothing behind."""

import re
import sys

import psutil
import pytest

from tests.support.processes import run_command

HANGS = """
import subprocess, sys, time
def wait_in_the_child():
    print("child", flush=True)
    time.sleep(1000)
if len(sys.argv) == 1:
    child = subprocess.Popen([sys.executable, __file__, "child"], start_new_session=True)
    print(child.pid, flush=True)
    child.wait()
wait_in_the_child()
"""


def test_output_and_exit_code_are_those_of_the_command(tmp_path):
    program = "import os, sys; print(os.getcwd(), os.environ['X']); print('no', file=sys.stderr); sys.exit(3)"
    done = run_command([sys.executable, "-c", program], cwd=tmp_path, env={"X": "y"})
    assert (done.returncode, done.stdout, done.stderr) == (3, f"{tmp_path} y\n", "no\n")


def test_a_command_that_hangs_is_ended_with_its_children_and_shows_their_stacks(tmp_path):
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    with pytest.raises(AssertionError, match=r"ran for more than 5 s") as late:
        run_command([sys.executable, script], limit=5)
    said = str(late.value)
    assert "in wait_in_the_child" in said and "in wait\n" in said  # of the child, of its parent
    assert re.search(r"^\d+\nchild$", said, re.MULTILINE)
    assert not any(str(script) in p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"])
