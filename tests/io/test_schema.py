"""What results.json may hold besides the obligatory: other scores, validation, general ability."""

import math

import pytest

from polyrank.io import schema

NAN = math.nan


def results(scored=(None, None), **changes):
    system = {
        "name": "lora",
        "label": "lora r=8",
        "role": "method",
        "restricted": [[1.0, None], [0.5, 0.75]],
        "unrestricted": [[1.0, None], [0.25, 0.75]],
        "counts": [4, 8],
        "metrics": {"unrestricted": {"forgetting": 0.75}, "restricted": {"forgetting": None}},
        "seconds": 1.5,
        "trainable": 128,
        "adapter": None,
        "routing": None,
    }
    tasks = [
        {"name": n, "labels": None, "n_train": 9, "n_test": 4, **({"metric": m} if m else {})}
        for n, m in zip("ab", scored, strict=True)
    ]
    return {"schema": 1, "tasks": tasks, "systems": [{**system, **changes}]}


def faults(*scored, **changes):
    return schema.results_problems(results(*scored, **changes))


HELD = {
    "restricted": [[None, None], [None, None]],
    "unrestricted": [[1.0, None], [0.5, 0.5]],
    "metrics": {"unrestricted": {"forgetting": 0.5}, "restricted": {"forgetting": None}},
}


FIGURE = {"name": "reuse", "title": "Reuse", "unit": "", "note": ""} | {
    "rows": ["a"],
    "columns": ["a", "b"],
    "values": [[-0.5, None]],
}
ROUTED = {"layers": ["q"], "tasks": ["a"], "load": [[[1.0, 0.0]]], "entropy": [[0.0]]}


def test_what_is_optional_may_be_absent_or_null():
    assert faults() == []
    nothing = dict.fromkeys(
        ("general", "validation", "extra_samples", "deploy", "exports", "figures")
    )
    assert faults(**nothing) == []
    full = {"general": [0.5, None, 0.25], "validation": HELD, "extra_samples": 16, "deploy": "slow"}
    assert faults(**full) == []
    # A reference that is trained once has one score before and one after.
    assert faults(general=[0.5, 0.25]) == []


@pytest.mark.parametrize("status", ["running", "done", "failed", "interrupted"])
def test_how_a_run_may_stand(status):
    assert not [p for p in schema.run_problems({"status": status}) if "status: got" in p]
    assert any("status: got 'over'" in p for p in schema.run_problems({"status": "over"}))


@pytest.mark.parametrize(
    ("metric", "good", "bad"),
    [
        ("accuracy", [0, 1, 0.5, None, NAN], [-0.1, 1.01, "1", True, math.inf]),
        (None, [0, 1], [2]),
        ("sari", [0.5], [35.0]),
        ("negative_loss", [-7.5, 0, None, NAN], ["-inf", -math.inf, True]),
        ("matthews", [-1, 1], [math.inf]),
        ("my_own", [1e6, -1e6], ["many"]),
    ],
)
def test_the_range_of_a_score_is_that_of_its_metric(metric, good, bad):
    for value in good:
        assert faults((metric, None), unrestricted=[[value, None], [0.5, 0.5]]) == []
    for value in bad:
        (line,) = faults((metric, None), unrestricted=[[value, None], [0.5, 0.5]])
        asked = "a fraction" if metric in (None, "accuracy", "sari") else f"a finite {metric}"
        assert f"systems[0].unrestricted: got {value!r}, expected {asked}" in line


def test_each_column_has_the_range_of_its_own_task():
    mixed = ("negative_mse", "accuracy")
    assert faults(mixed, unrestricted=[[-3.0, None], [-2.0, 0.5]]) == []
    (line,) = faults(mixed, unrestricted=[[-3.0, None], [-2.0, -0.5]])
    assert "got -0.5, expected a fraction 0..1" in line
    (line,) = faults(mixed, validation={**HELD, "unrestricted": [[0.5, None], [1, 1.5]]})
    assert "systems[0].validation.unrestricted: got 1.5, expected a fraction" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general": []}, "general: got [], expected up to 3 numbers"),
        ({"general": [0.1] * 4}, "general: got [0.1, 0.1, 0.1, 0.1], expected up to 3 numbers"),
        ({"general": [0.1, "x"]}, "general: got [0.1, 'x'], expected up to 3 numbers"),
        ({"general": 0.5}, "general: got float, expected list or null"),
        ({"extra_samples": -1}, "extra_samples: got -1, expected a number of at least 0, or null"),
        ({"extra_samples": True}, "extra_samples: got bool, expected int or float or null"),
        ({"exports": {"a": 1}}, "exports: a: got 1, expected the path of a folder"),
        ({"figures": [{}]}, "figures[0]: 'name' is missing"),
        ({"figures": [{**FIGURE, "rows": []}]}, "figures[0].rows: got [], expected one word"),
        (
            {"figures": [{**FIGURE, "values": [[0.5]]}]},
            "figures[0].values: expected 1 rows of 2 numbers",
        ),
        (
            {"figures": [{**FIGURE, "values": [[0.5, "inf"]]}]},
            "figures[0].values: expected finite numbers, or null",
        ),
        ({"routing": {**ROUTED, "gate": [[[]]]}}, "routing.gate: expected a list of one number"),
        ({"routing": {**ROUTED, "gate": [[["a"]]]}}, "routing.gate: expected finite numbers"),
        ({"routing": {**ROUTED, "load": [[[-1.0]]]}}, "routing.load: expected numbers of at"),
        ({"deploy": 3}, "deploy: got int, expected str or null"),
        ({"validation": []}, "validation: got list, expected dict or null"),
        ({"validation": {}}, "validation: 'unrestricted' is missing"),
        (
            {"validation": {**HELD, "restricted": [[1.0]]}},
            "validation.restricted: expected a matrix of 2 x 2",
        ),
        (
            {"validation": {**HELD, "metrics": {"restricted": {}}}},
            "validation.metrics.unrestricted: got None, expected names with numbers",
        ),
        (
            {"metrics": {"unrestricted": {"forgetting": math.inf}, "restricted": {}}},
            "metrics.unrestricted: got {'forgetting': inf}",
        ),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    found = faults(**changes)
    assert found
    assert any(f"systems[0].{message}" in p or f"systems[0]: {message}" in p for p in found), found


@pytest.mark.parametrize("metric", [3, ["accuracy"]])
def test_a_metric_is_a_name(metric):
    data = results()
    data["tasks"][1]["metric"] = metric
    (line,) = schema.results_problems(data)
    assert line == (f"results.json: tasks[1]: metric: got {type(metric).__name__}, expected str")


def test_figures_and_gates_are_held_and_mapped():
    gated = {**ROUTED, "gate": [[[-0.5, None]]]}
    data = results(figures=[FIGURE], routing=gated, exports={"a": "exports/lora/a"})
    assert schema.results_problems(data) == []
    assert schema.results_problems(results(routing=ROUTED)) == []
    back = schema.map_scores(data, lambda x: "gone" if x is None else x)["systems"][0]
    assert back["figures"] == [{**FIGURE, "values": [[-0.5, "gone"]]}]
    assert back["routing"]["gate"] == [[[-0.5, "gone"]]]
    assert back["exports"] == {"a": "exports/lora/a"}
    assert "gate" not in schema.map_scores(results(routing=ROUTED), str)["systems"][0]["routing"]


def test_every_score_that_may_be_missing_is_mapped():
    data = results(general=[0.5, None], validation={**HELD, "counts": [2, 2]}, extra_samples=None)
    back = schema.map_scores(data, lambda x: "gone" if x is None else x)["systems"][0]
    assert back["general"] == [0.5, "gone"]
    assert back["validation"]["restricted"] == [["gone", "gone"], ["gone", "gone"]]
    assert back["validation"]["metrics"]["restricted"] == {"forgetting": "gone"}
    assert back["validation"]["counts"] == [2, 2]
    # Absent on purpose, no score.
    assert back["extra_samples"] is None
    plain = schema.map_scores(results(), lambda x: "gone" if x is None else x)["systems"][0]
    assert "general" not in plain
    assert "validation" not in plain
