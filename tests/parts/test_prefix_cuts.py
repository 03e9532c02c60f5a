"""Nested ranks that are cut, kept, shown inside a block or merged: nothing else may change."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from torch import nn

import polyrank as pr
from polyrank.layers import absorb, adapter_of, append, keep, replica, saved_of, truncate, view
from polyrank.parts.nested import shown
from polyrank.parts.transforms import of_replica, plain_lora
from polyrank.testing import assert_close

R, D_IN, D_OUT = 4, 6, 5


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D_IN, D_OUT))


def drawn_values(layer, seed):
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (layer.A, layer.B):
            p.copy_(torch.empty(p.shape).normal_(generator=rng))


def made(*extras, **options):
    """One layer with values, behind a bank or an archive, or beside a replica."""
    model = pr.adapt(base(), pr.method("dylora", r=R, **options), ["0"], seed=1).eval()
    drawn_values(adapter_of(model).layers[0], 1)
    for extra in extras:
        if extra == "replica":
            pr.set_rank(model, 3)
            replica(model, "slow")
            pr.set_rank(model, R)
            continue
        if extra == "bank":
            append(model, R, seed=1)
        else:
            absorb(model, archive=True)
        drawn_values(adapter_of(model).layers[0], 2)
    return model, adapter_of(model).layers[0]


def x():
    return torch.randn(7, D_IN, generator=torch.Generator().manual_seed(2))


def exported(model, tmp_path):
    """The answers of the plain LoRA, loaded by PEFT."""
    pr.export(model, tmp_path)
    return PeftModel.from_pretrained(base(), str(tmp_path)).eval()(x())


EXTRAS = [(), ("bank",), ("archive",), ("bank", "replica"), ("archive", "bank"), ("replica",)]


@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)", 0.7])
@pytest.mark.parametrize("extras", EXTRAS, ids="-".join)
def test_a_cut_changes_nothing_else_than_the_ranks_that_go(extras, scaling, tmp_path):
    model, layer = made(*extras, scaling=scaling)
    scale = layer.scale
    expected = {}
    for b in (1, 2, 3):
        pr.set_rank(model, b)
        expected[b] = model(x())
    shows = {}
    if "replica" in extras:
        with view(model, "slow"):
            shows["before"] = model(x())
    truncate(model, 3)
    layer = adapter_of(model).layers[0]
    assert (layer.scale, layer.A.shape[0], layer.core.rank) == (scale, 3, 3)
    if shows:
        with view(model, "slow"):
            assert_close(model(x()), shows["before"])
    for b in (3, 2, 1):
        pr.set_rank(model, b)
        assert_close(model(x()), expected[b])
        assert_close(exported(model, tmp_path / f"plain-{b}"), expected[b])
    pr.set_rank(model, 3)
    model.save_pretrained(tmp_path / "cut")
    again = PeftModel.from_pretrained(base(), str(tmp_path / "cut")).eval()
    for held in (again, model):
        for b in (1, 3):
            pr.set_rank(held, b)
            assert_close(held(x()), expected[b])
        truncate(held, 2)
        assert_close(held(x()), expected[2])


def test_a_replica_keeps_the_rank_that_it_acts_at(tmp_path):
    model, _ = made("replica")
    pr.set_rank(model, 3)
    with view(model, "slow"):
        expected = model(x())
    truncate(model, 2)
    with view(model, "slow"):
        assert_close(model(x()), expected)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), str(tmp_path)).eval()
    assert_close(again(x()), model(x()))
    with view(again, "slow"):
        assert_close(again(x()), expected)
    plain = plain_lora(of_replica(saved_of(model), "slow"))
    assert plain.config["r"] == 3
    A, B = (plain.tensors[f"base_model.model.0.lora_{side}.weight"] for side in "AB")
    assert_close(base()(x()) + x() @ A.T @ B.T, expected)


def test_a_bank_that_grows_behind_a_cut_keeps_the_answers():
    model, _ = made("bank")
    truncate(model, 2)
    expected = model(x())
    append(model, 3, seed=5)
    assert_close(model(x()), expected)


def test_what_is_kept_of_ordered_ranks_is_a_prefix_and_nothing_else():
    model, layer = made()
    pr.set_rank(model, 2)
    expected = model(x())
    for ranks in ([1, 2], [1, 0], [0, 2], [3]):
        with pytest.raises(pr.ConfigError, match=r"keep: .*Prefix.* are ordered.*0\.\.\d, or trun"):
            keep(model, layer, torch.tensor(ranks))
    with pytest.raises(pr.ConfigError, match=r"rank: got 2, expected an integer in 1\.\.1"):
        keep(model, layer, torch.tensor([0]))
    assert layer.A.shape[0] == R
    keep(model, layer, torch.arange(3))
    assert (layer.A.shape[0], layer.core.rank) == (3, 2)
    assert_close(model(x()), expected)
    pr.set_rank(model, 3)
    whole, _ = made()
    pr.set_rank(whole, 3)
    assert_close(model(x()), whole(x()))


# --- inside a block -------------------------------------------------------------------------------


def test_a_shown_rank_is_the_one_that_is_saved(tmp_path):
    model, layer = made()
    found = {}
    with pr.at_rank(model, 2):
        found[2] = model(x())
        model.save_pretrained(tmp_path / "2")
    assert layer.core.rank == R
    found[R] = model(x())
    model.save_pretrained(tmp_path / str(R))
    for b, expected in found.items():
        again = PeftModel.from_pretrained(base(), str(tmp_path / str(b))).eval()
        assert adapter_of(again).layers[0].core.rank == b
        assert_close(again(x()), expected)
    about = json.loads((tmp_path / "2" / "adapter_config.json").read_text())
    assert about["sites"]["0"]["core"] == {"rank": 2}


def test_while_merged_no_other_rank_is_shown():
    model, layer = made()
    W = layer.module.dense_weight().detach().clone()
    pr.set_rank(model, 3)
    expected = model(x())
    model.merge_adapter()
    for block in (lambda: pr.at_rank(model, 2), lambda: shown(adapter_of(model), 2)):
        with pytest.raises(pr.MergeError, match=r"merged at rank 3.*unmerge_adapter"), block():
            pass
    assert layer.core.rank == 3
    model.unmerge_adapter()
    assert_close(layer.module.dense_weight(), W)
    assert_close(model(x()), expected)


def leave_merged(model, block):
    with block:
        model.merge_adapter()


def test_a_block_that_ends_merged_says_so_and_unmerging_still_is_right():
    for public in (True, False):
        model, layer = made()
        W = layer.module.dense_weight().detach().clone()
        block = pr.at_rank(model, 2) if public else shown(adapter_of(model), 2)
        with pytest.raises(pr.MergeError, match=r"merged at rank 2.*unmerge_adapter"):
            leave_merged(model, block)
        assert layer.core.rank == 2
        model.unmerge_adapter()
        assert_close(layer.module.dense_weight(), W)


def test_unmerging_takes_out_the_rank_that_was_merged():
    model, layer = made()
    W = layer.module.dense_weight().detach().clone()
    layer.core.choose(2)
    model.merge_adapter()
    layer.core.choose(4)
    model.unmerge_adapter()
    assert_close(layer.module.dense_weight(), W)
    assert layer.core.rank == 4


def test_a_block_inside_a_block_gives_back_what_was_before():
    model, layer = made()
    with pr.at_rank(model, 3):
        with pr.at_rank(model, 1):
            assert layer.core.rank == 1
        assert layer.core.rank == 3
        assert plain_lora(saved_of(model)).config["r"] == 3
    assert layer.core.rank == R


@pytest.mark.parametrize("verb", [pr.set_rank, pr.at_rank])
def test_with_two_active_adapters_one_must_be_named(verb):
    model, _ = made()
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "other"])

    def call(**named):
        found = verb(model, 2, **named)
        if found is not None:
            with found:
                return adapter_of(model, "other").layers[0].core.rank
        return adapter_of(model, "other").layers[0].core.rank

    with pytest.raises(pr.ConfigError, match=r"\['default', 'other'\] are all active.*adapter="):
        call()
    assert call(adapter="other") == 2
    assert adapter_of(model, "default").layers[0].core.rank == R


def test_a_copy_made_inside_an_update_is_in_none():
    model, layer = made()
    attachment = pr.attach(pr.optimizer(model, 0.1), model, seed=1)
    model.train()(x())
    b = layer.core.drawn
    assert 0 < b < R
    other = copy.deepcopy(model)
    assert adapter_of(other).layers[0].core.drawn == 0
    assert layer.core.drawn == b
    assert torch.equal(layer.core.now[1, 0], torch.tensor(float(b), dtype=torch.float64))
    with torch.no_grad():
        expected = model.eval()(x())
        core = adapter_of(other).layers[0].core.train()
        assert core.portion().ranks == R
        assert float(core.now[1, 0]) == R
        assert torch.equal(other(x()), expected)
    attachment.detach()
