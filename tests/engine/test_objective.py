"""The losses of a phase: what each is divided by, what it sees, and which ones are refused."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

import polyrank as pr
from polyrank.engine.objective import Objective
from polyrank.errors import ConfigError
from polyrank.frame import ROLES, Loss, Method, Out, keyed
from polyrank.testing import assert_close

ROLE = torch.tensor([ROLES["train"]] * 8 + [ROLES["replay"]] * 2)
ROWS = torch.arange(10)
PLAIN = pr.method("lora")


class Small(Loss):
    """Σ_rows |z|²."""

    needs = frozenset({"logits"})

    def __init__(self, role=None):
        self.role = role

    def __call__(self, out, batch):
        assert len(out.logits) == len(batch["labels"])
        return out.logits.float().square().sum()


class Cubed(Small):
    """Σ_rows |z|³."""

    def __call__(self, out, batch):
        return out.logits.float().abs().pow(3).sum()


class Left(Small):
    """Σ_rows of what a block left."""

    needs = frozenset({"sides"})

    def __call__(self, out, batch):
        return out.sides["block"]["newest"].sum()


class Read:
    """A reader of numbers, whose model returns them."""

    offers = frozenset({"logits"})
    kinds = frozenset({"numbers"})
    growing = True

    def loss(self):
        return Small()

    def mask(self, batch):
        return None

    def forward(self, model, batch, wants):
        return Out(logits=batch["x"])


@dataclass(frozen=True, kw_only=True)
class Cubing(Method):
    """LoRA whose tasks have another loss."""

    r: int = 2
    trains: ClassVar = frozenset({"A", "B"})

    def task_loss(self):
        return Cubed()


@dataclass(frozen=True, kw_only=True)
class Two(pr.Strategy):
    """Adds two losses of one class."""

    def losses(self):
        return [Cubed("train"), Cubed("replay")]


@pytest.fixture
def batch():
    x = torch.randn(10, 3, generator=keyed("rows"))
    return {"x": x, "labels": torch.zeros(10, dtype=torch.int64), "role": ROLE}


def value(objective, batch, newest=ROWS):
    """The loss of an update of one batch, beside which a block leaves a number a row."""
    sides = {"block": {"newest": newest.float()}}
    objective.adapter = SimpleNamespace(sides=lambda: sides)
    found, _ = objective(None, None, None, batch, objective.counts([batch]), 1)
    return found


def test_losses_of_one_class_are_means_over_the_rows_of_their_own_roles(batch):
    objective = Objective(Read(), PLAIN, (), (Small("train"), Small("replay")))
    new, old = batch["x"][:8], batch["x"][8:]
    assert_close(value(objective, batch), new.square().sum() / 8 + old.square().sum() / 2)


def test_a_loss_with_a_role_sees_what_blocks_left_of_its_rows(batch):
    objective = Objective(Read(), PLAIN, (), (Left("replay"),))
    assert_close(value(objective, batch), torch.tensor((8 + 9) / 2))
    with pytest.raises(ConfigError, match=r"'newest' of block: got shape \(5,\), expected \(10, "):
        value(objective, batch, ROWS[:5])


def test_the_loss_of_a_method_takes_the_place_of_the_readers(batch):
    found = value(Objective(Read(), Cubing(), ()), batch)
    assert_close(found, batch["x"].abs().pow(3).sum() / 10)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (("lost",), r"asks for the losses \['lost'\], but there are \['cubed', 'small'\]"),
        (("cubed",), r"'cubed', of which there are 2.*give the losses that are meant"),
        (("small", "small"), "'small' is given 2 times, expected once"),
        ((own := Small(), own), "'small' is given 2 times, expected once"),
    ],
    ids=["unknown", "several", "named-twice", "given-twice"],
)
def test_a_phase_says_clearly_which_losses_it_means(chosen, words):
    with pytest.raises(ConfigError, match=words):
        Objective(Read(), PLAIN, (Two(),), chosen)
