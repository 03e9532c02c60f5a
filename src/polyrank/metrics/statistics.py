"""What several seeds say of a number: mean, spread, differences paired by seed, plateaus.

NaN or None stands for what was not measured; it is left out, and what then has too few values is
NaN. Sums are exact (`math.fsum`), so that the order of seeds changes no digit.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from polyrank.errors import ConfigError
from polyrank.metrics._inputs import Scores, vector

Seed = TypeVar("Seed", bound=Hashable)
# A difference is marked only if it is larger than so many standard errors.
MARK = 2.0
# One point: rates whose score is this close to the best belong to its plateau.
POINT = 0.01


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference of two systems, paired by seed.

    Attributes:
        mean: Mean of the differences; NaN without a common seed.
        error: Its standard error; NaN with fewer than two common seeds.
        count: Number of common seeds.
    """

    mean: float
    error: float
    count: int

    @property
    def marked(self) -> bool:
        """Whether |mean| > 2 standard errors; never with fewer than two seeds."""
        return self.count > 1 and abs(self.mean) > MARK * self.error


def mean(values: Scores) -> float:
    """Mean of the measured values; NaN if there are none.

    Definition: x̄ = (1/n) Σ x_i
    """
    found = _measured(values)
    # From the smallest value on, so that equal values have exactly that mean and no deviation.
    low = min(found, default=math.nan)
    return low + math.fsum(x - low for x in found) / len(found) if found else math.nan


def sample_deviation(values: Scores) -> float:
    """Sample standard deviation; NaN with fewer than two values.

    Definition: sd = sqrt((1/(n−1)) Σ (x_i − x̄)²)
    """
    found = _measured(values)
    if len(found) < 2:
        return math.nan
    middle = mean(found)
    return math.sqrt(math.fsum((x - middle) ** 2 for x in found) / (len(found) - 1))


def standard_error(values: Scores) -> float:
    """Standard error of the mean; NaN with fewer than two values.

    Definition: SE = sd / sqrt(n)
    """
    found = _measured(values)
    return sample_deviation(found) / math.sqrt(len(found)) if found else math.nan


def paired_difference(values: Mapping[Seed, float], baseline: Mapping[Seed, float]) -> Difference:
    """Mean and standard error of the differences to a baseline, seed by seed.

    Definition: d_s = x_s − b_s over the seeds s that both have;  Δ = d̄,  SE = sd(d) / sqrt(n)

    Pairing takes out what a seed does to both alike: order of data, start of the weights.

    Args:
        values: Seed to value.
        baseline: Seed to value of the baseline.
    """
    shared = [
        (own, other)
        for own, other in ((values[seed], baseline[seed]) for seed in values if seed in baseline)
        if not _missing(own) and not _missing(other)
    ]
    gaps = [own - other for own, other in shared]
    return Difference(mean=mean(gaps), error=standard_error(gaps), count=len(gaps))


def plateau(rates: Sequence[float], scores: Scores, within: float = POINT) -> float:
    """How far a learning rate may be from the best one: the factor that its plateau spans.

    Definition: max R / min R,  R = {rate_i : score_i ≥ max score − within}

    1 if only the best rate is that good. A dip between two good rates does not end the plateau.

    Args:
        rates: Learning rates, finite and > 0, in any order.
        scores: Mean score at each rate, of which more is better; NaN where a run diverged.
        within: How much worse a score may be, >= 0: one point, or two standard errors.

    Returns:
        The factor, >= 1; NaN if no rate has a score.

    Raises:
        ConfigError: if the inputs do not fit.
    """
    steps, found = vector(rates, "rates"), vector(scores, "scores")
    problems = []
    if len(steps) != len(found):
        problems.append(f"scores: got {len(found)}, expected {len(steps)}; give one per rate")
    if bad := [x for x in steps if not (math.isfinite(x) and x > 0)]:
        problems.append(f"rates: got {bad[0]:g}, expected finite numbers above 0; correct it")
    if not within >= 0:
        problems.append(f"within: got {within:g}, expected at least 0; use {POINT} for one point")
    if problems:
        raise ConfigError(problems)
    known = [(x, y) for x, y in zip(steps, found, strict=True) if not math.isnan(y)]
    if not known:
        return math.nan
    best = max(y for _, y in known)
    good = [float(x) for x, y in known if y >= best - within]
    return max(good) / min(good)


def _measured(values: Scores) -> list[float]:
    return [float(x) for x in vector(values, "values") if not math.isnan(x)]


def _missing(value: float | None) -> bool:
    return value is None or math.isnan(value)
