"""docs/speed.md says what the committed tables say."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def made(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    for name in ("speed_page", "speed_aims", "speed_tables"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("speed_page")


def test_the_page_is_made_from_the_tables(made):
    written = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert written == made.page(), "run python bench/speed_page.py"


def test_the_table_of_the_readme_is_too(made):
    written = (ROOT / "README.md").read_text(encoding="utf-8")
    assert made.summary() in written, "run python bench/speed_page.py"


def test_a_table_that_is_not_there_leaves_its_section_and_aims_out(made, monkeypatch, tmp_path):
    for name in made.TABLES:
        shutil.copy(ROOT / "bench" / "results" / f"{name}.csv", tmp_path)
    monkeypatch.setattr(sys.modules["speed_tables"], "RESULTS", tmp_path)
    said = ("4 layers of 7 B, of PEFT bf16", made.SEVEN)
    assert not any(words in made.page() for words in said)
    shutil.copy(tmp_path / "model_step.csv", tmp_path / "model_step_7b.csv")
    assert all(words in made.page() for words in said)
