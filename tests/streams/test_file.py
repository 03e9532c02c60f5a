"""Streams from a YAML file: what rows come out, and that every fault is named at once."""

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from polyrank.errors import StreamError
from polyrank.streams import OnePass, stream
from polyrank.streams.file import Definition
from polyrank.streams.kinds import KINDS, METRICS

SHOP = r"""
kind: text-to-label
scenario: text
prompt: "{text}\nTopic ({options}):"
tasks:
  - {name: news, path: news.jsonl, train: 0.8, test: 0.2}
  - {name: mail, train: mail/train.csv, test: mail/test.csv, columns: {text: body}}
"""


@pytest.fixture
def shop(tmp_path, files):
    files.jsonl(tmp_path / "news.jsonl", files.texts(20))
    for role in ("train", "test"):
        rows = [{"body": f"{role}, {i}", "label": ("ham", "world")[i % 2]} for i in range(6)]
        files.table(tmp_path / "mail" / f"{role}.csv", rows)
    return files.definition(SHOP)


def problems(source, **options):
    with pytest.raises(StreamError) as caught:
        stream(source, **options)
    return caught.value.problems


def test_a_common_case_takes_six_lines(shop, files):
    made = stream(shop)
    assert len(SHOP.strip().splitlines()) == 6
    assert (made.name, made.scenario) == ("tasks", "text")
    news, mail = made
    assert (news.kind, news.metric, news.labels) == ("text-to-label", "exact_match", files.TOPICS)
    # A label is one class wherever it is shown, numbered in the order of being shown.
    assert (news.classes, mail.classes, mail.labels) == ((0, 1), (2, 1), ("ham", "world"))
    assert {role: len(rows) for role, rows in news.data.items()} == {"train": 16, "test": 4}
    assert mail.data["test"][1] == {
        "prompt": "test, 1\nTopic (ham, world):",
        "answer": "world",
        "label": 1,
        "task": 1,
    }


def test_fractions_partition_a_file_by_key(shop):
    first, second = stream(shop, seed=1), stream(shop, seed=2)
    origins = {role: first[0].data[role].origin.tolist() for role in ("train", "test")}
    assert sorted(origins["train"] + origins["test"]) == list(range(20))
    assert stream(shop, seed=1)[0].data["train"].origin.tolist() == origins["train"]
    assert second[0].data["test"].origin.tolist() != origins["test"]
    # Whole files stay whole; the seed orders their training rows.
    assert first[1].data["test"].origin.tolist() == list(range(6))
    assert sorted(first[1].data["train"].origin.tolist()) == list(range(6))


def test_a_seed_in_the_file_is_the_files_own(shop, files):
    files.definition("seed: 5" + SHOP)
    assert stream(shop, seed=1).hash == stream(shop, seed=2).hash
    assert stream(shop).seed == 5


def test_the_draw_is_the_same_everywhere(shop):
    code = "from polyrank.streams import stream; print(stream('tasks.yaml').hash)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == stream(shop).hash
    # Recorded once; a change of the draw would silently change everybody's splits.
    assert stream(shop)[0].data["test"].origin.tolist() == [0, 4, 6, 14]


def test_the_hash_follows_rows_prompt_and_labels(shop, tmp_path, files):
    before = stream(shop).hash
    assert stream(shop).hash == before
    rows = files.texts(20)
    files.jsonl(tmp_path / "news.jsonl", rows[::-1])
    assert stream(shop).hash != before
    files.jsonl(tmp_path / "news.jsonl", rows)
    assert stream(shop).hash == before
    files.definition(SHOP.replace("Topic", "topic"))
    assert stream(shop).hash != before


def test_it_travels_between_processes(shop):
    made = stream(shop)
    for twin in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert twin.hash == made.hash
        assert twin[1].data["test"][0] == made[1].data["test"][0]


KIND_ROWS = {
    "sequence-classification": (
        {"kind": "sequence-classification", "columns": {"text_pair": "second"}},
        {"text": "a0", "text_pair": "b0", "label": 0, "task": 0},
    ),
    "text-to-label": (
        {"kind": "text-to-label", "labels": ["no", "yes"]},
        {"prompt": "a0", "answer": "no", "label": 0, "task": 0},
    ),
    "generation": (
        {"kind": "generation", "prompt": "{text} / {second}:", "columns": {"answer": "out"}},
        {"prompt": "a0 / b0:", "answer": "o0", "task": 0},
    ),
    "language-modelling": (
        {"kind": "language-modelling", "columns": {"text": "{text} {{{second}}}"}},
        {"text": "a0 {b0}", "task": 0},
    ),
    "regression": (
        {"kind": "regression", "columns": {"target": "score"}},
        {"text": "a0", "target": 0.5, "task": 0},
    ),
    "image-classification": (
        {"kind": "image-classification", "columns": {"image": "photo"}},
        {"label": 0, "task": 0},
    ),
    "image-text": (
        {"kind": "image-text", "columns": {"image": "photo"}, "prompt": "this is a {label}"},
        {"label": 0, "task": 0},
    ),
}


def every_column(tmp_path, files):
    rows = []
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(files.png(i)[0])
        row = {"text": f"a{i}", "second": f"b{i}", "label": i % 2, "out": f"o{i}"}
        rows.append({**row, "score": i + 0.5, "photo": f"{i}.png"})
    for name in ("train", "test"):
        files.jsonl(tmp_path / f"{name}.jsonl", rows)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_rows_that_it_documents(tmp_path, kind, files):
    every_column(tmp_path, files)
    spec, expected = KIND_ROWS[kind]
    task = {"name": "a", "train": "train.jsonl", "test": "test.jsonl"}
    made = stream(files.definition({"scenario": "text", **spec, "tasks": [task]}))[0]
    assert made.metric == KINDS[kind].metrics[0]
    assert set(KINDS[kind].metrics) <= set(METRICS)
    row = made.data["test"][0]
    if "image" in KINDS[kind].fields:
        pixels = row.pop("image")
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, files.png(0)[1])
    assert row == expected
    assert made.prompt == spec.get("prompt")
    assert bool(made.classes) == KINDS[kind].labelled
    assert len(made.data["test"].fingerprint) == 64


def test_images_for_clip_have_a_prompt_for_every_class(tmp_path, files):
    files.photos(tmp_path / "pets")
    task = {"name": "pets", "path": "pets", "train": 0.5, "test": 0.5}
    made = stream(files.definition({"kind": "image-text", "scenario": "text", "tasks": [task]}))[0]
    assert made.prompt.format(label=made.labels[1]) == "a photo of a dog."
    grey = {**task, "channels": 1, "kind": "image-classification"}
    made = stream(files.definition({"scenario": "text", "tasks": [grey]}))[0]
    assert made.data["train"][0]["image"].shape == (3, 4, 1)


def test_a_damaged_image_is_named(tmp_path, files):
    files.photos(tmp_path / "pets")
    (tmp_path / "pets" / "cat" / "0.png").write_bytes(b"nothing")
    task = {"name": "pets", "path": "pets", "train": 0.5, "test": 0.5}
    spec = {"kind": "image-classification", "scenario": "text", "tasks": [task]}
    made = stream(files.definition(spec))[0]
    with pytest.raises(StreamError, match=r"pets, row 0: no readable image"):
        [row for rows in made.data.values() for row in map(rows.__getitem__, range(len(rows)))]


THREE = r"""
kind: text-to-label
scenaro: text
prompt: "{text}:"
tasks:
  - {name: news, path: news.jsonl, train: 0.8, test: 0.2, columns: {label: lable}}
  - {name: mail, train: mail/trian.csv, test: mail/test.csv, columns: {text: body}}
"""


def test_three_faults_are_three_lines(shop, files):
    found = problems(files.definition(THREE))
    assert len(found) == 3
    assert found[0] == "tasks.yaml: scenaro: unknown key; did you mean 'scenario'?"
    assert "tasks[1].train: got 'mail/trian.csv'" in found[1]
    assert found[1].endswith("did you mean 'train.csv'?")
    assert found[2].startswith(
        "tasks.yaml: tasks[0].columns.label: got 'lable', which is no column"
    )
    assert found[2].endswith("expected one of text, label; did you mean 'label'?")


# What is put into SHOP, and what is said of it.
FAULTS = {
    "kind": ({"kind": "text-to-lable"}, "kind: got .* did you mean 'text-to-label'"),
    "no kind": ({"kind": None}, r"tasks\[0\].kind: is missing.*tasks\[1\].kind: is missing"),
    "scenario": ({"scenario": "texts"}, "scenario: got 'texts'.*did you mean 'text'"),
    "no scenario": ({"scenario": None}, "scenario: is missing, expected one such as"),
    "metric": ({"metric": "acuracy"}, "metric: got 'acuracy'.*did you mean 'accuracy'"),
    "odd metric": ({"metric": "pearson"}, "got 'pearson', expected one of exact_match.*choose one"),
    "no tasks": ({"tasks": None}, "tasks: got none, expected a list of tasks, or `split`"),
    "empty tasks": ({"tasks": []}, "tasks: got none"),
    "tasks kind": ({"tasks": {"a": 1}}, "tasks: got {'a': 1}, expected a list; correct it"),
    "boolean": ({"name": True}, "name: got true, which YAML reads from a bare yes.*in quotes"),
    "label boolean": ({"labels": ["a", False]}, "labels: got false, which YAML reads"),
    "labels twice": ({"labels": ["a", "a"]}, "labels: got 'a' twice, expected each once"),
    "brace": ({"prompt": "{text"}, "prompt: got '{text': expected '}'.*write {{"),
    "format code": ({"prompt": "{text!r}"}, "prompt: .*has a format code; write the name"),
    "no column": ({"prompt": "What?"}, "prompt: got 'What.', expected columns in it"),
    "prompt column": ({"prompt": "{txt}"}, "prompt: got 'txt', which is no column.*mean 'text'"),
    "attribute": ({"prompt": "{text.upper}"}, "prompt: got 'text.upper', which is no column"),
    "dotted": ({"prompt": "{label.upper}"}, "news.jsonl, row .+: 'label.upper' is empty"),
    "column key": ({"columns": {"lable": "x"}}, "columns.lable: unknown key; .*mean 'label'"),
    "foreign column": ({"columns": {"image": "x"}}, "columns.image: is no field of text-to-label"),
    "share": ({"validation": 3}, "validation: got 3, expected a share .*write {rows: 3}"),
    "rows": ({"validation": {"rows": 0}}, "validation.rows: got 0, expected greater than or"),
    "seed": ({"seed": -1}, "seed: got -1, expected greater than or equal to 0"),
    "seed kind": ({"seed": "one"}, "seed: got 'one', expected a whole number; correct it"),
    "order": ({"order": "sed"}, "order: got 'sed', expected one of listed, seed;.*mean 'seed'"),
    "order name": ({"order": ["news", "male"]}, "order: got 'male', .*did you mean 'mail'"),
    "orders": ({"orders": {"a": ["x"]}}, "orders.a: got 'x', expected names of tasks: news, mail"),
    "two ways": ({"split": {"tasks": 2}}, "split: stands beside `tasks`"),
    "root": ({"root": "nowhere"}, "root: got .*nowhere', which is no folder"),
    "revision": ({"revision": "main"}, "revision: is for a data set of the hub"),
    "options": ({"options": {"a": 1}}, "options: stands without `use`"),
    "use": ({"use": "digits"}, "stands beside `use`, expected only"),
    "header": ({"header": "text"}, "header: got 'text', expected names in their order"),
    "where": ({"where": {"x": 1}}, r"where.x: is no column of .*news.jsonl"),
    "labels unknown": ({"labels": ["sport", "ham"]}, "labels: got 'world' in column 'label'.*drop"),
}


@pytest.mark.parametrize(("change", "says"), FAULTS.values(), ids=FAULTS)
def test_every_fault_is_named_with_its_key(shop, change, says, files):
    spec = {**yaml.safe_load(SHOP), **change}
    path = files.definition({key: value for key, value in spec.items() if value is not None})
    with pytest.raises(StreamError) as caught:
        _ = stream(path).hash
    found = "\n".join(caught.value.problems)
    assert re.search(says, found, re.DOTALL), found


def test_faults_of_one_task_are_named(shop, files):
    files.definition(
        r"""
kind: text-to-label
scenario: text
tasks:
  - {path: news.jsonl, train: 0.8, test: 0.3}
  - {name: b, path: news.jsonl}
  - {name: b, path: news.jsonl, hub: x/y, train: 1}
  - {name: c, train: news.jsonl, test: {from: ./news.jsonl, rows: 3}}
  - {name: d, train: {rows: 3}, test: news.jsonl}
  - {name: e, hub: x/y, train: 0.5, format: csv}
  - {name: f, train: news.xyz}
  - {name: g}
"""
    )
    (shop.parent / "news.xyz").write_text("")
    found = problems(shop)
    for says in (
        "tasks: got the name 'b' twice",
        "tasks[0].name: is missing",
        "tasks[0].test: fractions of one source (train, test) add up to 1.1",
        "tasks[2].path: stands beside `hub`",
        "tasks[3].test: reads the same rows as others (train, test)",
        "tasks[4].train.from: is missing, expected a file",
        "tasks[5].train: got the fraction 0.5 of no split; write {from: train, fraction: 0.5}",
        "tasks[5].format: is for files",
        "tasks[6].train: got 'news.xyz', whose ending says no format",
        "tasks[7].path: is missing, expected where the data are",
    ):
        assert any(line.startswith(f"tasks.yaml: {says}") for line in found), says
    assert any("tasks[1].path: 'news.jsonl': no role is named" in line for line in found)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "tasks.yaml: line 1, column 5: no YAML: "),
        ("a: 1\na: 2", "tasks.yaml: line 2, column 1: no YAML: key 'a' is given twice"),
        ("- a", "tasks.yaml: got \\['a'\\], expected keys with values"),
        ("", "tasks.yaml: got null, expected keys with values"),
        ("a: !!python/object/apply:os.system [ls]", "no YAML: could not determine a constructor"),
    ],
)
def test_what_is_no_stream_is_refused(text, says, files):
    with pytest.raises(StreamError, match=says):
        stream(files.definition(text))


def test_orders_are_named_or_given(shop, files):
    files.definition("orders: {back: [mail, news], one: [mail]}\n" + SHOP)
    assert [t.name for t in stream(shop)] == ["news", "mail"]
    assert [t.name for t in stream(shop, order="back")] == ["mail", "news"]
    assert [t.name for t in stream(shop, order=["mail"])] == ["mail"]
    assert stream(shop, order="one")[0].classes == (0, 1)
    drawn = {tuple(t.name for t in stream(shop, order="seed", seed=s)) for s in range(8)}
    assert drawn == {("news", "mail"), ("mail", "news")}
    assert stream(shop, order="back").options == {"file": "tasks.yaml", "order": "back"}
    for order, says in (
        ("bak", "did you mean 'back'"),
        (["x"], "expected names"),
        ([], "no names"),
    ):
        assert says in problems(shop, order=order)[0]


def test_a_row_without_a_value_is_named(shop, tmp_path, files):
    files.jsonl(
        tmp_path / "news.jsonl", [{"text": None, "label": "a"}, *files.texts(9, ("a", "b"))]
    )
    made = stream(shop)[0]
    with pytest.raises(StreamError, match=r"news.jsonl, row 0: 'text' is empty, expected a value"):
        _ = [made.data[role].fingerprint for role in made.data]


def test_a_target_that_is_no_number_is_named(files):
    rows = [{"text": "a", "target": value} for value in ("1.5", 2)]
    files.jsonl(Path("train.jsonl"), rows)
    files.jsonl(Path("test.jsonl"), [*rows, {"text": "b", "target": "n/a"}])
    task = {"name": "a", "train": "train.jsonl", "test": "test.jsonl"}
    spec = {"kind": "regression", "scenario": "text", "tasks": [task]}
    test = stream(files.definition(spec))[0].data["test"]
    assert [test[i]["target"] for i in range(2)] == [1.5, 2.0]
    with pytest.raises(StreamError, match=r"test.jsonl, row 2: column 'target': got 'n/a', expect"):
        test[2]
    with pytest.raises(IndexError):
        test[3]
    with pytest.raises(KeyError):
        test["label"]


def test_scenarios_hide_and_limit_as_declared(shop, files):
    text = SHOP.replace("scenario: text", "scenario: online")
    files.definition(
        text.replace("columns: {text: body}", "columns: {text: body}, labels: [ham, mine]")
    )
    (found,) = problems(shop)
    assert "tasks[1].labels: got 'world'" in found
    files.definition(text)
    assert any("share classes [1]" in line for line in problems(shop))
    files.definition("passes: 1\nvisible: {n_tasks: true}\n" + SHOP)
    made = stream(shop)
    assert made.visible.n_tasks
    assert made.visible.task_id_train
    train = made[0].data["train"]
    assert isinstance(train, OnePass)
    _ = train[0]
    with pytest.raises(StreamError, match="asked for twice"):
        _ = train[0]


def test_a_file_may_use_a_built_in_stream(files):
    path = files.definition("use: digits\noptions: {domains: inversion}\n")
    assert stream(path, seed=3).hash == stream("digits", seed=3, domains="inversion").hash
    assert stream(files.definition("use: digits\nseed: 4\n"), seed=3).seed == 4
    assert stream(files.definition("use: digits\nname: mine\n")).name == "mine"
    assert stream(files.definition("use: digits\noptions: {seed: 7}\n"), seed=3).seed == 7
    assert "did you mean 'digits'" in problems(files.definition("use: digit\n"))[0]
    found = problems(files.definition("use: digits\noptions: {domans: x}\n"))
    assert "did you mean 'domains'" in found[0]


def test_pretraining_data_stand_beside_the_tasks(shop, files):
    text = "pretraining: {name: base, path: news.jsonl, train: 0.5, test: 0.5}\n" + SHOP
    made = stream(files.definition(text))
    assert made.pretraining.classes == (0, 1)
    assert made.pretraining.size("train") == 10
    found = problems(files.definition(text.replace("0.5", "0.7")))
    assert "pretraining.test: fractions" in found[0]


def test_reading_a_definition_loads_nothing_heavy(shop):
    code = (
        "import sys; from polyrank.streams import stream; stream('tasks.yaml').hash\n"
        "print('torch' in sys.modules, 'datasets' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_what_a_definition_says_without_its_data(shop):
    found = Definition.open(shop)
    assert not found.unread
    assert [(task.name, task.source) for task in found.outlined()] == [
        ("news", "news.jsonl"),
        ("mail", "mail/train.csv, mail/test.csv"),
    ]
