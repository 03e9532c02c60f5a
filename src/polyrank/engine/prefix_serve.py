"""One forward with kept states in the place of the prefix, or in full and compared with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from polyrank.engine.prefix_find import Prefix, same_bits
from polyrank.engine.prefix_tails import Loop, Tails, even


class Stop(Exception):
    """Ends a forward that was only watched."""


@dataclass
class Seen:
    """What a watched forward showed.

    Attributes:
        start: states that the first block got.
        outputs: what the frozen blocks returned, in order.
        called: what modules around the blocks returned before the first adapted block.
        states: states that the first adapted block got.
        entry: everything that it got.
        end: what the last block returned.
    """

    start: Any = None
    outputs: list[Any] = field(default_factory=list)
    called: dict[nn.Module, list[Any]] = field(default_factory=dict)
    states: Any = None
    entry: Any = None
    end: Any = None


@contextmanager
def watched(prefix: Prefix, *, short: bool = False, tails: Tails | None = None) -> Iterator[Seen]:
    """Watch the next forward.

    Args:
        prefix: whose modules are watched.
        short: whether it ends at the first adapted block, and not after the last block.
        tails: what notes loops on the way to the first adapted block.
    """
    seen = Seen()
    look = prefix.look()
    stack = look.chain[-1]
    inside = {*look.chain, *stack.modules()}
    last = list(stack.children())[-1]

    def start(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.start = _states(module, args, kwargs)

    def entry(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.states, seen.entry = _states(module, args, kwargs), (args, kwargs)
        if tails is not None:
            tails.open = False
        if short:
            raise Stop

    def returned(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if seen.entry is None:
            seen.called.setdefault(module, []).append(output)

    def block(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.outputs.append(output)

    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.end = output
        raise Stop

    with ExitStack() as undo:
        handles = [
            look.blocks[0].register_forward_pre_hook(start, with_kwargs=True),
            look.above.register_forward_pre_hook(entry, with_kwargs=True, prepend=True),
            last.register_forward_hook(end),
            *(b.register_forward_hook(block) for b in look.blocks),
            *(m.register_forward_hook(returned) for m in prefix.model.modules() if m not in inside),
        ]
        for handle in handles:
            undo.callback(handle.remove)
        with suppress(Stop), tails or nullcontext():
            yield seen


class Relay:
    """Puts states in the place of a prefix.

    A forward is of a kind: rows, mode, threads, precision, and what the blocks get beside states.
    The first one of each kind runs in full, and its states are compared with the kept ones.

    Args:
        prefix: what is replaced.
        seen: a forward of the model as it is.
        loops: those of the prefix whose rest has other bits.

    Attributes:
        stem: the module whose output the first block gets as it is, so that it need not run
            either; None if there is none.
        exact: by kind, whether kept states have the very bits of a forward in full.
    """

    def __init__(self, prefix: Prefix, seen: Seen, loops: Iterable[Loop] = ()) -> None:
        self.prefix, self.outputs = prefix, [_emptied(output) for output in seen.outputs]
        self.loops = frozenset(loops)
        calls = seen.called
        alone = (m for m in prefix.model.modules() if len(calls.get(m, ())) == 1)
        self.stem = next((m for m in alone if calls[m][0] is seen.start), None)
        self.exact: dict[Any, bool] = {}

    def even(self, rows: int) -> bool:
        """Say whether a row has the same bits at every place of such a batch."""
        return even(self.loops, rows, torch.get_num_threads())

    @contextmanager
    def served(self, states: Tensor, *, trusted: bool = False) -> Iterator[Forward]:
        """Put states in place for one forward of the model.

        Args:
            states: (n, …), of the rows that the model is given.
            trusted: whether to do so without a comparison.
        """
        forward = Forward(self, states, trusted)
        look = self.prefix.look()
        blocks = look.blocks
        handle = look.above.register_forward_pre_hook(
            forward.arrive, with_kwargs=True, prepend=True
        )
        try:
            for number, block in enumerate(blocks):
                block.forward = partial(forward.block, number, block, block.forward)
            if self.stem is not None:
                self.stem.forward = partial(forward.begin, self.stem.forward)
            yield forward
        finally:
            handle.remove()
            for module in (*blocks, self.stem):
                if module is not None:
                    vars(module).pop("forward", None)


class Forward:
    """One forward of the model.

    Attributes:
        full: whether the prefix ran; None if no block was reached.
    """

    def __init__(self, relay: Relay, states: Tensor, trusted: bool) -> None:
        self.relay, self.states, self.trusted = relay, states, trusted
        self.full: bool | None = None
        self.kind: Any = None
        self.late: Callable[[], Any] | None = None

    def begin(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand in for the stem, which runs later if the first block says so."""
        self.late = partial(forward, *args, **kwargs)
        return self.states

    def block(
        self,
        number: int,
        module: nn.Module,
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Stand in for one block, or run it."""
        if number == 0:
            self.kind = self._kind(module, args, kwargs)
            self.full = not self.trusted and not self.relay.exact.get(self.kind, False)
            if self.full and self.late is not None:
                args, kwargs = _with_states(module, self.late(), args, kwargs)
        if self.full:
            return forward(*args, **kwargs)
        empty = self.relay.outputs[number]
        return self.states if empty is None else (self.states, *empty)

    def arrive(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compare what a prefix that ran gave with what was kept."""
        if self.full and self.kind not in self.relay.exact:
            found = _states(module, args, kwargs)
            self.relay.exact[self.kind] = same_bits(found, self.states)

    def _kind(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device = self.states.device.type
        autocast = torch.is_autocast_enabled(device)
        return (
            module.training,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_autocast_dtype(device) if autocast else None,
            torch.get_num_threads(),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            _sketch(_with_states(module, self.states, args, kwargs)),
        )


def _name(module: nn.Module) -> str:
    """Return what a block calls its states."""
    return next(n for n in inspect.signature(type(module).forward).parameters if n != "self")


def _states(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get(_name(module))


def _with_states(
    module: nn.Module, states: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (states, *args[1:]), kwargs
    return args, {**kwargs, _name(module): states}


def _emptied(output: Any) -> tuple[None, ...] | None:
    """Return what follows the states in a block's output: None if it is the states themselves.

    Raises:
        ValueError: if it holds more than states.
    """
    if isinstance(output, Tensor):
        return None
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        rest = output[1:]
        if all(part is None for part in rest):
            return rest
    raise ValueError("its blocks return more than states")


def _sketch(value: Any) -> Any:
    """Return what can decide about kernels, without the values of tensors; it can be hashed."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device, value.requires_grad
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(map(_sketch, value))
    if isinstance(value, dict):
        return tuple((key, _sketch(value[key])) for key in sorted(value))
    return type(value).__name__
