"""The stream contract: what is checked, what is hidden, what stays the same on every reading."""

import copy
import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from polyrank import streams
from polyrank.errors import StreamError
from polyrank.streams import OnePass, Rows, Stream, Task, Visible


def rows(*labels, **columns):
    return Rows({"x": np.arange(len(labels)) * 1.0, "label": list(labels), **columns})


def task(index=0, classes=(0, 1), labels=None, name=None, **changes):
    data = {"train": rows(*classes, *classes), "test": rows(*classes)}
    fields = {"index": index, "classes": classes, "data": data, "name": name or f"t{index}"}
    return Task(**{**fields, "labels": labels or [f"c{c}" for c in classes], **changes})


def build(*tasks, scenario="class-incremental", **changes):
    return Stream(**{"name": "toy", "scenario": scenario, "tasks": tasks, **changes})


def problems(*tasks, **changes):
    with pytest.raises(StreamError) as caught:
        build(*tasks, **changes)
    return caught.value.problems


def test_a_sound_stream_and_its_description():
    made = build(task(), task(1, (2, 3, 4)), seed=3, options={"order": "natural"})
    assert len(made) == 2
    assert [t.name for t in made] == ["t0", "t1"]
    assert made[1].classes == (2, 3, 4)
    assert made.seen(0) == (0, 1)
    assert made.seen(1) == (0, 1, 2, 3, 4)
    assert made.class_names == ("c0", "c1", "c2", "c3", "c4")
    described = made.describe()
    assert described["hash"] == made.hash
    assert described["seed"] == 3
    assert described["tasks"][1] == {
        "name": "t1",
        "kind": None,
        "labels": ["c2", "c3", "c4"],
        "classes": [2, 3, 4],
        "metric": "accuracy",
        "prompt": None,
        "domain": None,
        "n_train": 6,
        "n_validation": 0,
        "n_test": 3,
    }


FAULTS = {
    "no task": ([], {}, "tasks: got none"),
    "index": ([task(1)], {}, r"task indices: got \[1\], expected 0..0"),
    "same name": ([task(), task(1, (2, 3), name="t0")], {}, "got 't0' twice"),
    "label names": ([task(labels=["a"])], {}, "got 1 label names for 2 classes"),
    "class gap": ([task(classes=(1, 2))], {}, r"new classes: got \[1, 2\], expected 0..1"),
    "class kind": ([task(classes=(0.0, 1.0))], {}, "expected whole numbers from 0"),
    "class twice": ([task(classes=(0, 0))], {}, "expected each class once"),
    "overlap": ([task(), task(1, (1, 2))], {}, r"share classes \[1\].*declare 'blurry'"),
    "one name, two classes": (
        [task(), task(1, (2, 3), labels=["c0", "d"])],
        {},
        "class name 'c0': got it for classes 0 and 2",
    ),
    "two names, one class": (
        [task(), task(1, (0, 1), labels=["c0", "d"])],
        {"scenario": "domain-incremental"},
        r"got \['c1'\] beside another name",
    ),
    "other classes": (
        [task(), task(1, (2, 3))],
        {"scenario": "domain-incremental"},
        r"has classes \[2, 3\], expected those of the first task",
    ),
    "blurry without overlap": (
        [task(), task(1, (2, 3))],
        {"scenario": "blurry"},
        "no two tasks share a class",
    ),
    "blurry, all equal": (
        [task(), task(1)],
        {"scenario": "blurry"},
        "all tasks have the same classes",
    ),
    "foreign label": (
        [task(data={"train": rows(0, 1, 7), "test": rows(0)})],
        {},
        r"role 'train': got labels \[7\], expected only \[0, 1\]; move",
    ),
    "foreign test label": (
        [task(data={"train": rows(0, 1), "test": rows(5)})],
        {},
        r"role 'test': got labels \[5\]",
    ),
    "class without rows": (
        [task(data={"train": rows(0), "test": rows(0)})],
        {},
        r"no row of classes \[1\]",
    ),
    "empty": ([task(data={"train": rows(0, 1), "test": rows()})], {}, "'test': got no rows"),
    "no label": (
        [task(data={"train": Rows({"x": [1.0, 2.0]}), "test": rows(0)})],
        {},
        "rows have no 'label'",
    ),
    "text label": (
        [task(data={"train": Rows({"label": ["cat", "dog"]}), "test": rows(0)})],
        {},
        "expected class numbers; map them",
    ),
    "missing role": ([task(data={"train": rows(0, 1)})], {}, "role 'test' is missing"),
    "unknown role": (
        [task(data={"train": rows(0, 1), "test": rows(0), "tests": rows(0)})],
        {},
        "role 'tests': expected one of .* did you mean 'test'?",
    ),
    "passes": ([task()], {"passes": -1}, "passes: got -1"),
    "pretraining": (
        [task()],
        {"pretraining": task(classes=(1, 2))},
        "pretraining 't0': new classes",
    ),
    "unlearning roles": ([task()], {"scenario": "unlearning"}, "role 'forget' is missing"),
}


@pytest.mark.parametrize(("tasks", "changes", "message"), FAULTS.values(), ids=FAULTS)
def test_every_fault_is_named(tasks, changes, message):
    found = problems(*tasks, **changes)
    with pytest.raises(StreamError, match=message):
        raise StreamError(found)
    assert all(line.startswith("stream 'toy': ") for line in found)


def test_all_faults_are_reported_together():
    wrong = task(1, (1, 2), data={"train": rows(1, 2, 9), "test": rows()})
    found = "\n".join(problems(task(), wrong))
    for part in ("labels [9]", "'test': got no rows", "share classes [1]"):
        assert part in found


def test_unknown_scenario_suggests():
    with pytest.raises(StreamError, match="did you mean 'class-incremental'"):
        build(task(), scenario="class-incrementel")


def test_unlearning_may_take_any_class_away():
    data = {"forget": rows(3), "retain": rows(3), "test": rows(3)}
    assert len(build(task(classes=(3,), data=data), scenario="unlearning")) == 1


def test_text_tasks_need_no_classes():
    data = {"train": Rows({"text": ["a", "bb"]}), "test": Rows({"text": ["c"]})}
    made = build(task(classes=(), labels=(), data=data), scenario="text")
    assert made[0].data["train"][1] == {"text": "bb"}


@pytest.mark.parametrize(
    ("scenario", "train", "test"),
    [
        ("class-incremental", True, False),
        ("task-incremental", True, True),
        ("task-free", False, False),
    ],
)
def test_task_ids_are_read_only_where_visible(scenario, train, test):
    made = build(task(), task(1, (2, 3)), scenario=scenario)
    for when, visible in (("train", train), ("test", test)):
        if visible:
            assert made.task_id(1, when) == 1
        else:
            with pytest.raises(StreamError, match=f"asked for at {when}.*hides it; use a method"):
                made.task_id(1, when)


def test_visibility_can_be_declared():
    made = build(task(), visible=Visible(task_id_test=True, n_tasks=True))
    assert made.task_id(0, "test") == 0
    assert made.describe()["visible"]["n_tasks"] is True


def test_an_online_stream_is_read_once():
    plain = build(task(), task(1, (2, 3)))
    online = build(*plain, scenario="online")
    for one, many in zip(online, plain, strict=True):
        train = one.data["train"]
        assert isinstance(train, OnePass)
        # Batch by batch it is the class-incremental stream.
        assert [train[i] for i in range(len(train))] == list(many.data["train"])
        with pytest.raises(StreamError, match=r"row 0 was asked for twice.*replay buffer"):
            train[0]
        assert one.data["test"][0] == one.data["test"][0]
    again = online.fresh()
    assert again[0].data["train"][0] == plain[0].data["train"][0]
    assert again.hash == online.hash != plain.hash
    assert plain.fresh() is plain


def test_the_hash_follows_every_row_and_nothing_else():
    def made(value=1.0, **changes):
        train = Rows({"x": [0.0, value], "label": [0, 1]})
        return build(task(data={"train": train, "test": rows(0, 1)}, **changes))

    assert made().hash == made().hash
    assert made(2.0).hash != made().hash
    assert made(labels=["a", "b"]).hash != made().hash
    assert made(prompt="what is {x}?").hash != made().hash
    code = "from polyrank.streams import digits; print(digits(1).hash)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == streams.digits(1).hash != streams.digits(0).hash


def test_any_map_style_dataset_fits():
    torch = pytest.importorskip("torch")
    datasets = pytest.importorskip("datasets")

    class Plain(torch.utils.data.Dataset):
        def __init__(self, shift=0.0):
            self.shift = shift

        def __len__(self):
            return 2

        def __getitem__(self, i):
            return {"x": torch.full((2,), i + self.shift), "label": i, "name": "n", "raw": b"b"}

    def hugging(*labels):
        return datasets.Dataset.from_dict({"label": list(labels), "x": [[1, 2]] * len(labels)})

    def made(shift=0.0, labels=(0, 1)):
        return build(task(data={"train": Plain(shift), "test": hugging(*labels)}))

    assert made().hash == made().hash
    assert made(0.5).hash != made().hash
    assert made(labels=(1, 0)).hash != made().hash
    with pytest.raises(StreamError, match=r"role 'test': got labels \[2\]"):
        made(labels=(0, 2))


def test_rows_are_fixed_and_copied_out():
    source = np.zeros((3, 2), dtype=np.float32)
    data = Rows({"x": source, "label": [2, 1, 0], "text": ["a", "b", "c"]})
    source += 1
    first = data[0]
    assert first["x"].tolist() == [0, 0]
    assert (type(first["label"]), type(first["text"])) == (int, str)
    first["x"] += 1
    assert data[0]["x"].tolist() == [0, 0]
    assert len(list(data)) == len(data) == 3
    batch = data.batch([2, 0])
    assert batch["label"].tolist() == [0, 2]
    batch["label"][:] = 9
    assert data.labels.tolist() == [2, 1, 0]
    assert data.take([1]).fingerprint == Rows(data.batch([1])).fingerprint
    with pytest.raises(IndexError):
        data[3]
    with pytest.raises(StreamError, match="equal lengths; drop"):
        Rows({"x": [1], "label": [1, 2]})
    with pytest.raises(StreamError, match="mixed objects"):
        Rows({"x": [object()]})


def test_rows_without_a_checksum_are_refused():
    class Odd:
        def __len__(self):
            return 1

        def __getitem__(self, i):
            return {"label": 0, "x": object()}

    made = build(task(classes=(0,), data={"train": Odd(), "test": Odd()}))
    with pytest.raises(StreamError, match=r"has no checksum.*own `fingerprint`"):
        made.hash  # noqa: B018


def test_a_stream_travels_between_processes():
    made = streams.digits()
    for twin in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert twin.hash == made.hash
        assert twin.describe() == made.describe()


def test_tasks_cannot_be_changed():
    made = build(task())
    with pytest.raises(AttributeError):
        made.tasks = ()
    with pytest.raises(TypeError):
        made[0].data["train"] = rows(0)


@pytest.mark.parametrize(
    ("n", "k", "policy", "sizes"),
    [
        (6, 3, "error", [2, 2, 2]),
        (7, 3, "last", [2, 2, 3]),
        (8, 3, "spread", [3, 3, 2]),
        (5, 5, "last", [1] * 5),
        (5, 1, "last", [5]),
    ],
)
def test_no_class_is_dropped(n, k, policy, sizes):
    assert streams.share_out(n, k, policy) == sizes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: streams.share_out(3, 4), r"tasks: got 4, expected 1..3.*fewer"),
        (lambda: streams.share_out(3, 0), "tasks: got 0"),
        (lambda: streams.share_out(3, 2, "error"), "3 classes do not divide into 2"),
        (lambda: streams.share_out(3, 2, "drop"), "remainder: got 'drop'"),
        (lambda: streams.class_order(3, [0, 1, 1]), r"permutation of 0..2; name every class once"),
        (lambda: streams.class_order(3, "random"), "order: got 'random'"),
        (lambda: streams.digits(seed=-1), r"seed: got -1, expected 0..4294967295"),
        (lambda: streams.digits(tasks=7), "tasks: got 7, expected 1..6"),
    ],
)
def test_impossible_splits_are_refused(call, message):
    with pytest.raises(StreamError, match=message):
        call()


def test_the_order_of_a_seed_is_numpys_legacy_permutation():
    expected = np.random.RandomState(1993).permutation(100).tolist()
    assert streams.class_order(100, "seed", 1993) == expected
    # The well-known start of the order that class-incremental benchmarks use.
    assert expected[:5] == [68, 56, 78, 8, 23]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("digit", {}, "got 'digit', expected a file or one of: digits, .*did you mean 'digits'?"),
        ("qqqq", {}, "choose one"),
        ("tasks.yaml", {}, r"the file 'tasks.yaml' does not exist; correct the path"),
        (Path("data"), {}, "got the path 'data', expected a YAML file that describes the stream"),
        ("rows.csv", {}, "name the data in one"),
        ("runs/a", {}, "expected a YAML file"),
        (7, {}, "got int, expected a name"),
        ("trace", {"rot": "x"}, "unknown option 'rot'.*did you mean 'root'"),
        ("digits", {"sed": 1, "x": 2}, r"unknown option 'sed'.*did you mean 'seed'[\s\S]*'x'"),
    ],
)
def test_what_the_registry_refuses(source, options, message):
    with pytest.raises(StreamError, match=message):
        streams.stream(source, **options)


def test_the_registry_builds_and_passes_through():
    made = streams.stream("digits", seed=5)
    assert made.seed == 5
    assert streams.stream(made) is made
    assert streams.names()[:3] == ["digits", "stdlib", "stdlib-lm"]
    assert len(streams.names()) == len(set(streams.names())) == 9
    with pytest.raises(StreamError, match="built already"):
        streams.stream(made, seed=1)


def test_streams_import_no_torch():
    code = (
        "import sys, polyrank.streams as s; light = 'sklearn' in sys.modules\n"
        "s.digits().hash; print(light, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_nan_in_a_row_has_a_checksum():
    def made(value):
        data = {"train": [{"label": 0, "x": value}], "test": [{"label": 0, "x": 0.0}]}
        return build(task(classes=(0,), data=data))

    assert made(math.nan).hash == made(math.nan).hash != made(0.5).hash
