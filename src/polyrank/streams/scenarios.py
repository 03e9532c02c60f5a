"""The scenarios: how tasks relate, what is visible, how often a row may be read.

Source: Wang, Zhang, Su, Zhu, arXiv:2302.00487, section 2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

# Roles a task may name its data by; the engine trains on the first group, never on the second.
TRAINING_ROLES = ("train", "forget", "retain", "old", "text")
HELD_OUT_ROLES = ("validation", "test")


@dataclass(frozen=True, kw_only=True)
class Visible:
    """What a method may depend on; the stream knows everything either way."""

    task_id_train: bool = True  # which task a training row belongs to
    task_id_test: bool = False  # the same for a row to be predicted
    boundary: bool = True  # when one task ends and the next begins
    n_tasks: bool = False  # how many tasks will come


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """How the tasks of a stream relate, and what is visible unless the stream says otherwise."""

    classes: str  # "equal", "disjoint", "overlap" or "any", between tasks
    visible: Visible = Visible()
    passes: int | None = None  # how often a training row may be read, None: as often as wanted


SCENARIOS: Mapping[str, Scenario] = MappingProxyType(
    {
        "instance-incremental": Scenario(classes="equal"),
        "domain-incremental": Scenario(classes="equal"),
        "task-incremental": Scenario(classes="disjoint", visible=Visible(task_id_test=True)),
        "class-incremental": Scenario(classes="disjoint"),
        "task-free": Scenario(
            classes="disjoint", visible=Visible(task_id_train=False, boundary=False)
        ),
        "online": Scenario(classes="disjoint", passes=1),
        "blurry": Scenario(classes="overlap"),
        # Tasks of several domains, whose classes all compete and may have names in common (X-TAIL).
        "cross-domain": Scenario(classes="any"),
        "pretraining": Scenario(classes="any"),
        "unlearning": Scenario(classes="any"),
        "text": Scenario(classes="any"),
    }
)
