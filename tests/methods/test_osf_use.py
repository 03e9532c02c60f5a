"""osf: how much is retained, the end of a task, what is refused."""

import math

import pytest
import torch
from torch import nn

import polyrank as pr
from polyrank.errors import ConfigError, MergeError, RunError
from polyrank.frame import Site
from polyrank.layers import adapter_of, append, keep
from polyrank.parts.importance import _limited, cosines, measure
from polyrank.parts.retention import Retention
from polyrank.testing import assert_close

# The bench's layers: 10 × 6 and 10 × 10.
PATHS = ("first", "second")


def site(d_out=40, d_in=24, r=1):
    return Site(path="x", d_in=d_in, d_out=d_out, r=r)


def ranks_of(work):
    return {layer.site.path: layer.site.r for layer in work.adapter.layers}


def weights_of(work):
    return [layer.module.dense_weight().detach().clone() for layer in work.adapter.layers]


def begun(bench, **options):
    work = bench("osf", **{"dtype": torch.float32, **options})
    work.begin(0)
    return work


# --- how much is retained -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [12, 12]),
        ({"effective_rank": 0.3}, [7, 7]),
        ({"effective_rank": 5}, [5, 5]),
        ({"effective_rank": 99}, [24, 24]),
        ({"unfreeze_rank_ratio": 0.25}, [18, 18]),
        ({"unfreeze_rank_ratio": 0.001}, [23, 23]),
        ({"schedule": "progressive", "tasks": 3}, [1, 8, 16, 16]),
        ({"schedule": "rising", "rise": 0.07}, [1, 3, 5, 6]),
        ({"schedule": "rising", "released": True}, [2, 5, 8, 11, 14, 16, 19, 22, 24]),
        ({"schedule": "adaptive", "trr": 0.8}, [19, 19]),
    ],
    ids=str,
)
def test_schedules_retain_what_they_say(options, expected):
    retention = pr.method("osf", **options).retention()
    assert [retention.rank(site(), task) for task in range(len(expected))] == expected
    assert pr.method("osf", **options).ranks(site()) == 24 - expected[0]


def test_a_share_of_one_trains_what_rank_pattern_names_and_nothing_else():
    whole = pr.method("osf", effective_rank=1.0)
    net = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    model = pr.adapt(net, whole, ["0", "1"], rank_pattern={"1": 5})
    assert [layer.site.r for layer in adapter_of(model).layers] == [0, 5]
    assert pr.optimizer(model, 1e-3).param_groups
    model = pr.adapt(nn.Sequential(nn.Linear(12, 12)), whole, ["0"])
    with pytest.raises(ConfigError, match="nothing would train; retain less"):
        pr.optimizer(model, 1e-3)
    (problem,) = whole.too_long(3)
    assert problem.startswith("effective_rank: got 1.0, which freezes all directions")


def test_whole_shares_survive_rounding():
    # 0.07 · 100 is 7.000000000000001, and 0.29 · 100 is 28.999999999999996.
    assert Retention(schedule="rising", rise=0.07).rank(site(100, 100), 0) == 7
    assert Retention(schedule="fixed", share=0.29).rank(site(100, 100), 0) == 29


def test_osf_9_the_mean_ratio_is_the_target_and_scale_does_not_matter():
    given = {"a": 0.3, "b": 0.9, "c": -0.1, "d": 0.5}
    retention = Retention(schedule="adaptive", mrr=0.1, trr=0.8)
    found = retention.ratios(given)
    near = {"tol": 1e-7, "reason": "1e-8 is added to the mean of 0.4"}
    assert_close(sum(found.values()) / 4, 0.8, **near)
    by_hand = [0.1 + value / 0.4 * 0.7 for value in given.values()]
    assert_close(list(found.values()), by_hand, **near)
    scaled = retention.ratios({k: 7 * v for k, v in given.items()})
    assert_close(list(scaled.values()), list(found.values()), **near)
    flat = Retention(schedule="adaptive", mrr=0.6, trr=0.6).ratios(given)
    assert set(flat.values()) == {0.6}
    # Above 1 and below 0 they are clamped, to one frozen triplet and to all of them.
    assert [retention.rank(site(), 1, found[k]) for k in given] == [15, 24, 1, 23]


@pytest.mark.parametrize("wrong", [{"a": -0.2, "b": 0.1}, {"a": 0.0}, {"a": math.nan, "b": 1.0}])
def test_an_importance_without_a_positive_mean_is_refused(wrong):
    with pytest.raises(RunError, match="expected a number > 0 to divide by; go on with unsure"):
        Retention(schedule="adaptive").ratios(wrong)


def test_the_importance_is_the_mean_cosine_of_what_acts_now(bench):
    work = begun(bench, dtype=torch.float64, schedule="adaptive", trr=0.5)
    work.nudge(0.05)
    # All of the task's rows, since they come in an order of their own.
    found = measure(work, "train", 10**6)
    x = torch.cat([batch["x"] for batch in work.data("train")])
    first, second = work.adapter.layers
    W = first.weight() + first.delta()
    y = x @ W.T
    near = {"tol": 1e-7, "reason": "1e-8 is added to each norm"}
    assert_close(found["first"], nn.functional.cosine_similarity(x, y[:, :6]).mean(), **near)
    h = first.module(x).tanh()
    z = h @ (second.weight() + second.delta()).T
    assert_close(found["second"], nn.functional.cosine_similarity(h, z).mean(), **near)
    # Of batches of five rows, the second gives two.
    given = ({"x": torch.zeros(5, 2), "name": "kept"} for _ in range(3))
    assert [(len(b["x"]), b["name"]) for b in _limited(given, 7)] == [(5, "kept"), (2, "kept")]
    part = measure(work, "train", 7)
    assert part.keys() == found.keys()
    assert part["first"] != found["first"]


def test_cosines_are_damped_at_zero():
    x = torch.zeros(2, 3)
    assert torch.equal(cosines(x, x), torch.zeros(2, dtype=torch.float64))
    x = torch.tensor([[3.0, 4.0]])
    assert_close(cosines(x, 2 * x), torch.ones(1), tol=1e-7, reason="1e-8 is added to each norm")


def test_padding_does_not_count():
    model = pr.adapt(tiny_llama(), pr.method("osf", schedule="adaptive"), "all-linear", seed=0)
    from polyrank.parts.importance import Alike

    found = []
    for padded in (False, True):
        alike = Alike()
        layers = adapter_of(model).layers
        handles = [
            layer.module.base_layer.register_forward_hook(
                lambda _, args, out, layer=layer, alike=alike: alike(layer, args[0], out)
            )
            for layer in layers
        ]
        ids = torch.tensor([[5, 9, 3, 7]])
        mask = torch.ones_like(ids)
        if padded:
            ids, mask = (nn.functional.pad(t, (0, 3), value=v) for t, v in ((ids, 11), (mask, 0)))
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask)
        for handle in handles:
            handle.remove()
        found.append(alike.means())
        assert set(alike.counts.values()) == {4}
    assert found[0].keys() == {layer.site.path for layer in adapter_of(model).layers}
    assert_close(list(found[1].values()), list(found[0].values()), dtype=torch.float32)


def tiny_llama():
    from polyrank.testing import MODELS

    return MODELS["llama"].build()


# --- between tasks --------------------------------------------------------------------------------


@pytest.mark.parametrize("parametrisation", ["factors", "core", "block"])
def test_answers_stay_when_a_task_ends_and_the_base_takes_the_update(bench, parametrisation):
    work = begun(bench, dtype=torch.float64, parametrisation=parametrisation)
    for task in range(3):
        if task:
            work.begin(task)
        work.steps(count=3)
        before, rows, old = weights_of(work), work.rows(), work.logits(work.rows())
        deltas = [layer.delta() for layer in work.adapter.layers]
        work.end()
        assert_close(work.logits(rows), old, dtype=torch.float32)
        for weight, was, delta in zip(weights_of(work), before, deltas, strict=True):
            assert_close(weight, was + delta)
            assert delta.any()
        assert all(not layer.delta().any() for layer in work.adapter.layers)
        assert all(layer.archive[0].shape[0] <= 10 for layer in work.adapter.layers)


def test_a_split_is_of_the_weight_as_it_is_now(bench):
    work = begun(bench, schedule="rising", rise=0.25)
    assert ranks_of(work) == {"first": 5, "second": 8}
    found = []
    for task in range(2):
        if task:
            work.begin(task)
        work.steps(count=3)
        work.end()
        found.append(ranks_of(work))
        for layer in work.adapter.layers:
            S = torch.linalg.svdvals(layer.weight())
            assert_close(layer.core.weight, S[len(S) - layer.site.r :])
            assert not any(map(torch.equal, layer.shadow[:2], (layer.A * 2, layer.B * 2)))
    assert found == [{"first": 3, "second": 5}, {"first": 2, "second": 3}]
    assert work.memory("osf")["retained"] == [{"first": 1, "second": 2}, {"first": 3, "second": 5}]


def test_ranks_follow_the_importance_of_the_task_before(bench):
    work = begun(bench, schedule="adaptive", mrr=0.1, trr=0.5)
    assert ranks_of(work) == {"first": 3, "second": 5}
    work.steps(count=2)
    expected = measure(work, "train", 128)
    work.end()
    memory = work.memory("osf")
    assert_close(
        [memory["importance"][0][p] for p in PATHS],
        [expected[p] for p in PATHS],
        dtype=torch.float32,
    )
    retention = work.method.retention()
    ratios = retention.ratios(memory["importance"][0])
    assert ratios["first"] != ratios["second"]
    frozen = {
        layer.site.path: retention.rank(layer.site, 1, ratios[layer.site.path])
        for layer in work.adapter.layers
    }
    assert ranks_of(work) == {"first": 6 - frozen["first"], "second": 10 - frozen["second"]}


def test_an_unsure_importance_stops_the_run_or_retains_the_target(bench, monkeypatch):
    monkeypatch.setattr("polyrank.parts.resplit.measure", lambda *given: dict.fromkeys(PATHS, -0.5))
    for unsure in ("refuse", "uniform"):
        work = begun(bench, schedule="adaptive", trr=0.5, unsure=unsure)
        work.steps(count=1)
        if unsure == "refuse":
            # A run ends all the same if this was its last task.
            work.end()
            with pytest.raises(RunError, match="unsure='uniform'"):
                work.begin(1)
        else:
            work.end()
            assert ranks_of(work) == {"first": 3, "second": 5}


def test_pictures_tell_what_is_retained_and_how_far_it_is_protected(bench):
    work = begun(bench, schedule="rising", rise=0.25)
    learnt = []
    for task in range(3):
        if task:
            work.begin(task)
        work.steps(count=3, lr=0.02)
        deltas = [layer.delta() for layer in work.adapter.layers]
        work.end()
        splits = [(v.weight(), min(v.weight().shape) - v.site.r) for v in work.adapter.layers]
        learnt.append((splits, deltas))
    retained, outputs, inputs = work.boundaries[-1].figures(work, None)
    assert retained.rows == PATHS
    assert retained.values == ((1 / 6, 3 / 6, 4 / 6), (0.2, 0.5, 0.7))
    for figure in (outputs, inputs):
        assert len(figure.values) == len(figure.values[0]) == 3
        for row, values in enumerate(figure.values):
            assert [math.isnan(v) for v in values] == [column < row for column in range(3)]
            assert all(0 <= v <= 1 + 1e-6 for v in values[row:])
        # Of the first task's update, more is frozen the more is retained.
        assert figure.values[0][0] < figure.values[0][2]
    # Behind the last task all is frozen, so that only one side could differ.
    for task in (1, 2):
        by_hand, within = [], []
        for (W, k), delta in zip(*learnt[task], strict=True):
            U, _, V = torch.linalg.svd(W, full_matrices=False)
            P, S, Q = torch.linalg.svd(delta, full_matrices=False)
            P, Q = (P * S)[:, :8], (S[:, None] * Q)[:8].T
            by_hand.append(float((U[:, :k].T @ P).square().sum() / P.square().sum()))
            within.append(float((V[:k] @ Q).square().sum() / Q.square().sum()))
        for figure, shares in ((outputs, by_hand), (inputs, within)):
            assert_close(figure.values[task][task], sum(shares) / 2, tol=1e-4,
                         reason="fp32 decompositions on both sides")  # fmt: skip


def test_nested_what_was_protected_once_stays_so(bench):
    work = begun(bench, dtype=torch.float64, schedule="rising", rise=0.19, nested=True)
    held, learnt = [], []
    for task in range(4):
        if task:
            work.begin(task)
        held.append([
            (v.core.high_u.clone(), v.core.high_v.clone(), v.weight()) for v in work.adapter.layers
        ])  # fmt: skip
        work.steps(count=3)
        learnt.append([layer.delta() for layer in work.adapter.layers])
        rows, before = work.rows(), work.logits(work.rows())
        work.end()
        assert_close(work.logits(rows), before, dtype=torch.float32)
        for number, layer in enumerate(work.adapter.layers):
            core, W = layer.core, layer.weight()
            assert_close(core.high_u.mT @ core.high_u, torch.eye(core.split.k), dtype=torch.float32)
            for U, V, was in (old[number] for old in held):
                # What the weight did there it does after every later task.
                assert_close(U.mT @ W, U.mT @ was, dtype=torch.float32)
                assert_close(W @ V.mT, was @ V.mT, dtype=torch.float32)
            u = torch.linalg.svd(learnt[0][number])[0][:, :1]
            assert float((core.high_u.mT @ u).norm()) > 1 - 1e-6
    assert ranks_of(work) == {"first": 1, "second": 1}
    assert work.memory("osf")["retained"][-1] == {"first": 4, "second": 7}


def test_nested_without_more_to_retain_the_same_directions_stay(bench):
    work = begun(bench, dtype=torch.float64, nested=True)
    first = [(v.core.high_u.clone(), v.core.high_v.clone()) for v in work.adapter.layers]
    for task in range(2):
        if task:
            work.begin(task)
        work.steps(count=8, lr=0.3)
        work.end()
    for layer, (U, V) in zip(work.adapter.layers, first, strict=True):
        core, same = layer.core, torch.eye(layer.core.split.k)
        assert_close((core.high_u.mT @ U).abs(), same, dtype=torch.float32)
        assert_close((core.high_v @ V.mT).abs(), same, dtype=torch.float32)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"effective_rank": 0}, "effective_rank: got 0, .*use the method 'full'"),
        ({"effective_rank": 0.0}, "effective_rank: got 0.0"),
        ({"effective_rank": 1.5}, "effective_rank: got 1.5"),
        ({"effective_rank": True}, "effective_rank: got True"),
        ({"effective_rank": math.nan}, "effective_rank: got nan"),
        ({"effective_rank": "half"}, "effective_rank: got 'half'"),
        ({"unfreeze_rank_ratio": 1.0}, "unfreeze_rank_ratio: got 1.0"),
        ({"unfreeze_rank_ratio": 0}, "unfreeze_rank_ratio: got 0"),
        ({"effective_rank": 4, "unfreeze_rank_ratio": 0.5}, "given beside unfreeze_rank_ratio"),
        ({"schedule": "adaptive", "effective_rank": 4}, "it is read by 'fixed'"),
        ({"schedule": "progressive"}, "tasks: got 0, expected >= 1"),
        ({"tasks": 3}, "tasks: got 3, .* 0 with the others"),
        ({"trr": 0.05}, "trr: got 0.05 with mrr=0.1, expected mrr <= trr"),
        ({"trr": 1.1}, "trr: got 1.1"),
        ({"mrr": -0.1}, "mrr: got -0.1"),
        ({"rows": 0}, "rows: got 0"),
        ({"rise": 0.0}, "rise: got 0.0"),
        ({"nested": True, "parametrisation": "core"}, "nested: got true with 'core'"),
        ({"scaling": 2.0}, "scaling: got 2.0"),
        ({"dropout": 0.1}, "dropout: got 0.1"),
        ({"precision": "bf16"}, "precision: got 'bf16'"),
        ({"effectiv_rank": 4}, "did you mean 'effective_rank'"),
        ({"init_by": "lora-ga"}, "it holds for factors alone"),
    ],
)
def test_bad_options_are_named(options, says):
    with pytest.raises(ConfigError, match=says):
        pr.method("osf", **options)


def test_presets_are_the_published_settings():
    assert pr.method("osf", preset="paper").retention().trr == 0.8
    assert not pr.method("osf", preset="peft").reproject
    ranks = [pr.method("osf", preset="t5").retention().rank(site(4096, 1024), t) for t in range(4)]
    # The accident: wide matrices are frozen as a whole from the fourth task on.
    assert ranks == [286, 573, 860, 1024]


def test_weights_that_cannot_be_split_are_refused():
    broken = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        broken[0].weight[1, 2] = math.inf
    with pytest.raises(ConfigError, match="base weight at 0: is not finite"):
        pr.adapt(broken, pr.method("osf"), ["0"])
    with pytest.raises(ConfigError, match="r at 0: got 9, expected at most 4"):
        pr.adapt(nn.Sequential(nn.Linear(4, 4)), pr.method("osf"), ["0"], rank_pattern={"0": 9})
    with pytest.raises(ConfigError, match="matches no"):
        pr.adapt(nn.Sequential(nn.Linear(4, 4)), pr.method("osf"), ["q_proj"])
    with pytest.raises(ConfigError, match="polyrank adapts linear layers"):
        pr.adapt(nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(4, 4)), pr.method("osf"), ["0", "1"])


def test_a_pattern_gives_a_layer_its_own_free_rank():
    model = pr.adapt(
        nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), pr.method("osf"), ["0", "1"],
        rank_pattern={"1": 1},
    )  # fmt: skip
    assert [layer.site.r for layer in adapter_of(model).layers] == [3, 1]


def test_a_base_below_fp32_is_refused_before_it_is_trained(bench):
    with pytest.raises(MergeError, match=r"below fp32.*lossy=True"):
        bench("osf", dtype=torch.bfloat16).begin(0)
    work = bench("osf", dtype=torch.bfloat16, lossy=True)
    work.begin(0)
    before = weights_of(work)
    work.steps(count=2)
    work.end()
    assert not any(map(torch.equal, before, weights_of(work)))


def test_a_second_adapter_on_the_same_weights_is_refused(bench):
    work = bench("osf", heads=False)
    other = pr.PolyrankConfig(method="osf", target_modules=["first", "second"])
    work.model.add_adapter("other", other)
    with pytest.raises(ConfigError, match="adapter 'other' has split the weight at first too"):
        work.method.boundary().start(None, work, {})
    with pytest.raises(ConfigError, match="adapter 'other' has split the weight at first too"):
        work.absorb()


def test_frozen_as_a_whole_or_past_the_last_task_nothing_is_trained(bench):
    with pytest.raises(ConfigError, match="all 2 layers are frozen as a whole in task 1"):
        begun(bench, effective_rank=1.0)
    work = begun(bench, schedule="progressive", tasks=1)
    work.steps(count=1)
    work.end()
    with pytest.raises(ConfigError, match="tasks: got 1, but another task begins"):
        work.begin(1)


def test_verbs_that_would_tear_the_tail_apart_are_refused(bench):
    work = begun(bench)
    layer = work.adapter.layers[0]
    with pytest.raises(ConfigError, match="start subtracted at first"):
        keep(work.model, layer, torch.tensor([0]))
    work.model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge_adapter"):
        work.absorb()


def test_a_bank_takes_the_tail_and_what_is_subtracted(bench):
    work = begun(bench, dtype=torch.float64)
    work.steps(count=2)
    rows = work.rows()
    expected = work.logits(rows)
    append(work.model, seed=3)
    work.model.double()
    assert_close(work.logits(rows), expected, dtype=torch.float32)
