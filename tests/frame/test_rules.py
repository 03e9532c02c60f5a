"""Which rules may run together."""

import pytest

from polyrank.frame import ORDER, Rule, conflicts


def rule(label, order="project", touches=(), expects=()):
    made = type(label, (Rule,), {})()
    made.order = ORDER[order]
    made.touches, made.expects = frozenset(touches), frozenset(expects)
    return made


@pytest.mark.parametrize(
    ("touches", "expects", "fit"),
    [
        ("grad", "true_grad", True),
        ("true_grad", "true_grad", False),
        ("grad", "grad", False),
        ("true_grad", "grad", False),
        ("param", "grad", True),
    ],
)
def test_terms_of_the_objective_leave_a_gradient_true_and_factors_do_not(touches, expects, fit):
    found = conflicts(
        [rule("Second", expects=[expects]), rule("First", "penalty", touches=[touches])]
    )
    assert (found == []) is fit
    if not fit:
        assert f"'second' expects an untouched {touches}, but 'first' changes it" in found[0]


def test_what_comes_later_may_change_what_an_earlier_one_expected():
    assert conflicts([rule("A", expects=["grad"]), rule("B", "prox", touches=["grad"])]) == []
