"""Scores of predictions, the matrix they stand in, and what it says; each definition has its name.

`score(name, predictions, references)` is one task's score. Functions of the matrix of scores after
every task say what was learnt and forgotten: `summary(matrix, counts)` gives all numbers of a run,
`definitions()` prints what each name means. `polyrank.metrics.statistics` compares runs over seeds.
"""

from polyrank.metrics._summary import definitions, summary
from polyrank.metrics.routing import load_entropy
from polyrank.metrics.scores import RANGES, score
from polyrank.metrics.shares import global_forgetting, local_forgetting
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
    plasticity,
    weighted_average_accuracy,
    weighted_average_incremental_accuracy,
)
from polyrank.metrics.unlearning import unlearning_score
from polyrank.metrics.variants import (
    average_accuracy_pilot,
    backward_transfer_avalanche,
    forgetting_avalanche,
    forgetting_mammoth,
    forgetting_pilot,
    forward_transfer_avalanche,
)

__all__ = [
    "RANGES",
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
    "global_forgetting",
    "intransigence",
    "load_entropy",
    "local_forgetting",
    "plasticity",
    "score",
    "summary",
    "unlearning_score",
    "weighted_average_accuracy",
    "weighted_average_incremental_accuracy",
]
