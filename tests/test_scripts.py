"""The set-up script's first second on a machine that lacks something: it says what, and what to install."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parent.parent / "scripts" / "setup.sh"


def run_setup(tmp_path, answers, programs):
    """Run the script with a PATH that holds `programs` and a python3 that answers as told.

    `answers` maps a piece of a command line of python3 to what happens instead; making the environment ends it.
    """
    scripts, tools = tmp_path / "tree" / "scripts", tmp_path / "tools"
    scripts.mkdir(parents=True)
    shutil.copy(SETUP, scripts)
    tools.mkdir()
    for name in ("bash", "dirname"):
        (tools / name).symlink_to(shutil.which(name))
    cases = [
        f"*'{piece}'*) {answer};;" for piece, answer in (answers | {"-m venv": "echo making .venv; exit 9"}).items()
    ]
    python = ["#!/bin/bash", 'case "$*" in', *cases, f'*) exec {sys.executable} "$@";;', "esac"]
    for name, text in {"python3": "\n".join(python), **dict.fromkeys(programs, "#!/bin/bash")}.items():
        (tools / name).write_text(text + "\n")
        (tools / name).chmod(0o755)
    return subprocess.run([scripts / "setup.sh"], capture_output=True, text=True, env={"PATH": str(tools)})


@pytest.mark.parametrize(
    "answers, programs, message",
    [
        (
            {"platform": "echo 3.9.2", "version_info": "exit 1"},
            ["g++"],
            "needs Python 3.11 or newer and python3 is 3.9.2",
        ),
        (
            {"ensurepip": "exit 1"},
            ["g++"],
            "virtual environments; on Debian or Ubuntu: sudo apt-get install python3-venv",
        ),
        ({"sysconfig": "echo /nowhere"}, ["g++"], "on Debian or Ubuntu: sudo apt-get install python3-dev"),
        ({}, [], "no C++ compiler found; on Debian or Ubuntu: sudo apt-get install g++"),
    ],
)
def test_what_is_missing_is_named(tmp_path, answers, programs, message):
    done = run_setup(tmp_path, answers, programs)
    assert done.returncode == 1 and message in done.stderr and "making .venv" not in done.stdout


@pytest.mark.parametrize("compiler", ["g++", "c++", "clang++"])
def test_a_complete_machine_gets_as_far_as_the_environment(tmp_path, compiler):
    done = run_setup(tmp_path, {}, [compiler])
    assert done.returncode == 9 and "making .venv" in done.stdout
