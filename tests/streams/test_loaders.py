"""Every format gives the same rows; labels by name, number or column; data sets of the hub."""

import json
import sys
from pathlib import Path

import pytest

from polyrank.errors import StreamError
from polyrank.streams import draw, stream, templates
from polyrank.streams.loaders import local

ROWS = [{"text": 'a, "b"\nc', "label": "x"}, {"text": "dé", "label": "y"}]


def write(name, files):
    path = Path(name)
    if name.endswith(".json"):
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif name.endswith(".parquet"):
        files.parquet(path, ROWS)
    elif name.endswith("sv"):
        files.table(path, ROWS, "\t" if name.endswith(".tsv") else ",")
    else:
        files.jsonl(path, ROWS)
    return path


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a.csv", "a.tsv", "a.parquet"])
def test_every_format_gives_the_same_rows(name, files):
    found = local(write(name, files))
    assert len(found) == 2
    assert [dict(found.row(i)) for i in range(2)] == ROWS
    assert found.column("label") == ["x", "y"]
    assert sorted(found.columns) == ["label", "text"]
    assert found.where == name


def test_text_becomes_rows_by_line_paragraph_or_document():
    Path("a.txt").write_text("one\ntwo\n \n\nthree\n", encoding="utf-8")
    units = {"line": ["one", "two", "three"], "paragraph": ["one\ntwo", "three"]}
    for unit, texts in units.items():
        assert local(Path("a.txt"), unit=unit).column("text") == texts
    assert len(local(Path("a.txt"), unit="document")) == 1
    Path("b.md").write_text("four", encoding="utf-8")
    both = local(Path("[ab].*"))
    assert both.column("text")[-1] == both.row(len(both) - 1)["text"] == "four"
    assert len(both) == 4
    with pytest.raises(IndexError):
        both.row(4)


def test_a_csv_file_without_names_gets_them():
    Path("a.csv").write_text("3,hello\n4,you\n", encoding="utf-8")
    found = local(Path("a.csv"), header=["label", "text"])
    assert found.row(1) == {"label": "4", "text": "you"}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", '{"a": 1}', "expected a list of objects, one for each row"),
        ("a.json", '{"a": 1}\n{"a": 2}', "no JSON at line 2.*call the file .jsonl"),
        ("a.jsonl", '{"a": 1}\n{', "no JSON in line 2"),
        ("a.jsonl", "3", "got 3 in line 1"),
        ("a.csv", "a,b\n1", r"row 1 has 1 values for 2 columns \(a, b\); put quotes"),
        ("a.csv", "a,a\n1,2", "two columns are called 'a'; rename one"),
        ("a.csv", 'a\n"' + "x" * 140_000 + '"', "field larger than .*write it as JSON lines"),
        ("a.parquet", "no", "no Parquet file"),
        ("a.txt", b"\xff\xfe\xff", "cannot be read: .*it must be UTF-8 text"),
        ("a.xyz", "", "got the ending '.xyz', expected one of .json, "),
    ],
)
def test_what_cannot_be_read_is_named(name, content, says):
    path = Path(name)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(StreamError, match=f"^{name}: .*{says}" if "names" not in says else says):
        local(path)


def test_folders_that_hold_no_images_are_named(files):
    Path("empty").mkdir()
    with pytest.raises(StreamError, match=r"no image below a folder of its class.*empty/cat/1.png"):
        local(Path("empty"))
    with pytest.raises(StreamError, match="nowhere: no such file or folder"):
        local(Path("nowhere"))
    with pytest.raises(StreamError, match="empty: got a folder, expected a csv file"):
        local(Path("empty"), kind="csv")
    files.jsonl(Path("a.jsonl"), [{"a": 1}])
    files.jsonl(Path("b.jsonl"), [{"b": 1}])
    with pytest.raises(StreamError, match="got the columns b, expected those"):
        local(Path("*.jsonl"))


def one(files, task, **spec):
    task = {"name": "a", **task}
    base = {"kind": "sequence-classification", "scenario": "text"}
    return stream(files.definition({**base, **spec, "tasks": [task]}))[0]


def test_a_folder_has_its_roles_by_name(files, tmp_path):
    files.jsonl(tmp_path / "d" / "train.jsonl", files.texts(4))
    files.table(tmp_path / "d" / "test.csv", files.texts(2))
    files.jsonl(tmp_path / "d" / "dev.jsonl", files.texts(2))
    made = one(files, {"path": "d"})
    assert {role: len(rows) for role, rows in made.data.items()} == {"train": 4, "test": 2}
    made = one(files, {"path": "d", "train": "train", "validation": "dev", "test": "test.csv"})
    assert made.size("validation") == 2
    with pytest.raises(StreamError, match=r"tasks\[0\].train: .*trian: no such file or folder"):
        one(files, {"path": "d", "train": "trian"})


def test_a_folder_of_images_has_its_roles_by_name(files, tmp_path):
    files.photos(tmp_path / "p" / "train", each=2)
    files.photos(tmp_path / "p" / "test", each=1)
    made = one(files, {"path": "p"}, kind="image-classification")
    assert made.labels == ("cat", "dog")
    assert [len(rows) for rows in made.data.values()] == [4, 2]
    assert made.data["test"][1]["image"].tolist() == files.png(10)[1].tolist()


def test_paths_of_images_start_at_their_file(files, tmp_path):
    files.photos(tmp_path / "p" / "all")
    rows = [{"image": f"all/{c}/{i}.png", "label": c} for c in ("cat", "dog") for i in range(3)]
    files.jsonl(tmp_path / "p" / "rows.jsonl", rows)
    task = {"path": "p/rows.jsonl", "train": 0.5, "test": 0.5}
    made = one(files, task, kind="image-classification")
    assert made.data["train"][0]["image"].shape == (3, 4, 3)
    rows[0]["image"] = "all/none.png"
    files.jsonl(tmp_path / "p" / "rows.jsonl", rows)
    with pytest.raises(StreamError, match=r"rows.jsonl, row 0: .*none.png.*correct the path"):
        _ = [r.fingerprint for r in one(files, task, kind="image-classification").data.values()]


LABELS = {
    "as they are, sorted": ([10, 9, 9, 10], {}, ["9", "10"], ["10", "9", "9", "10"]),
    "by number": ([0, 1, 1, 0], {"labels": ["a", "b"]}, ["a", "b"], list("abba")),
    "by name": (["b", "a", "a", "b"], {"labels": ["b", "a"]}, ["b", "a"], list("baab")),
    "names that are numbers": ([1, 2, 2, 1], {"labels": [1, 2]}, ["1", "2"], list("1221")),
    "by word": ([1, 2, 2, 1], {"labels": {2: "b", 1: "a"}}, ["b", "a"], list("abba")),
    "true and false": (
        [True, False, False, True],
        {"labels": ["n", "y"]},
        ["n", "y"],
        list("ynny"),
    ),
    "floats": ([1.0, 0.0, 0.0, 1.0], {"labels": ["a", "b"]}, ["a", "b"], list("baab")),
    "merged": (list("abca"), {"labels": {"a": "x", "b": "y", "c": "x"}}, ["x", "y"], list("xyxx")),
    "dropped": (
        [-1, 0, 1, None],
        {"labels": ["a", "b"], "drop": [-1, None]},
        ["a", "b"],
        list("ab"),
    ),
    "without rows": ([1, 1, 0, 0], {"where": {"label": 1}}, ["1"], ["1", "1"]),
}


@pytest.mark.parametrize(("values", "spec", "names", "rows"), LABELS.values(), ids=LABELS)
def test_labels_become_names(files, values, spec, names, rows):
    for role in ("train", "test"):
        data = [{"text": str(i), "label": value} for i, value in enumerate(values)]
        files.jsonl(Path(f"{role}.jsonl"), data)
    made = one(files, {"train": "train.jsonl", "test": "test.jsonl"}, **spec)
    assert list(made.labels) == names
    test = made.data["test"]
    assert [made.labels[test[i]["label"]] for i in range(len(test))] == rows
    assert test["label"].tolist() == [test[i]["label"] for i in range(len(test))]


def test_a_column_may_name_the_labels(files):
    rows = [{"text": "t", "label": f"n{i % 3}", "label_name": "cab"[i % 3]} for i in range(6)]
    files.jsonl(Path("a.jsonl"), rows)
    task = {"train": "a.jsonl", "test": "b.jsonl"}
    files.jsonl(Path("b.jsonl"), rows)
    assert one(files, task).labels == ("c", "a", "b")
    files.jsonl(Path("b.jsonl"), [{**rows[0], "label_name": "z"}])
    with pytest.raises(StreamError, match="'n0' is called 'c' and 'z', expected one name"):
        one(files, task)
    files.jsonl(Path("b.jsonl"), [{**rows[0], "label": "n9"}])
    with pytest.raises(StreamError, match="two labels are called 'c'"):
        one(files, task)


def test_parquet_keeps_the_label_names_of_datasets(files):
    import datasets

    rows = [{"text": str(i), "label": i % 2} for i in range(4)]
    feature = datasets.ClassLabel(names=["neg", "pos"])
    files.parquet(Path("a.parquet"), rows, label=feature)
    files.parquet(Path("b.parquet"), rows, label=feature)
    made = one(files, {"train": "a.parquet", "test": "b.parquet"})
    assert made.labels == ("neg", "pos")


def test_rows_can_be_chosen_by_a_column_and_limited(files):
    rows = [{"text": str(i), "label": "ab"[i % 2], "part": i // 10} for i in range(30)]
    files.jsonl(Path("a.jsonl"), rows)
    task = {
        "path": "a.jsonl",
        "where": {"part": [0, 2]},
        "train": {"fraction": 0.75, "per_class": 3},
        "test": {"fraction": 0.25, "rows": 2},
    }
    made = one(files, task)
    train, test = made.data["train"], made.data["test"]
    assert sorted(train["label"].tolist()) == [0, 0, 0, 1, 1, 1]
    assert len(test) == 2
    assert not set(train.origin) & set(test.origin)
    assert {int(i) // 10 for i in (*train.origin, *test.origin)} <= {0, 2}
    assert test.origin.tolist() == sorted(test.origin)


def test_nested_values_are_reached_by_a_path(files):
    rows = [{"q": "?", "answers": {"text": [f"a{i}"]}, "meta": {"label": "x"}} for i in range(4)]
    files.jsonl(Path("a.jsonl"), rows)
    task = {"path": "a.jsonl", "train": 0.5, "test": 0.5}
    columns = {"answer": "{answers.text.0}"}
    made = one(files, task, kind="generation", columns=columns, prompt="{q}")
    assert made.data["test"][0]["answer"] == f"a{made.data['test'].origin[0]}"
    made = one(files, task, columns={"text": "q", "label": "meta.label"})
    assert made.labels == ("x",)


def test_templates_name_columns_and_nothing_else():
    assert templates.render("{{{a}}} {b.0}", {"a": 1}, {"a": 2, "b": ["x"]}) == "{1} x"
    for bad in ("{}", "{a", "{a!r}", "{a:>3}"):
        with pytest.raises(ValueError, match=r"expected|names no column|format code"):
            templates.parts(bad)
    with pytest.raises(KeyError):
        templates.render("{a.__class__}", {"a": "x"})


def test_draws_never_change():
    # Recorded once: another draw would change every stream that has fractions.
    assert draw.permutation(8, 0, "a").tolist() == [1, 5, 4, 2, 7, 0, 6, 3]
    assert draw.permutation(8, 1, "a").tolist() != [1, 5, 4, 2, 7, 0, 6, 3]


@pytest.fixture
def copies(files, tmp_path):
    """A folder with copies of two data sets of the hub."""
    import datasets

    names = datasets.ClassLabel(names=["neg", "pos"])
    for split in ("train", "validation", "test"):
        rows = [{"body": f"{split}{i}", "y": i % 2} for i in range(4)]
        files.parquet(
            tmp_path / "hub" / "me" / "one" / "data" / f"{split}-0.parquet", rows, y=names
        )
        files.jsonl(tmp_path / "hub" / "me" / "two" / "b" / f"{split}.jsonl", rows)
    splits = "".join(f"  - split: {s}\n    path: b/{s}.jsonl\n" for s in ("train", "test"))
    card = f"---\nconfigs:\n- config_name: b\n  data_files:\n{splits}---\n"
    (tmp_path / "hub" / "me" / "two" / "README.md").write_text(card, encoding="utf-8")
    return tmp_path / "hub"


COLUMNS = {"text": "body", "label": "y"}


def test_data_sets_of_the_hub_are_read_from_copies(files, copies):
    path = files.definition(
        {
            "kind": "sequence-classification",
            "scenario": "text",
            "columns": COLUMNS,
            "tasks": [
                {"name": "one", "hub": "me/one"},
                {"name": "two", "hub": "me/two", "config": "b", "labels": ["neg", "pos"]},
                {
                    "name": "part",
                    "hub": "me/one",
                    "train": {"from": "train", "fraction": 0.5},
                    "validation": {"from": "train", "fraction": 0.5},
                    "test": "validation+test",
                },
            ],
        }
    )
    made = stream(path, root=copies)
    assert [t.labels for t in made] == [("neg", "pos")] * 3
    assert list(made[0].data) == ["train", "validation", "test"]
    assert made[0].data["test"][1] == {"text": "test1", "label": 1, "task": 0}
    assert list(made[1].data) == ["train", "test"]
    assert [len(rows) for rows in made[2].data.values()] == [2, 2, 8]
    # The root may stand in the file, where it starts from the file's folder.
    path.write_text(f"root: hub\n{path.read_text()}", encoding="utf-8")
    assert stream(path).hash == made.hash


def test_images_of_the_hub_are_decoded_late(files, tmp_path):
    import datasets

    folder = tmp_path / "hub" / "me" / "pets"
    folder.mkdir(parents=True)
    columns = {"img": [files.png(i)[1] for i in range(4)], "y": [0, 1, 0, 1]}
    types = {"img": datasets.Image(), "y": datasets.ClassLabel(names=["cat", "dog"])}
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(types))
    for split in ("train", "test"):
        data.to_parquet(str(folder / f"{split}.parquet"))
    task = {"name": "pets", "hub": "me/pets", "columns": {"image": "img", "label": "y"}}
    spec = {"kind": "image-text", "scenario": "text", "tasks": [task]}
    made = stream(files.definition(spec), root=tmp_path / "hub")[0]
    assert made.data["test"][3]["image"].tolist() == files.png(3)[1].tolist()
    assert made.labels == ("cat", "dog")


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ({"hub": "me/none"}, r"tasks\[0\].hub: no folder .*none; put a copy of the data set"),
        ({"hub": "me/one", "test": "tets"}, r"tasks\[0\].test: cannot load 'me/one', split"),
        ({"hub": "me/two", "config": "c"}, r"cannot load 'me/two', config 'c', split 'all': .*'c'"),
        (
            {"hub": "me/one", "columns": {"label": "z"}},
            "got 'z', which is no column of me/one, spl",
        ),
    ],
)
def test_what_a_copy_lacks_is_named(files, copies, task, says):
    base = {"kind": "sequence-classification", "scenario": "text", "columns": COLUMNS}
    path = files.definition({**base, "tasks": [{"name": "a", **task}]})
    with pytest.raises(StreamError, match=says):
        stream(path, root=copies)


def test_offline_there_is_one_clear_error(files):
    base = {"kind": "sequence-classification", "scenario": "text"}
    path = files.definition({**base, "tasks": [{"name": "a", "hub": "me/one"}]})
    with pytest.raises(StreamError) as caught:
        stream(path)
    (line,) = caught.value.problems
    assert line.startswith("tasks.yaml: tasks[0].hub: cannot load 'me/one', split 'all': ")
    assert line.endswith("or put a copy into a folder and name that as `root`")


def test_the_hub_is_left_alone_while_the_file_has_faults(files):
    files.jsonl(Path("a.jsonl"), files.texts(4))
    base = {"kind": "sequence-classification", "scenario": "txt"}
    tasks = [{"name": "a", "hub": "me/one"}, {"name": "b", "path": "a.jsonl", "where": {"x": 1}}]
    for task in tasks[1:]:
        task.update(train=0.5, test=0.5)
    with pytest.raises(StreamError) as caught:
        stream(files.definition({**base, "tasks": tasks}))
    assert len(caught.value.problems) == 2
    assert "scenario: got 'txt'" in caught.value.problems[0]
    assert "tasks[1].where.x" in caught.value.problems[1]


def test_without_pillow_or_pyarrow_the_remedy_is_named(files, monkeypatch):
    files.photos(Path("p"))
    made = one(files, {"path": "p", "train": 0.5, "test": 0.5}, kind="image-classification")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(StreamError, match="needs Pillow; pip install pillow"):
        made.data["train"][0]
    files.parquet(Path("a.parquet"), files.texts(2))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(StreamError, match="Parquet needs pyarrow"):
        local(Path("a.parquet"))
