"""Alternating projected gradients over pairs of factors: the update rule "altlora".

Legend: a pair is A (r, d), B (k, r) with W = W0 + s B A; autograd gives g_A = s Bᵀ G and
g_B = s G Aᵀ of the gradient G with respect to W. The step of B is that of A for the transposed
problem, so that below P (r, n) is the factor that moves, A or Bᵀ, and F (m, r) the one that stands,
B or Aᵀ; with a diagonal gate between them F is B diag(g) or Aᵀ diag(g).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from polyrank.errors import ConfigError, RunError
from polyrank.layers.precision import exact
from polyrank.parts.optimizer import build_optimizer, register_update
from polyrank.parts.pairs import DEFAULTS, Pair, active, group_problems, lora_groups, moves

# Above this rank the r × r algebra would be slow in fp64, and stays in fp32.
WIDE = 128
# Entries of one stacked factor at most, so that the copies stay small beside the model.
STACKED = 1 << 24


class Move(NamedTuple):
    """What one bucket of pairs of equal shape is about to do; h and the momentum (pairs, r, n)."""

    pairs: list[Pair]
    projected: Tensor
    momentum: Tensor | None
    failed: Tensor
    norm: Tensor | None


@register_update("altlora")
class Alternating(Optimizer):
    """AltLoRA and AltLoRA+: one factor of every pair moves per step, by the projected gradient.

    h = (1/s²) (FᵀF + λI)⁻¹ g, so that s F h is G projected on the columns of F for λ = 0;
    M ← β1 (FᵀF + λI)⁻¹ Fᵀ F_old M + (1 − β1) h, with F_old the F of the last time that P moved;
    P ← P − η (M + γ P), or with `plus` P − η (M / (√V + ε) + γ P), V ← β2 V + (1 − β2) h ∘ h.
    One Cholesky factorisation and one solve serve all pairs of a shape; r × r in fp64 to r = 128.

    State of a factor: `momentum`, with `plus` `square`, and of the move of the other factor since
    then only `drift` = Fᵀ (F_old − F), (r, r); with `snapshots` F_old itself, as `anchor`.

    Args:
        groups: dicts with, beside what is in `DEFAULTS`,
            params: A and B of all pairs, in any order, fp32 or fp64.
            pairs: for each pair {"A": place in params, "B": place in params, "scale": s > 0,
                "name": for messages, "gated": whether a diagonal stands between the factors, told
                by `weigh`}.

    Raises:
        ConfigError: for pairs that do not fit, or options out of range.
    """

    # What a checkpoint must agree on, since momentum belongs to a pair, a phase and a subspace.
    fixed = frozenset({"pairs", "first", "switch_every", "joint", "released", "plus", "snapshots"})

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, dict(DEFAULTS))
        # By identity, which a copy of both keeps.
        self.gates: dict[Tensor, Tensor] = {}
        problems = [problem for group in self.param_groups for problem in group_problems(group)]
        if problems:
            raise ConfigError(problems)
        for group in self.param_groups:
            group.setdefault("base_lr", float(group["lr"]))

    def weigh(self, A: nn.Parameter, gate: Tensor) -> None:
        """Tell the diagonal (r,) that stands between A and its B; read anew at every step."""
        self.gates[A] = gate

    def __getstate__(self) -> dict[str, Any]:
        """Keep the gates in copies, beside what torch keeps."""
        return {**super().__getstate__(), "gates": self.gates}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move one factor of every pair, or with `joint` A and then B.

        Raises:
            RunError: if a factor has no gradient, with `joint` one that is not finite, or a Gram
                matrix cannot be factored; nothing has moved then, but that with `joint` A moves
                before the Gram matrix of B's step is known.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for entry in group["pairs"]:
                self._gate(group, entry)
            _check_gradients(group)
        for group in self.param_groups:
            with exact(group["params"][0].device.type):
                for side in active(group):
                    self._move(group, side)
                group["step"] += 1
                every = group["balance_every"]
                if every and group["step"] % every == 0:
                    self._balance(group)
        return loss

    def _gate(self, group: dict[str, Any], entry: dict[str, Any]) -> Tensor | None:
        """Return the diagonal between the factors of a pair, or None."""
        gate = self.gates.get(group["params"][entry["A"]]) if entry["gated"] else None
        if entry["gated"] and gate is None:
            raise RunError(
                f"altlora at {entry['name']}: nobody told the gate between the factors; train "
                "with polyrank.Trainer, or call polyrank.attach(optimizer, model)"
            )
        return gate

    def _pairs(self, group: dict[str, Any], side: str) -> Iterator[list[Pair]]:
        """Yield the pairs in buckets of equal shape."""
        other = "B" if side == "A" else "A"
        buckets: dict[Any, list[Pair]] = {}
        for entry in group["pairs"]:
            P, F = group["params"][entry[side]], group["params"][entry[other]]
            gate = self._gate(group, entry)
            key = (P.shape, F.shape, P.dtype, P.device, "momentum" in self.state[P])
            buckets.setdefault(key, []).append(Pair(P, F, entry["scale"], entry["name"], gate))
        for bucket in buckets.values():
            first = bucket[0]
            size = max(1, STACKED // max(first.moving.numel(), first.standing.numel()))
            yield from (bucket[n : n + size] for n in range(0, len(bucket), size))

    def _move(self, group: dict[str, Any], side: str) -> None:
        found = [self._solve(group, side, bucket) for bucket in self._pairs(group, side)]
        if not found:
            return
        # Layers may stand on several devices.
        device = found[0].failed.device
        # Once for the whole model: asking waits for all work of an accelerator.
        if bool(torch.stack([move.failed.any().to(device) for move in found]).any()):
            raise _failure(found, side, group["damping"])
        factor: Tensor | None = None
        if group["clip"]:
            norms = [move.norm.to(device) for move in found if move.norm is not None]
            total = torch.stack(norms).sum().sqrt()
            factor = (group["clip"] / total.clamp_min(1e-30)).clamp_max(1.0)
        for move in found:
            self._apply(group, side, move, factor)

    def _solve(self, group: dict[str, Any], side: str, pairs: list[Pair]) -> Move:
        """Return the projected gradients and the transported momenta of a bucket."""
        right, P = side == "B", pairs[0].moving
        r, narrow = P.shape[1 if right else 0], P.dtype
        dtype = _work(P, r)
        F = _standing(pairs, right, dtype)
        S = F.mT @ F
        ridge = torch.full((len(pairs), 1), group["damping"], dtype=dtype, device=F.device)
        if group["relative"]:
            ridge = ridge * S.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
        L, info = torch.linalg.cholesky_ex(S + torch.diag_embed(ridge.expand(-1, r)))
        failed = info != 0
        if not group["damping"]:
            pivots = L.diagonal(dim1=-2, dim2=-1)
            least = pivots.amin(-1) ** 2 / pivots.amax(-1) ** 2
            # Not greater rather than smaller, so that NaN fails too.
            failed |= ~(least > r * torch.finfo(dtype).eps)
        # (r, r) in the wide dtype; a solve for each of n columns would be slower than products.
        K = torch.cholesky_solve(torch.eye(r, dtype=dtype, device=F.device).expand_as(L), L)
        s2 = torch.tensor([pair.scale**2 for pair in pairs], dtype=dtype, device=F.device)
        inner = K if group["released"] else K / s2[:, None, None]
        h = inner.to(narrow) @ _stack([pair.moving.grad for pair in pairs], right, narrow)
        carried = self._carried(group, pairs, F, S, right)
        M = None
        if carried is not None:
            M = _stack([self.state[pair.moving]["momentum"] for pair in pairs], right, narrow)
            M = (K @ carried).to(narrow) @ M
            failed |= ~M.isfinite().flatten(1).all(1)
        failed |= ~h.isfinite().flatten(1).all(1)
        norm = None
        if group["clip"]:
            norm = (s2.to(narrow) * (h * (S.to(narrow) @ h)).sum((-2, -1))).sum()
        return Move(pairs, h, M, failed, norm)

    def _carried(
        self, group: dict[str, Any], pairs: list[Pair], F: Tensor, S: Tensor, right: bool
    ) -> Tensor | None:
        """Return Fᵀ F_old (pairs, r, r), or None before the first move."""
        states = [self.state[pair.moving] for pair in pairs]
        if "momentum" not in states[0]:
            return None
        if group["snapshots"]:
            return F.mT @ _stack([state["anchor"] for state in states], right, F.dtype)
        if "drift" not in states[0]:
            return S
        # FᵀF_old = FᵀF + Fᵀ(F_old − F): what is rounded to fp32 is only the small second term.
        return S + _stack([state["drift"] for state in states], False, F.dtype)

    def _apply(self, group: dict[str, Any], side: str, move: Move, factor: Tensor | None) -> None:
        """Mix, step, and keep what the next transports need."""
        pairs, right = move.pairs, side == "B"
        beta: float = group["beta1"]
        P: list[Tensor] = [pair.moving for pair in pairs]
        states = [self.state[p] for p in P]
        h = move.projected if factor is None else move.projected * factor.to(P[0])
        M = (1 - beta) * h
        kept = M = M if move.momentum is None else M + beta * move.momentum
        if group["released"] and group["plus"] and move.momentum is not None:
            kept = beta * _stack([s["momentum"] for s in states], right, h.dtype) + (1 - beta) * h
        step = M
        if group["plus"]:
            V = (1 - group["beta2"]) * h.square()
            if "square" in states[0]:
                V = V + group["beta2"] * _stack([s["square"] for s in states], right, h.dtype)
            _keep(states, "square", V, right)
            step = M / (V.sqrt() + group["eps"])
        _keep(states, "momentum", kept, right)
        old = _stack(P, right, h.dtype)
        new = self._stepped(group, side, old, step)
        torch._foreach_copy_(P, list((new.mT if right else new).unbind()))
        if group["snapshots"]:
            for pair, state in zip(pairs, states, strict=True):
                F = pair.standing.detach().clone() if pair.gate is None else _gated(pair, right)
                state["anchor"] = F
            return
        for state in states:
            state.pop("drift", None)
        if "momentum" in self.state[pairs[0].standing]:
            wide = _work(P[0], new.shape[1])
            drifts = new.to(wide) @ (old - new).to(wide).mT
            for pair, drift in zip(pairs, drifts.to(h.dtype).unbind(), strict=True):
                self.state[pair.standing]["drift"] = drift.clone()

    def _stepped(self, group: dict[str, Any], side: str, old: Tensor, step: Tensor) -> Tensor:
        lr, decay = float(group["lr"]), group["weight_decay"]
        if group["released"]:
            # The rate that it began with, whatever a scheduler says, and decay after the step.
            lr = group.get("base_lr", lr)
        rate = lr
        if group["bias_correction"] or group["released"]:
            rate = lr / (1 - group["beta1"] ** (moves(group, side) + 1))
        if group["released"]:
            return (old - rate * step) * (1 - lr * decay)
        return old - rate * step - lr * decay * old if decay else old - rate * step

    def _balance(self, group: dict[str, Any]) -> None:
        """A ← c A, B ← B / c with c² near ‖B‖ / ‖A‖; powers of two, so that B A keeps its bits."""
        entries = group["pairs"]
        A = [group["params"][entry["A"]] for entry in entries]
        B = [group["params"][entry["B"]] for entry in entries]
        ratio = [b / a for a, b in zip(torch._foreach_norm(A), torch._foreach_norm(B), strict=True)]
        for a, b, q in zip(A, B, ratio, strict=True):
            c = torch.exp2((q.log2() / 2).round())
            c = torch.where(c.isfinite() & (c > 0), c, 1.0)
            for p, f in ((a, c), (b, 1 / c)):
                p.mul_(f)
                powers = {"momentum": f, "square": f * f, "drift": 1 / (f * f), "anchor": 1 / f}
                for name, value in self.state[p].items():
                    value.mul_(powers[name])


def _work(P: Tensor, r: int) -> torch.dtype:
    """Return the precision of the r × r algebra."""
    narrow = r > WIDE or P.device.type == "mps"
    return torch.float32 if narrow and P.dtype == torch.float32 else torch.float64


def _stack(tensors: Iterable[Any], right: bool, dtype: torch.dtype) -> Tensor:
    """Return tensors of equal shape as one, transposed if they belong to the right factor."""
    found = torch.stack(list(tensors)).to(dtype)
    return found.mT if right else found


def _gated(pair: Pair, right: bool) -> Tensor:
    """Return the standing factor with the diagonal, in its own orientation."""
    gate = torch.as_tensor(pair.gate).detach().to(pair.standing)
    return pair.standing.detach() * (gate[:, None] if right else gate)


def _standing(pairs: list[Pair], right: bool, dtype: torch.dtype) -> Tensor:
    factors = [p.standing.detach() if p.gate is None else _gated(p, right) for p in pairs]
    return _stack(factors, right, dtype)


def _keep(states: list[dict[str, Any]], name: str, value: Tensor, right: bool) -> None:
    """Write one kind of state of a bucket, in the shapes of the parameters."""
    parts = (value.mT if right else value).unbind()
    if name in states[0]:
        torch._foreach_copy_([state[name] for state in states], list(parts))
        return
    for state, part in zip(states, parts, strict=True):
        state[name] = part.clone(memory_format=torch.contiguous_format)


def _check_gradients(group: dict[str, Any]) -> None:
    """Refuse gradients that are of no use before any factor of the model moves.

    Raises:
        RunError: naming the first one.
    """
    sides = active(group)
    for side in sides:
        for entry in group["pairs"]:
            _check_gradient(group["params"][entry[side]], entry["name"], side)
    if len(sides) < 2:
        # The solutions are looked at before the one factor moves.
        return
    device = group["params"][0].device
    finite = [p.grad.isfinite().all().to(device) for p in group["params"]]
    # Once for all: asking waits for all work of an accelerator.
    if bool(torch.stack(finite).all()):
        return
    for side in sides:
        for entry in group["pairs"]:
            if not group["params"][entry[side]].grad.isfinite().all():
                raise RunError(
                    f"altlora at {entry['name']}: the gradient of {side} or the other factor is "
                    "not finite; lower the learning rate, or set clip"
                )


def _check_gradient(P: nn.Parameter, name: str, side: str) -> None:
    if P.grad is None:
        raise RunError(
            f"altlora at {name}: {side} is to move and has no gradient; every adapted layer must "
            "take part in every update: leave unused modules out of target_modules"
        )
    if P.grad.is_sparse:
        raise RunError(f"altlora at {name}: got a sparse gradient of {side}, expected a dense one")


def _failure(found: list[Move], side: str, damping: float) -> RunError:
    """Say which pair could not be solved, and how close to singular it is."""
    for move in found:
        for pair, bad in zip(move.pairs, move.failed.tolist(), strict=True):
            if not bad:
                continue
            F = _standing([pair], side == "B", torch.float64)[0]
            grad = pair.moving.grad
            if not F.isfinite().all() or grad is None or not grad.isfinite().all():
                return RunError(
                    f"altlora at {pair.name}: the gradient of {side} or the other factor is not "
                    "finite; lower the learning rate, or set clip"
                )
            other = "B" if side == "A" else "A"
            # That of zero comes as NaN.
            condition = float(torch.linalg.cond(F.mT @ F).nan_to_num(torch.inf))
            return RunError(
                f"altlora at {pair.name}: the Gram matrix of {other} has condition number "
                f"{condition:.3g} and cannot be inverted with damping={damping:g}; use "
                'damping=1e-6, and first="B" where B begins at zero'
            )
    raise AssertionError("no pair failed")


def altlora_optimizer(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    *,
    kind: type[Optimizer] = torch.optim.AdamW,
    adapter: str | None = None,
    **options: Any,
) -> Optimizer:
    """Return AltLoRA over the factors of PEFT's own LoRA, and `kind` over all else that trains.

    Clip with `clip=` and not by the norm of gradients, in which the factor that stands still
    counts. A model of polyrank takes `polyrank.method("altlora")` and `polyrank.optimizer`.

    Args:
        model: made by `peft.get_peft_model` with a `peft.LoraConfig`.
        lr: rate of all groups.
        weight_decay: of factors and of other matrices; vectors are never decayed.
        kind: the optimiser of embeddings, convolutions, DoRA's magnitudes, heads and the like.
        adapter: its name; None is the active one.
        **options: as `polyrank.method("altlora")` has them: plus, beta1, damping …

    Raises:
        ConfigError: if the model has no such LoRA, or an option is wrong.

    >>> optimizer = polyrank.altlora_optimizer(peft_model, lr=1e-3, plus=True)  # doctest: +SKIP
    """
    groups = lora_groups(model, lr, weight_decay, adapter, options)
    return build_optimizer(groups, kind, {})
