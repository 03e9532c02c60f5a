"""One torch optimiser whose groups may follow different update rules.

Schedulers, clipping, loss scalers and hooks see an ordinary optimiser; a group's `update` says who
moves its parameters.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Iterator
from textwrap import shorten
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from polyrank.errors import CheckpointError, ConfigError, nearest
from polyrank.layers import adapter_of, parameter_groups

# "adamw" is the optimiser that the run itself chose, whatever it is.
DEFAULT = "adamw"
UPDATES: dict[str, type[Optimizer]] = {"sgd": torch.optim.SGD}


def register_update(name: str) -> Callable[[type[Optimizer]], type[Optimizer]]:
    """Make an optimiser class serve the groups with `update=name`.

    The class takes the groups alone, `cls(groups)`: everything else stands in the groups. Those of
    the run's own options that its attribute `shared` names, if it has one, reach it as well. What
    its attribute `fixed` names, if it has one, a checkpoint must have the same in its groups. One
    that stands in for the run's own optimiser says by a static `unfit(kind, options, groups)` why
    it would train something else than that, and else returns "".

    Raises:
        ValueError: if another class has the name.
    """

    def add(cls: type[Optimizer]) -> type[Optimizer]:
        if name == DEFAULT or UPDATES.setdefault(name, cls) is not cls:
            raise ValueError(f"update {name!r} is taken already; choose another name")
        return cls

    return add


class GroupedOptimizer(Optimizer):
    """Hands each group to the optimiser that its `update` names; all state is kept in one place.

    Args:
        groups: as `polyrank.parameter_groups` gives them.
        kind: class for the groups with update "adamw", the run's own choice.
        options: arguments of `kind`, betas and so on.
        otherwise: how a method does without its own update: ", or …".

    Raises:
        ConfigError: for an update that nobody serves, or that would take the place of an optimiser
            for which it cannot stand in.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        kind: type[Optimizer],
        options: dict[str, Any],
        otherwise: str = "",
    ) -> None:
        groups = list(groups)
        known = {DEFAULT, *UPDATES}
        strange = sorted({g.get("update", DEFAULT) for g in groups} - known)
        if strange:
            raise ConfigError(
                f"update: got {strange[0]!r}, expected one of {', '.join(sorted(known))};"
                f"{nearest(strange[0], known) or ' register_update makes a class serve it'}"
            )
        self.parts: dict[str, Optimizer] = {}
        super().__init__(groups, {})
        for name in dict.fromkeys(g.get("update", DEFAULT) for g in groups):
            own = [g for g in self.param_groups if g.get("update", DEFAULT) == name]
            made: Callable[..., Optimizer] = kind if name == DEFAULT else UPDATES[name]
            unfit = None if name == DEFAULT else getattr(made, "unfit", None)
            if unfit is not None and (why := unfit(kind, options, own)):
                raise ConfigError(f"optimizer: the update {name!r} {why}{otherwise}")
            shared = options.keys() & getattr(made, "shared", ())
            chosen = options if name == DEFAULT else {key: options[key] for key in shared}
            # The groups themselves, so that a rate set here is the rate that is used there.
            self.parts[name] = made(own, **chosen)
        self._link()
        # Schedulers ask here what every group has: OneCycleLR turns momentum or betas.
        known_to = self.parts.get(DEFAULT) or next(iter(self.parts.values()))
        self.defaults = {
            key: value
            for key, value in known_to.defaults.items()
            if all(key in group for group in self.param_groups)
        }

    @property
    def updates(self) -> frozenset[str]:
        """The update rules that groups may ask for."""
        return frozenset({DEFAULT, *UPDATES})

    def _link(self) -> None:
        """Share groups and state with the optimisers that do the work."""
        for name, part in self.parts.items():
            part.param_groups = [g for g in self.param_groups if g.get("update", DEFAULT) == name]
            part.state = self.state

    def __getstate__(self) -> dict[str, Any]:
        """Keep the optimisers that do the work in copies, beside what torch keeps."""
        return {**super().__getstate__(), "parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take back what `__getstate__` gave, and share groups and state again."""
        super().__setstate__(state)
        self._link()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            CheckpointError: if an entry that an update names in `fixed` is another one there.
        """
        for now, old in zip(self.param_groups, state_dict["param_groups"], strict=False):
            name = now.get("update", DEFAULT)
            for key in sorted(getattr(self.parts.get(name), "fixed", ())):
                if now.get(key) != old.get(key):
                    raise CheckpointError(
                        f"optimizer: the checkpoint was written with {_named(key, old)} of the "
                        f"update {name!r}, and this run has {_named(key, now)}; resume with the "
                        "settings that the run began with"
                    )
        super().load_state_dict(state_dict)
        self._link()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, served by what their `update` names."""
        name = param_group.get("update", DEFAULT)
        if self.parts and name not in self.parts:
            raise ConfigError(
                f"update: {name!r} came after the optimiser was made; build it anew with "
                "polyrank.optimizer(model, lr=...)"
            )
        if self.parts:
            # Its own before those of the run's optimiser, which are another one's.
            param_group = {**self.parts[name].defaults, **param_group}
        super().add_param_group(param_group)
        if self.parts:
            self._link()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let every part move its parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts.values():
            # Past the hooks of all optimisers: what attaches itself to steps has seen this one.
            step = type(part).step
            getattr(step, "__wrapped__", step)(part)
        return loss


def _named(key: str, group: dict[str, Any]) -> str:
    return shorten(f"{key}={group.get(key)!r}", 60, placeholder=" …")


def build_optimizer(
    groups: list[dict[str, Any]],
    kind: type[Optimizer],
    options: dict[str, Any],
    otherwise: str = "",
) -> Optimizer:
    """Return `kind` over the groups, or a `GroupedOptimizer` if some ask for another update."""
    if all(group.get("update", DEFAULT) == DEFAULT for group in groups):
        made: Callable[..., Optimizer] = kind
        return made(groups, **options)
    return GroupedOptimizer(groups, kind, options, otherwise)


def optimizer(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    *,
    kind: type[Optimizer] = torch.optim.AdamW,
    adapter: str | None = None,
    **options: Any,
) -> Optimizer:
    """Return the optimiser that a method needs, over `polyrank.parameter_groups`.

    Args:
        model: the adapted model.
        lr: rate that the method's groups multiply.
        weight_decay: for factors; gates are never decayed.
        kind: the optimiser of all groups that ask for no update of their own.
        adapter: its name; None is the active one.
        **options: of `kind`, betas and so on.

    Raises:
        ConfigError: for a rate or a decay that is no number >= 0.

    >>> optimizer = polyrank.optimizer(model, lr=1e-4)  # doctest: +SKIP
    >>> attached = polyrank.attach(optimizer, model)  # doctest: +SKIP
    """
    if problems := [
        *_no_number("lr", lr, "1e-4"),
        *_no_number("weight_decay", weight_decay, "0.0"),
    ]:
        raise ConfigError(problems)
    groups = parameter_groups(model, lr, weight_decay, adapter=adapter)
    return build_optimizer(groups, kind, options, adapter_of(model, adapter).method.otherwise)


def _no_number(name: str, value: Any, common: str) -> Iterator[str]:
    # torch takes a rate in a tensor, which a captured step reads anew.
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (real and 0 <= value < math.inf):
        yield f"{name}: got {value!r}, expected a finite number >= 0; {common} is common"
