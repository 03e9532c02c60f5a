"""Adapted layers and the PEFT tuner that places them."""

from polyrank.layers.absorption import absorb
from polyrank.layers.adapter import ModelAdapter, adapter_of
from polyrank.layers.blocks import reshaped
from polyrank.layers.compact import Compaction, compact
from polyrank.layers.config import PolyrankConfig
from polyrank.layers.gates import GateStatistics, gate_statistics, has_gates
from polyrank.layers.heads import LinearHead
from polyrank.layers.hosts import BlockHost, HeadHost
from polyrank.layers.linear import AdaptedLinear
from polyrank.layers.plugin import install
from polyrank.layers.replicas import extend, replica
from polyrank.layers.root import ensure_flow, hook_of
from polyrank.layers.saved import saved_of
from polyrank.layers.starts import initialise
from polyrank.layers.statistics import gather
from polyrank.layers.structure import (
    append,
    grow_head,
    keep,
    redraw,
    truncate,
)
from polyrank.layers.tuner import PolyrankModel
from polyrank.layers.verbs import adapt, conditioned, hotswap, load, merge, parameter_groups, view
from polyrank.layers.views import View

__all__ = [
    "AdaptedLinear",
    "BlockHost",
    "Compaction",
    "GateStatistics",
    "HeadHost",
    "LinearHead",
    "ModelAdapter",
    "PolyrankConfig",
    "PolyrankModel",
    "View",
    "absorb",
    "adapt",
    "adapter_of",
    "append",
    "compact",
    "conditioned",
    "ensure_flow",
    "extend",
    "gate_statistics",
    "gather",
    "grow_head",
    "has_gates",
    "hook_of",
    "hotswap",
    "initialise",
    "install",
    "keep",
    "load",
    "merge",
    "parameter_groups",
    "redraw",
    "replica",
    "reshaped",
    "saved_of",
    "truncate",
    "view",
]

install()
