"""What is shown while a run goes on."""

import pytest

from polyrank.engine.progress import Bar


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, "sora: 4-5 (14 updates)"),
        ({"number": 3, "of": 7}, "sora: 4-5, stage 3 of 7 (14 updates)"),
        ({"number": 1, "of": 1}, "sora: 4-5 (14 updates)"),
    ],
    ids=["plain", "stage", "single"],
)
def test_a_line_a_phase_says_which_one_it_is(capsys, more, expected):
    with Bar() as bar:
        bar("phase", {"system": "sora", "task": "4-5", "phase": "x", "total": 14, **more})
    assert capsys.readouterr().err.splitlines() == [expected]
