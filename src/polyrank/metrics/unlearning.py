"""How well classes were unlearnt while others were kept."""

import logging

from polyrank.errors import ConfigError
from polyrank.metrics._inputs import Limits

_log = logging.getLogger(__name__)
_FRACTION: Limits = (0.0, 1.0)


def unlearning_score(
    before: float, after: float, retained: float, *, limits: Limits = _FRACTION
) -> float:
    """Harmonic mean of what was forgotten on purpose and what was kept (H), within `limits`.

    Definition: H = 2 Acc_r Drop / (Acc_r + Drop),  Drop = Acc_f(before) − Acc_f(after)

    0 where the accuracy on the classes to forget rose, with a warning in the log: the formula alone
    would give a negative number, or none.

    Source: Zhao et al., "Continual Forgetting for Pre-trained Vision Models", arXiv:2403.11530.

    Args:
        before: Accuracy on the classes to forget, of the reference: the pretrained model.
        after: The same after unlearning.
        retained: Accuracy on the classes that stay, after unlearning.
        limits: Range of the accuracies, (0, 1) or (0, 100).

    Raises:
        ConfigError: if an accuracy lies outside `limits`.
    """
    low, high = limits
    given = {"before": before, "after": after, "retained": retained}
    problems = [
        f"{name}: got {value:g}, expected {low:g}..{high:g}; pass limits=(0, 100) for percent"
        for name, value in given.items()
        if not low <= value <= high
    ]
    if problems:
        raise ConfigError(problems)
    drop = before - after
    if drop < 0:
        _log.warning("unlearning: accuracy on the classes to forget rose by %g; H is 0", -drop)
    if drop <= 0 or retained <= 0:
        return 0.0
    return 2 * retained * drop / (retained + drop)
