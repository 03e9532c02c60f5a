"""The public names against tests/public_api.txt, which `pytest --update-api` rewrites."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "polyrank"
SNAPSHOT = ROOT / "tests" / "public_api.txt"
# Packages whose content is found by name, not exported: methods by the registry, pages by file.
UNLISTED = {"polyrank.methods", "polyrank.recipes"}


def packages():
    """The front door and the public packages, by dotted name."""
    folders = sorted(path.parent for path in SRC.glob("[!_]*/__init__.py"))
    return ["polyrank", *(f"polyrank.{folder.name}" for folder in folders)]


def exported():
    """Every public name, dotted; a package without `__all__` would be missed, so it is an error."""
    names = []
    for package in packages():
        if package in UNLISTED:
            continue
        module = importlib.import_module(package)
        assert hasattr(module, "__all__"), f"{package}: expected __all__, even if it is empty"
        names += [f"{package}.{name}" for name in module.__all__]
    return sorted(names)


def test_packages_are_found():
    assert {"polyrank", "polyrank.frame", "polyrank.metrics", "polyrank.testing"} <= set(packages())


def test_snapshot(request):
    text = "".join(f"{name}\n" for name in exported())
    if request.config.getoption("--update-api"):
        SNAPSHOT.write_text(text, encoding="utf-8")
    before, now = SNAPSHOT.read_text(encoding="utf-8").split(), text.split()
    new, gone = sorted(set(now) - set(before)), sorted(set(before) - set(now))
    assert now == before, (
        f"new: {new}, gone: {gone}; if that is on purpose, run "
        "`pytest tests/test_public_api.py --update-api` and write it into CHANGELOG.md"
    )


@pytest.mark.parametrize("package", sorted(set(packages()) - UNLISTED))
def test_every_public_name_exists_once_and_is_public(package):
    module = importlib.import_module(package)
    names = list(module.__all__)
    assert len(names) == len(set(names))
    for name in names:
        assert not name.startswith("_") or name == "__version__"
        assert getattr(module, name) is not None
    assert set(names) <= set(dir(module))


def test_front_door_names_what_is_missing():
    polyrank = importlib.import_module("polyrank")
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = polyrank.no_such_name
