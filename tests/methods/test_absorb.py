"""absorb: answers stay, factors begin anew, the base carries the update."""

import pytest
import torch

import polyrank as pr
from polyrank.testing import assert_close


@pytest.mark.parametrize("method", ["lora", "moe-lora"])
def test_answers_stay_and_a_fresh_adapter_begins(bench, method):
    options = {} if method == "lora" else {"router": "moslora", "experts": 1}
    strategy = pr.method("absorb")
    work = bench(method, **options)
    work.begin(0, strategy.boundary())
    bases = [v.module.get_base_layer().weight.clone() for v in work.adapter.layers]
    work.nudge()
    rows = work.rows()
    answers, updates = work.logits(rows), [v.delta() for v in work.adapter.layers]
    work.end()
    assert_close(work.logits(rows), answers)
    for layer, base, update in zip(work.adapter.layers, bases, updates, strict=True):
        assert_close(layer.module.get_base_layer().weight, base + update)
        assert not layer.B.any()
        assert layer.A.any()


def test_it_closes_after_all_others_and_refuses_what_is_no_matrix():
    strategy = pr.method("absorb")
    assert strategy.structural
    assert [*strategy.unfit(pr.method("lora"), [])] == []
    (said,) = strategy.unfit(pr.method("smora"), [])
    assert "is no matrix" in said
    (said,) = strategy.unfit(pr.method("olora"), [])
    assert "fresh ranks" in said


def test_the_last_task_of_a_bfloat16_base_is_refused_before_it_is_rounded(bench):
    strategy = pr.method("absorb")
    work = bench(dtype=torch.bfloat16)
    work.begin(0, strategy.boundary())
    work.nudge()
    before = [v.module.get_base_layer().weight.clone() for v in work.adapter.layers]
    with pytest.raises(pr.MergeError, match="stored below fp32"):
        work.end()
    for layer, base in zip(work.adapter.layers, before, strict=True):
        assert torch.equal(layer.module.get_base_layer().weight, base)


@pytest.mark.parametrize("archive", [True, False])
def test_absorbed_ranks_are_kept_if_asked_for(bench, archive):
    strategy = pr.method("absorb", archive=archive)
    work = bench()
    for task in range(2):
        work.begin(task, strategy.boundary())
        work.nudge()
        work.end()
    ranks = [0 if v.archive is None else len(v.archive[0]) for v in work.adapter.layers]
    assert ranks == [2 * v.site.r if archive else 0 for v in work.adapter.layers]
