"""Three real kills: the script that commits its result for twenty."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "resume.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the script forks, which Windows does not")
def test_three_kills_change_no_bit(tmp_path):
    out = tmp_path / "resume.csv"
    words = ["--small", "--kills", "3", "--systems", "ewc", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    (row,) = csv.DictReader(out.read_text(encoding="utf-8").splitlines())
    assert row["kills"] == "3"
    assert row["equal"] == "True"
