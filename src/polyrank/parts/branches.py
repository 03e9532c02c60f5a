"""Adapters beside a transformer block: several, mixed for each sample, that are added one by one.

D(h) = s · Σ_k w_k (ReLU(h Wd_kᵀ + bd_k) Wu_kᵀ + bu_k),  w = softmax(m W_mixᵀ + b_mix), m the mean
of h over real tokens; h (batch, tokens, d) is what enters the norm before the feed-forward layers,
and D is added to what the transformer block gives. With one adapter w is exactly 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from polyrank.errors import ConfigError
from polyrank.frame import Block, Flow, Site, keyed
from polyrank.layers.views import wide
from polyrank.parts.windows import Windows

# (tap, add, a part that tells the kind). Blocks that norm before their feed-forward layers: that
# norm, and the block itself, since it may scale what those layers give, or drop some of it. Of
# blocks that norm afterwards, what enters those layers, and the last module before the sum.
PLACES = (
    ("pre_feedforward_layernorm", "", "post_feedforward_layernorm"),
    ("mlp", "", "post_feedforward_layernorm"),
    ("layernorm_after", "", "mlp"),
    ("layernorm_after", "", "output.dense"),
    ("layer_norm2", "", "mlp"),
    ("norm2", "", "mlp"),
    ("post_attention_layernorm", "", "mlp"),
    ("ln_2", "", "mlp"),
    ("layer.2.layer_norm", "", "layer.2.DenseReluDense"),
    ("layer.1.layer_norm", "", "layer.1.DenseReluDense"),
    ("intermediate", "output.dropout", "output.dense"),
    ("intermediate", "output.dense", "output.dense"),
    ("ffn", "ffn", "ffn"),
)


def place_of(site: Site) -> tuple[str, str]:
    """Return where a branch reads and where it adds in the transformer block at a site.

    Raises:
        ConfigError: for a block of none of the known shapes.
    """
    for tap, add, part in PLACES:
        if {tap, add or tap, part} <= {*site.modules}:
            return tap, add
    known = ", ".join(f"{tap} and {part}" for tap, _, part in PLACES)
    raise ConfigError(
        f"block: {site.path!r} has no norm before feed-forward layers that is known here, expected "
        f"modules {known}; use a model with such blocks"
    )


def _uniform(*shape: int, rng: torch.Generator | None) -> nn.Parameter:
    bound = 1 / math.sqrt(shape[-1])
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound, generator=rng))


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))


T = TypeVar("T", bound="Stack")


class Stack(nn.Module):
    """K parts of one kind whose tensors are stacked, so that all are computed at once."""

    # The axis along which parts are stacked, by tensor.
    axes: ClassVar[dict[str, int]]

    @torch.no_grad()
    def taken(self: T, first: T | None) -> T:
        """Return this with the parts of another one before its own, all frozen."""
        for name, axis in self.axes.items():
            own = getattr(self, name)
            parts = [own] if first is None else [getattr(first, name), own]
            setattr(self, name, nn.Parameter(torch.cat(parts, axis), requires_grad=False))
        return self


class Adapters(Stack):
    """K adapters: down (K r, d), up (d, K r), with biases (K r,) and (K, d); up starts at zero."""

    axes: ClassVar = {"down": 0, "down_bias": 0, "up": 1, "up_bias": 0}

    def __init__(self, d: int, r: int, count: int = 1, rng: torch.Generator | None = None) -> None:
        super().__init__()
        self.down, self.down_bias = _uniform(count * r, d, rng=rng), _zeros(count * r)
        self.up, self.up_bias = _zeros(d, count * r), _zeros(count, d)

    def forward(self, h: Tensor, w: Tensor) -> Tensor:
        """Return Σ_k w_k f_k(h), (batch, tokens, d), for weights w (batch, K)."""
        z = nn.functional.linear(h, self.down.to(h.dtype), self.down_bias.to(h.dtype)).relu()
        w = w.to(h.dtype)
        z = z * w.repeat_interleave(z.shape[-1] // w.shape[-1], -1)[:, None]
        return z @ self.up.to(h.dtype).T + (w @ self.up_bias.to(h.dtype))[:, None]


class Router(Stack):
    """K rows of a router and their biases."""

    axes: ClassVar = {"weight": 0, "bias": 0}

    def __init__(self, d: int, count: int = 1, rng: torch.Generator | None = None) -> None:
        super().__init__()
        self.weight = _uniform(count, d, rng=rng)
        bound = 1 / math.sqrt(d)
        self.bias = nn.Parameter(torch.empty(count).uniform_(-bound, bound, generator=rng))

    def forward(self, m: Tensor) -> Tensor:
        """Return logits (batch, K) of means m (batch, d)."""
        return nn.functional.linear(m, self.weight.to(m.dtype), self.bias.to(m.dtype))


class Descriptors(Stack):
    """K linear auto-encoders d → q → d that know which means they were trained on."""

    axes: ClassVar = {"encode": 0, "encode_bias": 0, "decode": 0, "decode_bias": 0}

    def __init__(self, d: int, q: int, count: int = 1, rng: torch.Generator | None = None) -> None:
        super().__init__()
        self.encode, self.encode_bias = _uniform(count, q, d, rng=rng), _zeros(count, q)
        self.decode, self.decode_bias = _uniform(count, d, q, rng=rng), _zeros(count, d)

    def forward(self, m: Tensor) -> Tensor:
        """Return errors (batch, K): mean over features of (rec − m)²; m learns nothing."""
        m, kind = m.detach(), m.dtype
        code = torch.einsum("bd,kqd->bkq", m, self.encode.to(kind)) + self.encode_bias.to(kind)
        back = torch.einsum("bkq,kdq->bkd", code, self.decode.to(kind)) + self.decode_bias.to(kind)
        return (back - m[:, None]).square().mean(-1)


class Expandable(Block):
    """A branch of adapters, frozen ones and at most one that trains.

    Attributes:
        count: adapters, of which the newest is the last one.
        growing: whether more may come; one that does not grow has neither router nor descriptors.
        described: whether it still has descriptors; without them it can only answer.
        watched: whether evaluation leaves errors (batch, K) as `left["errors"]`.
        describing: whether training leaves the newest descriptor's (batch,) as `left["newest"]`.
        recording: whether training keeps the newest descriptor's errors in `pending`.

    Args:
        site: of the transformer block.
        r, q: widths of adapters and descriptors.
        window: values that statistics are made of.
        scale: s.
        growing: as above.
    """

    roles: ClassVar = {"router": "router", "descriptor": "descriptor"}

    def __init__(
        self, site: Site, *, r: int, q: int, window: int, scale: float, growing: bool
    ) -> None:
        super().__init__()
        self.tap, self.add = place_of(site)
        self.path, self.d, self.r, self.q, self.size = site.path, site.d_in, r, q, window
        self.scale, self.growing, self.described = scale, growing, growing
        self.watched = self.describing = self.recording = False
        self.pending: list[Tensor] = []
        self.held_adapter: Adapters | None = None
        self.held_router: Router | None = None
        self.held_descriptor: Descriptors | None = None
        self.held_window: Windows | None = None
        self._fresh(None)

    # --- structure -------------------------------------------------------------------------------

    @property
    def live(self) -> bool:
        """Whether its newest adapter still trains."""
        return self.adapter is not None

    @property
    def count(self) -> int:
        """The number of adapters."""
        held = 0 if self.held_adapter is None else len(self.held_adapter.up_bias)
        return held + self.live

    def _fresh(self, rng: torch.Generator | None) -> None:
        self.adapter: Adapters | None = Adapters(self.d, self.r, rng=rng)
        grows = self.growing
        self.router: Router | None = Router(self.d, rng=rng) if grows else None
        described = grows and self.described
        self.descriptor: Descriptors | None = (
            Descriptors(self.d, self.q, rng=rng) if described else None
        )
        self.window: Windows | None = Windows(1, self.size) if described else None
        self._names()

    def _names(self) -> None:
        """Say anew what each parameter is."""
        names = [name for name, _ in self.named_parameters()]
        self.frozen = frozenset(n for n in names if n.startswith(("held_", "window.")))
        self.exact = frozenset(n for n in names if "window." in n)
        alone = self.count == 1
        self.unreached = frozenset(
            n for n in names if n.startswith("descriptor.") or (alone and n.startswith("router."))
        )

    def expand(self, rng: torch.Generator) -> None:
        """Add an adapter that trains, with a row of the router and a descriptor.

        Raises:
            ConfigError: if it cannot grow, or the last one still trains.
        """
        if not self.growing or self.live:
            raise ConfigError(
                f"block at {self.path}: got {'an adapter that trains' if self.live else 'no range'}"
                ", expected frozen adapters in a block of the range; freeze them first, once a task"
            )
        self._fresh(rng)

    def freeze(self) -> None:
        """Join what trains to what is frozen, for good."""
        if not self.live:
            return
        for kind in ("adapter", "router", "descriptor"):
            own = getattr(self, kind)
            if own is not None:
                setattr(self, f"held_{kind}", own.taken(getattr(self, f"held_{kind}")))
            setattr(self, kind, None)
        if self.window is not None:
            held = self.held_window
            self.held_window = self.window if held is None else Windows.joined(held, self.window)
        self.window = None
        self._names()

    def settings(self) -> dict[str, Any]:
        """Return the number of frozen adapters, and whether one trains."""
        if self.count == 1 and self.live:
            return {}
        return {"held": self.count - self.live, "live": self.live, "described": self.described}

    def configure(self, settings: dict[str, Any]) -> None:
        """Take the shapes of a saved branch; the weights are loaded afterwards."""
        if not settings:
            return
        # Nothing may be drawn from the global generator, and all of it is overwritten.
        rng = keyed("shapes", self.path)
        held, self.described = int(settings["held"]), bool(settings["described"])
        self.adapter = self.router = self.descriptor = self.window = None
        if held:
            self.held_adapter = Adapters(self.d, self.r, held, rng).taken(None)
        if held and self.growing:
            self.held_router = Router(self.d, held, rng).taken(None)
        if held and self.described:
            self.held_descriptor = Descriptors(self.d, self.q, held, rng).taken(None)
            self.held_window = Windows(held, self.size)
        if settings["live"]:
            self._fresh(rng)
        self._names()

    # --- answers ---------------------------------------------------------------------------------

    def forward(self, base: Any, x: Tensor, tapped: Tensor, flow: Flow) -> Any:
        """Return base(x) + D(tapped).

        Raises:
            ConfigError: if samples and tokens cannot be told apart.
        """
        whole = base(x)
        # Some transformer blocks return more than hidden states.
        y: Tensor = whole if isinstance(whole, Tensor) else whole[0]
        if tapped.dim() != 3:
            raise ConfigError(
                f"block at {self.path}: got hidden states of shape {tuple(tapped.shape)}, expected "
                "(batch, tokens, d); use a model that keeps its samples apart"
            )
        h = tapped.to(y.dtype)
        if not self.growing:
            weights = h.new_ones(len(h), 1)
        else:
            # Decisions are taken without autocast, whose bf16 would round what they rest on.
            with _exact(tapped.device.type):
                m = _mean(tapped, flow.mask)
                weights = self._logits(m).softmax(-1)
                self._describe(m, flow)
        parts = [p for p in (self.held_adapter, self.adapter) if p is not None]
        sizes = [len(part.up_bias) for part in parts]
        split = weights.split(sizes, -1)
        for part, w in zip(parts, split, strict=True):
            y = y + self.scale * part(h, w)
        return y if isinstance(whole, Tensor) else (y, *whole[1:])

    def _logits(self, m: Tensor) -> Tensor:
        rows = [r for r in (self.held_router, self.router) if r is not None]
        return torch.cat([row(m) for row in rows], -1)

    def _describe(self, m: Tensor, flow: Flow) -> None:
        """Leave errors where somebody reads them."""
        live = self.descriptor
        if self.training and live is not None:
            newest = live(m)[:, 0] if self.describing or self.recording else None
            if self.describing and newest is not None:
                self.left["newest"] = newest
            if self.recording and newest is not None and flow.live(self.training):
                self.pending.append(newest.detach())
        if self.watched and self.described and not self.training:
            found = [d for d in (self.held_descriptor, live) if d is not None]
            self.left["errors"] = torch.cat([d(m) for d in found], -1)

    def score(self, errors: Tensor, *, signed: bool = False) -> float:
        """Return S = min over descriptors of the mean over a batch of z, for errors (batch, K).

        The batch is that of all processes together, which therefore decide alike.

        Raises:
            RunError: if the errors, or the statistics, allow no answer.
        """
        windows = [w for w in (self.held_window, self.window) if w is not None]
        parts = errors.split([len(w.length) for w in windows], -1)
        z = [w.scores(e, signed=signed) for w, e in zip(windows, parts, strict=True)]
        found = torch.cat(z, -1)
        # One tensor, so that sums and their count travel together.
        sums = torch.cat([found.sum(0), found.new_tensor([len(found)])])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        return float((sums[:-1] / sums[-1]).min())


def _exact(device: str) -> AbstractContextManager[Any]:
    """Return a context without autocast."""
    active = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if active else nullcontext()


def _mean(h: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over real tokens, (batch, d) in fp32 or fp64."""
    h = wide(h)
    if mask is None:
        return h.mean(1)
    real = mask.to(h.dtype)[..., None]
    return (h * real).sum(1) / real.sum(1).clamp_min(1)


def mean_up(blocks: Sequence[Block]) -> float:
    """Return the mean norm of Wu over adapters of all branches, those of a block taken as one."""
    found = [
        torch.linalg.vector_norm(part.up.detach().float()).cpu()
        for block in blocks
        if isinstance(block, Expandable)
        for part in (block.held_adapter, block.adapter)
        if part is not None
    ]
    return float(torch.stack(found).mean()) if found else 0.0
