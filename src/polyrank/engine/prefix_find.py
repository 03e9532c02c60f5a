"""The frozen prefix of an adapted model: where it ends, and what says that it cannot be kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from polyrank.layers import AdaptedLinear, BlockHost, HeadHost
from polyrank.layers.placement import blocks_of

# What labels are called and where a model was read does not change what its blocks do.
_ASIDE = {
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "num_labels",
    "transformers_version",
}
# Hooks of transformers that only look, and that it never takes off again.
_HARMLESS = "transformers.utils.output_capturing"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Values of each tensor that are compared before every forward.
_SAMPLE = 32


class Prefix:
    """The blocks below the first one that is adapted or trained, and all that runs before them.

    Modules are looked up by path each time, so that one that was exchanged is seen.

    Attributes:
        model: the model, unwrapped.
        path: of its list of transformer blocks.
        first: number of the first block that is adapted or trained, >= 1.
        reason: why its outputs cannot be kept; empty if they can.
    """

    def __init__(self, model: nn.Module, path: str, first: int) -> None:
        self.model, self.path, self.first = model, path, first
        # Paths of modules that run before the first adapted block though they are defined after it.
        self.others: list[str] = []
        self.reason = self.look().problem()

    def look(self) -> Look:
        """Return the prefix as it is now."""
        return Look(self)

    def extend(self, called: Iterable[nn.Module]) -> None:
        """Add modules that ran before the first adapted block though they are defined after it.

        Sets `reason` if one of them is adapted or trains.
        """
        look = self.look()
        known = {*look.modules, *look.chain}
        paths = {module: path for path, module in self.model.named_modules()}
        for module in called:
            if module not in known:
                known.update(module.modules())
                self.others.append(paths[module])
                if _touched([module]):
                    who = f"{type(module).__name__} at {paths[module]}"
                    self.reason = f"{who} runs before the first adapted block and is not frozen"
        self.reason = self.reason or self.look().problem()


class Look:
    """The modules and tensors of a prefix at one moment.

    Attributes:
        chain: what holds the blocks, each module holding the next, their list last.
        blocks: the frozen blocks, in order.
        above: the block that they feed.
        modules: every module of the prefix.
        tensors: every parameter and buffer that it may read.
    """

    def __init__(self, prefix: Prefix) -> None:
        self.chain = _chain(prefix.model, prefix.path)
        stack = list(self.chain[-1].children())
        self.blocks, self.above = stack[: prefix.first], stack[prefix.first]
        self.modules: list[nn.Module] = []
        others = (prefix.model.get_submodule(path) for path in prefix.others)
        for root in (*_before(self.chain), *self.blocks, *others):
            _walk(root, self.modules)
        places = (p for m in (*self.chain, *self.modules) for p in (m._parameters, m._buffers))
        self.tensors: list[Tensor] = [t for p in places for t in p.values() if t is not None]

    def busy(self) -> bool:
        """Say whether something listens inside of the prefix, so that it must run."""
        return any("forward" in vars(module) or _hooked(module) for module in self.modules)

    def problem(self) -> str:
        """Say why the outputs would not be those of every later forward, if so."""
        for module in (*self.chain, *self.modules):
            who = type(module).__name__
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float) and value > 0:
                    return f"{who}.{name} is {value}, and draws anew in every training forward"
            if isinstance(module, _DropoutNd) and module.p > 0:
                return f"{who} drops {module.p} of its inputs, drawn anew in training"
            if isinstance(module, _BatchNorm):
                return f"{who} mixes the rows of a batch in training"
            if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
                return f"{who} is compiled"
        if self.busy():
            return "a module has a hook or a forward of its own"
        for tensor in self.tensors:
            if type(tensor.data) is not Tensor or tensor.is_meta:
                return f"a weight is a {type(tensor.data).__name__} without plain values"
        return ""


class Mark:
    """What tells whether a prefix is still the same.

    Identities and version counters miss what is written through `.data` or by a fused optimiser,
    and samples miss single values; what trains or loads weights changes one of them. Of a tensor
    that was written, all values are compared: a model wrapped for several processes has its tensors
    written with what they hold, some of them in each forward.

    Attributes:
        digests: of the values of all tensors.
    """

    def __init__(self, look: Look) -> None:
        self.modules = _places(look)
        self.digests = [digest_of(tensor) for tensor in look.tensors]
        self._hold(look)
        self.samples = self._sample()

    def of(self, look: Look) -> bool:
        """Say whether a prefix has the marked modules and values, and does not train."""
        if self.modules != _places(look) or any(t.requires_grad for t in look.tensors):
            return False
        if len(look.tensors) != len(self.held):
            return False
        pairs = zip(_numbers(look.tensors), self.numbers, strict=True)
        written = [index for index, (now, then) in enumerate(pairs) if now != then]
        if any(digest_of(look.tensors[i]) != self.digests[i] for i in written):
            return False
        if written:
            self._hold(look)
        return same_bits(self._sample(), self.samples)

    def _hold(self, look: Look) -> None:
        # Held, so that no other tensor gets the id of one of them.
        self.held, self.numbers = look.tensors, _numbers(look.tensors)
        self.views: dict[Any, list[Tensor]] = {}
        for tensor in look.tensors:
            if tensor.is_contiguous():
                flat = tensor.detach().view(-1)[:: max(1, tensor.numel() // _SAMPLE)]
                self.views.setdefault((tensor.dtype, tensor.device), []).append(flat)

    def _sample(self) -> list[Tensor]:
        return [torch.cat(views) for views in self.views.values()]


def content_of(prefix: Prefix, mark: Mark) -> dict[str, Any]:
    """Return what decides the outputs of a prefix beside its inputs, as plain values."""
    look = prefix.look()
    return {
        "tensors": mark.digests,
        "modules": [f"{type(m).__module__}.{type(m).__qualname__}" for m in look.modules],
        "first": prefix.first,
        "config": _config(look.chain),
    }


def prefix_of(model: nn.Module) -> Prefix | None:
    """Return the frozen prefix of a model, or None if there is none.

    There is one if the model has a single stack of transformer blocks, of which the first ones, and
    all that stands before them, hold no adapter and nothing that trains. If no block is adapted,
    the last one counts as if it were. Whether the outputs can be kept is said by its `reason`.
    """
    inner = unwrapped(model)
    stacks = {path.rpartition(".")[0] for path, _, _ in blocks_of(inner)}
    if len(stacks) != 1:
        return None
    path = stacks.pop()
    chain = _chain(inner, path)
    stack = cast("nn.ModuleList", chain[-1])
    first = next((i for i, block in enumerate(stack) if _touched([block])), len(stack) - 1)
    # A parameter beside the modules, such as a class token, is read before the blocks.
    loose = [p for module in chain for p in module._parameters.values() if p is not None]
    if first < 1 or _touched(_before(chain)) or any(p.requires_grad for p in loose):
        return None
    return Prefix(inner, path, first)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of what distributes it over processes."""
    while isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return model


def digest_of(tensor: Tensor) -> str:
    """Return what stands for dtype, shape and values of a tensor."""
    digest = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
    digest.update(as_bytes(tensor.detach().cpu()).numpy().data)
    return digest.hexdigest()


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a tensor's values as flat uint8; a copy only if it is not contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same_bits(a: Any, b: Any) -> bool:
    """Compare tensors bit by bit, also inside of tuples, lists and dicts; the rest by value.

    Objects made anew in every forward, such as a cache of keys, are only known by their type.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            return False
        return a is b or torch.equal(as_bytes(a.detach()), as_bytes(b.detach()))
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    return not isinstance(a, (bool, int, float, str)) or a == b


def _places(look: Look) -> list[nn.Module]:
    return [*look.chain, look.above, *look.modules]


def _numbers(tensors: Iterable[Tensor]) -> list[tuple[int, int, int]]:
    return [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]


def _config(chain: Sequence[nn.Module]) -> dict[str, str]:
    for module in reversed(chain):
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_dict"):
            found = {k: v for k, v in config.to_dict().items() if k not in _ASIDE}
            found["attention"] = getattr(config, "_attn_implementation", None)
            return {key: repr(found[key]) for key in sorted(found)}
    return {}


def _walk(module: nn.Module, found: list[nn.Module]) -> None:
    # Faster than `modules()`, which looks for modules that are held twice.
    found.append(module)
    for child in module._modules.values():
        if child is not None:
            _walk(child, found)


def _chain(model: nn.Module, path: str) -> list[nn.Module]:
    parts = path.split(".")
    return [model.get_submodule(".".join(parts[:i])) for i in range(len(parts) + 1)]


def _before(chained: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """Yield the modules that are defined before the last of a chain, each holding the next."""
    for outer, inner in pairwise(chained):
        for child in outer.children():
            if child is inner:
                break
            yield child


def _touched(roots: Iterable[nn.Module]) -> bool:
    """Say whether something inside is adapted, or trains."""
    return any(
        isinstance(module, (AdaptedLinear, BlockHost, HeadHost))
        or any(p is not None and p.requires_grad for p in module._parameters.values())
        for root in roots
        for module in root.modules()
    )


def _hooked(module: nn.Module) -> bool:
    for name in _HOOKS:
        hooks = getattr(module, name)
        if hooks and any(getattr(h, "__module__", "") != _HARMLESS for h in hooks.values()):
            return True
    return False
