"""The digits stream: real images, split by form blocks, nothing lost and nothing twice."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from polyrank.errors import StreamError
from polyrank.streams import digits, digits_base
from polyrank.streams.digits import FORM_BLOCKS

ROLES = ("train", "validation", "test")


def every_role(*tasks):
    return [(task, role, task.data[role]) for task in tasks for role in ROLES]


def flat(rows):
    batch = rows.batch(slice(None))
    return batch["pixel_values"].reshape(len(rows), -1), batch["label"]


def classifier():
    return LogisticRegression(C=0.1, max_iter=2000)


def test_form_blocks_are_where_the_sequence_of_labels_begins_anew():
    target = load_digits().target
    first = target[:40].tolist()
    for start in FORM_BLOCKS:
        block = target[start : start + 40].tolist()
        # One block lacks a 7 and an 8 in its second round of digits.
        same = sum(a == b for a, b in zip(block, first, strict=True))
        assert same >= 39 or start == 1545
    assert target[1545:1564].tolist() == [*first[:17], 9, 0]


def test_three_tasks_of_two_new_digits():
    stream = digits()
    assert stream.scenario == "class-incremental"
    assert [t.name for t in stream] == ["4-5", "6-7", "8-9"]
    assert [t.labels for t in stream] == [("4", "5"), ("6", "7"), ("8", "9")]
    assert [t.classes for t in stream] == [(0, 1), (2, 3), (4, 5)]
    assert stream.pretraining.labels == ("0", "1", "2", "3")
    assert stream.pretraining.classes == (0, 1, 2, 3)
    assert [t.size("test") for t in stream] == [104, 103, 98]


def test_rows_are_the_images_with_their_labels():
    bunch = load_digits()
    stream = digits(seed=4, order=[5, 3, 1, 0, 2, 4])
    assert [t.labels for t in stream] == [("9", "7"), ("5", "4"), ("6", "8")]
    for task, _, rows in every_role(stream.pretraining, *stream):
        for i in range(0, len(rows), 17):
            row, origin = rows[i], rows.origin[i]
            assert set(row) == {"pixel_values", "label", "task"}
            assert row["pixel_values"].dtype == np.float32
            assert row["pixel_values"].shape == (1, 8, 8)
            np.testing.assert_array_equal(row["pixel_values"][0] * 8 + 8, bunch.images[origin])
            name = task.labels[task.classes.index(row["label"])]
            assert int(name) == bunch.target[origin]
            assert row["task"] == task.index
        values = rows.batch(slice(None))["pixel_values"]
        assert -1 == values.min() < values.max() == 1


@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 6])
def test_splits_partition_the_data(tasks):
    stream = digits(seed=1, tasks=tasks, order="seed")
    used = [rows.origin for _, _, rows in every_role(stream.pretraining, *stream)]
    assert sorted(np.concatenate(used).tolist()) == list(range(1797))
    assert sum(len(t.classes) for t in stream) == 6
    assert sorted(stream.class_names) == list("456789")


def test_no_form_block_serves_two_roles():
    stream = digits()
    blocks = {role: set() for role in ROLES}
    for _, role, rows in every_role(stream.pretraining, *stream):
        blocks[role] |= set(np.searchsorted(FORM_BLOCKS, rows.origin, side="right") - 1)
    assert blocks["train"] == set(range(8))
    assert blocks["validation"] == {8, 9}
    assert blocks["test"] == {10, 11, 12, 13}


def test_reading_again_gives_the_same_order():
    stream, twin = digits(3), digits(3)
    np.random.default_rng().random(3)
    for (_, _, first), (_, _, second) in zip(every_role(*stream), every_role(*twin), strict=True):
        assert first.origin.tolist() == second.origin.tolist()
        a, b = flat(first), flat(second)
        assert all((x == y).all() for x, y in zip(a, b, strict=True))
        assert [r["label"] for r in first] == [r["label"] for r in first]
    assert stream.hash == twin.hash


def test_the_seed_draws_the_order_of_training_rows_only():
    one, two = digits(0), digits(1)
    for a, b in zip(one, two, strict=True):
        assert a.data["train"].origin.tolist() != b.data["train"].origin.tolist()
        assert sorted(a.data["train"].origin) == sorted(b.data["train"].origin)
        assert a.data["test"].fingerprint == b.data["test"].fingerprint
    before = np.random.get_state()[1].copy()
    digits(5, order="seed")
    assert (np.random.get_state()[1] == before).all()


def test_the_base_does_not_know_the_new_digits():
    shown = {name for task in digits() for name in task.labels}
    assert shown.isdisjoint(digits_base().labels)


def test_a_linear_model_learns_it_and_forgetting_is_possible():
    # Logistic regression on pixels: each task alone .95-1.00, all six digits jointly .93; a
    # stream on which this fails would measure nothing.
    stream = digits()
    for task in stream:
        fitted = classifier().fit(*flat(task.data["train"]))
        assert fitted.score(*flat(task.data["test"])) > 0.9
    trains = [flat(task.data["train"]) for task in stream]
    pixels, labels = (np.concatenate(part) for part in zip(*trains, strict=True))
    joint = classifier().fit(pixels, labels)
    scores = [joint.score(*flat(task.data["test"])) for task in stream]
    assert np.mean(scores) > 0.9
    # The last task's model knows nothing of the first one.
    assert classifier().fit(*trains[-1]).score(*flat(stream[0].data["test"])) == 0


def fit(*tasks):
    parts = [flat(task.data["train"]) for task in tasks]
    pixels, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    return classifier().fit(pixels, labels)


def scores(fitted, stream):
    return np.array([fitted.score(*flat(task.data["test"])) for task in stream])


def blocks_of(rows):
    return set(np.searchsorted(FORM_BLOCKS, rows.origin, side="right") - 1)


@pytest.mark.parametrize("domains", ["blocks", "rotation", "inversion"])
def test_domains_keep_the_classes_and_no_test_image_was_trained_on(domains):
    stream = digits(2, domains=domains)
    assert stream.scenario == "domain-incremental"
    assert stream.name == f"digits-{domains}"
    labels = tuple(map(str, range(9 if domains == "rotation" else 10)))
    assert {task.labels for task in stream} == {labels}
    assert {task.classes for task in stream} == {tuple(range(len(labels)))}
    assert [task.domain for task in stream] == [task.name for task in stream]
    base = stream.pretraining
    assert base.labels == labels
    trained = {b for task in (base, *stream) for b in blocks_of(task.data["train"])}
    for task in (base, *stream):
        for role in set(task.data) - {"train"}:
            assert not blocks_of(task.data[role]) & trained
    assert digits(2, domains=domains).hash == stream.hash
    assert digits(3, domains=domains).hash != stream.hash


def test_domains_of_form_blocks_share_no_image():
    stream = digits(domains="blocks", tasks=5)
    used = [rows.origin for task in stream for rows in task.data.values()]
    assert sorted(np.concatenate(used).tolist()) == list(range(FORM_BLOCKS[4], 1797))
    assert [task.name for task in stream][:2] == ["blocks 4-5", "blocks 6-7"]
    assert all(set(task.data) == {"train", "test"} for task in stream)
    wide = digits(domains="blocks", tasks=2, order=[1, 0])
    assert [task.name for task in wide] == ["blocks 9-13", "blocks 4-8"]
    assert blocks_of(wide[0].data["validation"]) == {12}


def test_turned_and_inverted_images_are_the_plain_ones():
    turned = digits(domains="rotation", tasks=4)
    inverted = digits(domains="inversion")
    for role in ("train", "test"):
        plain = [stream[0].data[role].batch(slice(None)) for stream in (turned, inverted)]
        for turns in range(4):
            found = turned[turns].data[role].batch(slice(None))
            assert turned[turns].name == f"{90 * turns} degrees"
            expected = np.rot90(plain[0]["pixel_values"], turns, axes=(2, 3))
            np.testing.assert_array_equal(found["pixel_values"], expected)
            np.testing.assert_array_equal(found["label"], plain[0]["label"])
        found = inverted[1].data[role].batch(slice(None))["pixel_values"]
        np.testing.assert_array_equal(found, -plain[1]["pixel_values"])
        assert inverted[1].data[role].batch([0])["pixel_values"].dtype == np.float32


def test_a_linear_model_sees_how_far_domains_lie_apart():
    # A model of plain digits against other domains, by logistic regression on pixels: about .75
    # on other form blocks, near chance on images turned by 90 degrees, below it on inverted ones.
    blocks, turned, inverted = (digits(domains=d) for d in ("blocks", "rotation", "inversion"))
    assert scores(fit(*blocks), blocks).min() > 0.85
    assert scores(fit(blocks[0]), blocks).min() > 0.6
    assert scores(fit(turned[0]), turned)[[0, 1]] @ [1, -1] > 0.6
    assert scores(fit(*turned), turned).min() > 0.7
    assert scores(fit(inverted[0]), inverted).tolist()[1] < 0.1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"domains": "rotations"}, "domains: got 'rotations'.*did you mean 'rotation'"),
        ({"domains": "inversion", "tasks": 3}, "tasks: got 3, expected 1..2 for domains"),
        ({"domains": "blocks", "tasks": 6}, "tasks: got 6, expected 1..5"),
        ({"domains": "rotation", "order": [0, 1]}, "order: got .*permutation of 0..2"),
    ],
)
def test_impossible_domains_are_refused(options, says):
    with pytest.raises(StreamError, match=says):
        digits(**options)
