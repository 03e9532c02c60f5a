"""The contract of polyrank: what a method may say, and when it is called."""

from polyrank.frame.core import Core, inject
from polyrank.frame.flow import Flow
from polyrank.frame.method import SCALINGS, Method, Strategy
from polyrank.frame.plain import Identity, KaimingZero
from polyrank.frame.random import keyed, seed_of
from polyrank.frame.registry import get, load_file, method, names, register, slug
from polyrank.frame.saved import Generator, Saved, Transform
from polyrank.frame.site import Site
from polyrank.frame.slots import (
    ORDER,
    Adapter,
    Block,
    Boundary,
    Group,
    Head,
    Init,
    Job,
    Layer,
    Loss,
    Out,
    Penalty,
    PenaltyRule,
    Phase,
    Rule,
    Step,
    Workshop,
    conflicts,
)

__all__ = [
    "ORDER",
    "SCALINGS",
    "Adapter",
    "Block",
    "Boundary",
    "Core",
    "Flow",
    "Generator",
    "Group",
    "Head",
    "Identity",
    "Init",
    "Job",
    "KaimingZero",
    "Layer",
    "Loss",
    "Method",
    "Out",
    "Penalty",
    "PenaltyRule",
    "Phase",
    "Rule",
    "Saved",
    "Site",
    "Step",
    "Strategy",
    "Transform",
    "Workshop",
    "conflicts",
    "get",
    "inject",
    "keyed",
    "load_file",
    "method",
    "names",
    "register",
    "seed_of",
    "slug",
]
