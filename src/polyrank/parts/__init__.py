"""Reusable pieces of methods, one module an axis."""

from polyrank.parts import (
    average,
    boundaries,
    catalogue,
    connect,
    consolidate,
    cores,
    distil,
    fisher,
    inits,
    losses,
    memory,
    mixtures,
    per_sample,
    routers,
    rules,
    transforms,
)

__all__ = [
    "average",
    "boundaries",
    "catalogue",
    "connect",
    "consolidate",
    "cores",
    "distil",
    "fisher",
    "inits",
    "losses",
    "memory",
    "mixtures",
    "per_sample",
    "routers",
    "rules",
    "transforms",
]
