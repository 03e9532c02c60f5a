"""`polyrank methods NAME`: what fits a terminal, and which options it lists."""

import sys
from itertools import pairwise

import pytest

from polyrank.cli import main
from polyrank.cli.facts import description
from polyrank.cli.unread import unread
from polyrank.frame import get, method, names


def entry(capsys, monkeypatch, name, width=80):
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit) as caught:
        main(["methods", name])
    assert caught.value.code == 0
    return capsys.readouterr().out.splitlines()


def test_an_entry_fills_a_terminal_of_80_columns(capsys, monkeypatch):
    lines = entry(capsys, monkeypatch, "codyra")
    assert max(map(len, lines)) <= 80
    start = next(i for i, line in enumerate(lines) if line.startswith("Limits: "))
    end = next(i for i, line in enumerate(lines) if line.startswith("Status: "))
    paragraph = lines[start:end]
    assert all(line.startswith("    ") for line in paragraph[1:])
    # A line ends only where the next word would not have fitted.
    for line, following in pairwise(paragraph):
        assert len(line) + 1 + len(following.split()[0]) > 80


@pytest.mark.parametrize("width", [40, 80, 200])
def test_filling_keeps_every_word_and_every_heading(width):
    for name in names():
        cls = get(name)
        given = sys.modules[cls.__module__].__doc__
        text = description(cls, width)
        assert text.split() == given.split()
        assert max(map(len, text.splitlines())) <= min(width, 100)
        # Below the title, which is filled without an indent.
        _, before = given.split("\n\n", 1)
        _, after = text.split("\n\n", 1)
        heads, begun = (
            [line.split()[0] for line in body.splitlines() if line and not line.startswith(" ")]
            for body in (before, after)
        )
        assert begun == heads


def test_options_that_are_refused_are_not_listed(capsys, monkeypatch):
    text = "\n".join(entry(capsys, monkeypatch, "osf"))
    assert "not read, and refused: r, alpha, scaling, dropout, init_by, optim_by" in text
    listed = {
        line.split()[0] for line in text.splitlines() if line.startswith("  ") and line.strip()
    }
    assert {"schedule", "trr"} <= listed
    assert not {"r", "init_by", "optim_by"} & listed
    text = "\n".join(entry(capsys, monkeypatch, "full"))
    assert "--set" not in text


def test_options_that_are_taken_are_not_said_to_be_refused():
    refused = {name: unread(get(name)) for name in names()}
    assert refused["lora"] == refused["olora"] == refused["der"] == []
    assert "scaling" not in refused["allora"]
    assert method("allora", r=4, alpha=4.0, scaling="alpha/r").scaling == "alpha/r"
    assert "optim_by" not in refused["lora-ga"]
    assert method("lora-ga", optim_by="altlora").optim_by == "altlora"
    assert "init_by" in refused["smora"]
    with pytest.raises(ValueError, match="init_by"):
        method("smora", init_by="lora-ga")
