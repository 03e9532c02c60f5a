"""Where heads and blocks live in the module tree."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from polyrank.errors import ConfigError
from polyrank.frame import Block, Flow, Head, Method, Site
from polyrank.layers.trainability import DeclaredTrainability

# Where a block's host hangs. Without the prefix of PEFT's type: transformers' load_adapter puts the
# adapter's name behind the first component that has it, and the host's ModuleDict comes after.
NAME = "side_block"


class _Host(nn.Module, DeclaredTrainability):
    """Shared by hosts: one ModuleDict of owned modules, trained as far as roles allow."""

    held: str
    other_param_names: tuple[str, ...] = ()
    cast_input_dtype_enabled = True

    def __init__(self) -> None:
        nn.Module.__init__(self)
        setattr(self, self.held, nn.ModuleDict())
        self.methods: dict[str, Method] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = []

    @property
    def owned(self) -> nn.ModuleDict:
        """The modules by adapter."""
        return cast("nn.ModuleDict", getattr(self, self.held))

    def active(self) -> str | None:
        """Return the active adapter that this host serves, or None."""
        return next(iter(self.serving()), None)

    def serving(self) -> list[str]:
        """Return the active adapters that this host serves."""
        if self._disable_adapters:
            return []
        return [name for name in self.active_adapters if name in self.owned]

    def drop(self, adapter_name: str) -> None:
        """Remove what one adapter owns and leave the choice of the active one to the caller."""
        if adapter_name in self.owned:
            del self.owned[adapter_name]
        self.methods.pop(adapter_name, None)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove one adapter."""
        super().delete_adapter(adapter_name)
        self.methods.pop(adapter_name, None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Mark adapters as merged; what a host holds stays in place and stays in use."""
        for name in adapter_names or self.active_adapters:
            if name in self.owned and name not in self.merged_adapters:
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Forget the marks of `merge`."""
        self.merged_adapters.clear()


class HeadHost(_Host):
    """Stands in place of a model's classifier and runs the active adapter's growing head."""

    held = "polyrank_head"
    adapter_layer_names = ("polyrank_head",)
    other_param_names = ("polyrank_headcopy",)

    def __init__(self, base_layer: nn.Module, flow: Flow) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.flow = flow
        self.polyrank_headcopy = nn.ModuleDict()

    def update_head(self, name: str, head: Head, method: Method) -> None:
        """Give an adapter its head."""
        self.owned[name] = head
        self.methods[name] = method

    def parameters_of(self, name: str) -> dict[str, list[nn.Parameter]]:
        """Return the trained parameters of one adapter's head."""
        if "head" not in self.methods[name].trains:
            return {}
        frozen: frozenset[str] = getattr(self.owned[name], "frozen", frozenset())
        return {"head": [p for n, p in self.owned[name].named_parameters() if n not in frozen]}

    def replicate(self, name: str, replica: str) -> None:
        """Keep a frozen copy of one adapter's head under a name that `Flow.view` can show."""
        self.hold(name, replica, cast("Head", copy.deepcopy(self.owned[name])))

    def hold(self, name: str, replica: str, head: Head) -> None:
        """Keep a head as a replica, frozen."""
        if name not in self.polyrank_headcopy:
            self.polyrank_headcopy[name] = nn.ModuleDict()
        copies = cast("nn.ModuleDict", self.polyrank_headcopy[name])
        copies[replica] = head.requires_grad_(False)

    def copies(self, name: str) -> dict[str, Head]:
        """Return the replicas of one adapter's head by name."""
        if name not in self.polyrank_headcopy:
            return {}
        return dict(cast("Any", self.polyrank_headcopy[name]).items())

    def copy_of(self, name: str, replica: str) -> Head:
        """Return the head that one adapter keeps under a replica's name.

        Raises:
            ConfigError: if there is none.
        """
        found = self.copies(name)
        if replica not in found:
            raise ConfigError(
                f"view: got {replica!r}, but adapter {name!r} keeps {sorted(found) or 'none'}; "
                'use "base" or make one with polyrank.layers.replica(model, name)'
            )
        return found[replica]

    def drop(self, adapter_name: str) -> None:
        """Remove what one adapter owns."""
        super().drop(adapter_name)
        if adapter_name in self.polyrank_headcopy:
            del self.polyrank_headcopy[adapter_name]

    def forward(self, embedding: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the logits of the active adapter's head, else of the base classifier."""
        view = self.flow.view
        name = self.active() if view != "base" else None
        if name is None:
            return cast("Tensor", self.base_layer(embedding, *args, **kwargs))
        head = self.copy_of(name, view) if view else self.owned[name]
        return cast("Tensor", head(embedding, None))

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the merged adapter's head, by default the active one's, or the base classifier."""
        wanted = adapter_names or self.active_adapters
        name = next((n for n in wanted if n in self.owned), None) if merge else None
        return self.base_layer if name is None else self.owned[name]


class BlockHost(_Host):
    """Sits inside the module whose output a block replaces; the module keeps its place and path.

    A wrapper around the module would change the paths of everything inside it, and PEFT saves
    nothing that lies under a wrapper's base layer; so the block's forward is put in front of the
    module's own instead.
    """

    held = "polyrank_side"
    adapter_layer_names = ("polyrank_side",)

    def __init__(self, site: Site, flow: Flow, inside: nn.Module) -> None:
        super().__init__()
        self.site = site
        self.flow = flow
        # In a tuple, so that the transformer block is not taken for a part of its own part.
        self._inside = (inside,)
        self.tapped: dict[str, Tensor] = {}

    def update_block(self, name: str, block: Block, method: Method) -> None:
        """Give an adapter its block."""
        self.owned[name] = block
        self.methods[name] = method

    def place(self, name: str) -> str:
        """Return the key of one adapter's block in the config's sites."""
        return f"{self.site.path}:{cast('Block', self.owned[name]).add}"

    def parameters_of(self, name: str) -> dict[str, list[nn.Parameter]]:
        """Return the trained parameters of one adapter's block by role."""
        block = cast("Block", self.owned[name])
        found: dict[str, list[nn.Parameter]] = {}
        for parameter_name, param in block.named_parameters():
            role = block.roles.get(parameter_name.split(".")[0], "side")
            if parameter_name not in block.frozen and role in self.methods[name].trains:
                found.setdefault(role, []).append(param)
        return found

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT's own asks for the weight of a base layer; a block has none, and keeps its dtype.
        found = device or next((p.device for p in self._inside[0].parameters()), None)
        block = self.owned[adapter_name] if adapter_name in self.owned else nn.Identity()
        if found is None or found.type == "meta" or any(p.is_meta for p in block.parameters()):
            return
        block.to(found)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return an empty module; `detach` has put the original forward back."""
        return nn.Identity()


class _Original:
    """Runs what a block replaces: the module's own forward, or the block of another adapter."""

    def __init__(
        self, forward: BlockForward, adapter: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.module, self.inside = forward.module, forward.inside
        self.own = forward.own
        self.adapter, self.args, self.kwargs = adapter, args, kwargs
        self.within: Callable[[Tensor], Any] | None = None
        self.done: tuple[Tensor, Any] | None = None

    @property
    def alone(self) -> bool:
        """Whether no other block lies between."""
        return self.within is None

    def __call__(self, value: Tensor) -> Any:
        """Return the original's output."""
        if self.within is not None:
            return self.within(value)
        if self.done is not None and value is self.done[0]:
            return self.done[1]
        if self.own is not None:
            return self.own(value, *self.args, **self.kwargs)
        return type(self.module).forward(self.module, value, *self.args, **self.kwargs)


class BlockForward:
    """The forward of a module that hosts blocks; an object, so that copies of the model work.

    Without its host, as inside of a forward that was put around it, it is the module's own again.

    Attributes:
        own: the forward that was set on the module itself, as hooks of other libraries do, or None
            for that of its class.
    """

    def __init__(self, module: nn.Module, inside: nn.Module) -> None:
        self.module = module
        self.inside = inside
        self.host = cast("BlockHost", module._modules[NAME])
        self.own: Callable[..., Any] | None = module.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the blocks of the active adapters around the module's own forward, first innermost.

        Raises:
            ConfigError: if a replica is to be shown, which blocks do not keep.
        """
        x, args, kwargs = _first(self.module, args, kwargs)
        try:
            return self._run(x, args, kwargs)
        finally:
            # Whatever happens, no activation outlives its forward here.
            self.host.tapped.clear()

    def _run(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        host = self.host
        found = self.module._modules.get(NAME)
        # What wraps the host, as a sharding library may, does not make it another one.
        gone = found is None or (isinstance(found, BlockHost) and found is not host)
        names = [] if gone or host.flow.view == "base" else host.serving()
        taken = dict(host.tapped)
        host.tapped.clear()
        outer = _Original(self, "", args, kwargs)
        if not names:
            return outer(x)
        if host.flow.view:
            raise ConfigError(
                f"view: got {host.flow.view!r}, but the block at {host.site.path} keeps no "
                'replicas; use "base"'
            )
        flow = host.flow.at(host.flow.tokens(host.site.masks, x.shape[:-1]))
        blocks = [cast("Block", host.owned[name]) for name in names]
        if any(block.tap not in {block.add, *taken} for block in blocks):
            # What a part of the module is given is known once the module has run.
            outer.done = (x, outer(x))
            taken |= host.tapped
        for name, block in zip(names, blocks, strict=True):
            base, outer = outer, _Original(self, "", args, kwargs)
            base.adapter = name
            outer.within = _around(block, base, taken.get(block.tap, x), flow)
        return outer(x)


def _around(block: Block, base: _Original, tapped: Tensor, flow: Flow) -> Callable[[Tensor], Any]:
    """Return what a block makes of a value."""
    return lambda value: block(base, value, tapped, flow)


def _first(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Return a forward's first argument, however it was passed, and the rest."""
    if args:
        return args[0], args[1:], kwargs
    name = next(n for n in inspect.signature(type(module).forward).parameters if n != "self")
    return kwargs[name], (), {key: value for key, value in kwargs.items() if key != name}


class Tap:
    """Remembers the input of the module at a block's tap point."""

    def __init__(self, host: BlockHost, tap: str) -> None:
        self.host = host
        self.tap = tap

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the first input until the block reads it."""
        self.host.tapped[self.tap] = _first(module, args, kwargs)[0]


def attach_block(
    inside: nn.Module, site: Site, name: str, block: Block, flow: Flow, method: Method
) -> None:
    """Put a block at its add point inside the transformer block `inside`."""
    module = inside.get_submodule(block.add)
    if NAME not in module._modules:
        module.add_module(NAME, BlockHost(site, flow, inside))
        module.forward = BlockForward(module, inside)
    host = cast("BlockHost", module._modules[NAME])
    at = inside.get_submodule(block.tap)
    if block.tap != block.add and not any(
        isinstance(hook, Tap) and hook.host is host for hook in at._forward_pre_hooks.values()
    ):
        at.register_forward_pre_hook(Tap(host, block.tap), with_kwargs=True)
    host.update_block(name, block.train(module.training), method)
    host._move_adapter_to_device_of_base_layer(name)


def detach_blocks(model: nn.Module) -> None:
    """Put back the forwards of all modules that host blocks."""
    for module in list(model.modules()):
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, Tap):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        if isinstance(module._modules.get(NAME), BlockHost):
            del module._modules[NAME]
            forward = module.__dict__.get("forward")
            if isinstance(forward, BlockForward):
                del module.forward
                if forward.own is not None:
                    module.forward = forward.own
