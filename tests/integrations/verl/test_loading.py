"""How the plug-in gets into verl and out of it. Each test is a process of its own, where verl is imported anew."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("verl")

ROOT = Path(__file__).parents[3]
# Modules of the standard library that entcov may bring and verl has not.
STANDARD = {"tomllib", "statistics", "fractions"}


def python(code: str) -> subprocess.CompletedProcess:
    """Runs code in a process where verl finds the entry point of pyproject.toml, and a CPU to run on."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    head = f"""
import importlib.metadata, os, sys
sys.path.insert(0, {str(ROOT)!r})
os.environ |= {{"VERL_LOGGING_LEVEL": "ERROR", "VERL_PLATFORM": "cpu"}}
own = importlib.metadata.entry_points
found = {{
    "verl.plugins": ("entcov", {project["entry-points"]["verl.plugins"]["entcov"]!r}),
    "entcov.controls": ("of_another_package", "no_such_package:Control"),  # named, and not imported
}}
def entry_points(**keys):
    group = keys.get("group")
    return [importlib.metadata.EntryPoint(*found[group], group)] if group in found else own(**keys)
importlib.metadata.entry_points = entry_points
"""
    return subprocess.run([sys.executable, "-W", "ignore", "-c", head + code], capture_output=True, text=True, cwd="/")


def test_import_verl_imports_no_module_of_verl_or_others_for_the_plugin():
    code = """
os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"
import verl
before = set(sys.modules)
import entcov.integrations.verl
assert type(sys.meta_path[0]).__name__ == "_AfterImport"
print(*sorted(name for name in set(sys.modules) - before if not name.startswith(("entcov", "_"))))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    new = done.stdout.splitlines()[-1].split() if done.stdout.strip() else []
    assert set(new) <= STANDARD, set(new) - STANDARD


def test_into_verl_and_out_of_it():
    """Hooks come with verl's modules, before or after, and go with uninstall; a missing one is said once."""
    code = """
import verl
import verl.trainer.ppo.core_algos as algos
modes = {name for name in algos.POLICY_LOSS_REGISTRY if name.startswith("entcov")}
from entcov.controls import CONTROLS
assert modes == {"entcov", *(f"entcov_{name}" for name in CONTROLS)}, modes
assert {"entcov_clip_cov", "entcov_of_another_package"} <= modes
assert type(algos.__loader__).__name__ == "SourceFileLoader" == type(algos.__spec__.loader).__name__
from tests.integrations.verl.worker import register_platform
register_platform()
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
from verl.single_controller.base.decorator import MAGIC_ATTR

def hooked():
    names = [TrainingWorker.set_loss_fn, TrainingWorker.train_mini_batch, ActorRolloutRefWorker.init_model]
    return [*names, EngineRegistry.get_engine_cls]

first = hooked()
assert all("entcov/integrations/verl" in f.__code__.co_filename for f in first)
assert all(hasattr(f, MAGIC_ATTR) for f in first[:3])  # verl's way of calling a worker's method from afar
import entcov.integrations.verl as plugin
plugin.uninstall()
plugin.uninstall()
assert not [name for name in algos.POLICY_LOSS_REGISTRY if name.startswith("entcov")]
assert not [f for f in hooked() if "entcov" in f.__code__.co_filename]
assert "_AfterImport" not in [type(finder).__name__ for finder in sys.meta_path]
plugin.install()
plugin.install()
assert "entcov_clip_cov" in algos.POLICY_LOSS_REGISTRY
assert all("entcov/integrations/verl" in f.__code__.co_filename for f in hooked())
plugin.uninstall()
assert not [f for f in hooked() if "entcov" in f.__code__.co_filename]

del EngineRegistry.get_engine_cls
plugin.install()
for ask in (
    lambda: algos.POLICY_LOSS_REGISTRY["entcov_aent"](None, None, None, None),
    lambda: plugin.PolicyLossConfig(controls={"aent": {}}),
):
    try:
        ask()
    except RuntimeError as error:
        print(error)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    reason = "entcov cannot hook into verl.workers.engine.base of verl 0.9.1 (tested with 0.9.1): AttributeError: "
    reason += "EngineRegistry has no get_engine_cls"
    assert done.stderr.count("entcov cannot hook") == done.stderr.count(reason) == 1
    assert done.stdout.splitlines()[-2:] == [reason, reason]
