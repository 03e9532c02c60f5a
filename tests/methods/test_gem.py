"""gem and agem: the projection against its conditions, and the rule on a model with a store."""

import pytest
import torch

import polyrank as pr
from polyrank.errors import RunError
from polyrank.methods.agem import coefficient
from polyrank.methods.gem import dual
from polyrank.parts.memory import joined, products
from polyrank.testing import assert_close


def drawn(memories, size=12, seed=0):
    torch.manual_seed(seed)
    g, *rest = torch.randn(memories + 1, size, dtype=torch.float64)
    return g, torch.stack(rest)


def projected(g, G, margin=0.0, solve=None):
    table = products([[g], *([row] for row in G)])
    v = dual(table, margin) if solve is None else solve(table)
    return (g, torch.zeros(len(G), dtype=torch.float64)) if v is None else (g + G.T @ v, v)


@pytest.mark.parametrize("margin", [0.0, 0.7])
@pytest.mark.parametrize("memories", [1, 2, 5, 9])
def test_ilora_11_gem_meets_every_constraint_and_moves_no_further_than_it_must(memories, margin):
    """The conditions of the optimum: feasible, v >= 0, and no force where nothing presses."""
    for seed in range(10):
        g, G = drawn(memories, seed=seed)
        z, v = projected(g, G, margin)
        slack = G @ z - margin
        assert float(slack.min()) >= -1e-6
        assert float(v.min()) >= 0
        assert float((v * slack).abs().max()) < 1e-6
        assert_close(z, g + G.T @ v)


def test_ilora_11_without_an_objection_nothing_changes():
    g, G = drawn(4)
    assert dual(products([[g], *([row] for row in G * (G @ g).sign()[:, None])]), 0.0) is None
    assert coefficient(products([[g], [g]])) is None


def test_ilora_11_agem_is_gem_with_one_constraint():
    for seed in range(8):
        g, G = drawn(1, seed=seed)
        assert_close(projected(g, G)[0], projected(g, G, solve=coefficient)[0])


def test_agem_takes_away_what_points_against_the_memory():
    g, G = drawn(1)
    G = -G * (G @ g).sign()[:, None]
    z = projected(g, G, solve=coefficient)[0]
    assert_close(z, g - (g @ G[0]) / (G[0] @ G[0]) * G[0])
    assert abs(float(z @ G[0])) < 1e-12


def test_the_solution_does_not_depend_on_the_size_of_gradients():
    g, G = drawn(5)
    scale = torch.tensor([1e-7, 1.0, 1e6, 1e-3, 10.0], dtype=torch.float64)[:, None]
    assert_close(
        projected(g, G * scale)[0], projected(g, G)[0], tol=1e-9, reason="a solved program"
    )
    assert_close(projected(1e-8 * g, G)[0], 1e-8 * projected(g, G)[0], tol=1e-9, reason="the same")


def test_equal_and_absent_memories_are_no_harder():
    g, G = drawn(2)
    G = -G * (G @ g).sign()[:, None]
    twice = torch.cat([G, G, torch.zeros_like(G)])
    assert_close(projected(g, twice)[0], projected(g, G)[0], tol=1e-9, reason="a solved program")


def test_memories_that_oppose_each_other_have_no_margin_between_them():
    g, G = drawn(1)
    both = torch.cat([G, -G])
    z, _ = projected(g, both)
    assert float((both @ z).abs().max()) < 1e-9
    with pytest.raises(RunError, match="use a smaller margin"):
        projected(g, both, margin=1.0)


def test_products_are_those_of_all_parameters_together():
    torch.manual_seed(0)
    sets = [[torch.randn(3, 2), torch.randn(5)] for _ in range(3)]
    flat = torch.stack([torch.cat([p.reshape(-1) for p in g]) for g in sets]).double()
    assert_close(products(sets), flat @ flat.T)


def test_batches_of_equal_shapes_become_one():
    def made(rows, width):
        return {"x": torch.full((rows, width), float(rows)), "labels": torch.arange(rows)}

    one, two = joined([made(2, 3), made(1, 5), made(3, 3)])
    assert one["x"].shape == (5, 3)
    assert one["labels"].tolist() == [0, 1, 0, 1, 2]
    assert two["x"].shape == (1, 5)


# --- the rule ------------------------------------------------------------------------------------


def run_of(bench, strategy, tasks=3, **options):
    """A bench in its last task, whose store holds rows of the earlier ones and of its own."""
    work = bench(dtype=torch.float32, **options)
    for task in range(tasks):
        work.begin(task, strategy.boundary())
        work.nudge(seed=task)
        work.replay.rows[task] = work.rows(6)
        if task < tasks - 1:
            work.end()
    return work


def constrained(work, strategy, step, scale=1.0):
    """What the rule makes of the gradient of the task's rows: (before, after) by parameter."""
    (rule,) = strategy.rules()
    rule.bind(work.adapter, None, work)
    params = rule.params
    before = work.grads(work.rows(5, seed=3), params)
    for param, grad in zip(params, before, strict=True):
        param.grad = scale * grad
    rule.grads(step)
    after = [p.grad.clone() for p in params]
    for p in params:
        p.grad = None
    return [scale * g for g in before], after


def flat(grads):
    return torch.cat([g.reshape(-1) for g in grads]).double()


def test_gem_keeps_every_past_task_and_asks_the_store_by_key(bench, step):
    strategy = pr.method("gem", size=6)
    work = run_of(bench, strategy)
    pushed = 0
    for scale in (1.0, -1.0):
        work.replay.keys = []
        before, after = constrained(work, strategy, step, scale)
        past = [flat(work.grads(work.replay.rows[k], work.adapter.trained())) for k in (0, 1)]
        g, z = flat(before), flat(after)
        assert min(float(p @ z) / float(p.norm() * g.norm()) for p in past) >= -1e-6
        pushed += int(min(float(p @ g) for p in past) < 0)
        # The current task has rows in the store, and none of them constrains it.
        assert work.replay.keys == [("gem", 0, 1, "train", 0, k) for k in (0, 1)]
        assert_close(z, projected(g, torch.stack(past))[0], dtype=torch.float32)
    assert pushed


def test_agem_agrees_with_gem_where_one_task_is_past(bench, step):
    found = []
    for name in ("gem", "agem"):
        strategy = pr.method(name, size=6)
        work = run_of(bench, strategy, tasks=2)
        before, after = constrained(work, strategy, step)
        found.append(flat(after))
        assert not torch.equal(flat(before), flat(after))
    assert_close(*found, dtype=torch.float32)


def test_agem_takes_equally_many_rows_of_every_past_task(bench, step):
    strategy = pr.method("agem", size=9)
    work = run_of(bench, strategy, tasks=4)
    work.asked = []
    constrained(work, strategy, step)
    assert [key[-1] for key in work.replay.keys] == [0, 1, 2]
    # One batch for all of them, after that of the task itself.
    assert work.asked == [5, 9]
    few = pr.method("agem", size=2)
    work.memories["agem"]["past"] = [0, 1, 2]
    work.replay.keys = []
    for index in range(3):
        constrained(work, few, type(step)(**{**vars(step), "index": index}))
    assert [key[-1] for key in work.replay.keys] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("name", ["gem", "agem"])
def test_a_first_task_trains_as_without(bench, name):
    strategy, found = pr.method(name), []
    for strategies in ([strategy], []):
        work = bench(dtype=torch.float32)
        work.begin(0, *(s.boundary() for s in strategies))
        work.replay.rows[0] = work.rows(6)
        work.steps(strategies)
        found.append(work.weights())
    assert all(torch.equal(v, found[1][k]) for k, v in found[0].items())


@pytest.mark.parametrize("name", ["gem", "agem"])
def test_training_changes_once_a_task_is_past_and_forgets_less(bench, name):
    losses = {}
    for active in (True, False):
        strategy = pr.method(name, size=6)
        work = bench(dtype=torch.float32)
        work.begin(0, strategy.boundary())
        work.steps([strategy], count=10)
        work.replay.rows[0] = work.rows(6)
        work.end()
        work.begin(1, strategy.boundary())
        work.steps([strategy] if active else [], count=10)
        rows = work.replay.rows[0]
        losses[active] = float(torch.nn.functional.cross_entropy(work.logits(rows), rows["labels"]))
    assert losses[True] < losses[False]


def test_a_parameter_without_gradient_gets_one_where_the_memory_asks(bench, step):
    strategy = pr.method("gem", size=6)
    work = run_of(bench, strategy, tasks=2)
    (rule,) = strategy.rules()
    rule.bind(work.adapter, None, work)
    grads = work.grads(work.replay.rows[0], rule.params)
    rule.params[0].grad = -grads[0]
    rule.grads(step)
    assert rule.params[1].grad.any()


@pytest.mark.parametrize("name", ["gem", "agem"])
def test_lost_memories_and_a_missing_engine_are_said(bench, name):
    strategy = pr.method(name)
    work = bench()
    work.begin(0, strategy.boundary())
    work.end()
    with pytest.raises(pr.ConfigError, match=f"{name}: 1 tasks are over, but the store holds"):
        work.begin(1, strategy.boundary())
    with pytest.raises(pr.ConfigError, match=rf"{name}: .*polyrank\.run"):
        strategy.rules()[0].bind(work.adapter, None, None)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("gem", {"margin": -0.1}, "margin: got -0.1"),
        ("gem", {"size": 0}, "size: got 0"),
        ("gem", {"by": "class"}, "unknown option 'by'"),
        ("agem", {"by": "tasks"}, "did you mean 'task'"),
        ("agem", {"capacity": 0}, "capacity: got 0"),
        ("agem", {"bytes": -1}, "bytes: got -1"),
    ],
)
def test_bad_options_are_named(name, options, says):
    with pytest.raises(pr.ConfigError, match=says):
        pr.method(name, **options)
