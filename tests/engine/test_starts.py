"""Starts from data in a run: when the engine gathers, from which rows, and what it refuses."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback

import polyrank as pr
from polyrank import engine
from polyrank.engine.phase_trainer import PhaseTrainer
from polyrank.engine.workshop import TaskWorkshop
from polyrank.errors import ConfigError
from polyrank.frame import Boundary, Phase
from polyrank.layers import adapter_of
from polyrank.testing import assert_close
from polyrank.testing.streams import few_digits, tiny_vit

FAST = {"epochs": 1, "batch_size": 8, "lr": 1e-2}


def go(out, name, *strategies, stream=None, train=FAST, **options):
    stream = few_digits(rows=16, tasks=2) if stream is None else stream
    made = pr.method(name, **options)
    given = {"train": train, "references": [], "progress": False, "out": out}
    return engine.run(tiny_vit(), stream, made, strategies=strategies, **given)


def starts(result):
    lines = (result.path / "events.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [e["task"] for e in found if e["event"] == "job" and e["job"] == "start"]


@pytest.fixture
def rates(monkeypatch):
    """The first rates that starts were told of."""
    found, real = [], TaskWorkshop.initialise

    def told(self, rate):
        found.append(rate)
        return real(self, rate)

    monkeypatch.setattr(TaskWorkshop, "initialise", told)
    return found


def test_a_start_is_made_once_and_again_after_every_redraw(tmp_path):
    once = go(tmp_path / "once", "lora-ga", r=1)
    assert len(starts(once)) == 1
    absorbed = go(tmp_path / "absorb", "lora-ga", "absorb", r=1)
    assert len(starts(absorbed)) == 2
    grown = go(tmp_path / "bank", "olora", r=1, init_by="lora-ga")
    # Before strategies look, and once more behind the bank.
    assert len(starts(grown)) == 2
    for view in adapter_of(grown.model).layers:
        assert view.bank[0].shape[0] == 2
        assert view.shadow is not None


def test_the_adapter_of_a_run_loads_and_trains_on(tmp_path):
    result = go(tmp_path / "run", "lora-sb", r=3, rows=8)
    saved = tmp_path / "run" / result.system()["adapter"]
    model = pr.load(tiny_vit(), saved, is_trainable=True)
    for mine, theirs in zip(adapter_of(model).layers, adapter_of(result.model).layers, strict=True):
        assert torch.equal(mine.core.weight, theirs.core.weight)
        assert torch.equal(mine.A, theirs.A)
        assert not mine.waiting


@pytest.fixture
def taken(monkeypatch):
    """The rates of all updates, as a callback finds them at their begin."""
    found = []

    class Recorder(TrainerCallback):
        def on_step_begin(self, args, state, control, lr_scheduler=None, **kwargs):
            found.append(lr_scheduler.get_last_lr()[0])

    real = PhaseTrainer.prepare_phase

    def watched(self, *words):
        real(self, *words)
        self.add_callback(Recorder())

    monkeypatch.setattr(PhaseTrainer, "prepare_phase", watched)
    return found


class Stepped(Boundary):
    """A phase of so many updates, within a longer schedule."""

    def __init__(self, span):
        self.span = span

    def next(self, task, workshop, state):
        if state.get("trained"):
            return None
        state["trained"] = True
        return Phase(steps=12, span=self.span)


@pytest.mark.parametrize(
    ("how", "schedule"),
    [
        ("plain", "constant"),
        ("accumulated", "cosine"),
        ("steps", "linear"),
        ("span", "cosine"),
        ("flowing", "linear"),
    ],
)
def test_the_step_of_the_start_is_the_rate_that_a_callback_sees(
    tmp_path, rates, taken, monkeypatch, how, schedule
):
    stream = few_digits(rows=16, tasks=2 if how == "flowing" else 1)
    train = {**FAST, "epochs": 4, "warmup": 0.3, "schedule": schedule}
    if how == "flowing":
        stream = replace(stream, scenario="task-free")
    elif how == "accumulated":
        train |= {"batch_size": 3, "accumulation": 2}
    elif how != "plain":
        made = Stepped((0, 40) if how == "span" else None)
        monkeypatch.setattr(type(pr.method("lora-sb")), "boundary", lambda self: made)
    go(tmp_path / "run", "lora-sb", stream=stream, train=train, r=3, rows=8)
    assert len(taken) > 5
    assert_close(rates[0], next(rate for rate in taken if rate))


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"schedule": "constant"}, 1e-2),
        ({"warmup": 0.0}, 1e-2),
        # Sixteen updates, of which the first four warm up.
        ({"epochs": 8, "warmup": 0.25}, 1e-2 / 4),
    ],
    ids=["constant", "cold", "warm"],
)
def test_the_step_of_the_start_is_the_first_rate_of_the_run(tmp_path, rates, train, expected):
    stream = few_digits(rows=16, tasks=1)
    go(tmp_path / "run", "lora-sb", stream=stream, train={**FAST, **train}, r=3, rows=8)
    assert_close(rates, [expected] * 2)


def test_the_rows_are_drawn_by_the_seed_and_in_order_where_tasks_flow():
    seen = []

    class Parts(TaskWorkshop):
        def data(self, role, split="train", *, seed=None):
            seen.append(seed)
            return iter(())

    model = pr.adapt(tiny_vit(), pr.method("lora-ga", r=1), seed=1)
    for flowing in (False, True, False):
        work = Parts(
            model, None, {"train": []}, seed=1, task=0, size=4, first=True, flowing=flowing
        )
        with pytest.raises(ConfigError, match="got no batch"):
            work.initialise(1e-2)
    assert seen[1] is None
    assert seen[0] == seen[2] is not None


def test_rows_that_may_be_read_once_are_not_read_for_a_start(tmp_path):
    stream = replace(few_digits(rows=16, tasks=2), scenario="online", passes=None)
    with pytest.raises(ConfigError, match=r"lora-ga: its start wants weight_grad, and every row"):
        go(tmp_path / "no", "lora-ga", r=1, stream=stream)
    with pytest.raises(ConfigError, match=r"lora: its start wants weight_grad"):
        go(tmp_path / "no", "lora", r=1, init_by="lora-ga", stream=stream)
    result = go(tmp_path / "xs", "lora-xs", r=2, stream=stream)
    assert result.system()["label"] == "lora-xs r=2"


def test_too_few_rows_are_said_before_anything_is_trained(tmp_path):
    with pytest.raises(ConfigError, match=r"looks at 50 rows, and task '\S+' has 16; let it look"):
        go(tmp_path / "few", "lora-sb", r=3)
    assert not (tmp_path / "few").exists()
