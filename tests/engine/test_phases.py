"""Phases with groups, epochs and losses of their own, and tasks that find out what they need."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import polyrank as pr
from polyrank import engine
from polyrank.engine import machine, phase_trainer
from polyrank.errors import ConfigError
from polyrank.frame import Boundary, Group, Job, Loss, Method, Phase, seed_of
from polyrank.testing import assert_close
from polyrank.testing.streams import few_digits, tiny_vit

FAST = {"epochs": 1, "batch_size": 4, "lr": 1e-2}
SMALL = {"rows": 8, "tasks": 2}
# A method is named after its file.
NAME = "test-phases"
SLOW, QUICK = 0.5, 2.0


class Small(Loss):
    """Σ_rows |z|²: pulls the logits to zero, whatever the labels."""

    needs = frozenset({"logits"})

    def __call__(self, out, batch):
        return out.logits.float().square().sum()


class Look:
    """One batch a call; the cursor and what was seen are in the state alone."""

    def __init__(self, size):
        self.size = size

    def __call__(self, workshop, state):
        seed = seed_of(workshop.seed, state["round"])
        batches = list(workshop.data("train", seed=seed, size=self.size))
        batch = batches[state["cursor"]]
        state["seen"] = [*state["seen"], [int(n) for n in batch["row"]]]
        state["cursor"] += 1
        found = state["cursor"] == len(batches) or state["cursor"] % 2 == 1
        if found:
            state["stage"] = "func" if state["cursor"] < len(batches) else "end"
        return found


class Searching(Boundary):
    """look → func → rd → look …, until everything was looked at."""

    def __init__(self, groups):
        self.groups = groups

    def start(self, task, workshop, state):
        state.update(stage="look", cursor=0, round=0, seen=[])

    def next(self, task, workshop, state):
        if state["stage"] == "look":
            return Job(name="look", step=Look(2))
        if state["stage"] == "end":
            return None
        roles = workshop.adapter.roles()
        first = state["stage"] == "func"
        names = ("A", "head") if first else ("B",)
        number = state["round"] + first
        if first:
            state.update(stage="rd", round=number)
        else:
            state.update(stage="look")
        groups = [
            Group(
                params=[p for name in names for p in roles[name]],
                update="sgd",
                lr=QUICK if first else SLOW,
                weight_decay=0.1,
                options={"momentum": 0.9},
            )
        ]
        return Phase(
            name=f"{'func' if first else 'rd'}-{number}",
            epochs=2 if first else 0,
            train=frozenset(names),
            losses=None if first else (Small(),),
            groups=groups if self.groups else None,
            place=(2 * number - first, 0),
        )

    def finish(self, task, workshop, state):
        workshop.memory("looking")[str(task.index)] = state["seen"]


@dataclass(frozen=True, kw_only=True)
class Looking(Method):
    """Plain LoRA with the boundary above."""

    r: int = 2
    own: bool = True
    trains: ClassVar = frozenset({"A", "B", "head"})

    def boundary(self):
        return Searching(self.own)


class Killed(BaseException):
    """Stands for a kill."""


@pytest.fixture
def looking():
    """The toy, registered for one test."""
    from polyrank.frame import register, registry

    yield register(Looking)
    for name in [n for n, c in registry._found.items() if c is Looking]:
        del registry._found[name]


def go(out, **options):
    return engine.run(
        tiny_vit(), few_digits(**SMALL), pr.method(NAME, **options), train=FAST,
        references=[], out=out, save_every=1, progress=False,
    )  # fmt: skip


def events(path, *kinds):
    lines = (path / "events.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return [e for e in found if not kinds or e["event"] in kinds]


@pytest.fixture
def rates(monkeypatch):
    """Every optimiser of a run, as (phase, class, groups without parameters)."""
    kept, own = [], phase_trainer.PhaseTrainer.create_scheduler

    def noting(self, num_training_steps, optimizer=None):
        made = own(self, num_training_steps, optimizer)
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self._bare().param_groups]
        kept.append((self.phase.name, groups, num_training_steps))
        return made

    monkeypatch.setattr(phase_trainer.PhaseTrainer, "create_scheduler", noting)
    return kept


@pytest.fixture
def values(monkeypatch):
    """Every batch of a run, as (phase, its part of the objective, mean of |z|² over its rows)."""
    kept, own = [], phase_trainer.PhaseTrainer._own_loss

    def noting(self, model, batch):
        loss, out = own(self, model, batch)
        z = out.logits.detach().float()
        kept.append((self.phase.name, loss.detach(), z.square().sum() / len(z)))
        return loss, out

    monkeypatch.setattr(phase_trainer.PhaseTrainer, "_own_loss", noting)
    return kept


def test_a_task_asks_for_more_phases_as_it_finds_out(looking, tmp_path, rates, values):
    result = go(tmp_path / "run")
    shown = [e["phase"] for e in events(result.path, "phase") if e["system"] == f"{NAME} r=2"]
    assert shown[:4] == ["func-1", "rd-1", "func-2", "rd-2"]
    assert len(shown) == 8
    for name, (group,), steps in rates:
        func = name.startswith("func")
        assert group["initial_lr"] == pytest.approx(FAST["lr"] * (QUICK if func else SLOW))
        assert group["momentum"] == 0.9
        assert group["weight_decay"] == 0.1
        # 8 rows in batches of 4; the first kind of phase asks for two epochs.
        assert steps == (4 if func else 2)
    own = [pair for name, *pair in values if name.startswith("rd")]
    assert len(own) == 8
    for found, want in own:
        assert_close(found, want)


def test_a_phase_without_groups_takes_those_of_the_method(looking, tmp_path, rates):
    go(tmp_path / "run", own=False)
    assert {group["initial_lr"] for _, groups, _ in rates for group in groups} == {FAST["lr"]}
    assert all("momentum" not in group for _, groups, _ in rates for group in groups)


def test_a_kill_anywhere_in_such_a_task_goes_on_exactly(looking, tmp_path, monkeypatch):
    whole = go(tmp_path / "whole")
    stages = events(whole.path, "checkpoint", "phase", "job", "task_start")
    second = next(i for i, e in enumerate(stages) if e.get("task") == whole_task(whole, 1))
    before = len([e for e in stages[:second] if e["event"] == "checkpoint"])
    save = machine.Checkpoints.save
    # In the first look, in a phase that a look asked for, and in a look of the second task.
    for stop in (1, 4, before + 2):
        written = []

        def dying(self, state, written=written, stop=stop):
            written.append(save(self, state))
            if len(written) == stop:
                raise Killed
            return written[-1]

        out = tmp_path / f"killed-{stop}"
        with monkeypatch.context() as patched:
            patched.setattr(machine.Checkpoints, "save", dying)
            with pytest.raises(Killed):
                go(out)
        again = go(out)
        assert "resumed" in [e["event"] for e in events(out)]
        ours, theirs = whole.model.state_dict(), again.model.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert str(whole.system()["unrestricted"]) == str(again.system()["unrestricted"])


def whole_task(result, index):
    return [e["task"] for e in events(result.path, "task_start")][index]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"groups": []}, "tensors of .'A'. train and stand in none"),
        ({"train": frozenset({"B"})}, "hold 12 tensors that do not train"),
        ({"twice": True}, "a tensor stands in two of them"),
    ],
    ids=["missing", "strange", "twice"],
)
def test_groups_hold_exactly_what_trains(looking, tmp_path, change, words, monkeypatch):
    def wrong(self, task, workshop, state):
        params = workshop.adapter.roles()["A"]
        groups = [Group(params=params)] * (2 if change.get("twice") else 1)
        return Phase(
            train=change.get("train", frozenset({"A"})), groups=change.get("groups", groups)
        )

    monkeypatch.setattr(Searching, "next", wrong)
    with pytest.raises(ConfigError, match=words):
        go(tmp_path / "run")


class Embedded(Small):
    """Asks for what a model of language does not give."""

    needs = frozenset({"embedding", "texts"})


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"steps": -5}, "phase 'train': steps: got -5, expected at least 0"),
        ({"epochs": -1}, "phase 'train': epochs: got -1, expected at least 0"),
        ({"steps": 2, "epochs": 1}, "steps: got 2 beside epochs=1, expected one of them"),
        ({"losses": (Embedded(),)}, "phase 'train': loss 'embedded': needs texts, which models"),
        ({"steps": 1}, r"name: the task has had the phases \['train'\], expected a new name"),
    ],
    ids=["steps", "epochs", "both", "losses", "name"],
)
def test_a_phase_that_cannot_be_trained_as_it_says_is_refused(
    looking, tmp_path, wish, words, monkeypatch
):
    monkeypatch.setattr(Searching, "next", lambda self, task, workshop, state: Phase(**wish))
    with pytest.raises(ConfigError, match=words):
        go(tmp_path / "run")
