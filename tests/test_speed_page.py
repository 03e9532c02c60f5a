"""docs/speed.md says what the committed tables say."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_is_made_from_the_tables():
    spec = importlib.util.spec_from_file_location("speed_page", ROOT / "bench" / "speed_page.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    written = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert written == made.page(), "run python bench/speed_page.py"
