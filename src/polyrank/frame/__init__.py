"""The contract of polyrank: what a method may say, and when it is called."""

from polyrank.frame.block import Block, Original
from polyrank.frame.combine import combination_problems
from polyrank.frame.core import Core, Portion, inject
from polyrank.frame.flow import Flow
from polyrank.frame.method import SCALINGS, Method, Strategy
from polyrank.frame.plain import Identity, KaimingZero
from polyrank.frame.random import keyed, seed_of
from polyrank.frame.registry import get, load_file, method, names, register, slug
from polyrank.frame.saved import Generator, Saved, Transform
from polyrank.frame.site import Site
from polyrank.frame.slots import (
    ORDER,
    ROLES,
    Adapter,
    Group,
    Head,
    Init,
    Layer,
    Loss,
    Out,
    Penalty,
    PenaltyRule,
    Rule,
    Step,
    conflicts,
)
from polyrank.frame.stages import Boundary, Buffer, Figure, Job, Phase, Replay, Workshop

__all__ = [
    "ORDER",
    "ROLES",
    "SCALINGS",
    "Adapter",
    "Block",
    "Boundary",
    "Buffer",
    "Core",
    "Figure",
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
    "Original",
    "Out",
    "Penalty",
    "PenaltyRule",
    "Phase",
    "Portion",
    "Replay",
    "Rule",
    "Saved",
    "Site",
    "Step",
    "Strategy",
    "Transform",
    "Workshop",
    "combination_problems",
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
