"""Recipes: what stands in one, how a short run and other words change it, every fault at once."""

import subprocess
import sys
from pathlib import Path

import pytest

from polyrank.engine.recipe import Wanted, read
from polyrank.errors import ConfigError

FULL = """
method: moe_lora
options: {r: 8, k: 2}
strategies: [sequential, replay: {capacity: 0.1}]
stream: tasks.yaml
model: base
target: [q_proj, v_proj]
train: {epochs: 4, lr: 3e-3}
references: [sequential, probe]
seeds: [0, 1]
smoke:
  options: {r: 4}
  train: {epochs: 1}
  references: none
  seeds: [0]
"""


def write(text, name="a.yaml"):
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def faults(text, **options):
    with pytest.raises(ConfigError) as caught:
        read(write(text), **options)
    return caught.value.problems


def test_what_is_said_is_kept_and_paths_stand_beside_the_file():
    Path("sub/base").mkdir(parents=True)
    found = read(write(FULL, "sub/a.yaml"))
    assert dict(found) == {
        "method": "moe_lora",
        "options": {"r": 8, "k": 2},
        "strategies": (("sequential", {}), ("replay", {"capacity": 0.1})),
        "stream": str(Path("sub/tasks.yaml")),
        "model": str(Path("sub/base")),
        "target": ["q_proj", "v_proj"],
        "train": {"epochs": 4, "lr": 0.003},
        "references": ("sequential", "probe"),
        "seeds": (0, 1),
    }
    hub = read(write("stream: digits\nmodel: some/hub-id\n"))
    assert (hub.stream, hub.model, hub.method) == ("digits", "some/hub-id", None)


def test_a_short_run_overrides_key_by_key():
    found = read(write(FULL), smoke=True)
    assert found.options == {"r": 4, "k": 2}
    assert found.train == {"epochs": 1, "lr": 0.003}
    assert (found.references, found.seeds) == ((), (0,))
    assert found.method == "moe_lora"


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ({"options": {"k": 1}}, {"r": 8, "k": 1}),
        ({"method": "moe-lora", "options": {"k": 1}}, {"r": 8, "k": 1}),
        ({"method": "lora", "options": {"r": 2}}, {"r": 2}),
        ({"method": "lora"}, {}),
        ({}, {"r": 8, "k": 2}),
    ],
)
def test_words_go_before_and_another_method_takes_its_own_options(words, options):
    found = Wanted.model_construct(**words).over(read(write(FULL)))
    assert found.options == options
    assert found.method == words.get("method", "moe_lora")
    assert found.train == {"epochs": 4, "lr": 0.003}


def test_faults_are_named_all_at_once_with_suggestions():
    text = "metod: lora\noptions: [r]\nseeds: [1, 1]\nsmoke: {trian: {epochs: 1}, seeds: [-1]}\n"
    assert faults(text) == [
        "a.yaml: options: got ['r'], expected keys with values; correct it",
        "a.yaml: seeds: got 1 twice, expected each once; leave one out",
        "a.yaml: smoke.seeds[0]: got -1, expected greater than or equal to 0; correct it",
        "a.yaml: smoke.trian: unknown key; did you mean 'train'?",
        "a.yaml: metod: unknown key; did you mean 'method'?",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "got null, expected keys with values such as `method:`"),
        ("method: lora\nmethod: smora\n", "key 'method' is given twice"),
        ("references: [1]\n", "references: got [1], expected names, or none; write"),
        ("smoke: {smoke: {}}\n", "smoke.smoke: unknown key"),
    ],
)
def test_what_is_no_recipe_is_refused(text, says):
    (line,) = faults(text)
    assert says in line


def test_a_short_run_must_be_described():
    assert faults("method: lora\n", smoke=True) == [
        "a.yaml: smoke: is missing, expected what differs in a short run; add it"
    ]


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"recipe: the file 'b\.yaml' does not exist"):
        read(Path("b.yaml"))


def test_faults_need_no_torch():
    write("metod: lora\n")
    code = (
        "import sys; from polyrank.cli import main\n"
        "try: main(['run', '--recipe', 'a.yaml', '--set', 'r'])\n"
        "except SystemExit as end: assert end.code == 2\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert "--set: got 'r', expected NAME=VALUE" in lines[0]
    assert "did you mean 'method'?" in lines[1]
