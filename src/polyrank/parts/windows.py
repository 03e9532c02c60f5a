"""The last values that something took, as tensors that are saved: what is usual, and what is not.

Each of K rows is a window of its own. While it fills it never wraps: of the values that come with
the one that fills it, the surplus is dropped. A full one slides, as many old values leave as new
ones come.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polyrank.errors import RunError

# Below this no spread can be told.
LEAST = 3


class Windows(nn.Module):
    """K windows over the last M values.

    Args:
        count: K.
        size: M, >= 3.
    """

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        # Parameters, since processes that train together overwrite each other's buffers.
        values, length = torch.zeros(count, size), torch.zeros(count, dtype=torch.float32)
        self.values = nn.Parameter(values, requires_grad=False)
        # Floating point, since whoever calls requires_grad_ on a model includes all parameters.
        self.length = nn.Parameter(length, requires_grad=False)

    @torch.no_grad()
    def push(self, values: Tensor) -> None:
        """Take new values (n, K), the oldest first; nothing waits for the device."""
        size, new = self.values.shape[1], values.detach().T.to(self.values)
        slid = torch.cat([self.values, new], 1)[:, -size:]
        # The last place takes what is too much.
        place = self.length.long()[:, None] + torch.arange(new.shape[1], device=new.device)
        filling = torch.cat([self.values, self.values[:, :1]], 1)
        filling = filling.scatter(1, place.clamp_max(size), new)[:, :size]
        self.values.copy_(torch.where((self.length >= size)[:, None], slid, filling))
        self.length.copy_((self.length + new.shape[1]).clamp_max(size))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean and unbiased variance of what each window holds, (K,) in fp64.

        NaN where there are too few values.
        """
        held = torch.arange(self.values.shape[1], device=self.length.device) < self.length[:, None]
        values, count = self.values.double(), self.length.double()
        mean = values.where(held, 0.0).sum(1) / count
        variance = (values - mean[:, None]).square().where(held, 0.0).sum(1) / (count - 1)
        return mean, variance

    @torch.no_grad()
    def scores(self, values: Tensor, *, signed: bool) -> Tensor:
        """Return z = |v − mean| / √variance of values (n, K), without bars if signed; in fp64.

        0 for windows that hold fewer than three values.

        Raises:
            RunError: if a value is not finite, or all values of a window are equal.
        """
        mean, variance = self.moments()
        known = self.length >= LEAST
        flat = known & ~(variance > 0)
        held = self.values.isfinite().all() & values.isfinite().all()
        if not bool(held):
            raise RunError(
                "statistics: some errors are not finite; lower the learning rate of what they "
                "belong to, or clip harder"
            )
        if bool(flat.any()):
            raise RunError(
                f"statistics: all {int(self.length[flat][0])} recorded errors are equal, so "
                "nothing can be told to be unusual; record those of more different rows"
            )
        z = (values.double() - mean) / variance.sqrt()
        return (z if signed else z.abs()).where(known, 0.0)

    @classmethod
    def joined(cls, first: Windows, second: Windows) -> Windows:
        """Return the windows of both."""
        size = first.values.shape[1]
        made = cls(len(first.length) + len(second.length), size).to(first.values.device)
        made.values.data = torch.cat([first.values, second.values])
        made.length.data = torch.cat([first.length, second.length])
        return made
