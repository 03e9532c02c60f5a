"""What tests of methods need, ours and yours: tolerances, tiny models, the contract suite.

>>> from polyrank.testing import check_method
>>> check_method("lora", models=["llama"])  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import Any

from polyrank.testing.tolerance import TOL, assert_close

# Models and contracts import transformers and PEFT, which take seconds: loaded at first use.
_HOMES = {
    "CHECKS": "polyrank.testing.contracts",
    "MODELS": "polyrank.testing.models",
    "Case": "polyrank.testing.cases",
    "Tiny": "polyrank.testing.models",
    "check_method": "polyrank.testing.contracts",
    "contract_cases": "polyrank.testing.cases",
    "fresh_problems": "polyrank.testing.fresh",
}

__all__ = [
    "CHECKS",
    "MODELS",
    "TOL",
    "Case",
    "Tiny",
    "assert_close",
    "check_method",
    "contract_cases",
    "fresh_problems",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'polyrank.testing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
