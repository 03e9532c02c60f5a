"""Every pair of entries either works together or says in one sentence why not."""

import itertools

import pytest
import torch

import polyrank as pr
from polyrank.frame import Method, Strategy, combination_problems, get, names

SHIPPED = [get(name) for name in names() if get(name).__module__.startswith("polyrank.")]
METHODS = [cls for cls in SHIPPED if issubclass(cls, Method)]
STRATEGIES = [cls for cls in SHIPPED if issubclass(cls, Strategy)]
# Claims: what must not be combined, whatever the options.
NEVER = {
    # Only one of them can decide which samples are stored.
    *itertools.combinations(["agem", "der", "gem", "ilora", "replay"], 2),
    # The masked loss knows no rows of other tasks.
    ("ilora", "masked"),
    ("masked", "replay"),
    # Averages of factors that begin anew after every task would mean nothing.
    ("absorb", "ilora"),
    # There is one task, so nothing is earlier.
    *((name, "joint") for name in ("agem", "der", "ewc", "featkd", "gem", "ilora")),
    *(("joint", name) for name in ("lwf", "masked", "replay")),
}
NEVER_WITH = {
    ("codyra", "absorb"),
    ("codyra", "ilora"),
    ("olora", "absorb"),
    ("olora", "ilora"),
    ("smora", "absorb"),
}


def problems(method, *strategies):
    return combination_problems(method, list(strategies))


def together(method, *classes):
    """Whether any samples of the classes combine; all that was said where they do not."""
    said, fits = [], False
    for combination in itertools.product(*(cls.samples() for cls in classes)):
        found = problems(method, *combination)
        said += found
        fits |= not found
    return fits, said


def test_there_is_something_to_combine():
    assert {"olora", "lora", "smora"} <= {cls.name for cls in METHODS}
    expected = {"absorb", "agem", "der", "ewc", "featkd", "gem", "ilora", "joint", "l2", "lwf"}
    assert expected | {"masked", "replay", "sequential"} <= {cls.name for cls in STRATEGIES}


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda cls: cls.name)
def test_facts_are_no_options(strategy):
    for sample in strategy.samples():
        assert not {"structural", "persistent", "pools", "needs"} & sample.options().keys()


@pytest.mark.parametrize("pair", list(itertools.combinations(STRATEGIES, 2)), ids=str)
def test_two_strategies_combine_or_say_why_not(pair):
    fits, said = together(pr.method("lora"), *pair)
    key = tuple(cls.name for cls in pair)
    if key in NEVER:
        assert not fits
    if not fits:
        assert said
    for sentence in said:
        assert any(cls.name in sentence for cls in pair)
        assert "drop" in sentence or "use " in sentence or "keep one" in sentence
    if key not in NEVER and "joint" not in key:
        assert fits, said


@pytest.mark.parametrize("method", METHODS, ids=lambda cls: cls.name)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda cls: cls.name)
def test_a_method_and_a_strategy_combine_or_say_why_not(method, strategy):
    outcomes = [together(sample, strategy) for sample in method.samples()]
    fits = any(found for found, _ in outcomes)
    if (method.name, strategy.name) in NEVER_WITH:
        assert not fits
    elif method.name in ("lora", "smora", "olora"):
        assert fits, outcomes
    for found, said in outcomes:
        assert found or said
        assert all(strategy.name in sentence for sentence in said)


@pytest.mark.parametrize(
    ("method", "strategies", "says"),
    [
        ("lora", ["replay", "der"], "replay, der all decide the stored samples"),
        ("lora", ["masked", "lwf form=bce"], "all decide the task loss"),
        ("lora", ["masked", "replay"], "replay mixes rows of earlier tasks into it; use der"),
        ("lora", ["ewc", "absorb"], "to task, but absorb begins anew after each; drop"),
        ("olora", ["ewc"], "olora trains other ranks in each task"),
        ("olora", ["ilora"], "olora trains other ranks in each task"),
        ("lora", ["l2 space=factors", "absorb"], "l2: needs factors"),
        ("smora", ["l2"], "use space='factors'"),
        ("smora", ["ewc space=weights"], "use space='factors'"),
        ("smora", ["absorb"], "that of smora is no matrix"),
        ("lora", ["gem", "joint"], "gem: acts from the second task on, and joint trains on all"),
        ("lora", ["gem", "gem"], "'gem' is given 2 times"),
    ],
    ids=str,
)
def test_each_reason_in_its_words(method, strategies, says):
    found = problems(pr.method(method), *map(made, strategies))
    assert any(says in sentence for sentence in found), found


def made(words):
    name, *options = words.split()
    return pr.method(name, **dict(option.split("=") for option in options))


@pytest.mark.parametrize(
    ("method", "strategies"),
    [
        ("lora", ["ewc", "lwf", "featkd", "l2", "replay"]),
        ("lora", ["masked", "lwf", "gem", "ewc"]),
        ("lora", ["lwf form=bce", "l2", "absorb"]),
        ("lora", ["ewc space=weights", "absorb", "der"]),
        ("smora", ["ilora", "ewc", "lwf"]),
        ("olora", ["ewc space=weights", "replay", "lwf"]),
        ("olora", ["l2", "agem", "masked"]),
    ],
    ids=str,
)
def test_these_work_together_and_train_on_a_second_task(bench, method, strategies):
    chosen = [made(words) for words in strategies]
    options = {"r": 8, "k": 2} if method == "smora" else {"r": 2}
    assert problems(pr.method(method, **options), *chosen) == []
    work = bench(method, dtype=torch.float32, **options)
    for task in range(2):
        boundaries = [b for s in chosen if (b := s.boundary()) is not None]
        work.begin(task, *boundaries)
        work.replay.rows[task] = work.rows(6)
        before = work.weights()
        work.steps(chosen, count=2)
        assert any(not torch.equal(before[n], p) for n, p in work.weights().items())
        work.end()
    assert all(p.isfinite().all() for p in work.weights().values())
