"""ewc: what the Fisher information is of which rows, and what is held to what."""

import pytest
import torch
import torch.nn.functional as F

import polyrank as pr
from polyrank.errors import RunError
from polyrank.frame import Step
from polyrank.layers import append
from polyrank.testing import assert_close


def ewc(**options):
    """EWC as written: F as it comes."""
    return pr.method("ewc", **{"normalised": False, **options})


STEP = Step(index=0, total=1, lr=0.1, peak=0.1)


def trained(bench, strategy, **options):
    """A bench that has been through its first task."""
    work = bench(**options)
    work.begin(0, strategy.boundary())
    work.nudge()
    work.end()
    return work


def fisher(bench, **options):
    """What the first task leaves in the memory, by name."""
    work = trained(bench, ewc(**options))
    return work, work.memory("ewc")["weights"]


def by_hand(work, rows, labels):
    """Sums of squared gradients of −log p(label | x), one row at a time."""
    params = work.adapter.named()
    sums = {name: torch.zeros_like(p) for name, p in params.items()}
    for x, label in zip(rows["x"], labels, strict=True):
        loss = F.cross_entropy(work.model(x[None]), label[None])
        for name, g in zip(sums, torch.autograd.grad(loss, list(params.values())), strict=True):
            sums[name] += g.square()
    return sums


def penalty_of(strategy, work):
    (penalty,) = strategy.penalties()
    penalty.bind(work.adapter, work)
    return penalty


@pytest.mark.parametrize("estimator", ["empirical", "predicted"])
def test_the_estimators_against_a_loop(bench, estimator):
    work, found = fisher(bench, estimator=estimator, include_head=True)
    rows = work.rows(12)
    labels = rows["labels"] if estimator == "empirical" else work.logits(rows).argmax(-1)
    for name, sums in by_hand(work, rows, labels).items():
        assert_close(found[name], sums / 12, dtype=torch.float32)


def test_the_true_one_draws_its_labels_from_the_model_and_by_row(bench):
    """With p known, the mean over many draws is Σ_y p(y | x) (∂ log p(y | x))²."""
    strategy = ewc(estimator="true")
    work = bench()
    work.begin(0, strategy.boundary())
    work.nudge()
    one = work.rows(1)
    expected, p = 0.0, work.logits(one).softmax(-1)[0]
    for label in range(2):
        sums = by_hand(work, one, torch.tensor([label]))
        expected = expected + p[label] * sums["first.B.0"]
    copies = {k: v.repeat(400, *[1] * (v.dim() - 1)) for k, v in one.items()}
    work.batches = [{**copies, "row": torch.arange(400)}]
    work.end()
    found = work.memory("ewc")["weights"]["first.B.0"]
    assert_close(found, expected, tol=0.15, reason="400 draws of two classes")
    other = by_hand(work, one, p.argmax()[None])["first.B.0"]
    assert ((found - other).abs() > 0.01 * other.abs()).any()


@pytest.mark.parametrize("estimator", ["empirical", "predicted", "true"])
def test_rehearsal_free_5_one_sample_at_a_time_any_order_and_batch_size_gives_the_same(
    bench, estimator
):
    found = []
    for order, size in ((torch.arange(12), 5), (torch.arange(12).flip(0), 12), (None, 1)):
        strategy = ewc(estimator=estimator)
        work = bench()
        work.begin(0, strategy.boundary())
        work.nudge()
        whole = work.rows(12)
        order = torch.randperm(12) if order is None else order
        work.batches = [{k: v[i] for k, v in whole.items()} for i in order.split(size)]
        work.end()
        found.append(work.memory("ewc")["weights"])
    for other in found[1:]:
        for name, value in found[0].items():
            assert_close(other[name], value, dtype=torch.float32)


def test_rehearsal_free_5_the_batch_trick_is_something_else(bench):
    results = {}
    for size in (1, 4, 12):
        strategy = ewc(estimator="batch")
        work = bench()
        work.size = size
        work.begin(0, strategy.boundary())
        work.nudge()
        work.end()
        results[size] = work.memory("ewc")["weights"]["first.B.0"]
        rows, params = work.rows(12), [work.adapter.named()["first.B.0"]]
        expected = 0.0
        for part in torch.arange(12).split(size):
            batch = {k: v[part] for k, v in rows.items()}
            expected = expected + work.grads(batch, params)[0].square() * size
        assert_close(results[size], expected / (12 // size), dtype=torch.float32)
    exact = fisher(bench, estimator="empirical")[1]["first.B.0"]
    assert_close(results[1], exact, dtype=torch.float32)
    assert ((results[4] - exact).abs() > 0.05 * exact.abs()).any()


def test_a_killed_estimation_goes_on_where_it_stood(bench):
    strategy = ewc(rows=9)
    work = bench()
    work.begin(0, strategy.boundary())
    work.nudge()
    boundary, state = strategy.boundary(), {}
    whole = boundary.next(None, work, state)
    while not whole.step(work, state):
        pass
    assert state["rows"] == 9
    assert boundary.next(None, work, state) is None
    again = {}
    for _ in range(6):
        # A new process: nothing but the state is left.
        fresh = strategy.boundary()
        job = fresh.next(None, work, again)
        if job is not None:
            job.step(work, again)
    assert again["fisher"]
    for name, value in state["squares"].items():
        assert torch.equal(again["squares"][name], value)


def test_some_rows_are_drawn_by_key_and_all_come_in_order(bench):
    few, all_rows = (
        fisher(bench, rows=4, estimator="empirical"),
        fisher(bench, estimator="empirical"),
    )
    assert few[0].asked == [4]
    assert all_rows[0].asked == [5, 5, 2]
    assert fisher(bench, rows=50)[0].asked == [5, 5, 2]


def test_ilora_10_the_penalty_is_zero_at_the_anchor_and_pulls_by_lambda_f(bench):
    strategy = ewc(weight=3.0)
    work = trained(bench, strategy)
    then, weights = work.weights(), work.memory("ewc")["weights"]
    work.begin(1, strategy.boundary())
    penalty = penalty_of(strategy, work)
    assert penalty(work.adapter, STEP) == 0
    work.nudge(seed=1)
    value = penalty.weight * penalty(work.adapter, STEP)
    params = {n: p for n, p in work.adapter.named().items() if "head" not in n}
    assert weights.keys() == params.keys()
    grads = torch.autograd.grad(value, list(params.values()))
    total = 0.0
    for (name, p), grad in zip(params.items(), grads, strict=True):
        assert_close(grad, 3.0 * weights[name] * (p - then[name]))
        total = total + 1.5 * (weights[name] * (p - then[name]).square()).sum()
    assert_close(value, total)


def test_rehearsal_free_4_with_fisher_one_it_is_l2_and_with_zero_nothing(bench):
    strategy = ewc(weight=2.0)
    work = trained(bench, strategy)
    l2 = pr.method("l2", weight=1.0, space="factors")
    work.begin(1, strategy.boundary(), l2.boundary())
    held = work.memory("ewc")["weights"]
    found = {}
    for constant in (1.0, 0.0):
        for value in held.values():
            value.fill_(constant)
        penalty = penalty_of(strategy, work)
        work.nudge(seed=1)
        found[constant] = penalty.weight * penalty(work.adapter, STEP)
        if constant:
            assert_close(found[constant], penalty_of(l2, work)(work.adapter, STEP))
    assert found[0.0] == 0
    assert found[1.0] > 0


def test_rehearsal_free_4_it_is_quadratic(bench):
    strategy = ewc()
    work = trained(bench, strategy)
    then = work.weights()
    penalty = penalty_of(strategy, work)
    work.nudge(seed=1)
    once = penalty(work.adapter, STEP)
    with torch.no_grad():
        for name, p in work.adapter.named().items():
            p.copy_(then[name] + 2 * (p - then[name]))
    assert_close(penalty(work.adapter, STEP), 4 * once)
    assert once > 0


def three_tasks(bench, **options):
    """Each task's own F and anchor, and a bench whose memory has seen all of them."""
    strategy = ewc(estimator="empirical", include_head=True, **options)
    work, terms = bench(), []
    for task in range(3):
        work.begin(task, strategy.boundary())
        work.nudge(seed=task)
        rows = work.rows(12)
        terms.append((by_hand(work, rows, rows["labels"]), work.weights()))
        work.end()
    work.nudge(seed=9)
    return strategy, work, terms


def test_separate_terms_of_all_tasks_in_the_room_of_one(bench):
    strategy, work, terms = three_tasks(bench)
    penalty = penalty_of(strategy, work)
    params = work.adapter.named()
    found = torch.autograd.grad(penalty(work.adapter, STEP), list(params.values()))
    for (name, p), grad in zip(params.items(), found, strict=True):
        expected = torch.zeros_like(p)
        for sums, then in terms:
            rows = len(then[name])
            expected[:rows] += sums[name] / 12 * (p.detach()[:rows] - then[name])
        assert_close(grad, expected, dtype=torch.float32)


def test_online_keeps_one_decayed_term_and_the_newest_anchor(bench):
    strategy, work, terms = three_tasks(bench, form="online", gamma=0.5)
    params = work.adapter.named()
    found = torch.autograd.grad(
        penalty_of(strategy, work)(work.adapter, STEP), list(params.values())
    )
    for (name, p), grad in zip(params.items(), found, strict=True):
        weight = torch.zeros_like(p)
        for index, (sums, then) in enumerate(terms):
            weight[: len(then[name])] += 0.5 ** (2 - index) * sums[name] / 12
        assert_close(grad, weight * (p.detach() - terms[-1][1][name]), dtype=torch.float32)


def test_the_rows_of_new_classes_are_free(bench):
    strategy = ewc(include_head=True)
    work = trained(bench, strategy)
    work.begin(1, strategy.boundary())
    penalty = penalty_of(strategy, work)
    with torch.no_grad():
        work.adapter.head.weight[work.known :] += 1
    assert penalty(work.adapter, STEP) == 0
    with torch.no_grad():
        work.adapter.head.weight[: work.known] += 1
    assert penalty(work.adapter, STEP) > 0


def test_dense_weights_are_measured_and_held(bench):
    strategy = ewc(space="weights", estimator="empirical")
    work = bench()
    work.begin(0, strategy.boundary())
    work.nudge()
    rows = work.rows(12)
    bases = [v.module.get_base_layer().weight for v in work.adapter.layers]
    squares = [torch.zeros_like(w) for w in bases]
    for x, label in zip(rows["x"], rows["labels"], strict=True):
        for base in bases:
            base.requires_grad_(True)
        loss = F.cross_entropy(work.model(x[None]), label[None])
        for total, g in zip(squares, torch.autograd.grad(loss, bases), strict=True):
            total += g.square()
    for base in bases:
        base.requires_grad_(False)
    work.end()
    assert not any(base.requires_grad for base in bases)
    then = {v.site.path: v.delta().double() for v in work.adapter.layers}
    found = work.memory("ewc")["weights"]
    penalty = penalty_of(strategy, work)
    assert_close(penalty(work.adapter, STEP), 0.0)
    work.nudge(seed=1)
    expected = 0.0
    for view, total in zip(work.adapter.layers, squares, strict=True):
        path = view.site.path
        assert_close(found[path], total / 12, dtype=torch.float32)
        expected = expected + 0.5 * (found[path] * (view.delta() - then[path]).square()).sum()
    assert_close(penalty(work.adapter, STEP), expected, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["absorb", "olora"])
def test_dense_weights_keep_their_meaning_when_the_factors_do_not(bench, kind):
    strategy, merging = ewc(space="weights"), pr.method("absorb")
    more = [merging.boundary()] if kind == "absorb" else []
    options = {} if kind == "absorb" else {"method": "olora"}
    work = bench(dtype=torch.float64, **options)
    work.begin(0, strategy.boundary(), *more)
    work.nudge()
    work.end()
    work.begin(1, strategy.boundary(), *more)
    penalty = penalty_of(strategy, work)
    assert float(penalty(work.adapter, STEP).detach()) < 1e-12
    work.nudge(seed=1)
    expected = sum(
        0.5 * (work.memory("ewc")["weights"][v.site.path] * live.square()).sum()
        for v in work.adapter.layers
        for live in [v.scale * v.B @ v.A]
    )
    assert_close(penalty(work.adapter, STEP), expected, dtype=torch.float32)


def test_a_first_task_is_free_and_trains_as_without(bench):
    strategy, found = ewc(), []
    for strategies in ([strategy], []):
        work = bench(dtype=torch.float32)
        work.begin(0, *(s.boundary() for s in strategies))
        work.steps(strategies)
        found.append(work.weights())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name])


def test_training_is_held_where_it_counts(bench):
    ends = {}
    for weight in (0.0, 1e4):
        strategy = ewc(weight=weight)
        work = bench(dtype=torch.float32)
        work.begin(0, strategy.boundary())
        work.steps([strategy], count=6)
        work.end()
        then, weights = work.weights(), work.memory("ewc")["weights"]
        work.begin(1, strategy.boundary())
        work.steps([strategy], count=6)
        now = work.weights()
        ends[weight] = float(sum((weights[n] * (now[n] - then[n]).square()).sum() for n in weights))
    assert ends[1e4] < 0.2 * ends[0.0]


def test_what_cannot_be_estimated_or_held_is_said(bench):
    strategy = ewc()
    work = bench()
    work.begin(0, strategy.boundary())
    job = strategy.boundary().next(None, work, {})
    work.batches = []
    with pytest.raises(pr.ConfigError, match="no training rows"):
        job.step(work, {})
    work.batches = [work.rows(2)]
    work.nudge()
    with torch.no_grad():
        work.adapter.layers[0].B[0, 0] = float("inf")
    with pytest.raises(RunError, match="a gradient is not finite"):
        ewc(estimator="empirical").boundary().next(None, work, {}).step(work, {})
    with pytest.raises(pr.ConfigError, match=r"ewc: .*polyrank\.run"):
        strategy.penalties()[0].bind(work.adapter, None)


def test_an_anchor_of_another_shape_is_refused(bench):
    strategy = ewc()
    work = trained(bench, strategy)
    append(work.model, 4)
    with pytest.raises(pr.ConfigError, match=r"anchor of first\.A\.0: .*only a head may grow"):
        penalty_of(strategy, work)


def test_text_cannot_be_sampled(bench):
    strategy = ewc()
    work = bench()
    work.begin(0, strategy.boundary())
    work.logits = lambda batch: torch.zeros(5, 3, 7)
    with pytest.raises(pr.ConfigError, match="use estimator='empirical'"):
        strategy.boundary().next(None, work, {}).step(work, {})
    assert "classes" in strategy.needs
    assert "classes" not in ewc(estimator="empirical").needs


def test_normalised_every_task_has_a_mean_of_one(bench):
    work = trained(bench, pr.method("ewc", estimator="empirical", include_head=True))
    plain = trained(bench, ewc(estimator="empirical", include_head=True))
    found, raw = (w.memory("ewc")["weights"] for w in (work, plain))
    whole = torch.cat([value.reshape(-1) for value in raw.values()])
    assert_close(torch.cat([v.reshape(-1) for v in found.values()]), whole / whole.mean())
    # A model that is sure of everything leaves nothing to bring to one.
    still = bench()
    still.begin(0, pr.method("ewc").boundary())
    with torch.no_grad():
        still.adapter.head.bias[0] += 1e6
    still.end()
    assert not any(value.any() for value in still.memory("ewc")["weights"].values())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weight": -1.0}, "weight: got -1"),
        ({"gamma": 1.5}, "gamma: got 1.5, expected 0..1"),
        ({"gamma": -0.5}, "gamma: got -0.5"),
        ({"rows": -1}, "rows: got -1"),
        ({"estimator": "exact"}, "estimator: got 'exact'"),
        ({"form": "onlin"}, "did you mean 'online'"),
        ({"space": "all"}, "space: got 'all'"),
        ({"normalised": 1}, "normalised: got 1"),
    ],
)
def test_bad_options_are_named(options, says):
    with pytest.raises(pr.ConfigError, match=says):
        ewc(**options)
