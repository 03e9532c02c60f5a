"""What users do to a PEFT model between two steps of training."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any

from peft import PeftModel

from polyrank.errors import MergeError

Verb = Callable[[PeftModel], None]


def _set(model: PeftModel) -> None:
    model.set_adapter("default")


def _disable_enable(model: PeftModel) -> None:
    tuner: Any = model.base_model
    tuner.disable_adapter_layers()
    tuner.enable_adapter_layers()


def _context(model: PeftModel) -> None:
    with model.disable_adapter():
        pass


def _add(model: PeftModel) -> None:
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))


def _there_and_back(model: PeftModel) -> None:
    model.set_adapter("other")
    model.set_adapter("default")


def _delete(model: PeftModel) -> None:
    # The active one, since PEFT then looks for another: it warns and takes the first that is left.
    model.set_adapter("other")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model.delete_adapter("other")


def _merge(model: PeftModel) -> None:
    with contextlib.suppress(MergeError):
        model.merge_adapter()
        model.unmerge_adapter()


VERBS: dict[str, Verb] = {
    "set_adapter": _set,
    "disable and enable": _disable_enable,
    "disable_adapter()": _context,
    "add_adapter": _add,
    "set another and back": _there_and_back,
    "delete_adapter": _delete,
    "merge": _merge,
}
