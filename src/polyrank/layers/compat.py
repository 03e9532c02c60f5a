"""The names that polyrank needs from inside PEFT, in one place.

PEFT offers no public plug-in interface, so these are what a release of PEFT may move. The lower
bound is 0.21: before it, PEFT asks no tuner how the names in a file belong to the model, and the
deeper names of cores would keep the adapter's name and load to wrong values without a word.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _get_in_out_features,
    check_adapters_to_merge,
    check_target_module_exists,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from peft.utils.other import get_pattern_key

try:
    from peft.utils.error import NoMatchingPeftModuleError

    NoMatch: type[Exception] = NoMatchingPeftModuleError
except ImportError:
    NoMatch = ValueError

TARGETS: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
in_out_features = _get_in_out_features

__all__ = [
    "TARGETS",
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "NoMatch",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "get_pattern_key",
    "in_out_features",
]
