"""`polyrank methods --conflicts`: the table and the sentences."""

import pytest

from polyrank.cli import main
from polyrank.cli.conflicts import answer
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
