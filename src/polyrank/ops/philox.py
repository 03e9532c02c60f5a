"""Counter-based random numbers: the same bits here, in a kernel, on every device and in every pass.

A mask that depends only on (seed, element index) need not be stored: backward draws it again.
The generator is Philox-4x32-10 (Salmon et al., SC 2011), keyed and converted as Triton's
`tl.rand(seed, offset)` with a 32-bit offset does it, so that a kernel reproduces every mask.
"""

from importlib.util import find_spec
from typing import cast

import torch
from torch import Tensor

from polyrank.errors import ConfigError

_LOW, _HALF = 0xFFFFFFFF, 0x7FFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
# Triton's constant: the largest float32 whose product with 2^31 stays below 1.
_TO_UNIT = 4.6566127342e-10
# Numbers per chunk. On a CPU the ten rounds stay in the cache of a core, elsewhere 32 MiB suffice.
_CHUNK, _CHUNK_CPU = 1 << 22, 1 << 16

# A 32-bit word: a number, or an int64 tensor of which the low 32 bits count.
Word = int | Tensor


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Word, ...]:
    """Philox-4x32-10 of four counter words under two key words; all words in [0, 2^32).

    Words may be Python numbers or int64 tensors that broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit products wrap to negative int64; what is read of them are bits, after a mask.
        # c1 and c3 only ever meet ^, so their high bits wait for the mask of the next round.
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = right >> 32, left >> 32
        c0 ^= c1
        c0 ^= k0
        c0 &= _LOW
        c2 ^= c3
        c2 ^= k1
        c2 &= _LOW
        c1, c3 = right, left
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1 & _LOW, c2, c3 & _LOW


def uniform(seed: Word, offset: Tensor) -> Tensor:
    """Numbers in [0, 1), fp32, of the shape of `offset`: Triton's `tl.rand(seed, offset)`.

    Args:
        seed: The 64-bit key; a 0-d int64 tensor lets a compiled graph take a new seed each step.
        offset: int64 counters; only their low 32 bits are used.
    """
    if isinstance(seed, Tensor):
        seed = seed.to(offset.device).expand(offset.shape)
    bits = cast("Tensor", philox((offset & _LOW, 0, 0, 0), (seed & _LOW, (seed >> 32) & _LOW))[0])
    # The word read as a signed number, folded to its non-negative half.
    return torch.where(bits > _HALF, _LOW - bits, bits).to(torch.float32) * _TO_UNIT


def keep_mask(shape: torch.Size, p: float, seed: Word, device: torch.device) -> Tensor:
    """Bool of `shape`, False with probability p: element i, row by row, is tl.rand(seed, i) >= p.

    Raises:
        ConfigError: p outside [0, 1).
    """
    if not 0 <= p < 1:
        raise ConfigError(f"dropout: got {p}, expected 0 <= dropout < 1; 0 turns it off")
    n = shape.numel()
    if torch.compiler.is_compiling():
        return (uniform(seed, torch.arange(n, device=device)) >= p).view(shape)
    seed = (int(seed) + 2**63) % 2**64 - 2**63
    if device.type == "cuda" and n < 2**30 and find_spec("triton"):
        from polyrank.ops import philox_triton

        return philox_triton.keep_mask(n, p, seed, device).view(shape)
    keep = torch.empty(n, dtype=torch.bool, device=device)
    start = 0
    for part in keep.split(_CHUNK_CPU if device.type == "cpu" else _CHUNK):
        index = torch.arange(start, start + part.numel(), device=device)
        torch.ge(uniform(seed, index), p, out=part)
        start += part.numel()
    return keep.view(shape)


def dropout(x: Tensor, p: float, seed: Word) -> Tensor:
    """x with elements zeroed with probability p and the rest divided by 1 − p; differentiable.

    Raises:
        ConfigError: p outside [0, 1).
    """
    return x * keep_mask(x.shape, p, seed, x.device) * (1 / (1 - p))
