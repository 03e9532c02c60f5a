"""The loop over tasks, on transformers' Trainer; and the way into anyone else's loop."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Attachment": "polyrank.engine.attachment",
    "Result": "polyrank.engine.result",
    "Trainer": "polyrank.engine.trainer",
    "TrainerMixin": "polyrank.engine.trainer",
    "attach": "polyrank.engine.attachment",
    "attach_automatically": "polyrank.engine.automatic",
    "adapter_state": "polyrank.engine.paths",
    "connectivity": "polyrank.engine.paths",
    "REFERENCES": "polyrank.engine.plan",
    "run": "polyrank.engine.loop",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    # transformers' Trainer takes seconds to import, and attach does not need it.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'polyrank.engine' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
