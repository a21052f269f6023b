"""The scripts for set-up and tests, with stand-ins for Python: what they say on a machine that lacks something, what
they install and when, and that a failure of any part is a failure of the command."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = "bash dirname find sort xargs cat sha256sum sed rm mkdir chmod uname mktemp env".split()
# An environment's Python writes down what it is asked to do and does nothing; the installation $FAILS fails.
STAND_IN = """#!/bin/bash
case "$*" in
*"pip --version"*) ;;
--version) echo Python 3.11.0 ;;
*) echo "${0%/bin/python} $*" >>log; [[ -z "$FAILS" || "$0 $*" != *"$FAILS"* ]] ;;
esac
"""
MAKE = 'folder="${@: -1}"; mkdir -p "$folder/bin"; cat stand_in >"$folder/bin/python"; chmod +x "$folder/bin/python"'


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def run_setup(tmp_path, *names, answers=(), programs=("g++",), fails=""):
    """Run the script with a PATH that holds `programs` and a python3 that answers as told.

    `answers` maps a piece of a command line of python3 to what happens instead; it makes environments of STAND_IN.
    """
    tree, tools = tmp_path / "tree", tmp_path / "tools"
    if not tree.exists():
        (tree / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "scripts" / "setup.sh", tree / "scripts")
        for name in ("setup.py", "build_backend.py", "pyproject.toml", "requirements-engines.txt", "csrc"):
            (tree / name).write_text(name)
        for name in ("constraints.txt", "constraints-verl.txt", "constraints-trl.txt"):
            (tree / name).write_text("torch==9.9\n")
        (tree / "stand_in").write_text(STAND_IN)
        tools.mkdir()
        for name in TOOLS:
            (tools / name).symlink_to(shutil.which(name))
    cases = [f"*'{piece}'*) {answer};;" for piece, answer in {**dict(answers), "-m venv": MAKE}.items()]
    program(tools / "python3", "\n".join(['case "$*" in', *cases, f'*) exec {sys.executable} "$@";;', "esac"]))
    for name in programs:
        program(tools / name, "")
    environment = {"PATH": str(tools), "FAILS": fails}
    done = subprocess.run([tree / "scripts/setup.sh", *names], capture_output=True, text=True, env=environment)
    log = tree / "log"
    done.commands = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return done


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
    done = run_setup(tmp_path, answers=answers, programs=programs)
    assert done.returncode == 1 and message in done.stderr and not (tmp_path / "tree/.venv").exists()


@pytest.mark.parametrize("compiler", ["g++", "c++", "clang++"])
def test_a_complete_machine_gets_entcov(tmp_path, compiler):
    done = run_setup(tmp_path, programs=[compiler])
    assert done.returncode == 0 and done.commands[-1].endswith("-c constraints.txt -e .[train,tasks,dev,cuda-static]")


def test_a_wrong_name_is_refused_before_anything_is_made(tmp_path):
    done = run_setup(tmp_path, "trl", "verk")
    assert done.returncode == 1 and "must be engines, verl, trl or left out, got 'verk'" in done.stderr
    assert not done.commands and not (tmp_path / "tree/.venv-trl").exists()


def installed(done, folder):
    """What pip was asked for in an environment, without the options that are the same for all."""
    lines = (line.split(" ", 1) for line in done.commands)
    return [what.partition("--quiet ")[2] for where, what in lines if where == folder and "pip install" in what]


def test_each_environment_gets_its_own_versions_once(tmp_path):
    cpu_only = sys.platform == "linux" and not os.path.exists("/proc/driver/nvidia/version")
    done = run_setup(tmp_path, "verl", "trl")
    assert done.returncode == 0 and not (tmp_path / "tree/.venv").exists()
    for name, extras in (("verl", "verl,train,megatron,dev"), ("trl", "trl,dev")):
        options = f"--no-compile -c constraints-{name}.txt"
        torch = [f"{options} torch==9.9+cpu"] if cpu_only else []
        listed = f"{options} --no-deps -r constraints-{name}.txt"
        assert installed(done, f".venv-{name}") == [*torch, listed, f"{options} -e .[{extras}]"]
    assert not run_setup(tmp_path, "verl", "trl").commands
    (tmp_path / "tree/constraints-trl.txt").write_text("torch==9.8\n")
    done = run_setup(tmp_path, "verl", "trl")
    assert not installed(done, ".venv-verl") and ("torch==9.8+cpu" if cpu_only else "-r") in done.commands[0]


@pytest.mark.parametrize("fails", [".venv-verl", ".venv-trl"])
def test_an_environment_that_fails_is_made_again(tmp_path, fails):
    """It fails the command, whether the other one is made or not, and leaves no stamp."""
    assert run_setup(tmp_path, "verl", "trl", fails=fails).returncode == 1
    done = run_setup(tmp_path, "verl", "trl")
    assert done.returncode == 0 and {line.split(" ")[0] for line in done.commands} == {fails}
    changed = tmp_path / "tree" / f"constraints-{fails.removeprefix('.venv-')}.txt"
    before = changed.read_text()
    changed.write_text("torch==9.8\n")
    assert run_setup(tmp_path, "verl", "trl", fails="-e .").returncode == 1
    changed.write_text(before)  # the packages of 9.8 may be there
    assert run_setup(tmp_path, "verl", "trl").commands


def test_engines_are_added_to_the_environment_and_stay(tmp_path):
    run_setup(tmp_path)
    assert "-e" in installed(run_setup(tmp_path, "engines"), ".venv")[-1]
    assert not run_setup(tmp_path).commands and not run_setup(tmp_path, "engines").commands


def run_tests(tmp_path, *arguments, fails="nothing"):
    """setup_and_test.sh with stand-ins. An environment's tests print two lines, half a second apart."""
    for name in ("setup_and_test.sh", "test_plugins.sh"):
        (tmp_path / "scripts").mkdir(exist_ok=True)
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    program(tmp_path / "scripts/setup.sh", 'echo "setup $*"')
    for folder in (".venv", ".venv-verl", ".venv-trl"):
        said = 'echo "$0 $ENTCOV_ENVIRONMENT begins"; sleep 0.5; echo "$0 ends $*"'
        program(tmp_path / folder / "bin/python", f"{said}; [ {folder} != {fails} ]")
    return subprocess.run([tmp_path / "scripts/setup_and_test.sh", *arguments], capture_output=True, text=True)


def test_all_tests_are_run_and_their_outputs_follow_one_another(tmp_path):
    done = run_tests(tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[:2] == ["setup engines verl trl", "setup verl trl"]
    assert [line.partition(" ends")[0] for line in lines[2:]] == [
        ".venv-verl/bin/python verl begins", ".venv-verl/bin/python",
        ".venv-trl/bin/python trl begins", ".venv-trl/bin/python",
        ".venv/bin/python  begins", ".venv/bin/python",
    ]  # fmt: skip
    assert "tests/integrations/verl tests/rl/test_config.py" in lines[3] and "tests/integrations/trl" in lines[5]


@pytest.mark.parametrize("folder", [".venv", ".venv-verl", ".venv-trl"])
def test_tests_that_fail_anywhere_fail_the_command_after_all_have_run(tmp_path, folder):
    done = run_tests(tmp_path, fails=folder)
    where = " of .venv" if folder == ".venv" else " of the plug-ins"
    assert done.returncode == 1 and done.stderr.endswith(f"setup_and_test: failed: tests{where}\n")
    assert done.stdout.count(" ends") == 3 and (folder == ".venv" or f"failed in {folder}\n" in done.stderr)


def test_arguments_go_to_the_tests_of_the_main_environment_alone(tmp_path):
    done = run_tests(tmp_path, "-k", "a name")
    lines = done.stdout.splitlines()
    assert lines[0] == "setup engines" and len(lines) == 3 and lines[2].endswith("-q -k a name")
