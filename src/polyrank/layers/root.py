"""The one hook on a model's root: it fills the flow before the model runs."""

from __future__ import annotations

import inspect
import itertools
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from polyrank.errors import ConfigError, InertError
from polyrank.frame import Flow, Method

if TYPE_CHECKING:
    from polyrank.layers.views import View

CONDITION = "polyrank_condition"
HOOKS: weakref.WeakValueDictionary[int, FlowHook] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


@torch.library.custom_op(
    "polyrank::training_forward", mutates_args={"draw"}, schema="(Tensor(a!) draw, int hook) -> ()"
)
def training_forward(draw: Tensor, hook: int) -> None:
    """Do what a training forward does first, in compiled code; writing `draw` keeps it there."""
    draw.add_(1)
    if hook in HOOKS:
        HOOKS[hook].check()


class FlowHook:
    """Reads masks and condition from a forward's arguments; an object, so that copies work."""

    def __init__(self, model: nn.Module, flow: Flow) -> None:
        self.flow = flow
        self.names = [p.name for p in inspect.signature(model.forward).parameters.values()]
        self.before: list[dict[str, object] | None] = []
        # One view, or block, of every adapter that does something at every update.
        self.probes: dict[str, View | Side] = {}
        # One view of every adapter whose start wants statistics.
        self.starts: dict[str, View] = {}
        self._register(weakref.ref(model))

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in ("flow", "names", "probes", "starts")}
        return {**kept, "before": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register(None)

    def _register(self, root: weakref.ref[nn.Module] | None) -> None:
        self.root = root
        self.seen: dict[str, _Mark] = {}
        self.gathering = False
        self.alarms: dict[str, int] = {}
        self.number = next(_NUMBERS)
        HOOKS[self.number] = self

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        """Fill the flow; note what stood there if this forward is without gradients."""
        flow = self.flow
        given = dict(zip(self.names, args, strict=False))
        given.update(kwargs)
        values: dict[str, object] = {
            "mask": _real(given.get("attention_mask")),
            "decoder_mask": _decoded(given),
            "condition": _fitting(kwargs.get(CONDITION), given, flow.ambient),
            "learning": torch.is_grad_enabled(),
        }
        if values["learning"]:
            self.before.append(None)
            flow._set(values)
            if module.training:
                self._train(module)
        else:
            self.before.append({name: getattr(flow, name) for name in values})
            flow._set(values)
        return args, {k: v for k, v in kwargs.items() if k != CONDITION}

    def _train(self, module: nn.Module) -> None:
        if self.gathering:
            # Nothing is trained, but every forward drops out other entries.
            self.flow.draw.add_(1)
            return
        for name, view in self.starts.items():
            if view.waiting and view.acts():
                raise InertError(
                    f"adapter {name!r}: the start of {view.method.name!r} wants "
                    f"{', '.join(sorted(view.method.starting().wants))}, which nobody gathered, so "
                    "it would train as plain LoRA; call polyrank.initialise(model, batches) before "
                    "the optimiser is made"
                )
            if view.hollow and view.acts() and view.B.numel() and not view.B.is_meta:
                if not bool(view.B.any()):
                    raise InertError(
                        f"adapter {name!r}: its config is that of an adapter which has started "
                        "already, and its tensors were never loaded, so it would train as another "
                        "method; load them with PeftModel.from_pretrained, use a fresh config, or "
                        "call polyrank.layers.redraw(model)"
                    )
                view.hollow = False
        if torch.compiler.is_compiling():
            # Rules begin outside of the graph, which would keep the numbers of its first forward.
            training_forward(self.flow.draw, self.number)
        elif torch._C._current_graph_task_id() == -1:
            # A checkpoint around the whole model comes here a second time, in backward.
            self.root = weakref.ref(module)
            for watcher in self.flow.watchers:
                watcher()
            self.flow.draw.add_(1)
            # Not emptied: an earlier forward may still be waiting for its backward.
            self.flow.notes = {}
            self.check()

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Put back what stood in the flow before a forward without gradients."""
        before = self.before.pop() if self.before else None
        if before is not None:
            self.flow._set(before)

    def check(self) -> None:
        """Watch that weights change only together with what their method does at every update.

        Without an attachment the first such change is one too many. With one, the first may be a
        loaded checkpoint; two in a row mean that another optimiser trains than the attached one.

        Raises:
            InertError: if the method did not do its part.
        """
        for name, view in self.probes.items():
            attached = name in self.flow.attached
            now, before = _mark(view, attached), self.seen.get(name)
            self.seen[name] = now
            if before is None or now.same(before) or name in self.flow.stepped:
                self.alarms[name] = 0
                continue
            self.alarms[name] = self.alarms.get(name, 0) + 1
            if self.alarms[name] > attached:
                raise InertError(_inert(name, view.method.name, attached))
        self.flow.stepped.clear()


class Side(NamedTuple):
    """The block of one adapter, of which there is no view."""

    host: Any
    name: str

    @property
    def method(self) -> Method:
        """What the adapter was made by."""
        return cast("Method", self.host.methods[self.name])

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """Return what trains, by role."""
        return cast("dict[str, list[nn.Parameter]]", self.host.parameters_of(self.name))


class _Mark(NamedTuple):
    """What tells whether the weights of an adapter changed: version counters, or some values."""

    ids: list[int]
    versions: list[int]
    values: Tensor | None

    def same(self, before: _Mark) -> bool:
        if self.ids != before.ids or (self.values is None) is not (before.values is None):
            # Other tensors, or other means of looking: nothing to compare.
            return True
        if self.values is None or before.values is None:
            return self.versions == before.versions
        return torch.equal(self.values, before.values)


def _mark(view: View | Side, attached: bool) -> _Mark:
    params = [p for group in view.parameters().values() for p in group if p.requires_grad]
    ids = [id(p) for p in params]
    if attached or not params:
        # Does not wait for the device. Fused optimisers do not count versions, so that two of them
        # that take turns go unnoticed.
        return _Mark(ids, [p._version for p in params], None)
    return _Mark(ids, [], torch.cat([p.detach().reshape(-1)[:64].float() for p in params]))


def _inert(name: str, method: str, attached: bool) -> str:
    if attached:
        return (
            f"adapter {name!r}: its weights change, but not by the optimiser that {method!r} is "
            "attached to; detach() the old attachment and call polyrank.attach(optimizer, model) "
            "with the one that trains"
        )
    return (
        f"adapter {name!r}: its weights changed, but what {method!r} does at every update did not "
        "run, so it would train as something else; use polyrank.Trainer, "
        "`class T(polyrank.TrainerMixin, YourTrainer)`, or polyrank.attach(optimizer, model)"
    )


def _fitting(condition: Any, given: dict[str, Any], ambient: Tensor | None) -> Any:
    """Return the condition of a forward; one that came as an argument has a row a sample."""
    if condition is None:
        return ambient
    names = ("input_ids", "inputs_embeds", "pixel_values", "x", "input")
    batch = next((len(given[n]) for n in names if isinstance(given.get(n), Tensor)), None)
    if batch is not None and len(condition) not in (1, batch):
        raise ConfigError(
            f"{CONDITION}: got {len(condition)} rows for {batch} samples, expected one row a "
            "sample, or a single one for all"
        )
    return condition


def _real(mask: Any) -> Tensor | None:
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _decoded(given: dict[str, Any]) -> Tensor | None:
    # Collators pad labels by -100 and make decoder inputs of them, without a mask.
    labels = given.get("labels")
    if given.get("decoder_attention_mask") is None and isinstance(labels, Tensor):
        return labels != -100 if labels.dim() == 2 else None
    return _real(given.get("decoder_attention_mask"))


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
