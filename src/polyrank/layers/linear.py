"""The adapted linear layer: y = α₀(base(x) − b) + b + s · B φ(A x) − s · B0 δ0 A0 x.

There is one class for every method; the core is the only thing that varies.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from polyrank.errors import ConfigError, MergeError
from polyrank.frame import Core, Flow, Method, Site, keyed
from polyrank.layers.archive import restore_archive
from polyrank.layers.compat import check_adapters_to_merge, in_out_features
from polyrank.layers.fused import Sharing, through
from polyrank.layers.grouped import grouped
from polyrank.layers.segments import noted_bank, restore_bank
from polyrank.layers.trainability import DeclaredTrainability
from polyrank.layers.views import Factor, Frozen, View, wide

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


class AdaptedLinear(nn.Module, DeclaredTrainability):
    """Wraps a linear layer, GPT-2's Conv1D or a quantised one, and adds its adapters' updates."""

    polyrank_A: nn.ModuleDict
    polyrank_B: nn.ModuleDict
    polyrank_core: nn.ModuleDict
    polyrank_bank: nn.ModuleDict
    polyrank_shadow: nn.ModuleDict
    polyrank_replica: nn.ModuleDict
    polyrank_archive: nn.ModuleDict
    adapter_layer_names = ("polyrank_A", "polyrank_B", "polyrank_core")
    other_param_names = (
        "polyrank_bank",
        "polyrank_shadow",
        "polyrank_replica",
        "polyrank_archive",
    )
    # PEFT's helper switches it; there is no cast of the input here that it could switch off.
    cast_input_dtype_enabled = True

    def __init__(self, base_layer: nn.Module, flow: Flow) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        for name in self.adapter_layer_names + self.other_param_names:
            setattr(self, name, nn.ModuleDict())
        self.flow = flow
        self.views: dict[str, View] = {}
        self.sharing = Sharing()
        self.transposed = type(base_layer).__name__ == "Conv1D"
        self.in_features, self.out_features = cast("tuple[int, int]", in_out_features(base_layer))
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.merged_settings: dict[str, dict[str, Any]] = {}
        self._active_adapter: str | list[str] = []

    # --- structure -------------------------------------------------------------------------------

    def update_layer(
        self, name: str, method: Method, site: Site, shapes: dict[str, Any], seed: int | None
    ) -> None:
        """Allocate one adapter and fill it, unless it is on meta.

        Args:
            name: the adapter.
            method: what it is.
            site: where this layer sits.
            shapes: what `shapes` gave for a saved adapter, else empty.
            seed: key of the starting values; None leaves it unfilled.
        """
        start, started = method.starting(), shapes.get("started", False)
        if problems := [] if started else list(start.unfit(site)):
            raise ConfigError(problems)
        core = method.core(site)
        self.polyrank_A[name] = Factor(core.widths[0], site.d_in)
        self.polyrank_B[name] = Factor(site.d_out, core.widths[1])
        self.polyrank_core[name] = core
        view = self.views[name] = View(self, name, method, site)
        view.scale = shapes.get("scale", view.scale)
        view.waiting = bool(start.wants) and not started
        restore_bank(view, shapes)
        restore_archive(view, shapes)
        if (shadow := shapes.get("shadow")) is not None:
            delta = shapes.get("shadow_delta")
            view.shadow = (
                torch.zeros(shadow, site.d_in),
                torch.zeros(site.d_out, shadow),
                None if delta is None else torch.zeros(delta),
            )
        for replica, (r, bank) in shapes.get("replicas", {}).items():
            self._replicate_shape(name, replica, r, bank)
        view.core.configure(shapes.get("core", {}))
        for replica in shapes.get("replicas", {}):
            kept = shapes.get("replica_cores", {}).get(replica, shapes.get("core", {}))
            cast("Core", self.replica_of(name, replica).core).configure(kept)
        if seed is not None and view.A.device.type != "meta":
            view.fill(keyed(seed, name, site.path), started=started)
        self._move_adapter_to_device_of_base_layer(name)

    def shapes(self, name: str) -> dict[str, Any]:
        """Return what decides one adapter's shapes here beside its options, as plain values."""
        view = self.views[name]
        found: dict[str, Any] = {"r": view.site.r, "scale": view.scale}
        if view.method.starting().wants and not view.waiting:
            found["started"] = True
        if settings := view.core.settings():
            found["core"] = settings
        found |= noted_bank(view)
        if view.archive is not None:
            found["archive"] = view.archive[0].shape[0]
        if view.witness is not None:
            found["witness"] = view.witness
        if view.shadow is not None:
            found["shadow"] = view.shadow[0].shape[0]
            if view.shadow[2] is not None:
                found["shadow_delta"] = list(view.shadow[2].shape)
        if name in self.polyrank_replica:
            replicas = cast("nn.ModuleDict", self.polyrank_replica[name])
            found["replicas"] = {k: list(self.replica_of(name, k).shape) for k in sorted(replicas)}
            cores = {k: cast("Core", self.replica_of(name, k).core) for k in sorted(replicas)}
            set_there = {k: core.settings() for k, core in cores.items()}
            if any(value != settings for value in set_there.values()):
                found["replica_cores"] = set_there
        return found

    def fill(
        self, name: str, seed: int, *key: int | str, stat: dict[str, Tensor] | None = None
    ) -> None:
        """Write the starting values of one adapter, keyed by (seed, adapter, path)."""
        self.views[name].fill(keyed(seed, name, self.views[name].site.path, *key), stat)

    def replicate(self, name: str, replica: str) -> None:
        """Keep a frozen copy of one adapter's factors under a name that `Flow.view` can show."""
        view = self.views[name]
        A, B, core, bank = view.factors(Flow())
        held = Frozen(A.detach().clone(), B.detach().clone(), copy.deepcopy(core))
        self._hold(name, replica, held, view.site.r, bank)

    def replica_of(self, name: str, replica: str) -> Frozen:
        """Return what one adapter keeps under a replica's name."""
        return cast("Frozen", cast("nn.ModuleDict", self.polyrank_replica[name])[replica])

    def cores(self, name: str) -> list[Core]:
        """Return the core of one adapter, and those of its replicas."""
        made = self.polyrank_replica
        held = cast("nn.ModuleDict", made[name]).values() if name in made else ()
        return [self.views[name].core, *(cast("Core", each.core) for each in held)]

    def keeps(self, name: str, replica: str) -> bool:
        """Say whether one adapter keeps a replica of that name."""
        return name in self.polyrank_replica and replica in cast(
            "nn.ModuleDict", self.polyrank_replica[name]
        )

    def _replicate_shape(self, name: str, replica: str, r: int, bank: int) -> None:
        """Make room for a saved replica, whose ranks may differ from today's."""
        view = self.views[name]
        core = view.method.core(replace(view.site, r=r))
        if bank:
            core.banked(bank)
        A = torch.zeros(bank + core.widths[0], view.site.d_in)
        B = torch.zeros(view.site.d_out, bank + core.widths[1])
        self._hold(name, replica, Frozen(A, B, core), r, bank)

    def _hold(self, name: str, replica: str, held: Frozen, r: int, bank: int) -> None:
        held.shape = (r, bank)
        if name not in self.polyrank_replica:
            self.polyrank_replica[name] = nn.ModuleDict()
        cast("nn.ModuleDict", self.polyrank_replica[name])[replica] = held.eval()

    def drop(self, name: str) -> None:
        """Remove one adapter and leave the choice of the active one to the caller."""
        self.forget(name, self.adapter_layer_names + self.other_param_names)
        self.views.pop(name, None)

    def forget(self, name: str, containers: Sequence[str]) -> None:
        """Remove what some containers hold of one adapter."""
        for held in containers:
            if name in getattr(self, held):
                del getattr(self, held)[name]

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove one adapter."""
        self.views.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT's own version also casts to the base's dtype: a balance bias in bf16 would lose its
        # steps of 1e-5.
        target = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        for name in self.adapter_layer_names + self.other_param_names:
            held = getattr(self, name)
            if adapter_name not in held or target is None or target.type == "meta":
                continue
            if not any(p.is_meta for p in held[adapter_name].parameters()):
                held[adapter_name].to(target)

    def parameters_of(self, name: str) -> dict[str, list[nn.Parameter]]:
        """Return one adapter's trained parameters by role."""
        return self.views[name].parameters()

    # --- forward ---------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base output plus the updates of the active adapters."""
        flow = self.flow
        if self._disable_adapters or flow.view == "base":
            if self.merged_adapters:
                self.unmerge()
            return cast("Tensor", self.base_layer(x, *args, **kwargs))
        if x.dtype not in FLOATS:
            path = next((view.site.path for view in self.views.values()), "an adapted layer")
            raise ConfigError(
                f"input of {path}: got {x.dtype}, expected float32, bfloat16, float16 or float64; "
                "embed or cast it before the layer"
            )
        if flow.plain and not (args or kwargs) and (fast := through(self, x, flow)) is not None:
            return fast
        y = self.base_layer(x, *args, **kwargs)
        if flow.plain:
            if not self.merged_adapters:
                for name in self._active_adapter:
                    if name in self.views:
                        y = self.views[name].add(y, x, flow)
            return cast("Tensor", y)
        return self._general(y, x, flow)

    def _general(self, y: Tensor, x: Tensor, flow: Flow) -> Tensor:
        if flow.lane is not None:
            return self._lanes(y, x, flow)
        if self.merged_adapters:
            return y
        for name in self.active_adapters:
            view = self.views.get(name)
            if view is None:
                continue
            if flow.view and not self.keeps(name, flow.view):
                raise ConfigError(
                    f"view: got {flow.view!r}, but adapter {name!r} keeps no such replica; "
                    'use "base" or make one with polyrank.layers.replica(model, name)'
                )
            y = view.add(y, x, flow)
        return y

    def _lanes(self, y: Tensor, x: Tensor, flow: Flow) -> Tensor:
        lane = cast("Tensor", flow.lane)
        if len(x) * flow.beams == len(lane):
            # An encoder sees each sample once, whatever the number of beams.
            lane = lane[:: flow.beams]
        if len(x) != len(lane):
            if x.dim() != 2 or len(x) % len(lane):
                # The wording is what users of PEFT's mixed batches search for.
                raise ValueError(
                    "Length of `adapter_names` should be the same as the number of inputs, but got "
                    f"{len(lane)} and {len(x)} respectively."
                )
            # Tokens in one row after the other, as some models flatten them.
            lane = lane.repeat_interleave(len(x) // len(lane))
        if (together := grouped(self, y, x, lane, flow)) is not None:
            return together
        for index, name in enumerate(flow.lanes):
            if name in self.views:
                rows = (lane == index).nonzero().squeeze(-1)
                if len(rows):
                    part = self.views[name].add(y[rows], x[rows], flow.rows(rows))
                    y = y.index_copy(0, rows, part)
        return y

    # --- merging ---------------------------------------------------------------------------------

    def base_bias(self) -> Tensor | None:
        """Return the base layer's bias, or None."""
        return cast("Tensor | None", getattr(self.get_base_layer(), "bias", None))

    def quantised(self) -> bool:
        """Say whether the base weight is anything but a dense floating-point matrix."""
        base = self.get_base_layer()
        weight = getattr(base, "weight", None)
        if weight is None or type(base).__module__.startswith("bitsandbytes"):
            return True
        shape = (
            (self.in_features, self.out_features)
            if self.transposed
            else (self.out_features, self.in_features)
        )
        return not (
            weight.is_floating_point() and weight.shape == shape and type(weight.data) is Tensor
        )

    def dense_weight(self) -> Tensor:
        """Return the base weight in its own layout and dtype.

        Raises:
            MergeError: if the base is quantised.
        """
        if self.quantised():
            raise MergeError(
                f"base weight: {type(self.get_base_layer()).__name__} is quantised, and polyrank "
                f"needs a dense one "
                "here; keep the adapter unmerged, or load the base model without quantisation"
            )
        return cast("Tensor", self.get_base_layer().weight)

    def get_delta_weight(self, adapter: str, condition: Tensor | None = None) -> Tensor:
        """Return the dense update in the layout of the base weight and the dtype of B."""
        return self._update(adapter, condition).to(self.views[adapter].B.dtype)

    def _update(self, name: str, condition: Tensor | None = None) -> Tensor:
        delta = self.views[name].delta(condition)
        return delta.T if self.transposed else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of adapters to the base weight.

        Raises:
            MergeError: if a core has no single matrix or the base is quantised, before anything
                changes.
            ValueError: with `safe_merge`, if a merged weight is not finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.views]
        if not names:
            return
        for name in names:
            self.dense_weight().data = self._merged(name, safe_merge)
            self.merged_adapters.append(name)
            self.merged_settings[name] = self.views[name].core.settings()

    def _merged(self, name: str, safe: bool) -> Tensor:
        """Return the base weight plus one adapter's update, in the dtype of the base."""
        weight = self.dense_weight().detach()
        merged = (wide(weight) + self._update(name)).to(weight.dtype)
        if safe and not torch.isfinite(merged).all():
            # The first words are PEFT's, which its users look for.
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {name} seems to be broken: got "
                f"weights that are not finite at {self.views[name].site.path}, expected numbers; "
                "look for a diverged training run"
            )
        return merged

    def check_merge(self, name: str, safe: bool = False) -> None:
        """Raise what `merge` would raise for one adapter, and change nothing."""
        core = self.views[name].core
        if core.merges != "exact":
            core.delta(None)
        if core.merges == "never":
            raise MergeError(
                f"merge: the core {type(core).__name__} declares that no matrix equals it; keep "
                "the adapter unmerged"
            )
        self.dense_weight()
        if safe:
            self._merged(name, safe)

    def unmerge(self) -> None:
        """Take merged updates out of the base weight again, up to rounding in the base's dtype."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.views:
                weight, core = self.dense_weight(), self.views[name].core
                # What was set on the core since has not reached the weight.
                now = core.settings()
                core.configure(self.merged_settings.pop(name, now))
                weight.data = (wide(weight.detach()) - self._update(name)).to(weight.dtype)
                core.configure(now)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say whether the update is one matrix, so that PEFT can turn it into a plain LoRA."""
        return adapter_name in self.views and self.views[adapter_name].core.merges == "exact"

    def __repr__(self) -> str:
        """Name the layer after the project, as PEFT's tuners do."""
        return "polyrank." + super().__repr__()
