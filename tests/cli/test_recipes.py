"""`polyrank run --recipe`: every recipe in its short form, and what stands beside it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from polyrank import engine
from polyrank.cli import main, recipes
from polyrank.cli import run as command

# One line a recipe of the package.
NAMES = [
    "allora",
    "altlora",
    "codyra",
    "dylora",
    "lora-ga",
    "lora-sb",
    "lora-xs",
    "mixlora",
    "mora",
    "olora",
    "osf",
    "sema",
    "smora",
    "sora",
]
SWEEPS = ["sweep-digits", "sweep-starts-text", "sweep-starts"]

BLOCKED = """
import socket, sys
def blocked(*words, **options):
    raise OSError("the network is blocked")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = blocked
from polyrank.cli import main
for name in sys.argv[1:]:
    words = ["run", "--recipe", name, "--smoke", "--out", f"out/{name}", "--no-report"]
    for each in [words, *([["export", "out/olora", "lora"]] if name == "olora" else [])]:
        try:
            main(each)
        except SystemExit as end:
            assert not end.code, (each, end.code)
"""


def called(capsys, *words, code=2):
    """Run the command in this process; return its error lines."""
    with pytest.raises(SystemExit) as caught:
        main(["run", *words])
    captured = capsys.readouterr()
    assert caught.value.code == code, captured.err
    return captured.err.splitlines()


@pytest.fixture
def asked(monkeypatch):
    """What runs are asked for, none of which is made."""
    calls = []
    monkeypatch.setitem(engine.__dict__, "run", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setattr(command, "show", lambda *words: None)
    return calls


def test_recipes_have_names():
    assert list(recipes.names()) == NAMES
    assert list(recipes.names(sweeps=True)) == SWEEPS
    assert len(list(recipes.FOLDER.iterdir())) == len(NAMES) + len(SWEEPS)


@pytest.mark.slow
def test_every_recipe_runs_short_and_offline(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *NAMES],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60 + 60 * len(NAMES),
    )
    assert done.returncode == 0, done.stderr
    for name in NAMES:
        folder = tmp_path / "out" / name
        run = json.loads((folder / "run.json").read_text())
        assert (run["status"], run["method"]["name"]) == ("done", name)
        words = ["--recipe", name, "--smoke", "--out", f"out/{name}", "--no-report"]
        assert run["command"] == ["polyrank", "run", *words[:3], "--no-report", "--seed", "0"]
        results = json.loads((folder / "results.json").read_text())
        # Its own, and what else it deploys.
        assert {system["name"].split("@")[0] for system in results["systems"]} == {name}
        assert results["systems"][0]["unrestricted"][-1][-1] is not None
    # Three tasks of rank 2, in one bank.
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["rank_pattern"]) == ("LORA", 6, {})


def test_a_recipe_is_what_its_options_would_be(asked):
    Path("mine.yaml").write_text(
        "method: lora\noptions: {r: 3, alpha: 5}\nstrategies: [replay: {capacity: 0.1}]\n"
        "train: {epochs: 2, lr: 1e-3}\nreferences: none\ntarget: [q, v]\nseeds: [4, 5]\n"
    )
    with pytest.raises(SystemExit):
        main(["run", "--recipe", "mine.yaml", "--out", "out"])
    words = "run --method lora --set r=3 alpha=5 --with replay:capacity=0.1 --out out --seed 4 5"
    rest = "--train epochs=2 lr=1e-3 --references none --target q v"
    with pytest.raises(SystemExit):
        main([*words.split(), *rest.split()])
    assert len(asked) == 4
    for (words, options), (other_words, others) in zip(asked[:2], asked[2:], strict=True):
        assert options.pop("command") != others.pop("command")
        assert (words, options) == (other_words, others)
    assert [options["seed"] for _, options in asked] == [4, 5, 4, 5]


def test_words_beside_a_recipe_go_before(asked):
    words = "run --recipe smora --smoke --set r=8 --train lr=0.1 --seed 7 --stream stdlib-lm"
    with pytest.raises(SystemExit):
        main([*words.split(), "--references", "sequential", "--with", "ewc", "--out", "out"])
    ((model, stream, method), options) = asked[0]
    assert (model, stream) == (None, "stdlib-lm")
    assert (method.name, method.r, method.k) == ("smora", 8, 2)
    assert (options["train"].epochs, options["train"].lr) == (1, 0.1)
    assert (options["seed"], options["references"]) == (7, ("sequential",))
    assert [strategy.name for strategy in options["strategies"]] == ["ewc"]


def test_another_method_takes_its_own_options(asked):
    Path("scaled.py").write_text(
        "from dataclasses import dataclass\nfrom polyrank.frame import Method, register\n\n\n"
        "@register\n@dataclass(frozen=True, kw_only=True)\nclass Scaled(Method):\n    pass\n"
    )
    for words in (["--method", "lora"], ["--method-file", "scaled.py"]):
        with pytest.raises(SystemExit):
            main(["run", "--recipe", "smora", "--smoke", *words, "--out", "out"])
    assert [words[2].name for words, _ in asked] == ["lora", "scaled"]
    assert [words[2].r for words, _ in asked] == [8, 8]
    from polyrank.frame import registry

    del registry._found["scaled"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("--recipe", "smroa"),
            f"recipe: got 'smroa', expected a YAML file or one of: {', '.join(NAMES)};",
        ),
        (("--recipe", "sweep-digits"), f"a YAML file or one of: {', '.join(NAMES)};"),
        (("--recipe", "missing.yaml"), "recipe: the file 'missing.yaml' does not exist"),
        (("--smoke",), "smoke: is a part of a recipe; give --recipe NAME as well"),
        (("--recipe", "olora", "--set", "r=0"), "olora: r: got 0, expected at least 1 rank"),
        (("--recipe", "olora", "--smoke", "--set", "k=2"), "olora: unknown option 'k'"),
    ],
)
def test_bad_words_end_with_one_clear_error(capsys, words, says):
    (line,) = called(capsys, *words)
    assert line.startswith("error: ")
    assert says in line
    assert not list(Path().iterdir())


def test_faults_of_recipe_and_words_are_told_together(capsys):
    Path("bad.yaml").write_text("metod: lora\nseeds: [1, 1]\n", encoding="utf-8")
    lines = called(capsys, "--recipe", "bad.yaml", "--set", "r", "--seed", "0", "0")
    assert [line.split(": ")[1] for line in lines] == ["--set", "seed", "bad.yaml", "bad.yaml"]


def test_help_names_the_recipes(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"polyrank: {', '.join(NAMES)}." in text
    assert "--recipe" in text
