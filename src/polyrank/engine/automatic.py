"""Rules that join any optimiser by themselves, at its first step."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from polyrank.engine.attachment import Attachment, attach
from polyrank.errors import InertError
from polyrank.frame import PenaltyRule, Rule
from polyrank.layers import adapter_of
from polyrank.layers.root import HOOKS, FlowHook


class Automatic:
    """What `attach_automatically` started; its `remove()` ends it and detaches what it attached."""

    def __init__(self, accumulation: int) -> None:
        self.accumulation = accumulation
        self.attached: dict[tuple[int, str], Attachment] = {}
        self._handle = register_optimizer_step_pre_hook(self._step)

    def remove(self) -> None:
        """Take everything off again."""
        self._handle.remove()
        for attachment in self.attached.values():
            attachment.detach()
        self.attached.clear()

    def _step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for hook in list(HOOKS.values()):
            model = hook.root() if hook.root is not None else None
            for name, view in hook.probes.items():
                own = {id(p) for params in view.parameters().values() for p in params}
                if model is not None and own & held:
                    self._join(optimizer, model, hook, name)

    def _join(self, optimizer: Optimizer, model: nn.Module, hook: FlowHook, name: str) -> None:
        old = self.attached.get((hook.number, name))
        if old is not None and old.optimizer is not optimizer:
            old.detach()
        if name in hook.flow.attached:
            return
        # Rules forget at the start what was counted before; here that belongs to this very update.
        cores = [cast("Any", layer.core) for layer in adapter_of(model, name).layers]
        counted = [getattr(core, "counts", None) for core in cores]
        attached = attach(optimizer, model, adapter=name, accumulation=self.accumulation)
        for core, counts in zip(cores, counted, strict=True):
            if counts is not None:
                core.counts = counts
        early = [
            rule.name
            for rule in attached.rules
            if type(rule).begin is not Rule.begin
            or (type(rule).grads is not Rule.grads and not isinstance(rule, PenaltyRule))
        ]
        if early:
            attached.detach()
            raise InertError(
                f"rules {early} of {attached.adapter.method.name!r} cannot join at an optimiser's "
                "step; use polyrank.Trainer, polyrank.TrainerMixin or "
                "polyrank.attach(optimizer, model)"
            )
        self.attached[hook.number, name] = attached


def attach_automatically(accumulation: int = 1) -> Automatic:
    """Attach rules at the first step of any torch optimiser, for trainers one cannot choose.

    Only rules that act after an update can join this late; a method whose rules must see gradients
    before clipping, or the start of an update, raises `InertError` and names the way that works.

    Args:
        accumulation: micro-batches per update; losses that a core injects are divided by it, from
            the second update on.

    Returns:
        A handle; its `remove()` ends it.
    """
    return Automatic(accumulation)
