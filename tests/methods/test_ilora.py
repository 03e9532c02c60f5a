"""ilora: the slow learner, what ties the fast one to it, and what is evaluated."""

import pytest
import torch

import polyrank as pr
from polyrank.frame import Out
from polyrank.layers import view
from polyrank.parts.average import Ema
from polyrank.parts.distil import consistency
from polyrank.testing import assert_close


def started(bench, **options):
    strategy = pr.method("ilora", **options)
    work = bench(dtype=torch.float64)
    work.begin(0, strategy.boundary())
    return strategy, work


def slow_of(work):
    names = {id(p): name for name, p in work.adapter.named().items()}
    return {names[id(live)]: slow.detach().clone() for slow, live in work.adapter.pairs("slow")}


def follow(work, decay, ramp, moves=6):
    """Move the fast weights and average after each; returns their values and the slow ones."""
    rule = Ema("slow", decay, ramp)
    rule.bind(work.adapter, None, work)
    fast, slow = [work.weights()], [slow_of(work)]
    for k in range(moves):
        work.nudge(seed=k)
        rule.after(None)
        fast.append(work.weights())
        slow.append(slow_of(work))
    return fast, slow


def test_the_slow_learner_begins_as_a_copy(bench):
    _, work = started(bench)
    fast = work.weights()
    for name, value in slow_of(work).items():
        assert torch.equal(value, fast[name])
    assert fast.keys() == slow_of(work).keys()


def test_ilora_1_decay_one_never_moves_and_zero_follows_at_once(bench):
    _, work = started(bench)
    _, slow = follow(work, 1.0, ramp=False)
    assert all(torch.equal(slow[-1][name], value) for name, value in slow[0].items())
    fast, slow = follow(work, 0.0, ramp=False)
    for at, then in zip(fast[1:], slow[1:], strict=True):
        assert all(torch.equal(at[name], value) for name, value in then.items())


def test_ilora_2_towards_a_constant_the_distance_shrinks_by_the_decay(bench):
    _, work = started(bench)
    work.nudge()
    goal, start = work.weights(), slow_of(work)
    rule = Ema("slow", 0.8, ramp=False)
    rule.bind(work.adapter, None, work)
    for k in range(1, 9):
        rule.after(None)
        for name, value in slow_of(work).items():
            assert_close(value, goal[name] + 0.8**k * (start[name] - goal[name]))


def test_ilora_3_it_is_the_weighted_sum_of_all_that_was(bench):
    _, work = started(bench)
    decay = 0.7
    fast, slow = follow(work, decay, ramp=False)
    last = len(fast) - 1
    for name, value in slow[-1].items():
        total = decay**last * slow[0][name]
        for k in range(1, last + 1):
            total = total + (1 - decay) * decay ** (last - k) * fast[k][name]
        assert_close(value, total)


def test_the_ramp_is_the_mean_of_all_values_until_the_decay_is_reached(bench):
    _, work = started(bench)
    fast, slow = follow(work, 0.99, ramp=True)
    for k in range(1, len(fast)):
        for name, value in slow[k].items():
            assert_close(value, sum(at[name] for at in fast[: k + 1]) / (k + 1))
    # The count goes on from task to task: 1 − 1/(k + 1) is above 0.5 by now.
    fast, slow = follow(work, 0.5, ramp=True, moves=1)
    for name, value in slow[-1].items():
        assert_close(value, 0.5 * (slow[0][name] + fast[-1][name]))


def test_the_count_is_saved_and_restored(bench):
    _, work = started(bench)
    rule = Ema("slow", 0.9, ramp=True)
    rule.bind(work.adapter, None, None)
    rule.after(None)
    rule.after(None)
    assert rule.state() == {"updates": 2}
    fresh = Ema("slow", 0.9, ramp=True)
    fresh.restore({"updates": 2})
    assert fresh.state() == {"updates": 2}
    with pytest.raises((pr.ConfigError, KeyError)):
        Ema("missing", 0.9, ramp=True).bind(work.adapter, None, None)


def test_ilora_6_the_slow_learner_never_trains_and_never_decays(bench):
    strategy, work = started(bench, decay=1.0, ramp=False)
    before = slow_of(work)
    held = {id(p) for group in pr.parameter_groups(work.model, lr=1.0) for p in group["params"]}
    for slow, _ in work.adapter.pairs("slow"):
        assert not slow.requires_grad
        assert id(slow) not in held
    work.steps([strategy])
    for name, value in slow_of(work).items():
        assert torch.equal(value, before[name])
    assert all(slow.grad is None for slow, _ in work.adapter.pairs("slow"))


def test_training_moves_the_slow_learner_behind_the_fast_one(bench):
    strategy, work = started(bench, decay=0.9)
    start = slow_of(work)
    work.steps([strategy], count=5)
    slow, fast = slow_of(work), work.weights()
    gap = sum(float((fast[n] - slow[n]).square().sum()) for n in slow)
    way = sum(float((fast[n] - start[n]).square().sum()) for n in slow)
    assert 0 < gap < way
    rows = work.rows()
    with view(work.model, "slow"):
        seen = work.logits(rows)
    assert not torch.allclose(seen, work.logits(rows))
    assert work.memory("slow") == {"updates": 5}


def test_ilora_7_without_replay_the_fast_learner_is_sequential_lora_bit_for_bit(bench):
    strategy, work = started(bench, ratio=0.0)
    assert strategy.losses() == []
    plain = bench(dtype=torch.float64)
    plain.begin(0)
    for task in range(2):
        if task:
            work.begin(task, strategy.boundary())
            plain.begin(task)
        assert work.steps([strategy]) == plain.steps()
    for name, value in plain.weights().items():
        assert torch.equal(work.weights()[name], value)
    assert pr.method("ilora", weight=0.0).losses() == []


# --- consistency ---------------------------------------------------------------------------------


def hidden(seed, count=3):
    torch.manual_seed(seed)
    return [torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(count)]


def loss_of(now, then, mask=None, **options):
    (loss,) = pr.method("ilora", **options).losses()
    kind = options.get("target", "hidden")
    rows = {"labels": torch.zeros(len(now[0]), dtype=torch.long)}
    if kind == "logits":
        return loss(Out(logits=now[0], teacher=Out(logits=then[0])), rows)
    return loss(Out(hidden=now, mask=mask, teacher=Out(hidden=then)), rows)


@pytest.mark.parametrize("shape", ["two_sided", "max"])
def test_ilora_4_equal_states_cost_nothing_and_pull_nowhere(shape):
    now = hidden(0)
    found = loss_of(now, [h.detach() for h in now], shape=shape)
    assert found == 0
    assert not any(g.any() for g in torch.autograd.grad(found, now))


def test_ilora_5_the_one_sided_form_is_a_part_of_the_other():
    now, then = hidden(0), [h.detach() for h in hidden(1)]
    both = loss_of(now, then)
    one, other = loss_of(now, then, shape="max"), loss_of(then, now, shape="max")
    assert one <= both
    assert_close(one + other, both)
    (pull,) = torch.autograd.grad(one, now[:1])
    below = (now[0] - then[0]).detach().clamp_max(0)
    assert_close(pull, 2 * below / (3 * 5 * 4))


def test_the_mean_is_over_real_tokens_states_and_features():
    now, then = hidden(0), [h.detach() for h in hidden(1)]
    mask = torch.arange(5) < torch.tensor([5, 2])[:, None]
    found = loss_of(now, then, mask)
    squares = sum((h - t).square()[mask].sum() for h, t in zip(now, then, strict=True))
    # The engine divides by the seven real tokens.
    assert_close(found / 7, squares / (7 * 4 * 3))
    plain = torch.stack([(h - t).square().mean() for h, t in zip(now, then, strict=True)]).mean()
    assert_close(loss_of(now, then) / 2, plain)
    (loss,) = pr.method("ilora").losses()
    assert (loss.per, loss.role, loss.teacher) == ("token", "replay", "slow")


def test_logits_are_compared_over_classes():
    torch.manual_seed(0)
    z, slow = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    found = loss_of([z], [slow], target="logits")
    assert_close(found, (z - slow).square().mean(-1).sum())
    (loss,) = pr.method("ilora", target="logits").losses()
    assert loss.needs == {"logits", "teacher.logits"}
    assert loss.per == "label"


def test_a_model_without_hidden_states_is_refused():
    with pytest.raises(pr.ConfigError, match="use target='logits'"):
        consistency([], [], None, "two_sided")


# --- boundaries ----------------------------------------------------------------------------------


def test_the_slow_head_grows_with_the_fast_one(bench):
    strategy, work = started(bench)
    work.steps([strategy])
    before = slow_of(work)
    work.begin(1, strategy.boundary())
    head = [name for name in before if "head" in name]
    after, fast = slow_of(work), work.weights()
    for name in head:
        rows = len(before[name])
        assert torch.equal(after[name][:rows], before[name])
        assert torch.equal(after[name][rows:], fast[name][rows:])
        assert len(after[name]) == len(fast[name]) == rows + 2


def test_the_fast_learner_goes_on_or_begins_again_as_the_slow_one(bench):
    for restart in (False, True):
        strategy, work = started(bench, restart=restart)
        work.steps([strategy])
        fast = work.weights()
        work.begin(1, strategy.boundary())
        slow = slow_of(work)
        for name, value in work.weights().items():
            expected = slow[name] if restart else fast[name]
            assert torch.equal(value[: len(expected)], expected)


@pytest.mark.parametrize("inference", ["slow", "fast"])
def test_both_are_evaluated_and_the_chosen_one_first(bench, inference):
    strategy, work = started(bench, inference=inference)
    work.nudge()
    deployed = strategy.boundary().deploys(work)
    assert next(iter(deployed)) == inference
    rows, found = work.rows(), {}
    for name, context in deployed.items():
        with context:
            found[name] = work.logits(rows)
    assert torch.equal(found["fast"], work.logits(rows))
    assert not torch.allclose(found["slow"], found["fast"])


def test_it_stores_rows_and_needs_ranks_that_keep_their_meaning():
    found = pr.method("ilora", capacity=500, by="task", ratio=0.5)
    assert found.replay().shared
    assert (found.replay().capacity, found.replay().ratio) == (500, 0.5)
    assert found.persistent


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"decay": 1.01}, "decay: got 1.01, expected 0..1"),
        ({"decay": -0.1}, "decay: got -0.1"),
        ({"weight": -1.0}, "weight: got -1"),
        ({"capacity": 0}, "capacity: got 0"),
        ({"shape": "min"}, "shape: got 'min'"),
        ({"target": "hiddens"}, "did you mean 'hidden'"),
        ({"inference": "both"}, "inference: got 'both'"),
    ],
)
def test_bad_options_are_named(options, says):
    with pytest.raises(pr.ConfigError, match=says):
        pr.method("ilora", **options)
