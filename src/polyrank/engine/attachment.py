"""Runs a method's rules at the updates of any torch optimiser."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from polyrank.errors import CheckpointError, ConfigError, InertError
from polyrank.frame import Group, Rule, Step, Strategy, conflicts, seed_of
from polyrank.layers import ModelAdapter, adapter_of, ensure_flow, hook_of


class Attachment:
    """The rules of one adapter on one optimiser; `polyrank.attach` makes it.

    Attributes:
        rules: in the order in which they run.
        index: number of real updates so far.
        total: number of updates of the phase, 0 if unknown.
        accumulation: micro-batches per update; injected losses are divided by it.
        scaler: a `torch.amp.GradScaler` if gradients are scaled; injected losses are scaled along.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        adapter: ModelAdapter,
        *,
        strategies: Iterable[Strategy],
        total: int,
        accumulation: int,
        scaler: Any,
        task: int,
        phase: str,
        seed: int,
        workshop: Any,
        evaluated: bool = False,
        groups: list[Group] | None = None,
    ) -> None:
        self.groups = groups
        self.adapter, self.optimizer = adapter, optimizer
        self.total, self.accumulation, self.scaler = total, accumulation, scaler
        self.task, self.phase, self.seed = task, phase, seed
        self.index, self.peak = 0, 0.0
        self.begun = self.graded = False
        entries = (adapter.method, *strategies)
        rules: list[Rule] = [rule for entry in entries for rule in entry.all_rules()]
        if not evaluated and (lost := [entry.name for entry in entries if _lossy(entry)]):
            raise ConfigError(
                f"losses of {', '.join(lost)}: got a loop without tasks, in which no trainer "
                "evaluates them yet, and leaving them out would train something else; use "
                "polyrank.run, or add them to your own objective and say evaluated=True"
            )
        if problems := [*conflicts(rules), *self._mismatches(model)]:
            raise ConfigError(problems)
        self.rules = sorted(rules, key=lambda rule: (rule.order, rule.name))
        for rule in self.rules:
            rule.bind(adapter, optimizer, workshop)
        self.flow = ensure_flow(model)
        self.flow.attached.add(adapter.name)
        self.flow.watchers.append(self.begin)
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def _mismatches(self, model: nn.Module) -> Iterable[str]:
        groups = self.optimizer.param_groups
        place = {id(p): group for group in groups for p in group["params"]}
        trained = {id(p) for p in self.adapter.trained()}
        names = {id(p): name for name, p in model.named_parameters()}
        if missing := [names.get(i, "?") for i in trained if i not in place]:
            yield (
                f"optimizer: misses {len(missing)} trainable tensors of adapter "
                f"{self.adapter.name!r} ({', '.join(sorted(missing)[:3])}); "
                "build it from polyrank.parameter_groups(model, lr=...)"
            )
            return
        found = self.groups
        if found is None:
            found = self.adapter.method.grouping(self.adapter, None)
        served = {"adamw", *getattr(self.optimizer, "updates", ())}
        if strange := sorted({group.update for group in found} - served):
            yield (
                f"optimizer: {self.adapter.method.name!r} asks for the updates {strange}, which "
                f"{type(self.optimizer).__name__} does not serve; build it with "
                f"polyrank.optimizer(model, lr=...){self.adapter.method.otherwise}"
            )
        # A scheduler may have set the rate to zero for its first step.
        rates = [
            (float(place[id(p)].get("initial_lr", place[id(p)]["lr"])), group.lr)
            for group in found
            for p in group.params
        ]
        first = next((rate / factor for rate, factor in rates), 0.0)
        if any(abs(rate - first * factor) > 1e-6 * abs(first * factor) for rate, factor in rates):
            yield (
                f"optimizer: {self.adapter.method.name!r} trains groups at different rates, the "
                "optimiser does not; build it from polyrank.parameter_groups(model, lr=...)"
            )
        gates = [p for group in found if group.weight_decay == 0.0 for p in group.params]
        if any(place[id(p)].get("weight_decay", 0.0) for p in gates):
            yield (
                "optimizer: decays gates, which would pull them to zero whatever the data say; "
                "build it from polyrank.parameter_groups(model, lr=..., weight_decay=...)"
            )

    def step(self) -> Step:
        """Return where the current update stands."""
        group = self.optimizer.param_groups[0]
        lr = float(group["lr"])
        # A schedule that warms up says beforehand how high it will rise, OneCycleLR as max_lr.
        announced = (float(group.get(key, lr)) for key in ("initial_lr", "max_lr"))
        self.peak = max(self.peak, lr, *announced)
        return Step(
            index=self.index,
            total=self.total,
            lr=lr,
            peak=self.peak,
            task=self.task,
            phase=self.phase,
            seed=self.seed,
        )

    def begin(self) -> None:
        """Begin an update; within an update a further call changes nothing.

        Every training forward calls it, unless it is compiled: then call it before the forward in
        one's own loop. An update that a loss scaler skipped is begun again under the same index.
        """
        scale: float | Tensor = 1.0
        if self.scaler is not None:
            # On the device: asking for the number would wait for all work before.
            scale = self.scaler.scale(torch.ones((), device=self.adapter.trained()[0].device))
        self.flow.aux = scale / self.accumulation
        if self.graded:
            # The gradients were seen, but no step came: a loss scaler skipped it.
            self.begun = self.graded = False
        if not self.begun:
            self.begun = True
            # Processes see different rows, so they draw different masks.
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
            key = ("draw", self.seed, self.task, self.phase, self.index, rank)
            self.flow.draw.fill_(seed_of(*key))
            for rule in self.rules:
                rule.begin(self.step())

    def before_clip(self) -> bool:
        """Run the rules that work on gradients; call it before clipping in one's own loop.

        The gradients must be complete, reduced and unscaled. Without this call the rules run right
        before the optimiser's step. Returns whether there was any such rule.
        """
        if not self.graded:
            for rule in self.rules:
                rule.grads(self.step())
            # Only now: a rule may run the model on other data, which is no new update.
            self.graded = True
        return self.works_on_gradients()

    def works_on_gradients(self) -> bool:
        """Say whether any rule reads or writes gradients."""
        return bool(self._overriding("grads"))

    def _overriding(self, moment: str) -> list[str]:
        return [r.name for r in self.rules if getattr(type(r), moment) is not getattr(Rule, moment)]

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self.begun and (late := self._overriding("begin")):
            raise InertError(
                f"rules {late} of {self.adapter.method.name!r} begin before the first forward of "
                "an update, which was compiled or did not pass the model's root; call begin() of "
                "the attachment before it"
            )
        if _found_inf(optimizer):
            return
        scale = getattr(optimizer, "grad_scale", None)
        if not self.graded and scale is not None and self.works_on_gradients():
            # A fused optimiser would unscale inside its step, after the rules.
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        param.grad.div_(scale)
            cast("Any", optimizer).grad_scale = None
        self.before_clip()

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.begun = self.graded = False
        self.flow.stepped.add(self.adapter.name)
        if _found_inf(optimizer):
            return
        step = self.step()
        for rule in self.rules:
            rule.after(step)
        self.index += 1

    def detach(self) -> None:
        """Take the hooks off again; the optimiser and the model stay usable."""
        if self._handles:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            self.flow.attached.discard(self.adapter.name)
            self.flow.watchers.remove(self.begin)
            self.flow.aux = 1.0
            with ExitStack() as rest:
                # What one of them finds wrong must not keep the others from leaving.
                for rule in reversed(self.rules):
                    rest.callback(rule.release)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return (tensors, plain values) of all rules."""
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {"index": self.index, "peak": self.peak, "rules": {}}
        for rule in self.rules:
            values = rule.state()
            tensors.update(
                {f"{rule.name}/{k}": v for k, v in values.items() if isinstance(v, Tensor)}
            )
            plain["rules"][rule.name] = {
                k: v for k, v in values.items() if not isinstance(v, Tensor)
            }
        return tensors, plain

    def restore(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """Take back what `state` gave.

        Raises:
            CheckpointError: if it belongs to other rules.
        """
        own = {rule.name for rule in self.rules}
        if own != set(plain["rules"]):
            raise CheckpointError(
                f"rules: the checkpoint holds {sorted(plain['rules'])}, this run has "
                f"{sorted(own)}; resume with the method and strategies that the run began with"
            )
        self.index, self.peak = int(plain["index"]), float(plain["peak"])
        for rule in self.rules:
            values: dict[str, Any] = dict(plain["rules"][rule.name])
            prefix = f"{rule.name}/"
            values.update(
                {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            )
            rule.restore(values)

    def save(self, folder: str | Path) -> None:
        """Write the state beside a checkpoint's other files: safetensors and JSON, then renamed."""
        tensors, plain = self.state()
        base = Path(folder)
        save_file(
            {k: v.contiguous() for k, v in tensors.items()},
            str(base / "polyrank_rules.safetensors.part"),
        )
        (base / "polyrank_rules.json.part").write_text(json.dumps(plain), encoding="utf-8")
        for name in ("polyrank_rules.safetensors", "polyrank_rules.json"):
            (base / f"{name}.part").replace(base / name)

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote.

        Raises:
            CheckpointError: if it is not there, or belongs to other rules.
        """
        base = Path(folder)
        if not (base / "polyrank_rules.json").is_file():
            raise CheckpointError(
                f"rules: {base} holds no polyrank_rules.json; the checkpoint was written without "
                "polyrank.TrainerMixin and cannot be resumed exactly: start anew"
            )
        plain = json.loads((base / "polyrank_rules.json").read_text(encoding="utf-8"))
        self.restore(load_file(str(base / "polyrank_rules.safetensors")), plain)


def _lossy(entry: Any) -> bool:
    """Say whether an entry trains by another loss than the model's own."""
    return bool(entry.losses()) or entry.task_loss() is not None


def _found_inf(optimizer: Optimizer) -> bool:
    """Say whether a loss scaler told a fused optimiser to skip; `step` is called all the same."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def attach(
    optimizer: Optimizer,
    model: nn.Module,
    *,
    adapter: str | None = None,
    strategies: Iterable[Strategy] = (),
    total: int = 0,
    accumulation: int = 1,
    scaler: Any = None,
    task: int = 0,
    phase: str = "train",
    seed: int = 0,
    workshop: Any = None,
    evaluated: bool = False,
    groups: list[Group] | None = None,
) -> Attachment:
    """Let a method do its part in one's own training loop.

    Args:
        optimizer: a torch optimiser over the adapter, best built from `polyrank.parameter_groups`.
        model: the adapted model.
        adapter: its name; None is the active one.
        strategies: what is combined with the method.
        total: number of updates that will come, for schedules; 0 if unknown.
        accumulation: micro-batches per update.
        scaler: the loop's `torch.amp.GradScaler`, if it has one.
        task: number of the task, part of random keys.
        phase: name of the phase.
        seed: key of random draws.
        workshop: services of the engine, if it runs the loop.
        evaluated: whether the loop evaluates the losses of method and strategies itself.
        groups: what the optimiser was built from, if not from the method's own.

    Returns:
        What to call `before_clip()` of before clipping, and `detach()` when done.

    Raises:
        ConfigError: if the optimiser does not hold what trains, at the rates that the method needs.
    """
    found = adapter_of(model, adapter)
    if found.name in ensure_flow(root_of(model)).attached:
        raise ConfigError(
            f"attach: adapter {found.name!r} is attached already; "
            "call detach() on the old attachment first"
        )
    return Attachment(
        getattr(optimizer, "optimizer", optimizer),
        root_of(model),
        found,
        strategies=strategies,
        total=total,
        accumulation=accumulation,
        scaler=scaler,
        task=task,
        phase=phase,
        seed=seed,
        workshop=workshop,
        evaluated=evaluated,
        groups=groups,
    )


def root_of(model: nn.Module) -> nn.Module:
    """Return the module that carries the flow's hook."""
    for module in model.modules():
        hook = hook_of(module)
        if hook is not None and any(
            getattr(h, "__self__", None) is hook for h in module._forward_pre_hooks.values()
        ):
            return module
    raise ConfigError(
        "model: no polyrank adapter found; make one with polyrank.adapt(model, method)"
    )
