"""The runner of PEFT's suite: what it counts, and what it says where it cannot run."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

REPORT = """<testsuites><testsuite>
<testcase classname="a.TestOne" name="test_a[x]"/>
<testcase classname="a.TestOne" name="test_b[x]"><failure message="1 is not 2&#10;more"/></testcase>
<testcase classname="a.TestOne" name="test_b[y]"><error message="boom"/></testcase>
<testcase classname="a.TestOne" name="test_c[x]"><skipped message="why /tmp/z/f.py"/></testcase>
<testcase classname="a.TestOne" name="test_c[y]"><skipped message="why /tmp/z/f.py"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture(scope="module")
def runner():
    spec = importlib.util.spec_from_file_location(
        "run_peft_suite", Path(__file__).parent / "run_peft_suite.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_outcomes_are_counted_and_explained(runner, tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    found = runner.outcomes(tmp_path / "report.xml")
    assert [result for result, _ in found.values()] == [
        "passed", "failed", "failed", "skipped", "skipped"
    ]  # fmt: skip
    text = runner.table(found)
    assert "1 passed, 2 failed, 2 skipped." in text
    assert "| `TestOne::test_b` | 1 | 1 is not 2 |" in text
    assert "| `TestOne::test_c` | 2 | why f.py |" in text


def test_the_suite_is_skipped_with_a_reason_where_pip_cannot(runner, monkeypatch, capsys):
    def failing(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "no network")

    monkeypatch.setattr(runner.subprocess, "run", failing)
    assert runner.main([]) == 0
    said = capsys.readouterr().out
    assert said.startswith("peft-suite skipped: pip could not download the source of peft ")
    assert "no network" in said


def test_the_committed_table_is_of_a_run_without_failures(runner):
    text = runner.README.read_text(encoding="utf-8")
    table = text.partition(runner.MARKS[0])[2].partition(runner.MARKS[1])[0]
    assert " 0 failed, " in table
    assert "| Failures |" not in table
