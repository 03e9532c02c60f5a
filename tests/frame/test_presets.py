"""Named sets of options: merged under what is given, checked like the rest, never saved."""

import subprocess
import sys

import pytest

import polyrank as pr
from polyrank.errors import ConfigError
from polyrank.frame import get, names
from polyrank.layers.config import PolyrankConfig

FILE = '''"""Preset: a toy."""
from dataclasses import dataclass
from typing import ClassVar
from polyrank.frame import Method, register

@register
@dataclass(frozen=True, kw_only=True)
class Preset(Method):
    """A toy.

    Args:
        tau: a number.
    """
    tau: float = 1.0
    presets: ClassVar = {"paper": {"r": 4, "tau": 0.5}, "code": {"tau": 0.25}}
'''


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "preset_toy.py").write_text(FILE, encoding="utf-8")
    return pr.load_method_file(tmp_path / "preset_toy.py").name


def test_a_preset_stands_below_what_is_given(toy):
    assert pr.method(toy, preset="paper") == pr.method(toy, r=4, tau=0.5)
    assert pr.method(toy, preset="paper", r=2) == pr.method(toy, r=2, tau=0.5)
    assert pr.method(toy, preset=None) == pr.method(toy)


def test_what_is_saved_is_complete_and_names_no_preset(toy):
    config = PolyrankConfig(method=toy, options={"preset": "paper"}, target_modules=["q_proj"])
    assert config.options == pr.method(toy, r=4, tau=0.5).options()
    assert "preset" not in config.options


def test_an_unknown_preset_is_answered_with_the_nearest_word(toy):
    with pytest.raises(ConfigError, match=r"preset: got 'papr', expected one of paper, code; did"):
        pr.method(toy, preset="papr")
    with pytest.raises(ConfigError, match=r"smora: preset: got 'papr', expected none"):
        pr.method("smora", preset="papr")
    with pytest.raises(ConfigError) as found:
        pr.method(toy, preset=["paper"], r=0)
    assert len(found.value.problems) == 2


def test_the_command_line_shows_presets_and_takes_them(toy, tmp_path):
    words = [sys.executable, "-m", "polyrank"]
    file = ["--method-file", "preset_toy.py"]
    shown = subprocess.run(
        [*words, "methods", *file], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert "preset=paper: r=4 tau=0.5" in shown.stdout
    refused = subprocess.run(
        [*words, "run", *file, "--set", "preset=papr"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "did you mean 'paper'" in refused.stderr


@pytest.mark.parametrize("name", names())
def test_every_preset_can_be_built(name):
    cls = get(name)
    for word, options in cls.presets.items():
        made = pr.method(name, preset=word).options()
        assert made == {**cls().options(), **options}
