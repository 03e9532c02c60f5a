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
    "adapt": "polyrank.layers",
    "adapter_of": "polyrank.layers",
    "attach": "polyrank.engine",
    "attach_automatically": "polyrank.engine",
    "conditioned": "polyrank.layers",
    "hotswap": "polyrank.layers",
    "load": "polyrank.layers",
    "load_method_file": "polyrank.frame",
    "merge": "polyrank.layers",
    "method": "polyrank.frame",
    "parameter_groups": "polyrank.layers",
    "register": "polyrank.frame",
    "run": "polyrank.engine",
    "stream": "polyrank.streams",
    "view": "polyrank.layers",
}
_RENAMED = {"load_method_file": "load_file"}

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), _RENAMED.get(name, name))
    raise AttributeError(f"module 'polyrank' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _AfterPeft(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Registers polyrank's adapter type once PEFT is imported, so that either order works."""

    def __init__(self) -> None:
        self.spec: importlib.machinery.ModuleSpec | None = None

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "peft" or self.spec is not None:
            return None
        sys.meta_path.remove(self)
        self.spec = importlib.util.find_spec("peft")
        if self.spec is None or self.spec.loader is None:
            sys.meta_path.insert(0, self)
            self.spec = None
            return None
        return importlib.util.spec_from_file_location(
            name,
            self.spec.origin,
            loader=self,
            submodule_search_locations=self.spec.submodule_search_locations,
        )

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader().create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader().exec_module(module)
        importlib.import_module("polyrank.layers")

    def _loader(self) -> importlib.abc.Loader:
        # Only the spec that `find_spec` made asks, and that has one.
        assert self.spec is not None
        assert self.spec.loader is not None
        return self.spec.loader


if "peft" in sys.modules:
    importlib.import_module("polyrank.layers")
else:
    sys.meta_path.insert(0, _AfterPeft())
