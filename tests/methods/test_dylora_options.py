"""dylora: options, presets, what is evaluated and exported, and who may move its ranks."""

import pytest
import torch
from torch import nn

import polyrank as pr
from polyrank.frame import combination_problems
from polyrank.layers import saved_of


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"r_min": 0}, "r_min: got 0, expected >= 1"),
        ({"r_max": 9}, "r_max: got 9, expected <= r=8"),
        ({"r_min": 5, "r_max": 4}, "r_min: got 5, expected <= r_max=4"),
        ({"p": 1.0}, "p: got 1.0, expected 0 < p < 1"),
        ({"p": 0.0}, "p: got 0.0"),
        ({"alpha": 0.0}, "alpha: got 0.0, expected > 0"),
        ({"distribution": "geometrical"}, "did you mean 'geometric'"),
        ({"mode": "frozn"}, "did you mean 'frozen'"),
        ({"update": "rows"}, "update: got 'rows', expected one of strict, gradient"),
        ({"evaluate": [0]}, r"evaluate: got \(0,\), expected a list of ranks in 1\.\.8"),
        ({"evaluate": 4}, "evaluate: got 4"),
        ({"exports": [2.5]}, "exports: got"),
        ({"exports": [9], "r_max": 7}, r"in 1\.\.7"),
    ],
)
def test_bad_options_are_named(options, says):
    with pytest.raises(pr.ConfigError, match=says):
        pr.method("dylora", **options)


def test_ranks_that_differ_between_layers_are_refused():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    model = pr.adapt(net, pr.method("dylora", r=4), ["0", "1"], rank_pattern={"1": 2})
    with pytest.raises(pr.ConfigError, match=r"layers have ranks 1\.\.2, 1\.\.4"):
        pr.attach(pr.optimizer(model, lr=0.1), model)
    with pytest.raises(pr.ConfigError, match=r"r at '1': got 6, expected r_min\.\.r = 1\.\.4"):
        pr.adapt(
            nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)),
            pr.method("dylora", r=4), ["0", "1"], rank_pattern={"1": 6},
        )  # fmt: skip


def test_an_optimiser_that_moves_all_rows_serves_gradients_only(bench):
    for update in ("strict", "gradient"):
        model = bench("dylora", update=update).model
        optimizer = torch.optim.AdamW(pr.parameter_groups(model, lr=0.1))
        if update == "gradient":
            pr.attach(optimizer, model).detach()
            continue
        with pytest.raises(pr.ConfigError, match=r"\['rows'\].*polyrank\.optimizer.*\"gradient\""):
            pr.attach(optimizer, model)


def test_presets_are_the_published_settings():
    glue, paper = (pr.method("dylora", preset=name) for name in ("glue", "paper"))
    assert (glue.mode, glue.update, glue.distribution) == ("frozen", "gradient", "uniform")
    assert (paper.mode, paper.update) == ("full", "strict")
    assert (glue.r, glue.alpha) == (8, 16.0)


def test_several_ranks_are_evaluated_the_largest_first(bench):
    def deployed(**options):
        work = bench("dylora", **{"r": 8, **options})
        work.begin(0)
        work.nudge()
        found = {}
        for name, context in work.method.boundary().deploys(work).items():
            with context:
                found[name] = [layer.core.rank for layer in work.adapter.layers]
        assert all(layer.core.rank == work.method.top for layer in work.adapter.layers)
        return found

    assert list(deployed()) == ["rank 8", "rank 1", "rank 2", "rank 4"]
    assert deployed()["rank 2"] == [2, 2]
    assert list(deployed(r=6, r_min=2)) == ["rank 6", "rank 2", "rank 4"]
    assert list(deployed(evaluate=[3, 8])) == ["rank 8", "rank 3"]
    assert list(deployed(evaluate=[8])) == [""]


def test_it_exports_the_ranks_that_were_asked_for(bench):
    work = bench("dylora", r=4, exports=[1, 3], dtype=torch.float32)
    work.begin(0)
    work.nudge()
    work.saved = lambda: saved_of(work.model)
    found = work.method.boundary().exports(work)
    assert {name: saved.config["r"] for name, saved in found.items()} == {"rank-1": 1, "rank-3": 3}
    assert work.adapter.layers[0].core.rank == 4


def test_its_sign_of_life_is_zero_before_and_a_share_after(bench):
    work = bench("dylora", r=4, update="gradient")
    before = work.method.vital_sign(work.adapter)
    assert before == {"b_norm": 0.0, "first_half": 0.0}
    work.begin(0)
    work.steps(count=4)
    after = work.adapter.check_alive(before)
    assert 0 < after["first_half"] <= 1


def test_one_entry_of_a_run_says_what_is_evaluated():
    average = pr.method("ilora")
    (problem,) = combination_problems(pr.method("dylora", r=8), [average])
    assert "dylora, ilora all decide what is evaluated" in problem
    assert combination_problems(pr.method("dylora", r=8, evaluate=[8]), [average]) == []
