"""NAME=VALUE pairs and flags with several values."""

import pytest

from polyrank.cli.values import pairs, spread, value
from polyrank.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("16", 16),
        ("1e-3", 1e-3),
        ("true", True),
        ("False", False),
        ("null", None),
        ("alpha/r", "alpha/r"),
        ("[2, 4]", [2, 4]),
    ],
)
def test_a_value_is_read_as_what_it_looks_like(text, expected):
    found = value(text)
    assert found == expected
    assert type(found) is type(expected)


def test_pairs_report_every_fault_at_once():
    with pytest.raises(ConfigError) as caught:
        pairs(["r=4", "r=5", "k", "a b=1"], "--set")
    assert len(caught.value.problems) == 3
    assert "given twice" in caught.value.problems[0]
    assert "NAME=VALUE" in caught.value.problems[1]


def test_one_flag_takes_several_values():
    words = ["run", "--set", "r=16", "k=4", "--method", "smora", "--with", "joint", "sequential"]
    assert spread(words) == [
        *("run", "--set", "r=16", "--set", "k=4", "--method", "smora"),
        *("--with", "joint", "--with", "sequential"),
    ]
