"""The dropout mask on a GPU, in one pass by Triton's own generator.

`polyrank.ops.philox` imports this at the first mask that a CUDA device asks for, where Triton is
installed; in torch alone the ten rounds would pass through memory a hundred times.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit(do_not_specialize=["seed"])
def _keep(out, n, p, seed, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kept = tl.rand(seed.to(tl.int64), offset) >= p
    tl.store(out + offset, kept, mask=offset < n)


def keep_mask(n: int, p: float, seed: int, device: torch.device) -> Tensor:
    """Bool (n,), element i: tl.rand(seed, i) >= p; n < 2^31 - 1024, seed a signed 64-bit number."""
    out = torch.empty(n, dtype=torch.bool, device=device)
    if n:
        with torch.cuda.device(device):
            _keep[(triton.cdiv(n, _BLOCK),)](out, n, p, seed, BLOCK=_BLOCK)
    return out
