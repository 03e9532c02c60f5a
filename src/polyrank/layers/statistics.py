"""Statistics of adapted layers, for starts that come from data: gathered by hooks on the layers.

The gradient by the weight that acts in a layer is Σ dyᵀ x, dy from the layer's output and x its
input: no weight needs a gradient, so that quantised and shared bases work as well. Beside what a
training step keeps (each layer's input), a device holds the gradient of one layer at a time, in
fp32, and a sixteenth of it (see `outer`); the sums lie on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from polyrank.errors import ConfigError, RunError
from polyrank.frame import Init, keyed
from polyrank.layers.adapter import adapter_of
from polyrank.layers.precision import exact, without_tf32
from polyrank.layers.root import hook_of
from polyrank.layers.views import View

# Wide copies take this part of a gradient's bytes, or those of so many tokens if that is more.
SHARE, LEAST = 16, 64
# Parts of `wants` that a pass through the model shows, and the one that needs a backward.
SEEN = frozenset({"weight_grad", "input", "output"})
GRAD = "weight_grad"
# Losses of transformers in which the label of a token stands at its own place.
ALIGNED = frozenset({"ForMaskedLM", "ForTokenClassification"})

Stats = dict[str, dict[str, Tensor]]
# The mean loss of a batch, or that and the number of terms it is the mean of.
Loss = Callable[[Any, Any], "Tensor | tuple[Tensor, int]"]


def gather(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None,
    start: Init,
    *,
    adapter: str | None = None,
    draw: tuple[int | str, ...] = (0,),
) -> Stats:
    """Return by layer path what a start wants of batches, reduced over them and all processes.

    Args:
        model: the adapted model; the adapter acts as it is.
        batches: as in `initialise`.
        loss: as in `initialise`.
        start: says what it wants, and folds it.
        adapter: its name; None is the active one.
        draw: key of what the model drops out meanwhile.

    Raises:
        ConfigError: as in `initialise`.
        RunError: if another process could not go on.
    """
    views = adapter_of(model, adapter).layers
    taker = _Taker(start, {view.site.path: {} for view in views})
    backward = GRAD in start.wants
    with ExitStack() as stack:
        stack.enter_context(_aside(model, draw, start.training))
        stack.enter_context(without_tf32())
        for view in views:
            stack.callback(_listen(view, taker).remove)
        # Last, so that it asks the others before anything is put back.
        stack.enter_context(agreed(views[0].A.device))
        for batch in _limited(batches, start):
            moved = _moved(batch, views[0].A.device)
            with torch.set_grad_enabled(backward):
                value, terms = _value(loss, model, moved, start)
            taker.count += terms
            taker.batches += 1
            if backward:
                _backward(value * terms if start.reduction == "sum" else value, views)
    return taker.reduced(views)


def _backward(value: Tensor, views: list[View]) -> None:
    if not value.requires_grad:
        raise ConfigError(
            f"initialise: the loss does not depend on any adapted layer, such as "
            f"{views[0].site.path}; return the loss of the model's own answer, with its graph"
        )
    value.backward()


@dataclass
class _Taker:
    """Takes what hooks show, and holds it on the host.

    Attributes:
        start: folds it.
        stats: what it has folded, by path.
        passes: how often each layer was passed; a shared one counts for each pass.
        batches: how many batches were seen.
        count: of how many terms their losses were means.
    """

    start: Init
    stats: Stats
    passes: dict[str, int] = field(default_factory=dict)
    batches: int = 0
    count: int = 0

    def take(self, view: View, seen: dict[str, Tensor]) -> None:
        """Fold one pass through a layer."""
        path = view.site.path
        self.passes[path] = self.passes.get(path, 0) + 1
        self.stats[path] = self.start.gather(view.site, self.stats[path], seen)

    def backward(self, view: View, x: Tensor, dy: Tensor) -> None:
        """Take Σ dyᵀ x of one pass; its copy on the device is gone on return."""
        self.take(view, {GRAD: outer(dy, x).cpu()})

    def reduced(self, views: list[View]) -> Stats:
        """Return the statistics over all batches and processes, and refuse what is of no use."""
        device = views[0].A.device
        own = torch.tensor([self.batches, *(self.passes.get(v.site.path, 0) for v in views)])
        passes = least = _over_processes(own.clone(), device, least=True)
        # In a sum, a process without rows of its own is missed by nobody.
        whole = self.start.reduction == "sum"
        if whole and not bool(least.all()):
            passes = _over_processes(own, device)
        if not int(passes[0]):
            where = "" if whole else " on every process"
            raise ConfigError(
                f"initialise: got no batch, expected at least one{where}; give some, for "
                "example a list of a few batches of the training data"
            )
        paths = [view.site.path for view in views]
        unseen = [path for path, n in zip(paths, passes[1:].tolist(), strict=True) if not n]
        if unseen:
            raise ConfigError(_useless(unseen, "no gradient reached"))
        if whole and not bool(least.all()):
            self._level()
        totals = torch.tensor([self.batches, self.count], dtype=torch.float64)
        number, count = _over_processes(totals, device).tolist()
        for path in paths:
            stat = self.stats[path]
            for name in sorted(stat):
                stat[name] = _over_processes(stat[name], device)
                if self.start.reduction == "mean":
                    stat[name] /= number
            stat["count"] = torch.tensor(count, dtype=torch.float64)
        if GRAD in self.start.wants:
            self._refuse(paths)
        return self.stats

    def _level(self) -> None:
        """Hold zeros of what other processes have and this one has not seen."""
        mine = {
            path: {name: (value.shape, value.dtype) for name, value in stat.items()}
            for path, stat in self.stats.items()
        }
        every: list[Any] = [mine] * processes()
        if processes() > 1:
            dist.all_gather_object(every, mine)
        for shapes in every:
            for path, found in shapes.items():
                for name, (shape, dtype) in found.items():
                    self.stats[path].setdefault(name, torch.zeros(shape, dtype=dtype))

    def _refuse(self, paths: list[str]) -> None:
        grads = {path: self.stats[path][GRAD] for path in paths if GRAD in self.stats[path]}
        if bad := [path for path, grad in grads.items() if not bool(grad.isfinite().all())]:
            raise ConfigError(_useless(bad, "the gradient is not finite"))
        if zero := [path for path, grad in grads.items() if not bool(grad.any())]:
            raise ConfigError(_useless(zero, "the gradient is all zero"))


def _useless(paths: list[str], what: str) -> str:
    more = f" and {len(paths) - 1} more layers" if len(paths) > 1 else ""
    return (
        f"initialise: {what} at {paths[0]}{more}, from which no start can be made; leave the layer "
        "out with exclude_modules, or give other batches"
    )


def outer(dy: Tensor, x: Tensor) -> Tensor:
    """Return Σ dyᵀ x (d_out, d_in) in fp32, or in fp64 if one of them is; leading axes are tokens.

    Wide copies are made of n tokens at a time, n = max(64, d_out·d_in / 16 (d_out + d_in)), so that
    with e bytes an element (4 or 8) no more is allocated than

        e·d_out·d_in + max(e·d_out·d_in / 16, 64 e (d_out + d_in)),

    beside one copy of an argument whose tokens do not lie as a matrix. Where both sides have 2048
    or more, the first of the two is the larger.
    """
    dy, x = dy.detach().reshape(-1, dy.shape[-1]), x.detach().reshape(-1, x.shape[-1])
    dtype = torch.promote_types(torch.float32, torch.promote_types(dy.dtype, x.dtype))
    total = torch.zeros(dy.shape[1], x.shape[1], dtype=dtype, device=x.device)
    size = max(LEAST, total.numel() // (SHARE * sum(total.shape)))
    with exact(x.device.type):
        for rows, columns in zip(dy.split(size), x.split(size), strict=True):
            total.addmm_(rows.to(dtype).t(), columns.to(dtype))
    return total


class _Tap(torch.autograd.Function):
    """Returns y and shows (x, dy) in backward; x is saved as autograd saves, for checkpoints."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, probe: Tensor, sink: Any) -> Tensor:
        ctx.sink = sink
        ctx.save_for_backward(x)
        # A view would forbid models to add to it in place.
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.sink(ctx.saved_tensors[0], dy)
        return dy, None, None, None


def _listen(view: View, taker: _Taker) -> Any:
    wants = taker.start.wants
    # Nothing else may require a gradient, so that the graph begins here.
    probe = torch.zeros((), requires_grad=True)

    def passed(module: nn.Module, args: Any, kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
        x = args[0] if args else kwargs["x"]
        shown = {"input": x, "output": y}
        if (mine := wants & shown.keys()) and torch._C._current_graph_task_id() == -1:
            flat = {name: shown[name].detach().flatten(0, -2) for name in mine}
            with torch.no_grad():
                taker.take(view, flat)
        if GRAD in wants and torch.is_grad_enabled():
            apply: Callable[..., Tensor] = _Tap.apply
            return apply(y, x, probe, partial(taker.backward, view))
        return None

    return view.module.register_forward_hook(passed, with_kwargs=True)


@contextmanager
def _aside(model: nn.Module, draw: tuple[int | str, ...], training: bool) -> Iterator[None]:
    """Let forwards pass that train nothing, and put back whatever they change."""
    modes = {module: module.training for module in model.modules()}
    trained = {param: param.requires_grad for param in model.parameters()}
    devices = sorted({p.device.index for p in trained if p.device.type == "cuda"})
    hook = hook_of(model)
    assert hook is not None
    flow = hook.flow
    kept = {name: getattr(flow, name) for name in (*_FLOW, "learning")}
    drawn, rank = flow.draw.clone(), dist.get_rank() if processes() > 1 else 0
    state = keyed("gather", *draw, rank)
    try:
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(state.get_state())
            for device in devices:
                seed = int(torch.randint(2**31, (), generator=state))
                generator = torch.Generator(f"cuda:{device}").manual_seed(seed)
                torch.cuda.set_rng_state(generator.get_state(), device)
            model.train(training)
            for param in trained:
                param.requires_grad_(False)
            hook.gathering = True
            yield
    finally:
        hook.gathering = False
        for module, mode in modes.items():
            module.training = mode
        for param, on in trained.items():
            param.requires_grad_(on)
        flow._set(kept)
        flow.draw.copy_(drawn)


_FLOW = ("mask", "decoder_mask", "condition")


def _limited(batches: Iterable[Any], start: Init) -> Iterator[Any]:
    """Yield as many batches, or exactly as many rows, as a start looks at."""
    if not start.samples:
        yield from islice(batches, start.batches or None)
        return
    world = processes()
    left = start.samples // world + int(
        (dist.get_rank() if world > 1 else 0) < start.samples % world
    )
    for batch in batches:
        if not left:
            return
        count = _rows(batch)
        if count > left:
            batch = {
                key: value[:left] if isinstance(value, Tensor) and len(value) == count else value
                for key, value in batch.items()
            }
        left -= min(left, count)
        yield batch
    if left:
        raise ConfigError(
            f"initialise: the batches hold {left} rows too few, expected {start.samples}; give "
            "more, or set samples to what there is"
        )


def _rows(batch: Any) -> int:
    sizes = (
        [len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim()]
        if isinstance(batch, Mapping)
        else []
    )
    if not sizes:
        raise ConfigError(
            "initialise: rows are counted, which needs batches of named tensors; got "
            f"{type(batch).__name__}"
        )
    return sizes[0]


def _value(loss: Loss | None, model: nn.Module, batch: Any, start: Init) -> tuple[Tensor, int]:
    """Return the mean loss of a batch, and the number of its terms."""
    if loss is None:
        if not isinstance(batch, Mapping):
            raise ConfigError(
                f"initialise: got a batch of type {type(batch).__name__}, expected mappings of the "
                "model's keyword arguments; put a single one into a list, or pass loss="
            )
        found: Any = model(**batch).loss
        if found is None:
            raise ConfigError(
                "initialise: the model gave no loss; put labels into the batches, or pass loss="
            )
        return found, _terms(model, batch) if start.reduction == "sum" else 1
    found = loss(model, batch)
    if isinstance(found, tuple):
        return found[0], int(found[1])
    return found, _rows(batch) if start.reduction == "sum" else 1


def _terms(model: nn.Module, batch: Any) -> int:
    """Return how many terms the model's own loss is the mean of."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
        return _rows(batch)
    config = getattr(model, "config", None)
    # A decoder's labels are shifted inside of it; those of an encoder-decoder were before.
    there = getattr(config, "is_encoder_decoder", False)
    there = there or getattr(model, "loss_type", None) in ALIGNED
    return int(((labels if there else labels[:, 1:]) != -100).sum())


def _moved(batch: Any, device: torch.device) -> Any:
    if not isinstance(batch, Mapping):
        return batch
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def processes() -> int:
    """Return how many processes work together, 1 alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def agreed(device: torch.device) -> Iterator[None]:
    """Let all processes leave a block in the same way, so that nobody waits for one that failed.

    Raises:
        RunError: where another process raised.
    """
    try:
        yield
    except Exception:
        _over_processes(torch.ones(1), device)
        raise
    if processes() > 1 and bool(_over_processes(torch.zeros(1), device)):
        raise RunError(
            "initialise: another process stopped, so that no start can be made; see its message"
        )


def _over_processes(value: Tensor, device: torch.device, *, least: bool = False) -> Tensor:
    """Return the sum over all processes, or the least; on the host, in the tensor that came."""
    if processes() > 1:
        there = value.to(device)
        dist.all_reduce(there, dist.ReduceOp.MIN if least else dist.ReduceOp.SUM)
        value.copy_(there)
    return value
