"""mora over many tasks: nothing but the bank grows, and a run killed late goes on to the same."""

import gc
import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

import polyrank as pr
from polyrank import engine
from polyrank.engine import machine
from polyrank.frame import Boundary
from polyrank.parts.boundaries import Aside
from polyrank.streams import digits
from polyrank.testing.streams import tiny_vit

R = 8
GIVEN = {
    "train": {"epochs": 1, "batch_size": 64, "lr": 1e-2},
    "references": [],
    "progress": False,
}


def long_stream(tasks):
    """Five domains of ten digits, few rows of each, shown again and again."""
    whole = digits(tasks=5, domains="blocks")
    short = [{role: rows.take(range(64)) for role, rows in task.data.items()} for task in whole]
    shown = [
        replace(whole[n % 5], index=n, name=f"{n}", domain=f"{n}", data=short[n % 5])
        for n in range(tasks)
    ]
    return replace(whole, tasks=tuple(shown), general=None)


def live_bytes():
    """Return the bytes of all storages that some tensor of this process holds."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        # Not isinstance, which asks some objects for a class of theirs that warns; and no fakes.
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def banked(adapter):
    """Return the bytes of an adapter's banks."""
    parts = [part for layer in adapter.layers for part in layer.bank or ()]
    return sum(part.untyped_storage().nbytes() for part in parts)


@dataclass(frozen=True, kw_only=True)
class Watched(pr.Strategy):
    """Notes (all bytes, bytes of the bank) at the end of the second task and of the last.

    The matrices of scores are made after the first.
    """

    name = "watched"
    notes: ClassVar = []

    def boundary(self) -> Boundary:
        class Note(Aside):
            def finish(self, task, workshop, state):
                if task.index in (1, 14):
                    Watched.notes.append((live_bytes(), banked(workshop.adapter)))

        return Note()


# With so few rows, some layers' new ranks never come among the k: what this counts is bytes.
@pytest.mark.filterwarnings("ignore:append. at .* the live ranks have no values:UserWarning")
def test_over_fifteen_tasks_memory_grows_by_the_bank_alone(tmp_path):
    Watched.notes.clear()
    engine.run(
        tiny_vit(10), long_stream(15), pr.method("mora", r=R), strategies=[Watched()],
        out=tmp_path / "run", **GIVEN,
    )  # fmt: skip
    (first, before), (last, after) = Watched.notes
    grown = after - before
    # Thirteen growths of 8 ranks at 12 layers, each with 2 · 16 or 16 + 32 numbers a rank.
    assert grown == 13 * R * 4 * 2 * (4 * 32 + 2 * 48)
    assert abs((last - first) - grown) <= 0.02 * grown


class Killed(BaseException):
    """Stands for a kill."""


def test_after_ten_tasks_a_killed_run_goes_on_exactly_and_holds_trained_ranks_only(
    tmp_path, monkeypatch
):
    stream, method = long_stream(11), pr.method("mora", r=2, k=22, tau=0.3)
    given = {**GIVEN, "save_every": 10**6}
    whole = engine.run(tiny_vit(10), stream, method, out=tmp_path / "whole", **given)
    written, save = [], machine.Checkpoints.save

    def dying(self, state):
        written.append(save(self, state))
        if len(written) == 10:
            raise Killed
        return written[-1]

    with monkeypatch.context() as patched:
        patched.setattr(machine.Checkpoints, "save", dying)
        with pytest.raises(Killed):
            engine.run(tiny_vit(10), stream, method, out=tmp_path / "cut", **given)
    from safetensors.torch import load_file

    held = load_file(written[-1] / "tensors.safetensors")
    for side, axis in (("A", 0), ("B", 1)):
        banks = {k: v for k, v in held.items() if "polyrank_bank" in k and k.endswith(f".{side}")}
        live = {k: v for k, v in held.items() if f"polyrank_{side}." in k}
        assert len(banks) == len(live) > 0
        assert {v.shape[axis] for v in banks.values()} == {9 * 2}
        assert {v.shape[axis] for v in live.values()} == {2}
        if side == "B":
            assert all(v.any(0).all() for v in (*banks.values(), *live.values()))
    again = engine.run(tiny_vit(10), stream, method, out=tmp_path / "cut", **given)
    text = (tmp_path / "cut" / "events.jsonl").read_text(encoding="utf-8")
    events = [json.loads(line) for line in text.splitlines()]
    assert "resumed" in [event["event"] for event in events]
    ours, theirs = whole.model.state_dict(), again.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert str(whole.system()["unrestricted"]) == str(again.system()["unrestricted"])
