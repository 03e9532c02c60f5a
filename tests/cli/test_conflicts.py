"""`polyrank methods --conflicts`: the table and the sentences."""

import pytest

from polyrank.cli import main
from polyrank.cli.pairing import answer
from polyrank.frame import get


def printed(capsys, *words):
    with pytest.raises(SystemExit) as caught:
        main(["methods", *words])
    assert caught.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_all_pairs_and_why_some_do_not_work(capsys):
    text = printed(capsys, "--conflicts")
    assert "✓ work together · ~ with some options · · never" in text
    assert "· der + replay: strategies: der, replay all decide the stored samples" in text
    assert "~ smora + l2: compares dense weights" in text
    assert "· olora + absorb: ends every task with fresh ranks" in text


def test_columns_are_numbered_as_the_rows_and_fit_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["methods", "--conflicts"])
    tens, units, *lines = capsys.readouterr().out.splitlines()
    assert max(map(len, (tens, units))) < 80
    rows = lines[: lines.index("")]
    number = {row.split()[1]: int(row.split()[0]) for row in rows}
    place = units.index("1")
    for row, column, mark in (("replay", "der", "·"), ("l2", "smora", "~"), ("ewc", "lora", "✓")):
        at = place + 2 * (number[column] - 1)
        assert int(f"{tens.ljust(80)[at]}{units[at]}") == number[column]
        assert next(line for line in rows if line.split()[1] == row)[at] == mark


def test_it_says_with_which_options_a_pair_works(capsys):
    text = printed(capsys, "absorb", "--conflicts")
    assert "drop one of them. It works with ewc:space=weights." in text
    found = answer(get("smora"), get("l2"))
    assert found.remedy == "l2:space=factors"


def test_one_name_shows_its_own_reasons(capsys):
    text = printed(capsys, "masked", "--conflicts")
    assert "masked + replay" in text
    assert "der + replay" not in text


@pytest.mark.parametrize(
    ("one", "other", "mark"),
    [("ewc", "lwf", "✓"), ("absorb", "ewc", "~"), ("gem", "replay", "·"), ("smora", "ilora", "✓")],
)
def test_the_marks(one, other, mark):
    found = answer(get(one), get(other))
    assert found.mark == mark
    assert bool(found.reason) == (mark != "✓")
