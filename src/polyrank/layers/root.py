"""The one hook on a model's root: it fills the flow before the model runs."""

from __future__ import annotations

import inspect
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polyrank.errors import InertError
from polyrank.frame import Flow

if TYPE_CHECKING:
    from polyrank.layers.linear import View

CONDITION = "polyrank_condition"
HOOKS: weakref.WeakSet[FlowHook] = weakref.WeakSet()


class FlowHook:
    """Reads masks and condition from the arguments of a forward; an object, so that copies of the model work."""

    def __init__(self, model: nn.Module, flow: Flow) -> None:
        self.flow = flow
        self.names = [p.name for p in inspect.signature(model.forward).parameters.values()]
        self.before: list[dict[str, object] | None] = []
        self.probes: dict[str, View] = {}
        self.versions: dict[str, tuple[int, int]] = {}
        self.root: weakref.ref[nn.Module] | None = None
        HOOKS.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "root": None}

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        """Fill the flow; note what stood there if this forward is without gradients."""
        # Noted here and not at construction: a copy of the model brings a copy of the hook.
        self.root = weakref.ref(module)
        HOOKS.add(self)
        flow = self.flow
        given = dict(zip(self.names, args, strict=False))
        given.update(kwargs)
        condition = kwargs.get(CONDITION, flow.ambient)
        values: dict[str, object] = {
            "mask": _real(given.get("attention_mask")),
            "decoder_mask": _real(given.get("decoder_attention_mask")),
            "condition": condition,
        }
        if torch.is_grad_enabled():
            self.before.append(None)
            values["draw"] = flow.draw + int(module.training)
            flow._set(values)
            for watcher in flow.watchers:
                watcher(module.training)
            if module.training and self.probes:
                self._check()
        else:
            self.before.append({name: getattr(flow, name) for name in values})
            flow._set(values)
        return args, {k: v for k, v in kwargs.items() if k != CONDITION}

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Put back what stood in the flow before a forward without gradients."""
        before = self.before.pop() if self.before else None
        if before is not None:
            self.flow._set(before)

    def _check(self) -> None:
        for name, view in self.probes.items():
            now = (id(view.B), view.B._version)
            if name in self.flow.attached or not view.B.requires_grad:
                self.versions.pop(name, None)
            elif self.versions.setdefault(name, now) != now:
                raise InertError(
                    f"adapter {name!r}: its weights changed, but what {view.method.name!r} does at every update did "
                    "not run, so it would train as something else; use polyrank.Trainer, "
                    "`class T(polyrank.TrainerMixin, YourTrainer)`, or polyrank.attach(optimizer, model)"
                )


def _real(mask: Any) -> Tensor | None:
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def hook_of(model: nn.Module) -> FlowHook | None:
    """Return the flow hook of a model or of anything that wraps it."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, FlowHook):
                return owner
    return None


def ensure_flow(model: nn.Module) -> Flow:
    """Return the model's flow, making it and its hook at the first call."""
    hook = hook_of(model)
    if hook is None:
        hook = FlowHook(model, Flow())
        model.register_forward_pre_hook(hook.enter, with_kwargs=True)
        model.register_forward_hook(hook.leave, always_call=True)
    return hook.flow


def remove_flow(model: nn.Module) -> None:
    """Take the hook off a model whose adapters are gone."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), FlowHook):
                del hooks[key]
                model._forward_pre_hooks_with_kwargs.pop(key, None)
                model._forward_hooks_always_called.pop(key, None)
