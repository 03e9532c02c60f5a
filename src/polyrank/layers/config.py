"""The PEFT configuration of an adapter: everything that decides shapes, in JSON."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType
from peft.utils.constants import DUMMY_TARGET_MODULES

from polyrank.errors import CheckpointError, ConfigError
from polyrank.frame import Method, method
from polyrank.layers.card import write_card

SCHEMA = 1
# PEFT's word for an adapter that takes the place of no module.
NO_TARGETS = DUMMY_TARGET_MODULES


@dataclass
class PolyrankConfig(PeftConfig):
    """Configuration of one polyrank adapter.

    Args:
        method: registered name of a method, ``"smora"``; `polyrank methods` lists them.
        options: the method's options, ``{"r": 64, "k": 8}``; completed with the defaults, so that
            a saved adapter states all of them.
        target_modules: names, a regular expression, or ``"all-linear"``.
        exclude_modules: names or a regular expression of modules to leave out.
        modules_to_save: modules trained and saved whole beside the adapter.
        layers_to_transform: block numbers to adapt; needs `layers_pattern` if blocks are not
            found by name.
        layers_pattern: name of the list of blocks.
        rank_pattern: ranks that differ from `r`, by module name or regular expression.
        alpha_pattern: the same for `alpha`.
        head: a growing classifier: ``{"module": "classifier", "names": ["cat", "dog"]}``.
        sites: shapes of sites that differ from the options, by path; written when structure
            changes.
        seed: key of the starting values; None takes torch's initial seed.
        init_weights: False draws B as well, so that the adapter is not neutral at start (used by
            tests).
        schema_version: version of this layout; a newer one is refused.
    """

    method: str = "lora"
    options: dict[str, Any] = field(default_factory=dict)
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    head: dict[str, Any] | None = None
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    seed: int | None = None
    schema_version: int = SCHEMA

    def __post_init__(self) -> None:
        """Check everything at once and complete the options."""
        super().__post_init__()
        self.peft_type = PeftType("POLYRANK")
        if isinstance(self.schema_version, int) and self.schema_version > SCHEMA:
            raise CheckpointError(
                f"schema_version: got {self.schema_version}, expected at most {SCHEMA}; "
                "the adapter was saved by a newer polyrank: upgrade with `pip install -U polyrank`"
            )
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        # A copy: the names grow with the adapter, and the caller may use the dict again.
        self.head = copy.deepcopy(self.head)
        problems = list(self._problems())
        try:
            made = method(self.method, **self.options)
        except ConfigError as error:
            problems += error.problems
        else:
            problems += self._target_problems(made)
        if problems:
            raise ConfigError(problems)
        if not isinstance(made, Method):
            raise ConfigError(
                f"method: {self.method!r} is a strategy and owns no structure; "
                f'name a method and combine them: pr.run(..., method="lora", '
                f'strategies=["{self.method}"])'
            )
        self.method, self.options = made.name, made.options()

    def _target_problems(self, made: Any) -> list[str]:
        """Take the targets of a method without layers, and say if layers are asked for."""
        if getattr(made, "linear", True):
            return []
        if self.target_modules not in (None, "all-linear", NO_TARGETS):
            return [
                f"target_modules: got {self.target_modules!r}, but {made.name!r} adapts no linear "
                "layers; leave it out"
            ]
        self.target_modules = NO_TARGETS
        return []

    def _problems(self) -> list[str]:
        found = []
        for name, low in (("rank_pattern", 1), ("alpha_pattern", 0)):
            for key, value in getattr(self, name).items():
                good = (
                    isinstance(value, (int, float))
                    and not isinstance(value, bool)
                    and value >= low
                    and value > 0
                )
                if not good or (low and not isinstance(value, int)):
                    found.append(
                        f"{name}[{key!r}]: got {value!r}, expected "
                        f"{'an integer >= 1' if low else 'a number > 0'}"
                    )
        if self.bias != "none":
            found.append(
                f"bias: got {self.bias!r}, expected 'none'; list the modules in modules_to_save "
                f"to train their biases"
            )
        if self.target_parameters:
            found.append(
                "target_parameters: not supported, since most cores weigh each token; "
                "name linear layers in target_modules"
            )
        if self.head is not None and not (
            isinstance(self.head, dict) and isinstance(self.head.get("module"), str)
        ):
            found.append(
                f"head: got {self.head!r}, expected {{'module': 'classifier', 'names': [...]}}"
            )
        if self.layers_to_transform is not None and self.target_modules == "all-linear":
            found.append(
                "layers_to_transform: not read together with target_modules='all-linear'; "
                "name modules, for example target_modules=['q_proj', 'v_proj']"
            )
        if self.layers_pattern and not self.layers_to_transform and self.layers_to_transform != 0:
            found.append(
                "layers_pattern: given without layers_to_transform; name the blocks to adapt as "
                "well"
            )
        return found

    def build(self) -> Method:
        """Return the method with its options."""
        made: Method = method(self.method, **self.options)
        return made

    def to_dict(self) -> dict[str, Any]:
        """Return plain values in an order that does not change between processes."""
        found = super().to_dict()
        for key, value in found.items():
            if isinstance(value, set):
                found[key] = sorted(value)
        return dict(found)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and README.md where PEFT's says nothing yet."""
        about = kwargs.get("auto_mapping_dict")
        super().save_pretrained(save_directory, **kwargs)
        write_card({**self.to_dict(), **({"auto_mapping": about} if about else {})}, save_directory)
