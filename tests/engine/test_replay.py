"""The buffer: who stays is chance of the right size, drawn by key, within its limits."""

import numpy as np
import pytest
import torch
from scipy import stats

from polyrank.engine.replay import RowBuffer, size_of
from polyrank.errors import ConfigError
from polyrank.frame import Replay


def buffer(seed=0, rows=200, **options):
    def read(task, row):
        return {"label": row % 4, "x": np.float32(task * 1000 + row)}

    def collate(found):
        return {
            "labels": torch.tensor([r["label"] for r in found]),
            "task": torch.tensor([r["task"] for r in found]),
            "row": torch.tensor([r["row"] for r in found]),
        }

    return RowBuffer(Replay(**options), rows, read, collate, seed)


def offered(made, rows=200, tasks=1, logits=None):
    for task in range(tasks):
        for row in range(rows):
            made.offer(task, row, row % 4, None if logits is None else logits(task, row))
        made.close_task()
    return made


def kept(made):
    return sorted((e[0], e[1]) for group in made.kept.values() for e in group)


def test_a_reservoir_keeps_every_row_with_equal_probability():
    hits = np.zeros(40)
    for seed in range(400):
        for _, row in kept(offered(buffer(seed, capacity=10), rows=40)):
            hits[row] += 1
    # 400 draws of 10 out of 40: 100 expected each.
    assert stats.chisquare(hits).pvalue > 1e-3


def test_a_share_below_one_is_of_the_streams_rows():
    assert len(offered(buffer(capacity=0.05), rows=200)) == 10
    assert len(offered(buffer(capacity=7), rows=200)) == 7


def test_groups_get_equal_parts_and_old_ones_give_way():
    made = offered(buffer(capacity=12, by="task"), rows=40, tasks=3)
    assert [sum(t == task for t, _ in kept(made)) for task in range(3)] == [4, 4, 4]
    made = offered(buffer(capacity=12, by="class"), rows=40)
    labels = [e[2] for group in made.kept.values() for e in group]
    assert [labels.count(label) for label in range(4)] == [3, 3, 3, 3]


def test_a_row_is_offered_once_and_its_logits_are_renewed():
    made = buffer(capacity=100, stores=frozenset({"logits"}))
    for value in (1.0, 2.0):
        for row in range(5):
            made.offer(0, row, 0, torch.full((2,), value))
    assert len(made) == 5
    assert (made.draw(5, "k")["stored"] == 2.0).all()


def test_stored_logits_of_fewer_classes_are_padded_by_nan():
    made = buffer(capacity=100, stores=frozenset({"logits"}))
    made.offer(0, 0, 0, torch.ones(2))
    made.offer(1, 0, 0, torch.ones(4))
    stored = made.draw(2, "k")["stored"]
    assert sorted(stored.isnan().sum(1).tolist()) == [0, 2]


def test_draws_are_keyed_and_without_repetition():
    made = offered(buffer(capacity=50))
    first, again = made.draw(20, "a", 1), made.draw(20, "a", 1)
    other = made.draw(20, "a", 2)
    assert torch.equal(first["row"], again["row"])
    assert not torch.equal(first["row"], other["row"])
    assert len(set(first["row"].tolist())) == 20
    assert len(made.draw(500, "b")["row"]) == 50
    assert made.drawn == 110


def test_draws_of_one_task_are_of_that_task():
    made = offered(buffer(capacity=30, by="task"), rows=40, tasks=3)
    assert set(made.draw(5, "k", task=1)["task"].tolist()) == {1}
    assert made.tasks() == [0, 1, 2]
    with pytest.raises(ConfigError, match="no row of task 7 is kept yet"):
        made.draw(5, "k", task=7)


def test_bytes_are_bounded():
    row = size_of({"label": 1, "x": np.float32(1)})
    assert row == 12
    made = offered(buffer(capacity=100, bytes=20 * row + 3))
    assert len(made) == 20
    assert made.bytes <= 20 * row + 3
    assert size_of({"text": "äb"}) == 3


def test_state_goes_on_as_if_never_interrupted():
    whole, half = (buffer(capacity=9, by="task", stores=frozenset({"logits"})) for _ in range(2))

    def offer(made, tasks):
        for task in tasks:
            for row in range(30):
                made.offer(task, row, row % 4, torch.tensor([float(row)]))
            made.draw(4, task)
            made.close_task()

    offer(whole, range(4))
    offer(half, range(2))
    again = buffer(capacity=9, by="task", stores=frozenset({"logits"}))
    again.restore(half.state())
    offer(again, range(2, 4))
    assert kept(again) == kept(whole)
    assert again.drawn == whole.drawn
    first, second = again.draw(9, "k"), whole.draw(9, "k")
    assert all(torch.equal(first[name], second[name]) for name in first)
