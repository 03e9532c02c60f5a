"""sema on a stream: who trains when, what stays as it is, and runs that are stopped half-way."""

import json
import re

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

import polyrank as pr
from polyrank import engine
from polyrank.engine import course, machine
from polyrank.layers import adapter_of
from polyrank.parts.describe import branches_of
from polyrank.parts.expand import Expand
from polyrank.testing import assert_close
from polyrank.testing.streams import few_digits, tiny_vit

TRAIN = {"epochs": 1, "batch_size": 8, "lr": 1e-2, "weight_decay": 0.1}
SMALL = {"r": 2, "q": 3, "window": 12, "detect_batch": 8, "decay": 0.1}


def twelve():
    """Return a vision transformer of twelve narrow layers."""
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=8, intermediate_size=8,
        num_hidden_layers=12, num_attention_heads=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return ViTForImageClassification(config).eval()


def go(out, model=None, tasks=2, train=None, **options):
    given = {**SMALL, "start": -2, "tau": 0.2, **options}
    return engine.run(
        model or tiny_vit(), few_digits(rows=16, tasks=tasks), pr.method("sema", **given),
        train={**TRAIN, **(train or {})}, references=[], out=out, save_every=1, progress=False,
    )  # fmt: skip


class Watch:
    """What every phase trained, what it left alone, and the branches at the end of each task."""

    def __init__(self, monkeypatch):
        self.phases, self.tasks, self.grads = [], [], []
        own, finish = course.run_phase, Expand.finish

        def phase(run, phase, resume=None):
            adapter = adapter_of(run.model)
            roles = adapter.roles()
            held = {role: len(roles[role]) for role in sorted(phase.train)}
            before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
            found = own(run, phase, resume)
            named = dict(run.model.named_parameters())
            moved = {n for n, p in named.items() if not torch.equal(p, before[n])}
            ids = {id(p) for role in phase.train for p in roles[role]}
            trained = {n for n, p in named.items() if id(p) in ids}
            graded = {
                n for n, p in named.items()
                if n not in trained and p.grad is not None and p.grad.any()
            }  # fmt: skip
            self.phases.append((phase.name, held, moved, trained, graded))
            for p in named.values():
                p.grad = None
            return found

        def note(boundary, task, workshop, state):
            finish(boundary, task, workshop, state)
            blocks = branches_of(workshop.adapter)
            self.tasks.append([_bits(block) for block in blocks])

        monkeypatch.setattr(course, "run_phase", phase)
        monkeypatch.setattr(Expand, "finish", note)


def _bits(block):
    """Return the frozen adapters of a block, each with its row, descriptor and window."""
    found = [{} for _ in range(block.count)]
    for kind in ("adapter", "router", "descriptor"):
        part = getattr(block, f"held_{kind}")
        for name, axis in part.axes.items() if part is not None else ():
            for one, value in zip(
                found, getattr(part, name).detach().chunk(block.count, axis), strict=True
            ):
                one[f"{kind}.{name}"] = value.clone()
    if block.held_window is not None:
        for one, values, length in zip(
            found, block.held_window.values, block.held_window.length, strict=True
        ):
            one |= {"values": values.clone(), "length": length.clone()}
    return found


@pytest.fixture
def watch(monkeypatch):
    return Watch(monkeypatch)


def test_who_trains_when_and_who_never_again(tmp_path, watch):
    result = go(tmp_path / "run", twelve(), start=-3)
    func, rd, *later = watch.phases
    # Four tensors an adapter, a row and a bias a router, four a descriptor, two of the head.
    assert func[:2] == ("func-1", {"head": 2, "router": 2 * 3, "side": 4 * 12})
    assert rd[:2] == ("rd-1", {"descriptor": 4 * 3})
    assert [name for name, *_ in later] == [
        f"{kind}-{n}" for n in range(1, len(later) // 2 + 1) for kind in ("func", "rd")
    ]
    assert len(later) in (2, 4, 6)
    for name, held, *_ in later:
        one = {"head": 2, "router": 2, "side": 4} if "func" in name else {"descriptor": 4}
        assert held == one
    for name, _, moved, trained, graded in watch.phases:
        windows = {n for n in moved if ".window." in n}
        assert moved - windows <= trained
        assert moved & trained
        assert not graded, f"{name} leaves gradients of {sorted(graded)[:3]}"
        # Errors are recorded where descriptors train.
        assert bool(windows) is name.startswith("rd")
    first, second = watch.tasks
    assert [len(block) for block in first] == [1] * 12
    assert [len(block) for block in second[:9]] == [1] * 9
    grown = sum(len(block) - 1 for block in second)
    assert grown == len(later) // 2 >= 1
    for before, after in zip(first, second, strict=True):
        assert before[0].keys() == after[0].keys()
        assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    lengths = [int(one["length"]) for block in second[9:] for one in block]
    assert set(lengths) == {12}
    (adapters, expansion) = result.system()["figures"]
    assert [list(row) for row in adapters["values"]] == [
        [1.0, float(len(block))] for block in second
    ]
    assert f"{12 + grown} in the end" in adapters["note"]
    assert len(expansion["rows"]) == 3


def test_without_anything_unusual_the_head_alone_trains(tmp_path, watch):
    go(tmp_path / "run", tau=1e6)
    assert [name for name, *_ in watch.phases] == ["func-1", "rd-1", "head-1"]
    _, held, moved, trained, graded = watch.phases[-1]
    assert held == {"head": 2}
    assert moved == trained
    assert not graded
    assert [len(block) for block in watch.tasks[-1]] == [1, 1]


def test_the_released_way_records_in_every_phase(tmp_path, watch):
    go(tmp_path / "run", record="always", window=3, head_decay=False)
    windows = [{n for n in moved if ".window." in n} for _, _, moved, _, _ in watch.phases]
    assert all(windows)


# --- stopped half-way ----------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill."""


def events(path):
    lines = (path / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def killed(out, monkeypatch, when):
    """Run until the first checkpoint for which `when(state of the course)` holds, and die."""
    save = machine.Checkpoints.save

    def dying(self, state):
        path = save(self, state)
        if when(state["course"]):
            raise Killed
        return path

    with monkeypatch.context() as patched:
        patched.setattr(machine.Checkpoints, "save", dying)
        with pytest.raises(Killed):
            go(out)


def inside(name):
    return lambda c: c["group"] == 1 and c["phase"] is not None and c["phase"]["phase"] == name


PLACES = {
    "detection": lambda c: c["group"] == 1 and c["states"] and c["states"][0]["stage"] == "look"
    and c["states"][0]["batch"] == 1 and c["phase"] is None,
    "func": inside("func-1"),
    "rd": inside("rd-1"),
    "between": lambda c: c["group"] == 1 and c["stage"] == "begin",
}  # fmt: skip


def same(whole, again):
    ours, theirs = whole.model.state_dict(), again.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert str(whole.system()["unrestricted"]) == str(again.system()["unrestricted"])
    assert str(whole.system()["figures"]) == str(again.system()["figures"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return go(tmp_path_factory.mktemp("sema") / "whole")


def test_two_micro_batches_of_four_rows_equal_one_batch_of_eight(whole, tmp_path):
    halves = go(tmp_path / "halves", train={"batch_size": 4, "accumulation": 2})
    ours, theirs = whole.model.state_dict(), halves.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert_close(theirs[name], value, tol=2e-5, reason="fp32 sums over some updates")
    counts = [r.system()["figures"][0]["values"] for r in (whole, halves)]
    assert counts[0] == counts[1]


def test_the_most_weights_that_a_phase_trained_are_reported(whole):
    # Task 1: two adapters, two rows of a router, and the head's three classes.
    most = 2 * (2 * 16 * 2 + 2 + 16) + 2 * (16 + 1) + 3 * (16 + 1)
    assert whole.system()["trainable"] == most
    left = sum(p.numel() for p in whole.model.parameters() if p.requires_grad)
    assert left == 6 * (16 + 1)


def test_too_few_rows_to_look_at_are_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(pr.ConfigError) as caught:
        go(tmp_path / "run", detect_batch=17)
    (problem,) = caught.value.problems
    words = r"sema: task '.*': detection: got 16 rows, .* one batch of 17; lower .*"
    assert re.fullmatch(words, problem)
    assert not (tmp_path / "run").exists()
    sema = pr.method("sema", detect_batch=128, detect_least=7)
    assert [len([*sema.too_few(n, first=False)]) for n in (6, 7)] == [1, 0]
    assert [*sema.too_few(1, first=True)] == []


@pytest.mark.parametrize("place", PLACES)
def test_a_kill_inside_goes_on_to_the_same_bits(place, whole, tmp_path, monkeypatch):
    killed(tmp_path / "cut", monkeypatch, PLACES[place])
    again = go(tmp_path / "cut")
    assert "resumed" in [event["event"] for event in events(tmp_path / "cut")]
    same(whole, again)


def test_what_stands_on_disk_is_the_expanded_adapter(whole):
    again = pr.load(tiny_vit(), whole.path / whole.system()["adapter"]).state_dict()
    ours = whole.model.state_dict()
    own = [name for name in ours if "polyrank_" in name]
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], ours[name]) for name in own)
    assert any(name.endswith("held_adapter.up_bias") and len(ours[name]) > 1 for name in own)
