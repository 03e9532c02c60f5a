"""Methods as words: where a comma parts options, and where it belongs to a value."""

import pytest

import polyrank as pr
from polyrank.cli.choices import strategy
from polyrank.errors import ConfigError
from polyrank.frame.words import split, worded


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
    with pytest.raises(ConfigError, match=r"got '\[1,2\]', expected OPTION=VALUE"):
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
