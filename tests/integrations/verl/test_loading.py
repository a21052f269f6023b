"""How the plug-in gets into verl and out of it. Each test is a process of its own, where verl is imported anew."""

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

pytest.importorskip("verl")

ROOT = Path(__file__).parents[3]
HEAVY = ("verl.trainer.ppo.core_algos", "verl.workers", "verl.workers.engine", "transformers.models", "megatron")


def python(code: str) -> subprocess.CompletedProcess:
    """Runs code in which `import verl` finds the entry point of pyproject.toml, and `plugin` is None without it."""
    tomllib = __import__("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    entry = project["entry-points"]["verl.plugins"]["entcov"]
    head = f"""
import importlib.metadata, os, sys
sys.path.insert(0, {str(ROOT)!r})
os.environ["VERL_LOGGING_LEVEL"] = "ERROR"
from importlib.metadata import EntryPoint
own = importlib.metadata.entry_points
def entry_points(**keys):
    if keys.get("group") == "verl.plugins":
        return [EntryPoint("entcov", {entry!r}, "verl.plugins")]
    return own(**keys)
importlib.metadata.entry_points = entry_points
"""
    return subprocess.run([sys.executable, "-W", "ignore", "-c", head + code], capture_output=True, text=True, cwd="/")


def test_the_entry_point_is_the_package():
    assert EntryPoint("entcov", "entcov.integrations.verl", "verl.plugins").module == "entcov.integrations.verl"


def test_import_verl_imports_no_module_of_verl_or_others_for_the_plugin():
    code = """
os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"
import verl
before = set(sys.modules)
import entcov.integrations.verl
new = {name for name in set(sys.modules) - before if not name.startswith(("entcov", "_", "csv", "statistics", "numbers"))}
print(sorted(new))
assert type(sys.meta_path[0]).__name__ == "_AfterImport"
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    new = eval(done.stdout.splitlines()[-1])
    assert not [name for name in new if name.split(".")[0] in ("verl", "transformers", "megatron", "ray", "hydra")], new
    assert len(new) < 10, new


def test_hooks_come_with_verls_modules_and_go_with_uninstall():
    code = """
import verl
import verl.trainer.ppo.core_algos as algos
modes = {name for name in algos.POLICY_LOSS_REGISTRY if name.startswith("entcov")}
from entcov.controls import CONTROLS
assert modes == {"entcov", *(f"entcov_{name}" for name in CONTROLS)}, modes
assert type(algos.__loader__).__name__ == "SourceFileLoader" == type(algos.__spec__.loader).__name__
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
from verl.single_controller.base.decorator import MAGIC_ATTR
changed = [TrainingWorker.set_loss_fn, TrainingWorker.train_mini_batch, ActorRolloutRefWorker.init_model]
changed += [EngineRegistry.get_engine_cls]
assert all(f.__code__.co_filename.startswith(sys.path[0]) for f in changed)
assert all(hasattr(f, MAGIC_ATTR) for f in changed[:3])
import entcov.integrations.verl as plugin
plugin.uninstall()
assert not [name for name in algos.POLICY_LOSS_REGISTRY if name.startswith("entcov")]
left = [TrainingWorker.set_loss_fn, TrainingWorker.train_mini_batch, ActorRolloutRefWorker.init_model]
left += [EngineRegistry.get_engine_cls]
assert not [f for f in left if "entcov" in f.__code__.co_filename or f in changed]
assert "_AfterImport" not in [type(finder).__name__ for finder in sys.meta_path]
plugin.uninstall()
plugin.install()
assert "entcov_clip_cov" in algos.POLICY_LOSS_REGISTRY and TrainingWorker.set_loss_fn not in left
print("good")
"""
    done = python(code)
    assert done.stdout.endswith("good\n"), done.stderr


def test_a_missing_hook_is_said_once_and_stops_a_run_that_asks_for_entcov():
    code = """
import verl
import verl.workers.engine.base as base, types
import entcov.integrations.verl as plugin
plugin.uninstall()
before = base.EngineRegistry.get_engine_cls.__func__
del base.EngineRegistry.get_engine_cls
plugin.install()
import verl.trainer.ppo.core_algos as algos
assert "entcov_aent" in algos.POLICY_LOSS_REGISTRY
try:
    algos.POLICY_LOSS_REGISTRY["entcov_aent"](None, None, None, None)
except RuntimeError as error:
    print(error)
try:
    plugin.PolicyLossConfig(controls={"aent": {}})
except RuntimeError as error:
    print(error)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    reason = "entcov cannot hook into verl.workers.engine.base of verl 0.9.1 (tested with 0.9.1): AttributeError: "
    reason += "EngineRegistry has no get_engine_cls"
    assert done.stderr.count(reason) == 1
    assert done.stdout.splitlines()[-2:] == [reason, reason]
