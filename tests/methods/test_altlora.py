"""altlora: what a step is, against projections and against the formulas written out."""

import pytest
import torch
from torch import nn

from polyrank.errors import ConfigError, RunError
from polyrank.frame import keyed
from polyrank.parts.alternating import Alternating
from polyrank.testing import assert_close

K, D, R, S = 9, 7, 3, 0.7


def draw(*shape, key=0, dtype=torch.float64):
    return torch.randn(*shape, generator=keyed("altlora", key, *shape), dtype=dtype)


class Toy:
    """½ ‖s B A − T‖² over some pairs: G = s B A − T at each."""

    def __init__(self, count=1, r=R, k=K, d=D, s=S, dtype=torch.float64, A=None, B=None, **options):
        self.A = [draw(r, d, key=n, dtype=dtype) if A is None else A.clone() for n in range(count)]
        self.B = [draw(k, r, key=n, dtype=dtype) if B is None else B.clone() for n in range(count)]
        self.A, self.B = ([nn.Parameter(p) for p in side] for side in (self.A, self.B))
        self.T = [draw(k, d, key=50 + n, dtype=dtype) for n in range(count)]
        self.s = s
        # Not A beside its B: pairs are what is said, not what stands together.
        params = [*self.B, *self.A]
        pairs = [
            {"A": count + n, "B": n, "scale": s, "name": f"layer-{n}", "gated": False}
            for n in range(count)
        ]
        group = {"lr": 0.1, "damping": 0.0, "first": "A", **options}
        self.optimizer = Alternating([{"params": params, "pairs": pairs, **group}])

    @property
    def group(self):
        return self.optimizer.param_groups[0]

    def G(self, n=0):
        return self.s * self.B[n].detach() @ self.A[n].detach() - self.T[n]

    def fill(self):
        for n, (A, B) in enumerate(zip(self.A, self.B, strict=True)):
            A.grad = self.s * B.detach().T @ self.G(n)
            B.grad = self.s * self.G(n) @ A.detach().T

    def step(self, count=1):
        for _ in range(count):
            self.fill()
            self.optimizer.step()
        return self

    def factors(self, n=0):
        return self.A[n].detach().clone(), self.B[n].detach().clone()

    def W(self, n=0):
        return self.s * self.B[n].detach() @ self.A[n].detach()


def projector(F):
    """Onto the columns of F."""
    return F @ torch.linalg.pinv(F)


def inverse(F, damping):
    eye = torch.eye(F.shape[1], dtype=F.dtype)
    return torch.linalg.inv(F.T @ F + damping * eye)


def projected(side, **options):
    """The factors before a first step, and the direction h that the step took."""
    toy = Toy(first=side, beta1=0.0, lr=1.0, **options)
    A, B = toy.factors()
    G = toy.G()
    toy.step()
    after = toy.factors()
    return A, B, G, (A - after[0] if side == "A" else B - after[1])


def test_altlora_1_a_step_moves_w_by_the_projected_gradient():
    A, B, G, h = projected("A")
    assert_close(S * B @ h, projector(B) @ G)
    A, B, G, h = projected("B")
    assert_close(S * h @ A, G @ projector(A.T))


def test_altlora_2_no_other_step_of_the_factor_comes_closer_to_the_gradient():
    _, B, G, h = projected("A")
    least = (S * B @ h - G).square().sum()
    for n in range(20):
        other = h + 1e-3 * draw(R, D, key=n)
        assert (S * B @ other - G).square().sum() > least


def test_altlora_2_damping_is_a_ridge_on_the_step():
    _, B, G, h = projected("A", damping=0.3)
    X = h.clone().requires_grad_()
    ridge = (S * B @ X - G).square().sum() + S**2 * 0.3 * X.square().sum()
    (slope,) = torch.autograd.grad(ridge, X)
    assert float(slope.abs().max()) < 1e-12 * float(G.abs().max())
    _, B, G, h = projected("A", damping=0.3, relative=True)
    mean = float((B.T @ B).trace()) / R
    assert_close(h, inverse(B, 0.3 * mean) @ B.T @ G / S)


def transported(move):
    """M and B before, M~ and B after B took the step `move` (k, r); A's gradient then is zero."""
    toy = Toy(beta1=0.5, lr=1.0).step()
    (A,), (B,) = toy.A, toy.B
    M, old = toy.optimizer.state[A]["momentum"].clone(), B.detach().clone()
    # The first step of B is (1 − β1) h, h = g (A Aᵀ)⁻¹ / s².
    B.grad = 2 * S**2 * move(old) @ A.detach() @ A.detach().T
    toy.optimizer.step()
    A.grad = torch.zeros_like(A)
    toy.optimizer.step()
    return M, old, toy.optimizer.state[A]["momentum"] / 0.5, B.detach().clone()


def test_altlora_3_momentum_is_projected_on_the_new_subspace():
    M, old, now, new = transported(lambda B: 0.3 * draw(K, R, key=9))
    assert not torch.allclose(old, new)
    assert_close(new @ now, projector(new) @ old @ M, tol=1e-9, reason="as the derivation states")


def test_altlora_3_momentum_stays_where_the_subspace_does():
    M, old, now, new = transported(torch.zeros_like)
    assert torch.equal(old, new)
    assert_close(now, M, tol=1e-9, reason="a solve and a product with the same Gram matrix")
    T = torch.eye(R, dtype=torch.float64) + 0.3 * draw(R, R, key=4)
    M, old, now, new = transported(lambda B: B - B @ T)
    assert_close(new, old @ T)
    assert_close(new @ now, old @ M, tol=1e-9, reason="two solves in a row")


def turned(T, **options):
    """W, A and B of a run, and of one from (T A, B T⁻¹)."""
    options = {"beta1": 0.9, "weight_decay": 0.05, "lr": 0.1, **options}
    one = Toy(**options)
    two = Toy(A=T @ one.A[0].detach(), B=one.B[0].detach() @ torch.linalg.inv(T), **options)
    one.step(8)
    two.step(8)
    return one, two


GENERIC = torch.eye(R, dtype=torch.float64) + 0.5 * draw(R, R, key=3)
SIGNED = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]]).double()


@pytest.mark.parametrize("first", ["A", "B"])
def test_altlora_4_a_run_does_not_depend_on_the_factorisation(first):
    one, two = turned(GENERIC, first=first)
    reason = "eight steps of rounding in two bases"
    assert_close(two.W(), one.W(), tol=1e-9, reason=reason)
    assert_close(two.A[0], GENERIC @ one.A[0].detach(), tol=1e-9, reason=reason)
    M = one.optimizer.state[one.A[0]]["momentum"]
    assert_close(two.optimizer.state[two.A[0]]["momentum"], GENERIC @ M, tol=1e-9, reason=reason)


def test_altlora_4_damping_and_the_plus_form_do_depend_on_it():
    for options in ({"plus": True}, {"damping": 0.5}):
        one, two = turned(GENERIC, **options)
        assert float((one.W() - two.W()).abs().max()) > 1e-3
    one, two = turned(SIGNED, plus=True)
    assert_close(two.W(), one.W(), tol=1e-9, reason="eight steps of rounding in two bases")
    assert_close(two.A[0], SIGNED @ one.A[0].detach(), tol=1e-9, reason="as above")


def test_altlora_4_clipping_the_projected_norm_keeps_the_invariance_and_the_gradient_norm_not():
    one, two = turned(GENERIC, clip=0.5)
    assert_close(two.W(), one.W(), tol=1e-9, reason="eight steps of rounding in two bases")
    ends = []
    for T in (torch.eye(R, dtype=torch.float64), GENERIC):
        toy = Toy()
        toy = Toy(A=T @ toy.A[0].detach(), B=toy.B[0].detach() @ torch.linalg.inv(T))
        for _ in range(4):
            toy.fill()
            nn.utils.clip_grad_norm_([*toy.A, *toy.B], 5.0)
            toy.optimizer.step()
        ends.append(toy.W())
    assert float((ends[0] - ends[1]).abs().max()) > 1e-4


def test_altlora_clip_bounds_the_step_of_w_over_all_layers():
    free, tight = (Toy(2, beta1=0.0, lr=1.0, clip=clip) for clip in (1e9, 0.5))
    starts = [free.W(n) for n in range(2)]
    steps = [[t.W(n) - starts[n] for n in range(2)] for t in (free.step(), tight.step())]
    norms = [sum(float(w.square().sum()) for w in found) ** 0.5 for found in steps]
    assert norms[0] > 1
    assert_close(norms[1], 0.5)
    for n in range(2):
        assert_close(steps[1][n], steps[0][n] * 0.5 / norms[0])


def test_altlora_5_the_step_of_w_depends_on_a_subspace_and_the_gradient_alone():
    B, G = draw(K, R), draw(K, D, key=8)
    found = []
    for s, scale, A in (
        (0.7, 1.0, draw(R, D)),
        (3.0, 1.0, draw(R, D)),
        (0.7, 50.0, draw(R, D, key=2)),
    ):
        toy = Toy(s=s, B=scale * B, A=A, beta1=0.0, lr=0.1)
        toy.A[0].grad = s * scale * B.T @ G
        before = toy.W()
        toy.optimizer.step()
        found.append(toy.W() - before)
    for step in found:
        assert_close(
            step, -0.1 * projector(B) @ G, tol=1e-9, reason="differences of larger numbers"
        )


def test_altlora_6_at_b_zero_a_cannot_move_and_b_can():
    toy = Toy(B=torch.zeros(K, R, dtype=torch.float64), damping=1e-6)
    A, _ = toy.factors()
    toy.step()
    assert torch.equal(toy.A[0].detach(), A)
    h = toy.G() @ A.T @ inverse(A.T, 1e-6) / S
    toy.step()
    assert_close(toy.B[0], -0.1 * (1 - 0.9) * h)


def test_altlora_7_one_factor_moves_at_a_time():
    for first, span in (("A", 1), ("B", 1), ("A", 2)):
        toy = Toy(first=first, switch_every=span)
        moved = ""
        for _ in range(4):
            A, B = toy.factors()
            toy.step()
            after = toy.factors()
            moved += "".join(
                name
                for name, x, y in zip("AB", (A, B), after, strict=True)
                if not torch.equal(x, y)
            )
        other = "B" if first == "A" else "A"
        assert moved == (first + other) * 2 if span == 1 else first * 2 + other * 2


def test_altlora_11_a_single_rank():
    toy = Toy(r=1, beta1=0.0, lr=1.0, damping=0.2)
    A, B = toy.factors()
    G = toy.G()
    toy.step()
    assert_close(A - toy.A[0].detach(), S * B.T @ G / (S**2 * (B.square().sum() + 0.2)))


def test_altlora_12_one_step_solves_a_quadratic_in_its_factor():
    toy = Toy(beta1=0.0, lr=1.0)
    best = torch.linalg.lstsq(S * toy.B[0].detach(), toy.T[0]).solution
    toy.step()
    assert_close(toy.A[0], best)


def plainly(toy, steps, *, plus, snapshots_of=1):
    """The algorithm as it is written: snapshots, two solves, one pair, fp64."""
    A, B = toy.factors()
    group, s = toy.group, toy.s
    b1, b2, lam, eta = group["beta1"], group["beta2"], group["damping"], group["lr"]
    M, V, old = {}, {}, {}
    for t in range(steps):
        G = s * B @ A - toy.T[0]
        side = "AB"[(t // snapshots_of) % 2]
        F, g = (B, s * B.T @ G) if side == "A" else (A.T, (s * G @ A.T).T)
        P = inverse(F, lam)
        h = P @ g / s**2
        M[side] = (1 - b1) * h + (b1 * P @ F.T @ old[side] @ M[side] if side in M else 0)
        old[side] = F.clone()
        step = M[side]
        if plus:
            V[side] = (1 - b2) * h**2 + b2 * V.get(side, 0)
            step = M[side] / (V[side].sqrt() + group["eps"])
        decay = group["weight_decay"]
        if side == "A":
            A = A - eta * (step + decay * A)
        else:
            B = B - eta * (step.T + decay * B)
    return A, B


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("span", [1, 3])
def test_altlora_9_the_formulas_written_out(plus, span):
    options = {"weight_decay": 0.1, "damping": 1e-3, "plus": plus, "eps": 1e-4, "lr": 0.05}
    toy = Toy(switch_every=span, snapshots=span > 1, **options)
    A, B = plainly(toy, 12, plus=plus, snapshots_of=span)
    toy.step(12)
    assert_close(toy.A[0], A)
    assert_close(toy.B[0], B)


def test_altlora_9_what_is_kept_of_the_last_subspace_makes_no_difference():
    ends = [Toy(snapshots=kept, damping=1e-4, weight_decay=0.1).step(10) for kept in (False, True)]
    assert_close(ends[0].A[0], ends[1].A[0])
    assert_close(ends[0].B[0], ends[1].B[0])
    assert {"drift", "anchor"} == {
        name for toy in ends for name in toy.optimizer.state[toy.A[0]] if name != "momentum"
    }
    size = sum(v.numel() for state in ends[0].optimizer.state.values() for v in state.values())
    assert size <= R * (K + D) + 2 * R * R


def released(toy, steps, *, plus):
    """What the released optimisers do with a pair, inverse and all."""
    A, B = toy.factors()
    group, s = toy.group, toy.s
    b1, b2, lam, lr = group["beta1"], group["beta2"], group["damping"], group["base_lr"]
    M = {"A": torch.zeros_like(A), "B": torch.zeros_like(B.T)}
    V = {side: torch.zeros_like(m) for side, m in M.items()}
    old = {"A": torch.zeros_like(B), "B": torch.zeros_like(A.T)}
    for t in range(1, steps + 1):
        G = s * B @ A - toy.T[0]
        grads = {"A": s * B.T @ G, "B": (s * G @ A.T).T}
        for side in "AB":
            F = B if side == "A" else A.T
            P = inverse(F, lam)
            h = P @ grads[side]
            step = b1 * P @ F.T @ old[side] @ M[side] + (1 - b1) * h
            M[side] = b1 * M[side] + (1 - b1) * h if plus else step
            old[side] = F.clone()
            if plus:
                V[side] = b2 * V[side] + (1 - b2) * h**2
                step = step / (V[side].sqrt() + group["eps"])
            moved = (A if side == "A" else B.T) - lr / (1 - b1**t) * step
            moved = moved - lr * group["weight_decay"] * moved
            A, B = (moved, B) if side == "A" else (A, moved.T)
    return A, B


@pytest.mark.parametrize("plus", [False, True])
def test_altlora_9_the_released_form_on_request(plus):
    options = {"weight_decay": 0.1, "damping": 1e-3, "plus": plus, "eps": 1e-4, "lr": 0.05}
    toy = Toy(joint=True, released=True, **options)
    A, B = released(toy, 7, plus=plus)
    # The rate of that code stays, whatever a scheduler does.
    toy.group["lr"] = 0.0
    toy.step(7)
    assert_close(toy.A[0], A)
    assert_close(toy.B[0], B)


def test_altlora_9_joint_alone_is_both_steps_from_one_gradient_in_their_right_size():
    toy, alone = Toy(joint=True, beta1=0.0), Toy(beta1=0.0)
    A, B = toy.factors()
    G = toy.G()
    toy.step()
    alone.step()
    assert torch.equal(toy.A[0], alone.A[0])
    new = toy.A[0].detach()
    assert_close(toy.B[0], B - 0.1 * G @ A.T @ torch.linalg.inv(new @ new.T) / S)


def test_altlora_10_the_rate_of_the_group_is_the_rate():
    for plus in (False, True):
        toy = Toy(plus=plus, lr=0.1, weight_decay=0.1).step(3)
        toy.group["lr"] = 0.0
        before = toy.factors()
        toy.step(2)
        assert all(torch.equal(x, y) for x, y in zip(before, toy.factors(), strict=True))


def test_altlora_bias_correction_counts_the_moves_of_each_factor():
    toy = Toy(bias_correction=True, lr=0.1, switch_every=2)
    for moves in (1, 2):
        before = toy.factors()[0]
        toy.step()
        M = toy.optimizer.state[toy.A[0]]["momentum"]
        assert_close(
            before - toy.A[0].detach(), 0.1 / (1 - 0.9**moves) * M, tol=1e-9, reason="a difference"
        )
    before = toy.factors()[1]
    toy.step()
    M = toy.optimizer.state[toy.B[0]]["momentum"]
    assert_close(
        before - toy.B[0].detach(), M, tol=1e-9, reason="a difference; 0.1 / (1 − 0.9) = 1"
    )


def test_altlora_balancing_leaves_the_product_and_the_path_as_they_are():
    B = 1e-3 * draw(K, R)
    ends = {}
    for every in (0, 3):
        toy = Toy(B=B, balance_every=every, beta1=0.9).step(3)
        early = toy.W()
        toy.step(6)
        ends[every] = (early, toy.W(), float((toy.A[0].norm() / toy.B[0].norm()).detach()))
    assert torch.equal(ends[0][0], ends[3][0])
    assert_close(ends[3][1], ends[0][1], tol=1e-9, reason="six steps of rounding in two bases")
    assert ends[0][2] > 100
    assert 0.25 < ends[3][2] < 4


@pytest.mark.parametrize("first", ["A", "B"])
def test_altlora_many_pairs_of_several_shapes_move_as_each_alone(first, monkeypatch):
    monkeypatch.setattr("polyrank.parts.alternating.STACKED", 2 * K * R)
    whole = Toy(5, first=first, damping=1e-6).step(4)
    for n in range(5):
        alone = Toy(A=draw(R, D, key=n), B=draw(K, R, key=n), first=first, damping=1e-6)
        alone.T = [whole.T[n]]
        alone.step(4)
        assert_close(whole.A[n], alone.A[0])
        assert_close(whole.B[n], alone.B[0])


@pytest.mark.parametrize("r", [R, 130])
def test_altlora_single_precision_follows_double_also_beyond_the_widest_rank(r):
    A, B = draw(r, 380, dtype=torch.float32), draw(400, r, dtype=torch.float32)
    ends = []
    for dtype in (torch.float32, torch.float64):
        toy = Toy(r=r, k=400, d=380, A=A.to(dtype), B=B.to(dtype), dtype=dtype, weight_decay=0.1)
        toy.T = [draw(400, 380, dtype=torch.float32).to(dtype)]
        ends.append(toy.step(6).W())
    assert_close(ends[0], ends[1], dtype=torch.float32)


def test_altlora_a_wrong_group_names_all_that_is_wrong():
    with pytest.raises(ConfigError) as found:
        Toy(beta1=1.0, damping=-1.0, first="C", switch_every=0, s=0.0, dtype=torch.bfloat16)
    text = str(found.value)
    for word in ("beta1", "damping", "first", "switch_every", "scale 0.0", "torch.bfloat16"):
        assert word in text


def test_altlora_every_parameter_stands_in_one_pair():
    A, B, other = (nn.Parameter(draw(*shape)) for shape in ((R, D), (K, R), (K, R)))
    pair = {"A": 0, "B": 1, "scale": 1.0, "name": "layer", "gated": False}
    for params, pairs in (
        ([A], []),
        ([A, B, other], [pair]),
        ([A, B, other], [pair, {**pair, "B": 2}]),
    ):
        with pytest.raises(ConfigError, match="every parameter to be the A or the B of one pair"):
            Alternating([{"params": params, "pairs": pairs}])
    wrong = nn.Parameter(draw(R, D, key=1))
    with pytest.raises(ConfigError, match=r"pair layer: got A \(3, 7\) and B \(3, 7\)"):
        Alternating([{"params": [A, wrong], "pairs": [pair]}])


def test_altlora_sparse_gradients_are_refused():
    toy = Toy(first="B")
    toy.fill()
    toy.B[0].grad = toy.B[0].grad.to_sparse()
    with pytest.raises(RunError, match="got a sparse gradient of B"):
        toy.optimizer.step()


def test_altlora_products_are_exact_whatever_the_run_allows_and_that_stays():
    matmul = torch.backends.cuda.matmul
    name, loose, exact = (
        ("fp32_precision", "tf32", "ieee")
        if hasattr(matmul, "fp32_precision")
        else ("allow_tf32", True, False)
    )
    before, seen = getattr(matmul, name), []
    toy = Toy(dtype=torch.float32, first="B")
    whole = toy.optimizer._move
    toy.optimizer._move = lambda *words: (
        seen.append((getattr(matmul, name), torch.is_autocast_enabled("cpu"))),
        whole(*words),
    )
    try:
        setattr(matmul, name, loose)
        toy.fill()
        with torch.autocast("cpu"):
            toy.optimizer.step()
            assert torch.is_autocast_enabled("cpu")
        assert getattr(matmul, name) == loose
    finally:
        setattr(matmul, name, before)
    assert seen == [(exact, False)]
