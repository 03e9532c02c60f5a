"""How evenly the ranks of a routed layer are used."""

import numpy as np

from polyrank.errors import ConfigError
from polyrank.metrics._inputs import Scores, vector


def load_entropy(load: Scores) -> float:
    """Evenness of a layer's load: 1 if all ranks are used alike, 0 if one does everything.

    Definition: H = −Σ_i p_i ln p_i / ln r,  p_i = l_i / Σ_j l_j;  l_i: load of rank i of r

    Args:
        load: Counts or fractions, one per rank, each at least 0.

    Returns:
        A number in [0, 1]; NaN for a single rank or if nothing was routed.

    Raises:
        ConfigError: if a load is negative or not finite.
    """
    values = vector(load, "load")
    if not np.isfinite(values).all() or (values < 0).any():
        raise ConfigError(
            f"load: got {values.tolist()}, expected finite numbers of at least 0; "
            "pass how often each rank was active"
        )
    if len(values) < 2 or not values.any():
        return float("nan")
    p = values / values.sum()
    used = p[p > 0]
    # Rounding may leave the sum a little above ln r, or a negative zero.
    return float(np.clip(-(used * np.log(used)).sum() / np.log(len(p)), 0.0, 1.0))
