"""polyrank: every rank is an expert.

Adapt pretrained models to many tasks, at once or one after another, with published methods behind
one formula, `y = W x + b + s · B φ(A x ; x)`. Names are loaded at first use; importing the package
imports nothing heavy.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from polyrank._version import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

# Public name -> module that holds it.
_HOMES = {
    "CheckpointError": "polyrank.errors",
    "ConfigError": "polyrank.errors",
    "InertError": "polyrank.errors",
    "MergeError": "polyrank.errors",
    "Method": "polyrank.frame",
    "PolyrankConfig": "polyrank.layers",
    "PolyrankError": "polyrank.errors",
    "Strategy": "polyrank.frame",
    "Stream": "polyrank.streams",
    "Trainer": "polyrank.engine",
    "TrainerMixin": "polyrank.engine",
    "absorb": "polyrank.layers",
    "adapt": "polyrank.layers",
    "adapter_of": "polyrank.layers",
    "altlora_optimizer": "polyrank.parts.alternating",
    "append": "polyrank.layers",
    "at_rank": "polyrank.parts.nested",
    "attach": "polyrank.engine",
    "attach_automatically": "polyrank.engine",
    "compact": "polyrank.layers",
    "conditioned": "polyrank.layers",
    "end_task": "polyrank.parts.resplit",
    "export": "polyrank.io.adapters",
    "hotswap": "polyrank.layers",
    "initialise": "polyrank.layers",
    "load": "polyrank.layers",
    "load_method_file": "polyrank.frame",
    "merge": "polyrank.layers",
    "method": "polyrank.frame",
    "optimizer": "polyrank.parts.optimizer",
    "parameter_groups": "polyrank.layers",
    "prune": "polyrank.parts.gates",
    "register": "polyrank.frame",
    "run": "polyrank.engine",
    "set_rank": "polyrank.parts.nested",
    "settle": "polyrank.parts.settle",
    "stream": "polyrank.streams",
    "truncate": "polyrank.layers",
    "view": "polyrank.layers",
}
_RENAMED = {"load_method_file": "load_file"}

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), _RENAMED.get(name, name))
    raise AttributeError(f"module 'polyrank' has no attribute {name!r}")


def __dir__() -> list[str]:
    # Submodules that are loaded, but not what this file itself imports.
    inner = {n for n, value in globals().items() if isinstance(value, ModuleType)}
    inner = {name for name in inner if f"polyrank.{name}" in sys.modules and name[0] != "_"}
    return sorted({*__all__, *inner, *(name for name in globals() if name[:2] == "__")})


class _AfterPeft(importlib.abc.MetaPathFinder):
    """Registers polyrank's adapter type once PEFT is imported, so that either order works.

    It stays until then: transformers looks whether PEFT could be found long before it imports it.
    """

    looking = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "peft" or self.looking:
            return None
        self.looking = True
        try:
            spec = importlib.util.find_spec("peft")
        finally:
            self.looking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(self, spec.loader)
        return spec


class _Registering(importlib.abc.Loader):
    """PEFT's own loader, and what comes after it."""

    def __init__(self, finder: _AfterPeft, loader: importlib.abc.Loader) -> None:
        self.finder, self.loader = finder, loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        importlib.import_module("polyrank.layers")


if "peft" in sys.modules:
    importlib.import_module("polyrank.layers")
else:
    sys.meta_path.insert(0, _AfterPeft())
