"""What a call of the kernels does, worked out once for its shapes: launches without tensors."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyrank.ops.rank_gate import launch
from polyrank.ops.rank_gate.kernel_gates import KINDS
from polyrank.ops.rank_gate.launch import At, Launch, Member
from polyrank.ops.rank_gate.product import MOST_PAIRS, Product, pays, runs

# Of one member: y or W, the bias of W, A, rows, B, gate, balance bias, row_scale.
WIDTH = 8
# Tensors, or None where a member has none.
Given = list[Any]
_PLANS: dict[Any, "Plan"] = {}
_MOST = 4096


def unit(t: Tensor) -> Tensor:
    """A matrix whose rows lie in one piece each."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


class Call(NamedTuple):
    """The constants of one call."""

    members: tuple[Member, ...]
    dropout: float
    # Whether the base product is made here, from W, and not given as y.
    owned: bool
    keep: bool
    packs: bool
    inplace: bool = False

    def numbers(self) -> list[float]:
        """The same as numbers, which an operator of torch.library can take."""
        flat = [self.dropout, self.owned, self.keep, self.packs]
        for m in self.members:
            flat += [KINDS.index(m.kind), *m[1:]]
        return [float(v) for v in flat]


@lru_cache(maxsize=4096)
def call_of(numbers: tuple[float, ...]) -> Call:
    """What `Call.numbers` made numbers of."""
    dropout, *flags = numbers[:4]
    size, members = len(Member._fields), []
    for start in range(4, len(numbers), size):
        kind, k, block, in_weight, *rates, live, counts = numbers[start : start + size]
        first: list[Any] = [KINDS[int(kind)], int(k), int(block), bool(in_weight), *rates]
        members.append(Member(*(*first, int(live), bool(counts))))
    owned, keep, packs = (bool(f) for f in flags)
    return Call(tuple(members), dropout, owned, keep, packs)


class Part:
    """One member of a plan.

    Attributes:
        i: its number.
        first: where its tensors begin among the given.
        start: its first column of d and row of [A; rows].
        width: how many it has.
        whole: whether it is the only member.
        silent: ranks without a column of B.
        packed: the scale that B is packed with.
        scale: what is left of the update's scale then.
        write: the kernel of the update; there is none where it `folds`.
        folds: whether its output is one sum of base product and update.
        wide: dtype of h.
        straight: whether rows of A, rows and B lie in one piece each.
    """

    def __init__(self, plan: "Plan", i: int, start: int, found: Given, biased: bool) -> None:
        base, bias, A, rows, B, _, balance, _ = found
        self.plan, self.i, self.first, self.start = plan, i, i * WIDTH, start
        self.m = m = plan.call.members[i]
        self.packed = _packed_scale(m, plan.dtype)
        self.scale = 1.0 if plan.call.packs and self.packed == m.scale else m.scale
        self.r, self.n, self.r_B = A.shape[0], B.shape[0], B.shape[1]
        self.width, self.whole = m.ranks(self.r), len(plan.call.members) == 1
        self.silent, self.biased = self.r - self.r_B, balance is not None
        self.wide = torch.float32 if m.kind == "self" else plan.dtype
        self.A_dtype, self.B_dtype = A.dtype, B.dtype
        self.rows_dtype = None if rows is None else rows.dtype
        self.tiles = launch.token_tiles(plan.T, self.n, self.r, plan.dtype.itemsize)
        self._lay_out()
        self._inner: dict[tuple[int, int, bool], Launch] = {}
        self._values: dict[tuple[int, bool], Launch] = {}
        self._sums: dict[tuple[int, bool], Product] = {}
        self.folds = plan.foldable and pays(plan.T, self.n, plan.device)
        self.straight = all(t is None or unit(t) is t for t in (A, rows, B))
        self._forward(base, bias, unit(A), A if rows is None else unit(rows), unit(B))

    def _lay_out(self) -> None:
        """Place q, h, what is kept of the gate and B, one after the other, in the plan's buffer."""
        plan, m = self.plan, self.m
        self.places: dict[str, tuple[int, int, int, torch.dtype]] = {}

        def place(name: str, rows: int, columns: int, dtype: torch.dtype) -> None:
            self.places[name] = (plan.bytes, rows, columns, dtype)
            # The widest loads of a kernel take 16 bytes.
            plan.bytes += -(-rows * columns * dtype.itemsize // 16) * 16

        place("q", plan.T, self.r, plan.dtype)
        self.places["h"] = self.places["kept"] = self.places["q"]
        if plan.call.keep and m.kind != "none":
            place("h", plan.T, self.r, self.wide)
            if m.gated:
                place("kept", plan.T, self.r, torch.float32)
        if plan.call.packs:
            place("B", self.n, self.r_B, plan.dtype)

    def at(self, name: str, buffer: Tensor, origin: int) -> At:
        """One of them in a buffer that begins at the address `origin`."""
        return At(buffer, origin, *self.places[name])

    def keyed(self, AW: Tensor) -> tuple[At, At]:
        """Its rows of [A; rows], and of those the router's."""
        plan, step = self.plan, self.plan.d * AW.element_size()
        origin, start = AW.data_ptr(), self.start * step
        own = At(AW, origin, start, self.width, plan.d, plan.dtype)
        if not self.m.linear:
            return own, own
        rows = self.width - self.r
        return own, At(AW, origin, start + self.r * step, rows, plan.d, plan.dtype)

    def ranked(self, d: Tensor, start: int) -> tuple[At, At]:
        """From a column of a matrix d on, the gradients of h, and of a router's logits."""
        size, columns = d.element_size(), d.stride(0)
        origin, first = d.data_ptr(), start * size
        own = At(d, origin, first, self.plan.T, columns, d.dtype)
        if not self.m.linear:
            return own, own
        return own, At(d, origin, first + self.r * size, self.plan.T, columns, d.dtype)

    def _forward(self, base: Any, bias: Any, A: Tensor, rows: Tensor, B: Tensor) -> None:
        plan, m, call = self.plan, self.m, self.plan.call
        strides = (A.stride(0), rows.stride(0), B.stride(0))
        if call.packs:
            self.pack = launch.pack(m, plan.d, self.n, self.r, self.r_B, strides, self.packed)
            strides = (plan.d, plan.d, self.r_B)
        self.read = launch.read(
            m, plan.T, plan.d, self.r, (plan.sx, strides[0], strides[1], self.r), plan.dtype,
            keep=call.keep, counts=m.counts and call.packs, bias=self.biased, mask=plan.mask,
            dropout=call.dropout, seeded=plan.seeded, packed=call.packs,
        )  # fmt: skip
        row = self.n if base is None or call.owned else _row(base)
        out = row if call.inplace else self.n
        if self.folds:
            return
        self.write = launch.write(
            plan.T, self.n, self.r_B, (out, row, self.r, 1, strides[2]), self.scale, plan.dtype,
            add=not call.owned, bias=call.owned and bias is not None,
        )  # fmt: skip

    def inner(self, sy: int, sd: int, scaled: bool) -> Launch:
        """The pass over dy with rows sy apart, into d with rows sd apart."""
        found = self._inner.get((sy, sd, scaled))
        if found is None:
            plan = self.plan
            strides = (sy, self.r_B, 1, sd, self.width)
            found = self._inner[sy, sd, scaled] = launch.inner(
                self.m, plan.T, self.n, self.r, strides, self.silent, plan.dtype,
                scale=self.scale, bias=self.biased, scaled=scaled,
            )  # fmt: skip
        return found

    def sum(self, W: Tensor, bias: bool) -> Product:
        """x Wᵀ + q B'ᵀ [+ bias] as one sum."""
        found = self._sums.get(key := (W.stride(0), bias))
        if found is None:
            plan = self.plan
            strides = (self.n, (plan.sx, self.r), (W.stride(0), self.r_B))
            found = self._sums[key] = Product(
                (plan.T, self.n), (plan.d, self.r_B), strides, turned=True, bias=bias,
                device=W.device,
            )  # fmt: skip
        return found

    def values(self, sy: int, scaled: bool) -> Launch:
        """The gradient of B's live columns from dy with rows sy apart."""
        found = self._values.get((sy, scaled))
        if found is None:
            plan, live = self.plan, self.r - self.m.live_from
            found = self._values[sy, scaled] = launch.outer(
                plan.T, self.n, live, (sy, self.r, self.r_B, 1), self.m.scale, plan.dtype,
                scaled=scaled,
            )  # fmt: skip
        return found


def _packed_scale(m: Member, dtype: torch.dtype) -> float:
    """The scale that B is packed with.

    A small one would push numbers of fp16 below those that it holds in full.
    """
    return 1.0 if dtype == torch.float16 and abs(m.scale) < 1 else m.scale


def _row(y: Tensor) -> int:
    """Distance of rows of y as (T, n)."""
    return unit(y.reshape(-1, y.shape[-1])).stride(0)


class Plan:
    """The launches of a call on x (T, d); see `Part`.

    Attributes:
        bytes: size of the buffer of q, h, what is kept and B of all members.
        vendor: whether torch's own products of skinny matrices are the faster ones here.
        alike: whether one product can make the gradients of all A and rows.
        foldable: whether base product and update can be one sum; see `product.py`.
        folds: whether the gradient of x is one.
    """

    def __init__(
        self,
        call: Call,
        x: Tensor,
        given: Given,
        mask: bool,
        seeded: bool,
        *,
        aligned: bool = False,
    ) -> None:
        self.call, self.dtype, self.mask, self.seeded = call, x.dtype, mask, seeded
        (self.T, self.d), self.sx, self.device = x.shape, x.stride(0), x.get_device()
        self.foldable = aligned and call.owned and call.packs and self._foldable(x, given)
        self.folds = self.foldable and pays(self.T, self.d, self.device)
        # Dropout's mask is on the gradient that passes through A alone.
        self.folds = self.folds and not call.dropout and len(call.members) < MOST_PAIRS
        self.parts: list[Part] = []
        self.bytes = start = 0
        for i in range(len(call.members)):
            part = Part(self, i, start, given[i * WIDTH : (i + 1) * WIDTH], mask)
            self.parts.append(part)
            start += part.width
        self.ranks = start
        self.vendor = x.is_cuda and x.element_size() == 2 and self.T >= 1024 and not call.dropout
        self.alike = len({part.A_dtype for part in self.parts}) == 1
        self.alike = self.alike and not any(m.live_from for m in call.members)
        self._spread: dict[int, Launch] = {}
        self._keys: dict[tuple[int, int], Launch] = {}
        self._sums: dict[Any, Product] = {}

    def _foldable(self, x: Tensor, given: Given) -> bool:
        """Whether copies of `product` can read the rows of all matrices."""
        if not runs(x) or x.stride(0) < x.shape[1]:
            return False
        sizes = [x.stride(0), x.shape[1]]
        for m, i in zip(self.call.members, range(0, len(given), WIDTH), strict=True):
            W, A, B = given[i], given[i + 2], given[i + 4]
            if W.dtype != x.dtype or W.shape != (B.shape[0], x.shape[1]) or W.device != x.device:
                return False
            if _packed_scale(m, x.dtype) != m.scale:
                return False
            sizes += [W.stride(0), W.shape[0], A.shape[0], B.shape[1]]
            if W.stride(1) != 1 or W.stride(0) < W.shape[1] or not B.shape[1]:
                return False
        return not any(size % 8 for size in sizes)

    def sum(self, d: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Product:
        """The gradient of x (T, d_in) as one sum over pairs (dy, W), d (T, ranks) and [A; rows]."""
        strides = tuple((dy.stride(0), W.stride(0), W.shape[0]) for dy, W in pairs)
        found = self._sums.get(strides)
        if found is None:
            dys, Ws, widths = zip(*strides, strict=True) if strides else ((), (), ())
            found = self._sums[strides] = Product(
                (self.T, self.d), (*widths, self.ranks),
                (self.d, (*dys, self.ranks), (*Ws, self.d)), turned=False, bias=False,
                device=d.device,
            )  # fmt: skip
        return found

    def spread(self, sd: int) -> Launch:
        """d [A; rows] as a gradient of x."""
        if sd not in self._spread:
            gain = 1 / (1 - self.call.dropout)
            self._spread[sd] = launch.write(
                self.T, self.d, self.ranks, (self.d, self.d, sd, self.d, 1), gain, self.dtype,
                dropout=self.call.dropout, seeded=self.seeded,
            )  # fmt: skip
        return self._spread[sd]

    def keys(self, K: int, sd: int) -> Launch:
        """The gradient of K rows of [A; rows] from d with rows sd apart."""
        if (K, sd) not in self._keys:
            gain = 1 / (1 - self.call.dropout)
            self._keys[K, sd] = launch.outer(
                self.T, self.d, K, (self.sx, sd, 1, self.d), gain, self.dtype,
                dropout=self.call.dropout, seeded=self.seeded,
            )  # fmt: skip
        return self._keys[K, sd]


def plan_of(call: Call, x: Tensor, given: Given, mask: bool, seeded: bool) -> Plan:
    """The plan of a call, made at its first time."""
    key: list[Any] = [call, x.shape, x.stride(0), x.dtype, mask, seeded, launch.precision(x.dtype)]
    places = x.data_ptr()
    for i in range(0, len(given), WIDTH):
        base, bias, A, rows, B, gate, balance, row_scale = given[i : i + WIDTH]
        key += (A.shape[0], A.stride(), A.dtype, B.shape, B.stride(), B.dtype)
        key += [None if t is None else t.dtype for t in (bias, balance, row_scale)]
        if rows is not None:
            key += (rows.stride(), rows.dtype)
        if gate is not None:
            key.append(gate.dtype)
        if call.owned:
            places |= base.data_ptr()
            key += (base.stride(), base.shape, base.dtype, base.get_device())
        elif base is not None:
            key += (base.dtype, _row(base))
    key += (x.get_device(), aligned := not places & 15)
    found = _PLANS.get(known := tuple(key))
    if found is None:
        if len(_PLANS) >= _MOST:
            _PLANS.clear()
        found = _PLANS[known] = Plan(call, x, given, mask, seeded, aligned=aligned)
    return found
