"""Pure functions on the matrix of accuracies after every task; every definition has its own name.

Only numpy is needed. `definitions()` prints what each name means, `summary(matrix, counts)` gives
all numbers of a run.
"""

from polyrank.metrics._summary import definitions, summary
from polyrank.metrics.routing import load_entropy
from polyrank.metrics.survey import (
    average_accuracy,
    average_accuracy_curve,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forgetting_all,
    forgetting_by_task,
    forward_transfer,
    forward_transfer_gem,
    intransigence,
    weighted_average_accuracy,
    weighted_average_incremental_accuracy,
)
from polyrank.metrics.variants import (
    average_accuracy_pilot,
    backward_transfer_avalanche,
    forgetting_avalanche,
    forgetting_mammoth,
    forgetting_pilot,
    forward_transfer_avalanche,
)

__all__ = [
    "average_accuracy",
    "average_accuracy_curve",
    "average_accuracy_pilot",
    "average_incremental_accuracy",
    "backward_transfer",
    "backward_transfer_avalanche",
    "definitions",
    "forgetting",
    "forgetting_all",
    "forgetting_avalanche",
    "forgetting_by_task",
    "forgetting_mammoth",
    "forgetting_pilot",
    "forward_transfer",
    "forward_transfer_avalanche",
    "forward_transfer_gem",
    "intransigence",
    "load_entropy",
    "summary",
    "weighted_average_accuracy",
    "weighted_average_incremental_accuracy",
]
