"""The gates and their derivatives on one tile of tokens, inside a kernel; see `closed.py`.

A tile has BM tokens and R columns, of which the first r are ranks. A router's logits stand there
once per rank: ranks of one block have equal logits, and the sums of its gradients are made outside.
What backward needs of a gate is `kept` (tokens, r) in fp32: a router's logits with −inf where a
rank is off, or the weights of a self-activated bank.
"""

import triton
import triton.language as tl

KINDS = ("none", "static", "sigmoid", "softmax", "self")


@triton.jit
def select(score, cols, r, k: tl.constexpr, R: tl.constexpr):
    """Bool (BM, R): the k best of the first r scores, of equal ones the lower column."""
    valid = cols[None, :] < r
    if k >= R:
        # Compared with itself, so that the shape is that of the scores and a NaN is off.
        on = valid & (score == score)
    else:
        # A float's bits in the order of integers, the column below them: no two keys are equal.
        bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
        bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        key = (bits.to(tl.int64) << 32) | (R - 1 - cols[None, :]).to(tl.int64)
        lowest: tl.constexpr = -(2**63)
        key = tl.where(valid, key, lowest)
        left = key
        best = tl.max(left, axis=1)
        for _ in range(k - 1):
            left = tl.where(left == best[:, None], lowest, left)
            best = tl.max(left, axis=1)
        # Where r < k every rank is on, and no column beyond it.
        on = (key >= best[:, None]) & valid
    return on


@triton.jit
def router(kept, bias, total, floor, KIND: tl.constexpr, IN_WEIGHT: tl.constexpr):
    """Gates (BM, R) from logits that are −inf where a rank is off."""
    v = kept
    if IN_WEIGHT:
        v += bias
    if KIND == "sigmoid":
        v = tl.sigmoid(kept)
        if IN_WEIGHT:
            v = tl.where(kept > float("-inf"), v + bias, 0.0)
        share = total / tl.maximum(tl.sum(v, axis=1), floor)
    else:
        v = tl.exp(v - tl.max(v, axis=1)[:, None])
        share = total / tl.sum(v, axis=1)
    return v * share[:, None]


@triton.jit
def normed(h, eps):
    """Returns h / max(‖h‖, eps) and ‖h‖ of every token."""
    n = tl.sqrt(tl.sum(h * h, axis=1))
    return h / tl.maximum(n, eps)[:, None], n


@triton.jit
def forward(
    h, z, gate, bias, cols, r, total, floor, tau, delta, eps,
    KIND: tl.constexpr, IN_WEIGHT: tl.constexpr, CUT: tl.constexpr, K: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """Gates g (BM, R) and what is kept of them; gate and bias (R,), total … eps scalars."""
    kept = z
    g = tl.full(h.shape, 1.0, tl.float32)
    if KIND == "static":
        g *= gate[None, :]
    elif KIND == "self":
        s, _ = normed(h, eps)
        logit = tl.where(select(s, cols, r, K, R), s / tau, float("-inf"))
        w = tl.exp(logit - tl.max(logit, axis=1)[:, None])
        kept = w / tl.sum(w, axis=1)[:, None]
        g = tl.where(s >= delta, kept, 0.0) if CUT else kept
    elif KIND != "none":
        score = (tl.sigmoid(z) if KIND == "sigmoid" else z) + bias[None, :]
        kept = tl.where(select(score, cols, r, K, R), z, float("-inf"))
        g = router(kept, bias[None, :], total, floor, KIND, IN_WEIGHT)
    return g, kept


@triton.jit
def backward(
    u, h, kept, gate, bias, total, floor, tau, delta, eps,
    KIND: tl.constexpr, IN_WEIGHT: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Gates g, and the gradients dh and dz (BM, R); u = scale · dy B."""
    g = tl.full(h.shape, 1.0, tl.float32)
    dz = u
    if KIND == "static":
        g *= gate[None, :]
    elif KIND == "self":
        s, n = normed(h, eps)
        g = tl.where(s >= delta, kept, 0.0) if CUT else kept
        gamma = tl.where(s >= delta, u * h, 0.0) if CUT else u * h
        ds = kept * (gamma - tl.sum(gamma * kept, axis=1)[:, None]) / tau
        # Where eps bounds the norm it is a constant.
        along = tl.where(n > eps, tl.sum(ds * s, axis=1), 0.0)
        dz = (ds - s * along[:, None]) / tl.maximum(n, eps)[:, None]
    elif KIND != "none":
        g = router(kept, bias[None, :], total, floor, KIND, IN_WEIGHT)
        gamma = u * h
        if KIND == "softmax":
            dz = g * (gamma - tl.sum(gamma * g, axis=1)[:, None] / total)
        else:
            p = tl.sigmoid(kept)
            v = p
            if IN_WEIGHT:
                v = tl.where(kept > float("-inf"), p + bias[None, :], 0.0)
            S = tl.sum(v, axis=1)
            bounded = tl.maximum(S, floor)
            # Where the bound holds the divisor it is a constant and brings no mean.
            mean = tl.where(floor <= S, tl.sum(gamma * v, axis=1) / bounded, 0.0)
            dz = (gamma - mean[:, None]) * (total / bounded)[:, None] * p * (1 - p)
    dh = u * g
    if KIND == "self":
        dh += dz
    return g, dh, dz
