"""What the plug-in changes in verl, when, and how to take it back.

verl swallows what a plug-in raises. So a hook that fails says so on stderr, once, and is remembered: a run that asks
for a loss mode of entcov then fails with that reason (`check_hooked`).
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from entcov.integrations.plugin import Patches

TESTED = "0.9.1"  # verl's version

_failure: str | None = None
_patches = Patches()
_finder: "_AfterImport | None" = None


# After the import of the module of verl, `hook` of the module of ours is called with it.
HOOKS = {
    "verl.trainer.ppo.core_algos": "entcov.integrations.verl.loss",
    "verl.workers.engine.base": "entcov.integrations.verl.engine",
    "verl.workers.engine_workers": "entcov.integrations.verl.worker",
}


def install() -> None:
    """Hooks the plug-in into verl. A second call does nothing."""
    global _finder
    if _finder is not None:
        return
    _finder = _AfterImport()
    sys.meta_path.insert(0, _finder)
    for name in HOOKS:
        if name in sys.modules:  # verl was imported first
            _hook(sys.modules[name])


def uninstall() -> None:
    """Takes back everything that the plug-in changed in verl. Engines that were made before keep their class."""
    global _finder, _failure
    if _finder is not None:
        sys.meta_path.remove(_finder)
        _finder, _failure = None, None
    _patches.remove()


def replace_attribute(owner: Any, name: str, made: Callable[[Any], Any]) -> None:
    """owner.name = made(what it is), until `uninstall`. AttributeError where it is not there."""
    if name not in vars(owner):
        raise AttributeError(f"{getattr(owner, '__name__', owner)} has no {name}")
    _patches.replace(owner, name, made(vars(owner)[name]))


def at_uninstall(action: Callable[[], None]) -> None:
    _patches.callback(action)


def check_hooked() -> None:
    """Raises RuntimeError where the plug-in could not hook into verl, with the reason."""
    if _failure is not None:
        raise RuntimeError(_failure)


def _hook(module: ModuleType) -> None:
    """Changes verl's module. Errors go to stderr instead of into verl's import."""
    global _failure
    try:
        importlib.import_module(HOOKS[module.__name__]).hook(module)
    except Exception as error:
        version = getattr(sys.modules.get("verl"), "__version__", "of an unknown version")
        reason = (
            f"entcov cannot hook into {module.__name__} of verl {version} (tested with {TESTED}): "
            f"{type(error).__name__}: {error}"
        )
        if _failure is None:
            print(f"{reason}. Runs without a loss mode of entcov are not affected.", file=sys.stderr, flush=True)
            _failure = reason


class _AfterImport(MetaPathFinder):
    """Calls `_hook` with a module of HOOKS after its first import."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in HOOKS:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(Loader):
    """Loads by the module's own loader, gives the module that loader back, and then hooks into the module."""

    def __init__(self, own: Loader):
        self.own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.own
        self.own.exec_module(module)
        _hook(module)
