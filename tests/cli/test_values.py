"""NAME=VALUE pairs and flags with several values."""

import pytest

from polyrank.cli import main
from polyrank.cli.choices import asked, choose
from polyrank.cli.lists import several
from polyrank.cli.values import spread


def test_one_flag_takes_several_values():
    words = ["run", "--set", "r=16", "k=4", "--method", "smora", "--with", "joint", "sequential"]
    assert spread(words) == [
        *("run", "--set", "r=16", "--set", "k=4", "--method", "smora"),
        *("--with", "joint", "--with", "sequential"),
    ]


@pytest.mark.parametrize(
    ("given", "declared", "expected"),
    [
        ("1,3", "tuple[int, ...]", [1, 3]),
        ("0.1, 2", "str | list[float] | tuple[float, ...]", [0.1, 2]),
        (4, "tuple[int, ...]", [4]),
        ([1, 2], "tuple[int, ...]", [1, 2]),
        ("linear", "str | list[float]", "linear"),
        ("a,b", "str | list[float]", "a,b"),
        ("1,3", "str", "1,3"),
        (4, "int", 4),
        (True, "tuple[int, ...]", True),
    ],
)
def test_several_values_are_written_with_commas(given, declared, expected):
    assert several(given, declared) == expected


def test_an_option_that_holds_several_takes_commas_and_says_so(capsys):
    problems = []
    words = asked(
        method="dylora", file=None, options=["r=4", "evaluate=1,3", "exports=2"], strategies=[],
        stream=None, model=None, train=[], target=None, references=None, seeds=None,
        problems=problems,
    )  # fmt: skip
    made = choose(words, None, problems).method
    assert (list(made.evaluate), list(made.exports)) == ([1, 3], [2])
    with pytest.raises(SystemExit):
        main(["methods", "dylora"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--set evaluate=1,3" in said.replace("- ", "-")
    assert "polyrank run --method dylora --set OPTION=VALUE OPTION=VALUE" in said
