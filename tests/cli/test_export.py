"""`polyrank export` as a user types it, from a run and from an adapter."""

from pathlib import Path

import pytest
from peft import PeftModel

import polyrank as pr
from polyrank.cli import main
from polyrank.io import RunFolder
from polyrank.layers import adapter_of
from polyrank.testing import MODELS, Case, assert_close


def called(capsys, *words, code=0):
    """Run the command in this process; return what it prints on both streams."""
    with pytest.raises(SystemExit) as caught:
        main(["export", *map(str, words)])
    captured = capsys.readouterr()
    assert caught.value.code == code, captured.err
    return captured


def written(asked, results):
    folder = RunFolder.create("run", asked)
    folder.write_results(results)
    folder.finish()


def test_a_system_of_a_run_becomes_a_lora(capsys, run_results, monkeypatch):
    case = Case(pr.method("lora", r=2, scaling="alpha"), 0, MODELS["vit"])
    based = case.tiny.build()
    based.save_pretrained("base")
    model = case.build(head={"module": "classifier", "names": [*"abcd"]}, init_weights=False)
    written(*run_results)
    model.peft_config["default"].base_model_name_or_path = str(Path("base").resolve())
    model.save_pretrained("run/adapters/other")
    said = called(capsys, "run", "out", "--system", "other").out
    _, classes, out, *lines = said.splitlines()
    assert [classes, out] == ["for a base with 4 classes: a, b, c, d", "out"]
    # The lines that it prints are what a reader types next, and README.md holds them too.
    names = {}
    exec("\n".join(lines), names)
    assert_close(case.answer(names["model"].eval()), case.answer(model))
    card = Path("out/README.md").read_text(encoding="utf-8")
    assert "- Classes: a, b, c, d." in card
    assert "Base: `../base`, seen from this folder." in card
    code = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir("out")
    exec(code, names)
    assert_close(case.answer(names["model"].eval()), case.answer(model))


def test_an_adapter_becomes_a_lora(capsys, tmp_path):
    case = Case(pr.method("lora", r=3), 0, MODELS["llama"])
    model = case.build(init_weights=False)
    model.save_pretrained(tmp_path / "from")
    said = called(capsys, tmp_path / "from", tmp_path / "out").out
    layers = adapter_of(model).layers
    assert (
        said.splitlines()[0] == f"{3 * len(layers)} ranks at {len(layers)} of {len(layers)} layers"
    )
    loaded = PeftModel.from_pretrained(case.tiny.build(), tmp_path / "out").eval()
    assert type(loaded.peft_config["default"]).__name__ == "LoraConfig"
    assert_close(case.answer(loaded), case.answer(model))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("missing", "out"), "missing: holds neither run.json nor adapter_config.json"),
        (("made", "out", "--system", "lora"), "made is an adapter, not a run; leave --system out"),
        (("made", "out", "--format", "peft"), "got 'peft', expected one of peft-lora, polyrank"),
        (("routed", "out"), "RankGate of 'smora' weighs ranks for each token"),
        (
            ("run", "out", "--system", "lroa"),
            "got 'lroa', expected one of lora, other; did",
        ),
        (("run", "out"), "is missing, expected what the run saved; repeat the run"),
        (("run", "out", "--system", "lora r=2"), "is missing, expected what the run saved"),
        (("run", "out", "--system", "probe"), "lora, other; probe trains no adapter"),
        (
            ("run", "out", "--system", "lora (stage-0)"),
            "that one was exported by the run: run/exports/lora/stage-0",
        ),
        (
            ("run", "out", "--system", "lora r=2 (rank 1)"),
            "rank 1 is no adapter of its own, but was evaluated out of lora, whose adapter",
        ),
        (("plain", "out"), "it is already an ordinary LoRA"),
    ],
    ids=[
        "nothing",
        "no-run",
        "format",
        "routed",
        "system",
        "deleted",
        "label",
        "probe",
        "stage",
        "rank",
        "plain",
    ],
)
def test_bad_words_end_with_one_clear_error_and_no_folder(capsys, words, says, run_results):
    for name, options in (("made", {"method": "lora"}), ("routed", {"method": "smora"})):
        method = pr.method(options["method"], **({"k": 2} if name == "routed" else {}))
        Case(method, 0, MODELS["llama"]).build().save_pretrained(name)
    pr.export(Case(pr.method("lora"), 0, MODELS["llama"]).build(), "plain")
    written(*run_results)
    captured = called(capsys, *words, code=2)
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert not captured.out
    assert not Path("out").exists()


@pytest.fixture
def run_results():
    """(what was asked, results) of a run whose adapter was deleted."""
    row = {"unrestricted": [[0.5]], "restricted": [[0.5]], "counts": [4], "seconds": 1.0}
    system = {"name": "lora", "label": "lora r=2", "role": "method", **row, "trainable": 1}
    system |= {"metrics": {"unrestricted": {}, "restricted": {}}, "routing": None}
    task = {"name": "a", "labels": ["x"], "n_train": 4, "n_test": 4}
    named = {"name": "lora"}
    asked = {"method": named, "stream": {"name": "one"}, "model": {}, "seed": 0, "train": {}}
    probe = {**system, "name": "probe", "role": "reference", "adapter": None}
    other = {**probe, "name": "other", "adapter": "adapters/other"}
    mine = {**system, "adapter": "adapters/lora"}
    mine["exports"] = {"stage-0": "exports/lora/stage-0"}
    parts = [
        {**mine, "name": f"lora@{part}", "label": f"lora r=2 ({part})", "deploy": part}
        | {"adapter": None, "exports": None}
        for part in ("stage-0", "rank 1")
    ]
    return asked, {"tasks": [task], "systems": [mine, *parts, other, probe]}
