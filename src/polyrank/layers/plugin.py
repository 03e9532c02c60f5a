"""Makes PEFT know the type POLYRANK."""

from __future__ import annotations

from peft.utils import PeftType, register_peft_method

NAME = "polyrank"


def _member(name: str) -> PeftType:
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


def install() -> None:
    """Register config and tuner with PEFT; a second call changes nothing."""
    from peft.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )

    member = _member(NAME.upper())

    from polyrank.layers.config import PolyrankConfig
    from polyrank.layers.tuner import PREFIX, PolyrankModel

    if member in PEFT_TYPE_TO_TUNER_MAPPING:
        # A reloaded module: register_peft_method would refuse the second call.
        PEFT_TYPE_TO_CONFIG_MAPPING[member] = PolyrankConfig
        PEFT_TYPE_TO_TUNER_MAPPING[member] = PolyrankModel
        PEFT_TYPE_TO_PREFIX_MAPPING[member] = PREFIX
        return
    register_peft_method(
        name=NAME, config_cls=PolyrankConfig, model_cls=PolyrankModel, prefix=PREFIX
    )
