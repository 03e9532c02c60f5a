"""Options of all methods that one method refuses, found by setting them."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

# Of what all methods share, values of which every method that reads it takes another one than its
# own: ranks may have to be even, or powers of two.
_OTHER: dict[str, list[Any]] = {
    "r": [5, 6, 8, 16],
    "alpha": [7.0, 9.0],
    "scaling": ["alpha/r", "alpha/sqrt(r)", "alpha", 0.5],
    "dropout": [0.25, 0.5],
}
_LENT = {"init_by": "init", "optim_by": "optim"}


def unread(cls: Any) -> list[str]:
    """Return the options of all methods that this one refuses to have set."""
    if cls.kind != "method":
        return []
    samples = cls.samples()
    return [
        spec.name
        for spec in fields(cls)
        if (spec.name in _OTHER and all(_refuses(sample, spec.name) for sample in samples))
        or (spec.name in _LENT and not any(_takes(sample, _LENT[spec.name]) for sample in samples))
    ]


def _refuses(sample: Any, name: str) -> bool:
    others = [value for value in _OTHER[name] if value != getattr(sample, name)]
    # One convention of scaling and another may be the same number, which alone may be allowed.
    same = {"alpha": float(sample.r)} if name == "scaling" else {}
    changed = [replace(sample, **{**same, name: value}) for value in others]
    return all(any(p.startswith(f"{name}:") for p in each.checks()) for each in changed)


def _takes(sample: Any, what: str) -> bool:
    """Say whether some method could lend its start or its optimiser to this one."""
    from polyrank import frame

    every = (each for name in frame.names() for each in frame.get(name).samples())
    lenders = (each for each in every if isinstance(each, frame.Method) and what in each.lendable)
    return any(not [*each.lends(what, sample)] for each in lenders)
