"""One adapter over the whole model, as rules, penalties and boundaries see it."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from polyrank.errors import ConfigError, InertError, nearest
from polyrank.frame import Adapter, Block, Head, Method
from polyrank.layers.hosts import BlockHost, HeadHost
from polyrank.layers.linear import AdaptedLinear
from polyrank.layers.views import View

BY = ("block", "layer", "matrix")


class ModelAdapter(Adapter):
    """Collects the views of one adapter; made anew after every structural change."""

    def __init__(self, name: str, method: Method, hosts: list[nn.Module]) -> None:
        self.name = name
        self.method = method
        self.hosts = hosts
        self.layers: list[View] = [h.views[name] for h in hosts if isinstance(h, AdaptedLinear)]  # type: ignore[assignment]
        self._blocks = [h for h in hosts if isinstance(h, BlockHost)]
        self._heads = [h for h in hosts if isinstance(h, HeadHost)]
        self.blocks: list[Block] = [h.owned[name] for h in self._blocks]  # type: ignore[misc]
        self.head: Head | None = self._heads[0].owned[name] if self._heads else None  # type: ignore[assignment]

    def roles(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters that the method declares as trained, by role."""
        found: dict[str, list[nn.Parameter]] = {}
        for source in self.layers:
            for role, params in source.parameters().items():
                found.setdefault(role, []).extend(params)
        for host in [*self._blocks, *self._heads]:
            for role, params in host.parameters_of(self.name).items():
                found.setdefault(role, []).extend(params)
        return {role: params for role, params in found.items() if params}

    def groups(self, by: str) -> list[list[nn.Parameter]]:
        """Return the trained parameters of the layers grouped by "block", "layer" or "matrix"."""
        if by not in BY:
            raise ConfigError(
                f"groups: got {by!r}, expected one of {', '.join(BY)};"
                f"{nearest(by, BY) or ' choose one'}"
            )
        found: dict[object, list[nn.Parameter]] = {}
        for index, layer in enumerate(self.layers):
            for params in layer.parameters().values():
                for param in params:
                    key = {"block": layer.site.depth, "layer": index, "matrix": id(param)}[by]
                    found.setdefault(key, []).append(param)
        return list(found.values())

    def sides(self) -> dict[str, dict[str, Tensor]]:
        """Return what the blocks left of the last forward, by site path, and let go of it."""
        found = {}
        for host, block in zip(self._blocks, self.blocks, strict=True):
            if block.left:
                found[host.site.path], block.left = block.left, {}
        return found

    def named(self) -> dict[str, nn.Parameter]:
        """Return the parameters that may train, by names that stay while shapes stay."""
        found: dict[str, nn.Parameter] = {}
        for view in self.layers:
            for role, params in view.parameters().items():
                for number, param in enumerate(params):
                    found[f"{view.site.path}.{role}.{number}"] = param
        for kind, hosts in (("block", self._blocks), ("head", self._heads)):
            for index, host in enumerate(hosts):
                for role, params in host.parameters_of(self.name).items():
                    for number, param in enumerate(params):
                        found[f"{kind}-{index}.{role}.{number}"] = param
        return found

    def pairs(self, replica: str) -> list[tuple[Tensor, nn.Parameter]]:
        """Return (tensor of a replica, live parameter) of everything that may train.

        Of a replica that holds banked ranks too, the part that belongs to the live ones.

        Raises:
            ConfigError: if the replica is missing, or its shapes are no longer those of today.
        """
        found: list[tuple[Tensor, nn.Parameter]] = []
        for view in self.layers:
            held = view.module.replica_of(self.name, replica)
            first = held.shape[1]
            core: list[Tensor] = [] if held.core is None else list(held.core.parameters())
            mine: dict[str, list[Tensor]] = {
                "A": [held.A[first:]],
                "B": [held.B[:, first:]],
                "core": core,
            }
            live = view.parameters()
            live_core = [p for p in view.core.parameters() if "core" in live]
            live = {**live, **({"core": live_core} if "core" in live else {})}
            for role, params in live.items():
                found += zip(mine[role], params, strict=True)
        for host in self._heads:
            names = host.parameters_of(self.name)
            if names:
                copy = cast("nn.Module", host.copy_of(self.name, replica))
                found += zip(copy.parameters(), host.owned[self.name].parameters(), strict=True)
        if wrong := [s for s, p in found if s.shape != p.shape]:
            raise ConfigError(
                f"replica {replica!r}: {len(wrong)} of its tensors have the shapes of an earlier "
                "task; make it anew, or extend its head, after the structure has changed"
            )
        trained = {id(p) for params in self.roles().values() for p in params}
        return [(s, p) for s, p in found if id(p) in trained]

    def train_only(self, roles: frozenset[str] | None) -> None:
        """Make exactly these roles trainable; None means all that the method declares."""
        for role, params in self.roles().items():
            for param in params:
                param.requires_grad_(roles is None or role in roles)

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters that require gradients now."""
        return [p for params in self.roles().values() for p in params if p.requires_grad]

    def check_alive(self, before: dict[str, float]) -> dict[str, float]:
        """Return the vital sign after training that began with the figures `before`.

        Raises:
            InertError: if a figure was zero before and is zero still.
        """
        now = self.method.vital_sign(self)
        if dead := sorted(name for name, value in now.items() if value == 0 == before.get(name)):
            raise InertError(
                f"adapter {self.name!r}: {', '.join(dead)} of {self.method.name!r} stayed zero "
                "through training, so what the method is about did not happen; check that its "
                "rules "
                "run (polyrank.Trainer, polyrank.TrainerMixin or polyrank.attach), its rates are "
                "not 0 and its targets see data"
            )
        return now


def adapter_of(model: nn.Module, name: str | None = None) -> ModelAdapter:
    """Return one adapter of a model, by default the active one.

    Raises:
        ConfigError: if the model has no such polyrank adapter.
    """
    hosts = [m for m in model.modules() if isinstance(m, (AdaptedLinear, BlockHost, HeadHost))]
    if name is None:
        name = next((n for h in hosts for n in h.active_adapters), None)
    held = [h for h in hosts if name in (h.views if isinstance(h, AdaptedLinear) else h.owned)]
    if name is None or not held:
        known = sorted({n for h in hosts if isinstance(h, AdaptedLinear) for n in h.views})
        raise ConfigError(
            f"adapter: got {name!r}, but the model holds {known or 'no polyrank adapter'}; "
            "make one with polyrank.adapt(model, method)"
        )
    first = held[0]
    method = first.views[name].method if isinstance(first, AdaptedLinear) else first.methods[name]
    return ModelAdapter(name, method, list(held))
