"""What is made once: where it lies, that it is there whole or not at all, that damage is seen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from polyrank.errors import CheckpointError, RunError
from polyrank.io.cache import cache_folder, cached

KEY = {"rows": "abc", "seed": 0}


class Maker:
    """Writes two files, and counts how often it was asked to."""

    def __init__(self, text="made", fault=None):
        self.text, self.fault, self.count = text, fault, 0

    def __call__(self, folder):
        assert list(folder.iterdir()) == []
        self.count += 1
        (folder / "a.txt").write_text(self.text, encoding="utf-8")
        (folder / "deep").mkdir()
        (folder / "deep" / "b.txt").write_text("b", encoding="utf-8")
        if self.fault is not None:
            raise self.fault


@pytest.fixture
def bare(monkeypatch):
    """An environment that names no cache."""
    for name in ("POLYRANK_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    return monkeypatch


def test_tests_have_a_cache_of_their_own():
    assert "polyrank-tests-" in str(cache_folder())


@pytest.mark.parametrize(
    ("platform", "place"),
    [
        ("linux", "/home/me/.cache/polyrank"),
        ("darwin", "/home/me/Library/Caches/polyrank"),
        ("win32", "/home/me/.cache/polyrank"),
    ],
)
def test_each_platform_has_its_place(bare, platform, place):
    bare.setattr(sys, "platform", platform)
    assert cache_folder() == Path(place)


def test_the_environment_comes_first(bare):
    bare.setattr(sys, "platform", "win32")
    bare.setenv("LOCALAPPDATA", "/local")
    assert cache_folder() == Path("/local/polyrank")
    bare.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/polyrank")
    bare.setenv("POLYRANK_CACHE", "/own")
    assert cache_folder() == Path("/own")


def test_it_is_made_once_for_each_key(tmp_path):
    make = Maker()
    first = cached("model", KEY, make, tmp_path)
    assert cached("model", {"seed": 0, "rows": "abc"}, make, tmp_path) == first
    assert make.count == 1
    assert first.name.startswith("model-")
    assert (first / "a.txt").read_text(encoding="utf-8") == "made"
    other = cached("model", {**KEY, "seed": 1}, make, tmp_path)
    assert other != first
    assert make.count == 2
    assert sorted(tmp_path.iterdir()) == sorted([first, other])


def test_the_cache_of_the_machine_is_used_if_no_folder_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYRANK_CACHE", str(tmp_path / "deep" / "cache"))
    assert cached("model", KEY, Maker()).parent == tmp_path / "deep" / "cache"


def test_what_fails_or_is_stopped_leaves_nothing(tmp_path):
    for fault in (ValueError("no"), KeyboardInterrupt()):
        with pytest.raises(type(fault)):
            cached("model", KEY, Maker(fault=fault), tmp_path)
        assert list(tmp_path.iterdir()) == []
    assert (cached("model", KEY, Maker(), tmp_path) / "a.txt").is_file()


def test_a_process_that_is_killed_leaves_nothing_that_is_used(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from polyrank.io.cache import cached\n"
        "def make(folder):\n"
        "    (folder / 'a.txt').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        f"cached('model', {KEY!r}, make, {str(tmp_path)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode != 0
    make = Maker()
    found = cached("model", KEY, make, tmp_path)
    assert make.count == 1
    assert (found / "a.txt").read_text(encoding="utf-8") == "made"


def test_of_two_that_make_the_same_the_first_to_finish_keeps_its_own(tmp_path):
    class Slow(Maker):
        def __call__(self, folder):
            cached("model", KEY, Maker("fast"), tmp_path)
            super().__call__(folder)

    found = cached("model", KEY, Slow("slow"), tmp_path)
    assert (found / "a.txt").read_text(encoding="utf-8") == "fast"
    assert list(tmp_path.iterdir()) == [found]


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: (found / "a.txt").write_text("changed", encoding="utf-8"),
        lambda found: (found / "deep" / "b.txt").unlink(),
        lambda found: (found / "more.txt").write_text("", encoding="utf-8"),
        lambda found: (found / "cached.json").unlink(),
        lambda found: (found / "cached.json").write_text("{", encoding="utf-8"),
        lambda found: (found / "cached.json").write_text("[]", encoding="utf-8"),
    ],
    ids=["changed", "missing", "extra", "no record", "no JSON", "list"],
)
def test_damage_is_seen_and_names_the_remedy(tmp_path, damage):
    found = cached("model", KEY, Maker(), tmp_path)
    damage(found)
    make = Maker()
    with pytest.raises(CheckpointError, match="remove the folder, and it is made anew"):
        cached("model", KEY, make, tmp_path)
    assert make.count == 0


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RunError, match="set POLYRANK_CACHE to a folder"):
        cached("model", KEY, Maker(), tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]
