"""The toy methods, each in a file of its own, as `polyrank run --method-file` would take it."""

from pathlib import Path

import pytest

from polyrank.frame import load_file, registry

TOYS = Path(__file__).parent / "toys"


@pytest.fixture
def toys():
    """The toy methods by name, registered for one test."""
    found = {file.stem: load_file(file) for file in sorted(TOYS.glob("*.py"))}
    yield found
    for name in found:
        del registry._found[name]
