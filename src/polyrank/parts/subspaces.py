"""A weight as protected and free singular directions: decomposed, started from, kept apart.

W = U diag(S) V, thin, S descending; the leading k triplets (h, high) are protected, the m − k
others (0, the tail) are free, m = min(d_out, d_in). Whatever trains, U_hᵀ ΔW = 0 and ΔW V_hᵀ = 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyrank.errors import ConfigError
from polyrank.frame import Adapter, Core, Flow, Init, Layer, Site
from polyrank.layers.precision import exact
from polyrank.layers.views import wide

REACHES = ("range", "all")
# The roles that train in each parametrisation.
TRAINED = {
    "factors": frozenset({"A", "B", "core"}),
    "core": frozenset({"core"}),
    "block": frozenset({"A"}),
}
# Why `layers.absorb` alone would not do: it keeps the number of protected directions, and forgets
# which ones they were.
NESTED = (
    "what is protected stays from task to task, which a plain split of the new weight would "
    "forget; call polyrank.end_task"
)
MOVING = (
    "how much is protected changes from task to task, where absorb alone keeps it; call "
    "polyrank.end_task"
)
DRIVERS = ("auto", "gram", "svd", "gesvd", "gesvdj", "gesvda")


def decompose(W: Tensor, driver: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Return (U (o, m), S (m,), V (m, i)), thin and descending, in fp32, in fp64 if W is.

    Args:
        W: (o, i), finite.
        driver: "gram", eigenvectors of the smaller Gram matrix in fp64 and one QR, which keeps both
            sides orthonormal to the last digit of fp32 and the smallest singular values better than
            a decomposition in fp32 would; "svd", torch's in the dtype of W; "auto", the first below
            fp64 and the second there; or a driver of CUDA.
    """
    if driver not in DRIVERS:
        raise ConfigError(f"driver: got {driver!r}, expected one of {', '.join(DRIVERS)}")
    W = wide(W)
    if driver == "gram" or (driver == "auto" and W.dtype == torch.float32):
        if W.shape[0] < W.shape[1]:
            U, S, V = _by_gram(W.mT)
            return V.mT.contiguous(), S, U.mT.contiguous()
        return _by_gram(W)
    word = None if driver in ("auto", "svd") else driver
    # What is tall goes through a square factor, of which there is less to rotate.
    tall = W if W.shape[0] >= W.shape[1] else W.mT
    Q, R = torch.linalg.qr(tall)
    U, S, V = torch.linalg.svd(R, full_matrices=False, driver=word)
    U = Q @ U
    return (U, S, V) if tall is W else (V.mT.contiguous(), S, U.mT.contiguous())


def _by_gram(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose W (o, i), o >= i: WᵀW = Vᵀ S² V, and W Vᵀ = U S by a QR."""
    D = W.double()
    _, V = torch.linalg.eigh(D.mT @ D)
    V = V.flip(-1)
    U, R = torch.linalg.qr(D @ V)
    S = R.diagonal()
    sign = torch.where(S < 0, -1.0, 1.0).to(S)
    U, S = U * sign, S * sign
    order = S.argsort(descending=True, stable=True)
    U, S, V = U[:, order], S[order], V[:, order].mT.contiguous()
    return U.to(W.dtype), S.to(W.dtype), V.to(W.dtype)


class Split(NamedTuple):
    """Sizes of a weight's parts: k protected triplets and r free ones, k + r = m."""

    d_out: int
    d_in: int
    k: int
    r: int

    @classmethod
    def of(cls, site: Site) -> Split:
        """Return the parts at a site with r live ranks."""
        return cls(site.d_out, site.d_in, min(site.d_out, site.d_in) - site.r, site.r)

    def inner(self, reach: str) -> tuple[int, int]:
        """Return (rows, columns) of R: the tail alone, "range", or "all" that is not protected."""
        o, i, k, r = self
        return (r, r) if reach == "range" else (o - k, i - k)

    @property
    def holds_u(self) -> bool:
        """Whether U_h is kept: where U is not square, or U_h the smaller one."""
        return self.d_out > self.d_in or self.k < self.r

    @property
    def holds_v(self) -> bool:
        """Whether V_h is kept."""
        return self.d_in > self.d_out or self.k < self.r


class Protecting(Core):
    """Keeps the protected directions that its layer's rule projects with, frozen and saved.

    Where a side is square, I − U_h U_hᵀ = U_0 U_0ᵀ, and the tail that is subtracted serves as well.
    """

    frozen = frozenset({"high_u", "high_v"})
    high_u: nn.Parameter | None
    high_v: nn.Parameter | None

    def __init__(self, split: Split, *, both: bool = False) -> None:
        super().__init__()
        self.split, self.bank, self.owns = split, 0, split.k > 0
        o, i, k, _ = split
        for name, shape, held in (
            ("high_u", (o, k), both or split.holds_u),
            ("high_v", (k, i), both or split.holds_v),
        ):
            made = nn.Parameter(torch.zeros(shape), requires_grad=False) if held and k else None
            self.register_parameter(name, made)

    def banked(self, ranks: int) -> None:
        """Frozen ranks pass unweighed."""
        self.bank = ranks

    def protect(self, U: Tensor, V: Tensor) -> None:
        """Keep what is needed of U_h (o, k) and V_h (k, i)."""
        for param, value in ((self.high_u, U), (self.high_v, V)):
            if param is not None:
                param.copy_(value)


class Tail(Protecting):
    """φ(h) = S ⊙ h between V_l and U_l: the trained tail of the weight itself."""

    gates = frozenset({"weight"})
    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {"weight": ("rank",)}

    def __init__(self, split: Split, *, both: bool = False) -> None:
        super().__init__(split, both=both)
        self.widths = (split.r, split.r)
        self.weight = nn.Parameter(torch.empty(split.r))

    def fill(self, rng: torch.Generator) -> None:
        """Write zeros, until a start knows better."""
        self.weight.zero_()

    def _all(self) -> Tensor:
        if not self.bank:
            return self.weight
        return torch.cat([self.weight.new_ones(self.bank), self.weight])

    def forward(self, h: Tensor, z: Tensor | None, flow: Flow) -> Tensor:
        """Return S ⊙ h."""
        # The product's order is that of what is subtracted, so that equal factors cancel exactly.
        return h * self._all().to(h.dtype)

    def apart(
        self, x: Tensor, A: Tensor, B: Tensor, shadow: tuple[Tensor, Tensor, Tensor | None]
    ) -> Tensor | None:
        """Return (B S − B_0 S_0) A x + B_0 S_0 (A − A_0) x where x is below fp32.

        Both products are as large as the update, where B S A x is as large as the tail, of whose
        rounding in bf16 little of an update is left.
        """
        A0, B0, S0 = shadow
        if self.bank or S0 is None or x.dtype not in (torch.bfloat16, torch.float16):
            return None
        before = wide(B0) * wide(S0)
        off = (wide(B) * wide(self.weight) - before).to(x.dtype)
        moved = F.linear(x, (wide(A) - wide(A0)).to(x.dtype))
        return F.linear(F.linear(x, A.to(x.dtype)), off) + F.linear(moved, before.to(x.dtype))

    def delta(self, condition: Tensor | None = None) -> Tensor:
        """Return diag(S), ones for the bank."""
        return torch.diag(self._all())


class Inner(Core):
    """φ(h) = R h with a free R (rows, columns), between frozen directions that are free to move in.

    Args:
        rows: of R, and columns of B.
        columns: of R, and rows of A.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.widths, self.bank, self.owns = (columns, rows), 0, True
        self.weight = nn.Parameter(torch.empty(rows, columns))

    def banked(self, ranks: int) -> None:
        """Frozen ranks pass unchanged."""
        self.bank = ranks

    def fill(self, rng: torch.Generator) -> None:
        """R = 0."""
        self.weight.zero_()

    def forward(self, h: Tensor, z: Tensor | None, flow: Flow) -> Tensor:
        """Return R h."""
        own = F.linear(h[..., self.bank :], self.weight.to(h.dtype))
        return torch.cat([h[..., : self.bank], own], -1) if self.bank else own

    def delta(self, condition: Tensor | None = None) -> Tensor:
        """Return R, behind an identity for the bank."""
        one = torch.eye(self.bank, dtype=self.weight.dtype, device=self.weight.device)
        return torch.block_diag(one, self.weight) if self.bank else self.weight


class Whole(Protecting):
    """y gains A x with A (d_out, d_in) free and B the identity: the whole weight trains.

    Args:
        split: k directions that a rule keeps A off; 0 for none.
    """

    def __init__(self, split: Split) -> None:
        super().__init__(split, both=True)
        self.widths = (split.d_out, split.d_out)

    def forward(self, h: Tensor, z: Tensor | None, flow: Flow) -> Tensor:
        """Return h."""
        return h

    def outcome(self, product: Any, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Return A x; the identity is multiplied by only behind a bank."""
        found: Tensor = product(x, A, B) if self.bank else F.linear(x, A.to(x.dtype))
        return found

    def delta(self, condition: Tensor | None = None) -> Tensor:
        """Return the identity, the bank's ranks included."""
        return torch.eye(self.bank + self.widths[0])


def core_of(parametrisation: str, site: Site, reach: str, *, both: bool = False) -> Core:
    """Return the core of one of `TRAINED`.

    Args:
        parametrisation: which one.
        site: where it sits.
        reach: of an inner one.
        both: whether a tail keeps what is protected on both sides, though it could do without.
    """
    split = Split.of(site)
    if both and not split.k:
        raise ConfigError(
            f"r at {site.path}: got {site.r}, all of its directions, of which a nested split has "
            f"none to protect; use at most {site.r - 1} in rank_pattern"
        )
    if parametrisation == "core":
        return Inner(*split.inner(reach))
    return Tail(split, both=both) if parametrisation == "factors" else Whole(split)


def trained_of(parametrisation: str, site: Site, reach: str) -> int:
    """Return how many weights train at a site."""
    split = Split.of(site)
    rows, columns = split.inner(reach)
    o, i, _, r = split
    return {"factors": r * (o + i + 1), "core": rows * columns, "block": o * i}[parametrisation]


def moved(adapter: Adapter) -> float:
    """Return the mean norm of R, or of what whole weights have gained."""
    norms = []
    for layer in adapter.layers:
        core = layer.core
        gained = core.weight if isinstance(core, Inner) else layer.A
        norms.append(torch.linalg.norm(gained.detach().float()).cpu())
    return float(torch.stack(norms).mean()) if norms else 0.0


class WholeStart(Init):
    """A = 0 and B the identity."""

    def fill(self, layer: Layer, stat: dict[str, Tensor] | None, rng: torch.Generator) -> None:
        """Write A and B."""
        layer.A.zero_()
        torch.nn.init.eye_(layer.B)


class SpectralStart(Init):
    """Writes the parts of W where they belong; the adapted model starts as the base.

    Args:
        driver: of `decompose`.
    """

    wants = frozenset({"weight"})

    def __init__(self, driver: str = "auto") -> None:
        self.driver = driver

    def unfit(self, site: Site) -> Iterator[str]:
        """Refuse more free directions than there are."""
        if site.r > (least := min(site.d_in, site.d_out)):
            yield (
                f"r at {site.path}: got {site.r}, expected at most {least}, its smaller width; use "
                "less in rank_pattern, or leave the layer out with exclude_modules"
            )

    def fill(self, layer: Layer, stat: dict[str, Tensor] | None, rng: torch.Generator) -> None:
        """Write A, B, the core and what is subtracted.

        Raises:
            ConfigError: if the weight is not finite.
        """
        assert stat is not None
        # Where the base lies, which the adapter may join only after this.
        W = stat["weight"]
        if not bool(W.isfinite().all()):
            raise ConfigError(
                f"base weight at {layer.site.path}: is not finite, and has no singular values; "
                "load the model again, or leave the layer out with exclude_modules"
            )
        core, k = layer.core, min(W.shape) - layer.site.r
        with exact(W.device.type):
            U, S, V = decompose(W, self.driver)
        if isinstance(core, Protecting):
            core.protect(U[:, :k], V[:k])
        if isinstance(core, Whole):
            WholeStart().fill(layer, stat, rng)
            return
        if isinstance(core, Inner):
            columns, rows = core.widths
            layer.A.copy_(_completed(V.mT, k, columns).mT)
            layer.B.copy_(_completed(U, k, rows))
            core.fill(rng)
            return
        _write_tail(layer, U[:, k:], S[k:], V[k:])


def _write_tail(layer: Layer, U: Tensor, S: Tensor, V: Tensor) -> None:
    """Let a tail begin as these r triplets."""
    core = cast("Tail", layer.core)
    layer.A.copy_(V)
    layer.B.copy_(U)
    core.weight.copy_(S)
    # What was written, so that a rounded factor is subtracted as it was rounded.
    layer.shadow = (layer.A, layer.B, core.weight)


@torch.no_grad()
def nest(layer: Layer, U: Tensor, V: Tensor) -> None:
    """Protect other directions than the leading ones of the weight, which has just been split.

    The tail is what the weight does off them, (I − U Uᵀ) W (I − Vᵀ V), in its r largest triplets.

    Args:
        layer: with a `Tail` that keeps both sides.
        U: (o, k), its columns independent; they are made orthonormal.
        V: (k, i), its rows likewise.
    """
    core, W = cast("Tail", layer.core), layer.weight().double()
    with exact(W.device.type):
        U, V = torch.linalg.qr(U.double())[0], torch.linalg.qr(V.double().mT)[0].mT
        rest = W - U @ (U.mT @ W)
        rest = rest - (rest @ V.mT) @ V
        L, S, R = decompose(rest)
        r = core.split.r
        L, R = _off_basis(U, L[:, :r]), _off_basis(V.mT, R[:r].mT).mT
    core.protect(U, V)
    _write_tail(layer, L, S[:r], R)


def _off_basis(Q: Tensor, P: Tensor) -> Tensor:
    """Return P (n, r) orthonormal, and off Q (n, k) too where singular values of it vanish."""
    full, R = torch.linalg.qr(torch.cat([Q, P], 1))
    sign = R.diagonal().sign()[Q.shape[1] :]
    return full[:, Q.shape[1] :] * torch.where(sign == 0, 1.0, sign)


def _completed(U: Tensor, k: int, count: int) -> Tensor:
    """Return `count` orthonormal columns off the first k of U (n, m): its own, then more."""
    if k + count <= U.shape[1]:
        return U[:, k : k + count]
    Q, _ = torch.linalg.qr(U, mode="complete")
    return torch.cat([U[:, k:], Q[:, U.shape[1] : k + count]], 1)
