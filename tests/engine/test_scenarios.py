"""What each scenario lets a method see, and what its scores mean."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

import polyrank as pr
from polyrank import engine
from polyrank.errors import ConfigError, StreamError
from polyrank.frame import Boundary, Loss, Rule
from polyrank.testing.streams import few_digits, tiny_vit

FAST = {"epochs": 1, "batch_size": 8, "lr": 1e-2}
SEEN = []


class Looking(Rule):
    def begin(self, step):
        SEEN.append(("step", step.task))


class LookingLoss(Loss):
    weight = 0.0

    def __call__(self, out, batch):
        SEEN.append(("rows", sorted(set(batch["task"].tolist()))))
        return out.logits.sum()


class LookingBoundary(Boundary):
    def start(self, task, workshop, state):
        SEEN.append(("start", None if task is None else task.name))

    def next(self, task, workshop, state):
        return None


@dataclass(frozen=True, kw_only=True)
class Spy(pr.Strategy):
    name = "spy"

    def rules(self):
        return [Looking()]

    def losses(self):
        return [LookingLoss()]

    def boundary(self):
        return LookingBoundary()


def go(stream, out, *strategies, **changes):
    SEEN.clear()
    given = {"train": FAST, "references": [], "progress": False, **changes}
    method = pr.method("lora", r=2)
    return engine.run(tiny_vit(), stream, method, strategies=strategies, out=out, **given)


def small(**options):
    return few_digits(rows=16, tasks=3, **options)


def test_tasks_with_borders_are_shown(tmp_path):
    stream = small()
    result = go(stream, tmp_path / "run", Spy())
    assert [what for kind, what in SEEN if kind == "start"] == [task.name for task in stream]
    assert {what for kind, what in SEEN if kind == "step"} == {0, 1, 2}
    assert ("rows", [1]) in SEEN
    assert np.isfinite(result.matrix[np.tril_indices(3)]).all()
    assert np.isnan(result.matrix[np.triu_indices(3, 1)]).all()


def test_a_task_free_stream_shows_no_task_and_no_border(tmp_path):
    stream = replace(small(), scenario="task-free", visible=None)
    result = go(stream, tmp_path / "run", Spy())
    assert [what for kind, what in SEEN if kind == "start"] == [None]
    assert {what for kind, what in SEEN if kind == "step"} == {0}
    assert {tuple(what) for kind, what in SEEN if kind == "rows"} == {(-1,)}
    # Every part is evaluated where it ends, without the method's knowledge.
    assert np.isfinite(result.matrix[np.tril_indices(3)]).all()
    with pytest.raises(ConfigError, match="needs boundary"):
        go(stream, tmp_path / "ewc", "ewc")


def test_an_online_stream_is_read_once(tmp_path):
    stream = replace(small(), scenario="online", passes=None)
    with pytest.raises(ConfigError, match="may be read once; use epochs=1"):
        go(stream, tmp_path / "twice", train={**FAST, "epochs": 2})
    result = go(stream, tmp_path / "once", "replay")
    assert np.isfinite(result.matrix[np.tril_indices(3)]).all()
    fresh = stream.fresh()[0].data["train"]
    fresh[0]
    with pytest.raises(StreamError, match="asked for twice"):
        fresh[0]


def test_class_incremental_tasks_are_scored_among_their_own_classes_too(tmp_path):
    result = go(small(), tmp_path / "run")
    lower = np.tril_indices(3)
    assert (result.restricted[lower] >= result.matrix[lower]).all()


def test_where_classes_are_equal_restricted_has_no_meaning(tmp_path):
    whole = pr.streams.digits(domains="inversion")
    tasks = [
        replace(t, data={role: rows.take(range(80)) for role, rows in t.data.items()})
        for t in whole
    ]
    stream = replace(whole, tasks=tuple(tasks), general=None)
    result = go(stream, tmp_path / "run")
    assert np.isnan(result.restricted).all()
    assert np.isfinite(result.matrix[np.tril_indices(2)]).all()
    head = pr.adapter_of(result.model).head
    assert len(head.names) == 10


def test_blurry_tasks_grow_the_head_by_what_is_new(tmp_path):
    whole = few_digits(rows=16, tasks=6)
    first, second = whole[0], whole[1]
    # The second task brings rows of the first one's class again.
    both = {
        role: pr.streams.Rows(
            {
                name: np.concatenate([first.data[role].batch(slice(None))[name], values])
                for name, values in second.data[role].batch(slice(None)).items()
            }
        )
        for role in second.data
    }
    mixed = replace(second, labels=(*first.labels, *second.labels), classes=(0, 1), data=both)
    stream = replace(whole, tasks=(first, mixed), scenario="blurry", visible=None, general=None)
    result = go(stream, tmp_path / "run")
    assert list(pr.adapter_of(result.model).head.names) == ["4", "5"]


def test_a_task_incremental_stream_gives_the_task_at_test(tmp_path):
    stream = replace(small(), scenario="task-incremental", visible=None)
    assert stream.visible.task_id_test
    result = go(stream, tmp_path / "run")
    assert (result.restricted[2] >= result.matrix[2]).all()


def test_several_processes_do_not_write_one_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"one of 2 processes.*without torchrun"):
        go(small(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
