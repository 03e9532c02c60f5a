"""The definitions that are shipped: each read from small copies of its data sets."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import polyrank.streams
from polyrank.errors import StreamError
from polyrank.streams import draw, stream
from polyrank.streams.file import Definition
from polyrank.streams.ready import FOLDER, ready

STARS = ["1 star", "2 star", "3 stars", "4 stars", "5 stars"]
PAIR = ("premise", "hypothesis")
PAIRS = ("sentence1", "sentence2")
DBPEDIA = [
    *("Company", "EducationalInstitution", "Artist", "Athlete", "OfficeHolder"),
    *("MeanOfTransportation", "Building", "NaturalPlace", "Village", "Animal"),
    *("Plant", "Album", "Film", "WrittenWork"),
]
# Text columns, the column of numbers, its label names (or how many numbers), splits.
TEXT = ("train", "test")
TRIO = ("train", "validation", "test")
TEXTS = {
    "fancyzhx/ag_news": (["text"], "label", ["World", "Sports", "Business", "Sci/Tech"], TEXT),
    "SetFit/amazon_reviews_multi_en": (["id", "text", "label_text"], "label", 5, TRIO),
    "fancyzhx/dbpedia_14": (["title", "content"], "label", DBPEDIA, TEXT),
    "community-datasets/yahoo_answers_topics": (
        ["question_title", "question_content", "best_answer"],
        "topic",
        [f"topic {i}" for i in range(10)],
        TEXT,
    ),
    "Yelp/yelp_review_full": (["text"], "label", STARS, TEXT),
    "stanfordnlp/imdb": (["text"], "label", ["neg", "pos"], TEXT),
    "nyu-mll/glue mnli": (
        PAIR,
        "label",
        ["entailment", "neutral", "contradiction"],
        ("train", "validation_matched", "validation_mismatched"),
    ),
    "nyu-mll/glue qqp": (
        ["question1", "question2"],
        "label",
        ["not_duplicate", "duplicate"],
        TRIO,
    ),
    "nyu-mll/glue rte": (PAIRS, "label", ["entailment", "not_entailment"], TRIO),
    "nyu-mll/glue sst2": (["sentence"], "label", ["negative", "positive"], TRIO),
    "aps/super_glue cb": (PAIR, "label", ["entailment", "contradiction", "neutral"], TRIO),
    "aps/super_glue wic": (["word", *PAIRS], "label", ["False", "True"], TRIO),
    "aps/super_glue copa": (
        ["premise", "choice1", "choice2", "question"],
        "label",
        ["choice1", "choice2"],
        TRIO,
    ),
    "aps/super_glue boolq": (["question", "passage"], "label", ["False", "True"], TRIO),
    "aps/super_glue multirc": (
        ["paragraph", "question", "answer"],
        "label",
        ["False", "True"],
        TRIO,
    ),
}
IMAGES = {
    "HuggingFaceM4/FGVC-Aircraft": ("variant", ["707-320", "A310"], TRIO),
    "dpdl-benchmark/caltech101": ("label", ["accordion", "sunflower"], TEXT),
    "tanganke/dtd": ("label", ["banded", "blotchy"], TEXT),
    "tanganke/eurosat": ("label", ["annual crop land", "forest"], TEXT),
    "dpdl-benchmark/oxford_flowers102": ("label", ["sunflower", "watercress"], TRIO),
    "ethz/food101": ("label", ["apple_pie", "waffles"], ("train", "validation")),
    "ylecun/mnist": ("label", [str(i) for i in range(10)], TEXT),
    "timm/oxford-iiit-pet": ("label", ["abyssinian", "yorkshire_terrier"], TEXT),
    "tanganke/stanford_cars": ("label", ["AM General Hummer SUV 2000", "Acura RL"], TEXT),
    "tanganke/sun397": ("label", ["abbey", "zen garden"], TEXT),
}


def save(folder, splits, columns, types):
    """Write a data set as its repository holds it: Parquet files with the types beside them."""
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    known = {name: types[name] for name in types}
    for split in splits:
        data = datasets.Dataset.from_dict(columns)
        features = datasets.Features({**data.features, **known})
        datasets.Dataset.from_dict(columns, features=features).to_parquet(
            str(folder / f"{split}-00000-of-00001.parquet")
        )


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Copies of all text data sets, 12 rows of each class."""
    import datasets

    root = tmp_path_factory.mktemp("texts")
    cards = {}
    for key, (columns, label, names, splits) in TEXTS.items():
        name, _, config = key.partition(" ")
        count = names if isinstance(names, int) else len(names)
        rows = [i % count for i in range(12 * count)]
        data = {c: [f"{c} {i}" for i in range(len(rows))] for c in columns}
        types = {} if isinstance(names, int) else {label: datasets.ClassLabel(names=names)}
        save(root / name / config, splits, {**data, label: rows}, types)
        if config:
            files = [f"  - split: {s}\n    path: {config}/{s}-*\n" for s in splits]
            text = f"- config_name: {config}\n  data_files:\n{''.join(files)}"
            cards[name] = cards.get(name, "") + text
    for name, text in cards.items():
        (root / name / "README.md").write_text(f"---\nconfigs:\n{text}---\n", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory, files):
    """Copies of all image data sets, few tiny images of each class."""
    import datasets

    root = tmp_path_factory.mktemp("images")
    pixels = [files.png(i)[1] for i in range(20)]
    for name, (label, names, splits) in IMAGES.items():
        data = {"image": pixels, label: [i % len(names) for i in range(20)]}
        types = {"image": datasets.Image(), label: datasets.ClassLabel(names=names)}
        save(root / name, splits, data, types)
    fine = [i % 100 for i in range(1000)]
    names = {"fine_label": datasets.ClassLabel(names=[f"class{i:02}" for i in range(100)])}
    data = {"img": [pixels[i % 20] for i in fine], "fine_label": fine}
    data["coarse_label"] = [i // 5 for i in fine]
    save(root / "uoft-cs/cifar100", TEXT, data, {"img": datasets.Image(), **names})
    kinds = [i % 200 for i in range(3000)]
    data = {"image": [pixels[i % 20] for i in kinds], "wnid": [f"n{900 - i:08}" for i in kinds]}
    data["class_name"] = [f"thing_{i}" for i in kinds]
    save(root / "axiong/imagenet-r", ("test",), data, {"image": datasets.Image()})
    return root


def test_every_definition_is_tested_here_and_says_what_it_is():
    assert set(ready()) == {
        "imagenet-r",
        "long-sequence",
        "split-cifar100",
        "standard-cl",
        "trace",
        "x-tail",
    }
    for name, path in ready().items():
        text = path.read_text(encoding="utf-8")
        head = re.sub(r"\n# ?", " ", text.partition("\nname:")[0])
        assert "not loaded here: *not verified*" in head
        definition = Definition.open(name)
        assert (definition.name, definition.unread) == (name, True)
        assert definition.spec.about


ORDERS = {
    "standard-cl": {
        "order-1": "dbpedia amazon yahoo agnews",
        "order-2": "dbpedia amazon agnews yahoo",
        "order-3": "yahoo amazon agnews dbpedia",
    },
    "long-sequence": {
        "order-4": "mnli cb wic copa qqp boolq rte imdb yelp amazon sst2 dbpedia agnews multirc "
        "yahoo",
        "order-5": "multirc boolq wic mnli cb copa qqp rte imdb sst2 dbpedia agnews yelp amazon "
        "yahoo",
        "order-6": "yelp amazon mnli cb copa qqp rte imdb sst2 dbpedia agnews yahoo multirc boolq "
        "wic",
    },
}


@pytest.fixture(scope="module")
def long_sequence(texts):
    return stream("long-sequence", root=texts)


def test_orders_are_the_published_ones(texts):
    for name, orders in ORDERS.items():
        definition = Definition.open(name, texts)
        for order, names in orders.items():
            assert (order, definition.spec.orders[order]) == (order, tuple(names.split()))
        assert definition.spec.order == next(iter(orders))
        assert len(definition.spec.orders) == 3
    made = stream("standard-cl", root=texts, order="order-3")
    assert [task.name for task in made] == ["yahoo", "amazon", "agnews", "dbpedia"]
    assert [task.classes for task in made][:2] == [tuple(range(10)), tuple(range(10, 15))]
    everything = stream("standard-cl", root=texts, order="listed")
    assert everything[4].name == "yelp"


def test_text_streams_ask_in_the_benchmarks_form(long_sequence):
    assert len(long_sequence) == 15
    for task in long_sequence:
        assert set(task.data) == {"train", "validation", "test"}
        assert not set(task.data["train"].origin) & set(task.data["validation"].origin)
        assert (task.kind, task.metric) == ("text-to-label", "exact_match")
        row = task.data["test"][0]
        assert row["answer"] in task.labels
        assert row["prompt"].startswith("Task:")
        assert row["prompt"].endswith("\nAnswer:")
        assert task.name == "copa" or f"Option: {', '.join(task.labels)} \n" in row["prompt"]


def answer(made, name, number):
    """The answer to a row whose raw label is the number."""
    task = next(task for task in made if task.name == name)
    rows, count = task.data["test"], len(task.labels)
    index = next(i for i, origin in enumerate(rows.origin) if origin % count == number)
    return rows[index]["answer"], rows[index]["prompt"]


def test_labels_of_the_long_sequence_mean_what_their_numbers_mean(long_sequence):
    made = long_sequence
    # The number that GLUE's and SuperGLUE's cards give, and the word the benchmark uses for it.
    for name, number, word in (
        ("mnli", 0, "entailment"),
        ("mnli", 1, "neutral"),
        ("cb", 1, "contradiction"),
        ("rte", 1, "contradiction"),
        ("qqp", 1, "True"),
        ("wic", 0, "False"),
        ("boolq", 1, "True"),
        ("multirc", 0, "False"),
        ("copa", 1, "B"),
        ("imdb", 0, "Bad"),
        ("sst2", 1, "Good"),
        ("agnews", 3, "Science or Technology"),
        ("dbpedia", 1, "Educational Institution"),
        ("amazon", 0, "very negative"),
        ("yelp", 4, "very positive"),
    ):
        assert answer(made, name, number)[0] == word, name
    assert "sentence 1: premise 0\nsentence 2: hypothesis 0" in answer(made, "mnli", 0)[1]
    assert "\nB: choice2 1\n" in answer(made, "copa", 1)[1]
    shared = {task.name: task.classes for task in made}
    assert shared["amazon"] == shared["yelp"]


def test_trace_has_its_own_scores_and_needs_its_archive(files, tmp_path):
    with pytest.raises(StreamError, match=r"trace.yaml: root: is missing, .*'C-STANCE'"):
        stream("trace")
    names = [task.name for task in Definition.open("trace").outlined()]
    assert len(names) == 8
    for name in names:
        for role, count in (("train", 5), ("eval", 2), ("test", 3)):
            rows = [{"prompt": f"{name} {role} {i}", "answer": f"A{i}"} for i in range(count)]
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{role}.json").write_text(json.dumps(rows), encoding="utf-8")
    made = stream("trace", root=tmp_path)
    assert [task.name for task in made] == names
    assert [len(rows) for rows in made[0].data.values()] == [5, 2, 3]
    assert made[0].data["test"][2] == {"prompt": "C-STANCE test 2", "answer": "A2", "task": 0}
    scores = {task.name: task.metric for task in made}
    assert scores["MeetingBank"] == "rouge_l"
    assert scores["20Minuten"] == "sari"
    assert scores["Py150"] == "edit_similarity"
    assert scores["NumGLUE-cm"] == "exact_match"


def test_split_cifar_has_the_class_order_of_seed_1993(images):
    made = stream("split-cifar100", root=images)
    assert [len(task.classes) for task in made] == [10] * 10
    order = np.random.RandomState(1993).permutation(100)
    assert made.class_names == tuple(f"class{i:02}" for i in order)
    assert sum(task.size("train") + task.size("validation") for task in made) == 1000
    assert [task.size("test") for task in made] == [100] * 10
    row = made[3].data["test"][0]
    assert row["image"].shape == (3, 4, 3)
    assert row["label"] in range(30, 40)


def test_imagenet_r_has_its_classes_by_wordnet_number(images):
    made = stream("imagenet-r", root=images)
    assert [len(task.classes) for task in made] == [20] * 10
    # The copy numbers its classes backwards.
    order = np.random.RandomState(1993).permutation(200)
    assert made.class_names == tuple(f"thing_{199 - i}" for i in order)
    sizes = [sum(t.size(role) for t in made) for role in ("train", "validation", "test")]
    assert sizes == [2160, 240, 600]


def test_x_tail_matches_images_with_the_classes_of_all_tasks(images):
    made = stream("x-tail", root=images)
    names = "aircraft caltech101 dtd eurosat flowers food101 mnist pets cars sun397"
    assert [task.name for task in made] == names.split()
    assert made.scenario == "cross-domain"
    # The sunflower of two data sets is one class.
    assert len(made.class_names) == 27
    assert made[1].classes[1] == made[4].classes[0]
    assert (
        made[0].prompt.format(label=made[0].labels[1]) == "a photo of a A310, a type of aircraft."
    )
    assert all("{label}" in task.prompt for task in made)
    assert made[0].size("train") == 20
    assert made[6].data["test"][5]["image"].shape == (3, 4, 3)


def test_sixteen_images_a_class_are_drawn_by_key():
    classes = [i % 3 for i in range(100)]
    rows = draw.per_class(np.arange(100), classes, 16, 0, "a")
    assert np.bincount([classes[i] for i in rows]).tolist() == [16] * 3
    assert draw.per_class(np.arange(100), classes, 40, 0, "a").tolist() == list(range(100))


def test_a_ready_definition_can_be_used_with_options(texts, files):
    options = {"order": "order-3", "root": "data"}
    path = files.definition({"use": "standard-cl", "options": options})
    shutil.copytree(texts, Path("data"))
    assert stream(path).hash == stream("standard-cl", root=texts, order="order-3").hash


def test_the_definitions_are_packaged():
    root = Path(polyrank.streams.__file__).parents[3]
    config = (root / "pyproject.toml").read_text(encoding="utf-8")
    # hatch takes every file of a package, whatever its ending, unless git ignores it.
    assert 'packages = ["src/polyrank"]' in config
    assert "src/polyrank/streams/ready" in FOLDER.as_posix()
    done = subprocess.run(
        ["git", "check-ignore", *map(str, FOLDER.glob("*.yaml"))],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == ""


def test_listing_them_is_quick_and_light():
    code = (
        "import sys; from polyrank.streams import names; names()\n"
        "print('pydantic' in sys.modules, 'yaml' in sys.modules, 'numpy' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False", "True"]
