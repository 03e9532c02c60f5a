"""NAME=VALUE pairs: what a value is read as, and where a comma parts two of them."""

import pytest

import polyrank as pr
from polyrank.cli.choices import strategy
from polyrank.errors import ConfigError
from polyrank.pairs import pairs, split, value, worded


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("16", 16),
        ("1e-3", 1e-3),
        (".5", 0.5),
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
        pairs(["r=4", "r=5", "k", "a b=1"], "--set", "--set r=16")
    assert len(caught.value.problems) == 3
    assert "given twice" in caught.value.problems[0]
    assert "NAME=VALUE" in caught.value.problems[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=1,b=2", {"a": 1, "b": 2}),
        ("a=[1,2,[3,4]],b=x", {"a": [1, 2, [3, 4]], "b": "x"}),
        ('a={"k":[1,2],"l":3},b=true', {"a": {"k": [1, 2], "l": 3}, "b": True}),
        ('a="one,two]",b=[",","["]', {"a": "one,two]", "b": [",", "["]}),
        ('a="say \\",\\"",b=0', {"a": 'say ","', "b": 0}),
        ("a=x],b=1", {"a": "x]", "b": 1}),
    ],
    ids=["plain", "list", "object", "quotes", "escaped", "stray"],
)
def test_commas_inside_of_values_part_nothing(text, expected):
    assert worded(f"name:{text}") == ("name", expected)
    assert strategy(f"name:{text}") == ("name", expected)


def test_what_is_no_pair_is_told_whole():
    assert split("") == [""]
    with pytest.raises(ConfigError, match=r"got '\[1,2\]', expected NAME=VALUE"):
        worded("name:a=1,[1,2]")


def test_a_method_that_lends_takes_lists(monkeypatch):
    seen = {}
    cls = type(pr.method("lora-ga"))
    real = cls.problems

    def watched(self):
        seen["gamma"] = self.gamma
        return real(self)

    monkeypatch.setattr(cls, "problems", watched)
    with pytest.raises(ConfigError, match=r"gamma: got \[1, 2\], expected a finite number"):
        pr.method("lora", init_by="lora-ga:gamma=[1,2],direction=ArBr")
    assert seen["gamma"] == [1, 2]
