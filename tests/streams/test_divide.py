"""One source divided into tasks: nothing lost, nothing twice, and blur 0 is class-incremental."""

from pathlib import Path

import numpy as np
import pytest

from polyrank.errors import StreamError
from polyrank.streams import stream

NAMES = "abcdefg"


@pytest.fixture
def build(files):
    """A stream of one source with 7 classes and 3 domains, divided as asked."""
    for role, each in (("train", 12), ("test", 3)):
        rows = [
            {"text": f"{role}{c}{i}", "label": NAMES[c], "where": f"d{i % 3}", "half": c // 4}
            for i in range(each)
            for c in range(7)
        ]
        files.jsonl(Path("data") / f"{role}.jsonl", rows)

    def make(split, scenario="class-incremental", **spec):
        base = {"kind": "sequence-classification", "scenario": scenario, "path": "data"}
        return stream(files.definition({**base, **spec, "split": split}))

    return make


def origins(made, role):
    return [task.data[role].origin.tolist() for task in made]


def together(made, role):
    return sorted(np.concatenate([task.data[role].origin for task in made]).tolist())


def test_classes_are_shared_out(build):
    made = build({"tasks": 3})
    assert [t.labels for t in made] == [("a", "b"), ("c", "d"), ("e", "f", "g")]
    assert [t.classes for t in made] == [(0, 1), (2, 3), (4, 5, 6)]
    assert [t.name for t in made] == ["a-b", "c-d", "e-f-g"]
    for role, count in (("train", 84), ("test", 21)):
        assert together(made, role) == list(range(count))
    row = made[1].data["test"][0]
    assert (row["text"][:5], row["label"], row["task"]) == ("test2", 2, 1)
    assert [len(t.labels) for t in build({"tasks": 3, "remainder": "spread"})] == [3, 2, 2]
    assert build({"tasks": 1})[0].name == "a … g (7)"


def test_the_order_of_classes_is_drawn_or_given(build):
    shown = [n for t in build({"tasks": 7, "order": "seed", "seed": 1993}) for n in t.labels]
    assert shown == [NAMES[i] for i in np.random.RandomState(1993).permutation(7)]
    given = build({"tasks": 7, "order": list("gfedcba")})
    assert given.class_names == tuple("gfedcba")
    assert build({"tasks": 7, "order": [6, 5, 4, 3, 2, 1, 0]}).hash == given.hash
    assert given[0].classes == (0,)


def test_without_blur_it_is_the_class_incremental_stream(build):
    plain = build({"tasks": 3}, "class-incremental")
    for part in ("train", "test"):
        assert origins(build({"tasks": 3, "blur": 0.0}), part) == origins(plain, part)


def test_blur_moves_rows_of_a_class_to_one_other_task(build):
    made = build({"tasks": 3, "blur": 0.5}, "blurry")
    assert together(made, "train") == list(range(84))
    home = [set("ab"), set("cd"), set("efg")]
    for task, own in zip(made, home, strict=True):
        names = [task.labels[task.classes.index(c)] for c in task.data["train"]["label"]]
        # Half of the 12 rows of a class stay, the others go to one task.
        assert {name: names.count(name) for name in task.labels} == dict.fromkeys(task.labels, 6)
        assert own <= set(task.labels)
        assert {task.labels[task.classes.index(c)] for c in task.data["test"]["label"]} == own
    assert sorted("".join("".join(t.labels) for t in made)) == sorted(NAMES * 2)
    again = build({"tasks": 3, "blur": 0.5}, "blurry")
    assert origins(again, "train") == origins(made, "train")


def test_rows_are_shared_out_and_tests_are_shared(build):
    made = build({"by": "rows", "tasks": 5}, "instance-incremental")
    assert [t.name for t in made] == [f"part {i}" for i in range(1, 6)]
    assert together(made, "train") == list(range(84))
    assert [t.size("train") for t in made] == [17, 17, 17, 17, 16]
    assert all(part == list(range(21)) for part in origins(made, "test"))
    assert {t.classes for t in made} == {tuple(range(7))}
    for task in made:
        counts = np.bincount(task.data["train"]["label"])
        assert set(counts) <= {2, 3}


def test_domains_are_values_of_a_column(build):
    made = build({"by": "where"}, "domain-incremental")
    assert [t.name for t in made] == [t.domain for t in made] == ["d0", "d1", "d2"]
    assert {t.classes for t in made} == {tuple(range(7))}
    assert together(made, "train") == list(range(84))
    two = build({"by": "where", "tasks": 2, "order": ["d2", "d0", "d1"]}, "domain-incremental")
    assert [t.name for t in two] == ["d2", "d0-d1"]
    halves = build({"by": "half"}, "class-incremental")
    assert [t.labels for t in halves] == [tuple("abcd"), tuple("efg")]


def test_kinds_without_labels_are_divided_by_rows(files):
    Path("a.txt").write_text("\n".join(f"line {i}" for i in range(10)), encoding="utf-8")
    spec = {"kind": "language-modelling", "scenario": "pretraining", "text": "a.txt"}
    made = stream(files.definition({**spec, "split": {"by": "rows", "tasks": 2}}))
    assert [t.size("text") for t in made] == [5, 5]
    assert together(made, "text") == list(range(10))


@pytest.mark.parametrize(
    ("split", "spec", "says"),
    [
        ({"tasks": 8}, {}, r"split.tasks: got 8, expected 1..7"),
        ({}, {}, "split.tasks: is missing, expected the number of tasks"),
        ({"tasks": 3, "remainder": "drop"}, {}, "split.remainder: got 'drop', expected one of"),
        ({"tasks": 3, "remainder": "error"}, {}, "split.7 classes do not divide into 3"),
        ({"tasks": 3, "order": "sed"}, {}, "split.order: got 'sed', expected 'natural'"),
        ({"tasks": 3, "order": ["a"]}, {}, "split.order: got a, expected all of a, b.*drop b, c"),
        ({"tasks": 3, "blur": 0.5}, {}, "split.blur: got 0.5 in a class-incremental stream"),
        ({"tasks": 3, "blur": 1.5}, {}, "split.blur: got 1.5, expected less than 1"),
        ({"tasks": 3, "by": "rows", "blur": 0.1}, {}, "blur: got 0.1 with by 'rows', expected by"),
        ({"tasks": 99, "by": "rows"}, {}, "split.tasks: got 99 for 84 rows of role 'train'"),
        ({"by": "whre"}, {}, "split.by: got 'whre', expected .*did you mean 'where'"),
        ({"tsks": 3}, {}, "split.tsks: unknown key; did you mean 'tasks'"),
        ({"tasks": 2}, {"kind": "language-modelling"}, "split.by: got 'label', but language-mod"),
        ({"tasks": 2}, {"path": "nowhere"}, "tasks.yaml: path: got 'nowhere', but .*not exist"),
    ],
)
def test_what_cannot_be_divided_is_refused(build, split, spec, says):
    with pytest.raises(StreamError, match=says):
        build(split, **spec)
