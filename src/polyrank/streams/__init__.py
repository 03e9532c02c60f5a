"""Streams of tasks: the contract, the checks and the built-in data; no torch."""

from polyrank.streams.base import Stream, Task
from polyrank.streams.data import Dataset, OnePass, Rows
from polyrank.streams.digits import digits, digits_base
from polyrank.streams.registry import names, stream
from polyrank.streams.scenarios import SCENARIOS, Scenario, Visible
from polyrank.streams.split import class_order, share_out
from polyrank.streams.stdlib import stdlib
from polyrank.streams.stdlib_lm import stdlib_lm

__all__ = [
    "SCENARIOS",
    "Dataset",
    "OnePass",
    "Rows",
    "Scenario",
    "Stream",
    "Task",
    "Visible",
    "class_order",
    "digits",
    "digits_base",
    "names",
    "share_out",
    "stdlib",
    "stdlib_lm",
    "stream",
]
