"""The folders ("rooms") of entcov/: which of them a file may import from, at its head or in a function, no circle of
files. The folders of tests/ are the same, no test imports a test, and docs/architecture.md names what is there."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLAT = {  # files of entcov/ itself, and the room that they are taken for
    "arguments": "shared", "intervals": "shared", "law": "shared", "registry": "shared", "diagnostics": "objective",
    "_cpu": "ops", "_cuda": "ops",
    "__main__": "cli",
}  # fmt: skip
MAY_IMPORT = {
    "shared": "",
    "ops": "",
    "stats": "ops",
    "objective": "ops stats controls",
    "controls": "stats objective",
    "rl": "stats objective controls",
    "plan": "",
    "report": "rl",
    "studies": "stats objective controls rl report",
    "verify": "ops stats",
    "integrations": "stats objective controls",
    "entcov": "stats objective",  # the public names
    "cli": "rl plan report studies verify",
}


def modules_of(folder: Path) -> dict[str, Path]:
    names = {path: path.relative_to(folder.parent).with_suffix("").parts for path in folder.rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in names.items()}


def imports_of(path: Path, modules) -> set[str]:
    """Modules that a file imports anywhere in it; `from package import name` is the module `name` if there is one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: line {node.lineno}: imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules or name in BUILT else node.module for name in names}
    return found


def room_of(module: str) -> str:
    first = module.removeprefix("entcov.").partition(".")[0]
    return FLAT.get(first, first)


BUILT = ("entcov._cpu", "entcov._cuda")
MODULES = modules_of(ROOT / "entcov")
GRAPH = {name: imports_of(path, MODULES) for name, path in MODULES.items()}


def outside(*folders: str) -> dict[Path, set[str]]:
    return {path: imports_of(path, MODULES) for folder in folders for path in (ROOT / folder).rglob("*.py")}


def test_no_circle_of_imports():
    ours = {name: {other for other in others if other in MODULES} for name, others in GRAPH.items()}
    try:
        TopologicalSorter(ours).prepare()
    except CycleError as error:
        pytest.fail("circle of imports: " + " <- ".join(error.args[1]))


def test_rooms_import_in_one_direction():
    wrong = []
    for module, others in GRAPH.items():
        room = room_of(module)
        assert room in MAY_IMPORT, f"{module}: which room is it? (FLAT, MAY_IMPORT)"
        allowed = {room, "shared", *MAY_IMPORT[room].split()}
        ours = (other for other in others if other.partition(".")[0] == "entcov")
        wrong += [f"{module} imports {other}" for other in ours if room_of(other) not in allowed]
    assert not wrong


def test_nothing_in_entcov_imports_what_stands_on_it():
    above = ("megatron_integration", "benchmarks", "tests")
    assert not [(m, other) for m, others in GRAPH.items() for other in others if other.partition(".")[0] in above]


def test_oracles_are_not_used_outside_tests_and_benchmarks():
    users = outside("megatron_integration", "examples")
    assert len(users) > 10
    assert not [str(p) for p, others in users.items() if any(other.startswith("entcov.verify") for other in others)]


def test_every_room_says_what_is_in_it():
    assert not [name for name, path in MODULES.items() if not ast.get_docstring(ast.parse(path.read_text()))]


def test_the_map_is_short_and_names_folders_and_files_that_exist():
    page = (ROOT / "docs/architecture.md").read_text()
    named = set(re.findall(r"`([\w./]+/[\w./]*)`", page))
    assert len(named) > 50 and not [name for name in named if not (ROOT / name).exists()]
    assert {f"entcov/{room_of(name)}/" for name in MODULES if name.count(".") > 1} <= named
    assert len(page.splitlines()) <= 80


# ---- the rooms of tests/ ---------------------------------------------------------------------------------------------

TESTS = modules_of(ROOT / "tests")
OTHER_FOLDERS = {"benchmarks", "megatron", "gpu", "emulator", "fuzz", "planted_faults", "support"}


def test_no_test_imports_a_test():
    """What two of them use is in tests/support; tests that run twice are named to tests/support/repeated.py."""
    found = {name: imports_of(path, TESTS) for name, path in TESTS.items()}
    assert len(found) > 100
    assert not [
        f"{name} imports {other}"
        for name, others in found.items()
        for other in others
        if other.startswith("tests.") and ".test_" in other
    ]


def test_every_folder_of_tests_is_a_room():
    folders = {path.parent.relative_to(ROOT / "tests") for path in TESTS.values()} - {Path(".")}
    rooms = {room_of(name) for name in MODULES}
    assert len(folders) > 20
    for folder in folders:
        room = folder.parts[0]
        if len(folder.parts) == 1:
            assert room in rooms | OTHER_FOLDERS, f"tests/{folder}: of which room are these the tests?"
        else:
            assert (ROOT / "entcov" / folder).is_dir(), f"tests/{folder}: entcov/{folder} is no folder"
