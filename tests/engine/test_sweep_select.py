"""Which rate is selected and which run comes next, against cases worked out by hand."""

import dataclasses
import random

import pytest

from polyrank.engine.sweep.grid import Grid
from polyrank.engine.sweep.records import by_group
from polyrank.engine.sweep.schedule import Group, Point, pending, rates
from polyrank.engine.sweep.select import best_of, choose
from polyrank.testing import assert_close

GRID = Grid(anchor=2e-4, per_decade=4, first=-1, last=1)


def group(**changes):
    values = {
        "id": "g",
        "label": "lora",
        "stage": "full",
        "grid": GRID,
        "seeds": (0, 1),
        "extend": True,
        "axes": {},
    }
    return Group(**{**values, **changes})


def line(of, index, seed, validation, test=0.5, state="ok", **more):
    return {
        **Point(group=of, index=index, seed=seed).line(),
        "state": state,
        "validation": validation,
        "test": test,
        **more,
    }


def lines(of, table, **more):
    """One line for each seed of {rate number: validation by seed}; None is a diverged run."""
    return [
        line(of, index, seed, v or 0.0, v or 0.0, "ok" if v is not None else "diverged", **more)
        for index, values in table.items()
        for seed, v in zip(of.seeds, values, strict=False)
    ]


def own(of, table):
    return by_group(lines(of, table))[of.id]


def chosen(of, table):
    return choose(own(of, table), of.grid, list(table), of.seeds)


def test_the_best_mean_over_seeds_is_selected_and_its_test_shown():
    of = group()
    found = chosen(of, {-1: (0.70, 0.74), 0: (0.90, 0.80), 1: (0.95, 0.60)})
    assert found.best == 0
    assert found.validation == (0.90, 0.80)
    assert not found.at_edge
    assert (found.diverged, found.missing, found.errors) == (0, 0, 0)
    runs = by_group([line(of, 0, 0, 0.9, 0.1), line(of, 0, 1, 0.9, 0.2), *lines(of, {1: (1, 0)})])
    assert choose(runs["g"], GRID, [0, 1], of.seeds).test == (0.1, 0.2)


def test_ties_go_to_the_smaller_rate_even_if_only_rounding_differs():
    # 0.8 + 0.9 is not 0.85 + 0.85 in floating point.
    assert (0.8 + 0.9) / 2 != 0.85
    assert chosen(group(), {-1: (0.85, 0.85), 0: (0.8, 0.9), 1: (0.9, 0.8)}).best == -1
    assert chosen(group(), {-1: (0.8, 0.9), 0: (0.85, 0.85), 1: (0.85, 0.85)}).best == -1
    assert best_of(own(group(), {-1: (0.8, 0.9), 0: (0.85, 0.85)}), [-1, 0], (0, 1)) == [-1, 0]


@pytest.mark.parametrize(("best", "edge"), [(-1, True), (0, False), (1, True)])
def test_the_best_rate_at_an_edge_is_flagged(best, edge):
    table = {i: (0.9, 0.9) if i == best else (0.5, 0.5) for i in (-1, 0, 1)}
    assert chosen(group(), table).at_edge is edge


def test_one_rate_has_no_edge():
    of = group(grid=dataclasses.replace(GRID, first=0, last=0))
    assert not chosen(of, {0: (0.9, 0.9)}).at_edge


def test_a_diverged_run_counts_as_the_worst_value():
    found = chosen(group(), {-1: (0.6, 0.6), 0: (0.5, 0.6), 1: (0.99, None)})
    assert (found.best, found.diverged) == (-1, 1)
    assert_close(found.levels[2].scores[1], 0.0)
    every = chosen(group(), {-1: (None, None), 0: (None, None), 1: (None, None)})
    assert (every.best, every.test, every.diverged) == (-1, (0.0, 0.0), 6)


def test_the_plateau_is_a_factor_of_rates():
    def width(*means):
        of = group(seeds=(0,), grid=dataclasses.replace(GRID, first=0, last=4))
        return chosen(of, {i: (value,) for i, value in enumerate(means)}).plateau

    assert_close(width(0.5, 0.9, 0.5, 0.5, 0.5), 1.0)
    assert_close(width(0.5, 0.9, 0.895, 0.5, 0.5), 10**0.25)
    # One point less than the best still belongs to it, in decimal as well.
    assert_close(width(0.89, 0.9, 0.5, 0.5, 0.89), 10.0)
    assert_close(width(0.5, 0.9, 0.8899, 0.5, 0.5), 1.0)


def test_noisy_seeds_widen_the_plateau():
    # sd = 0.1·√2 / √1, so SE = 0.1 and the width 0.2.
    table = {0: (0.9, 0.7), 1: (0.61, 0.61), 2: (0.59, 0.59)}
    of = group(grid=dataclasses.replace(GRID, first=0, last=2))
    assert_close(chosen(of, table).plateau, 10**0.25)


def test_a_rate_without_all_its_seeds_is_no_candidate():
    found = chosen(group(), {-1: (0.6, 0.6), 0: (0.5, 0.5), 1: (0.99,)})
    assert (found.best, found.missing) == (-1, 1)
    assert not found.levels[2].whole
    assert chosen(group(), {0: (0.5,)}).best is None


def test_an_error_is_no_result():
    of = group()
    failed = line(of, 0, 0, None, None, "error", error="RunError: full disk")
    runs = by_group([failed, *lines(of, {1: (0.5, 0.5)})])["g"]
    found = choose(runs, GRID, [0, 1], of.seeds)
    assert (found.best, found.errors, found.missing, found.diverged) == (1, 1, 2, 0)
    assert by_group([failed, line(of, 0, 0, 0.7)]) == by_group([line(of, 0, 0, 0.7), failed])
    assert by_group([failed, line(of, 0, 0, 0.7)])["g"][0, 0]["state"] == "ok"


def tried(of, table):
    return rates(of, [of], by_group(lines(of, table)))


def test_a_grid_grows_while_its_best_point_is_at_an_edge():
    of = group()
    base = {-1: (0.1, 0.1), 0: (0.2, 0.2), 1: (0.3, 0.3)}
    assert tried(of, {}) == [-1, 0, 1]
    # The last run of the grid is still to come.
    assert tried(of, {**base, 1: (0.9,)}) == [-1, 0, 1]
    assert tried(of, base) == [-1, 0, 1, 2]
    assert tried(of, {**base, 2: (0.2, 0.2)}) == [-1, 0, 1, 2]
    assert tried(of, {**base, 2: (0.4, 0.4), 3: (0.5, 0.5)}) == [-1, 0, 1, 2, 3, 4]
    up = {i: (0.1 + i / 100, 0.1 + i / 100) for i in range(-1, 9)}
    assert tried(of, up) == [-1, 0, 1, 2, 3, 4, 5]
    assert choose(own(of, up), GRID, tried(of, up), of.seeds).at_edge
    down = {i: (0.1 - i / 100, 0.1 - i / 100) for i in range(-9, 2)}
    assert tried(of, down) == [-5, -4, -3, -2, -1, 0, 1]
    assert tried(group(extend=False), base) == [-1, 0, 1]
    # All worst: tied, so that the smallest rate is the best.
    assert tried(of, {-1: (None, None), 0: (None, None), 1: (None, None)}) == [-2, -1, 0, 1]


def test_one_rate_is_never_extended():
    of = group(grid=dataclasses.replace(GRID, first=0, last=0), fixed="the paper's")
    assert tried(of, {0: (0.5, 0.5)}) == [0]


def test_full_runs_follow_a_finished_probe():
    before = group(id="p", stage="probe", extend=False)
    after = group(probe="p", points=2, extend=False)
    both = [before, after]
    table = {-1: (0.1, 0.1), 0: (0.2, 0.2), 1: (0.15,)}
    assert rates(after, both, by_group(lines(before, table))) == []
    table[1] = (0.15, 0.15)
    runs = by_group(lines(before, table))
    assert rates(after, both, runs) == [0, 1]
    assert [(p.group.stage, p.index, p.seed) for p in pending(both, runs)] == [
        ("full", 0, 0),
        ("full", 0, 1),
        ("full", 1, 0),
        ("full", 1, 1),
    ]


def test_what_is_left_does_not_depend_on_the_order_of_lines():
    groups = [group(id=name, label=name) for name in "ab"]
    every = [
        *lines(groups[0], {-1: (0.1, 0.2), 0: (0.3, 0.1), 1: (0.6, 0.7)}),
        *lines(groups[1], {-1: (0.1, 0.2), 0: (0.3,)}),
        line(groups[1], 1, 0, None, None, "error"),
    ]
    left = [(p.group.id, p.index, p.seed) for p in pending(groups, by_group(every))]
    assert left == [("a", 2, 0), ("a", 2, 1), ("b", 0, 1), ("b", 1, 0), ("b", 1, 1)]
    for seed in range(5):
        random.Random(seed).shuffle(every)
        again = pending(groups, by_group(every))
        assert [(p.group.id, p.index, p.seed) for p in again] == left


def test_the_identity_of_a_run_says_what_decides_it():
    ids = {
        Point(group=of, index=index, seed=seed).id
        for of in (group(), group(id="h"))
        for index in (0, 1)
        for seed in (0, 1)
    }
    assert len(ids) == 8
    assert Point(group=group(label="other", extend=False), index=0, seed=0).id in ids


def test_a_group_survives_being_written():
    of = group(axes={"rank": 4}, config={"train": {"epochs": 1}}, fixed="why")
    assert Group.read(of.plain()) == of
    assert of.name == "lora rank=4"
