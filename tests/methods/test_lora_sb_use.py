"""lora-sb in use: what shows that it trains, whatever its rank."""

import pytest
import torch

import polyrank as pr
from polyrank import engine
from polyrank.errors import InertError
from polyrank.layers import adapter_of, keep
from polyrank.testing import assert_close
from polyrank.testing.streams import few_digits, tiny_vit

FAST = {"epochs": 1, "batch_size": 8, "lr": 1e-2, "warmup": 0.0}


def sign(model):
    adapter = adapter_of(model)
    return adapter.method.vital_sign(adapter)


def go(out, **train):
    return engine.run(
        tiny_vit(), few_digits(rows=16, tasks=1), pr.method("lora-sb", r=1, rows=8),
        references=[], train={**FAST, **train}, progress=False, out=out,
    )  # fmt: skip


def test_a_single_rank_shows_that_it_trains_also_once_it_was_saved(tmp_path):
    result = go(tmp_path / "run")
    (moved,) = sign(result.model).values()
    cores = [view.core for view in adapter_of(result.model).layers]
    expected = [(core.weight - core.start[:, None]).abs().detach() for core in cores]
    assert moved > 0
    assert_close(torch.tensor(moved), torch.stack(expected).mean())
    saved = tmp_path / "run" / result.system()["adapter"]
    assert sign(pr.load(tiny_vit(), saved)) == sign(result.model)


def test_a_start_alone_shows_no_life(tmp_path, monkeypatch):
    # What would be an optimiser moves nothing.
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    with pytest.raises(InertError, match="moved of 'lora-sb' stayed zero"):
        go(tmp_path / "run")


def test_kept_ranks_keep_their_start(tmp_path):
    model = pr.adapt(tiny_vit(), pr.method("lora-sb", r=3, rows=8, eta=0.1), seed=1)
    view = adapter_of(model).layers[0]
    with torch.no_grad():
        view.core.begin(torch.tensor([3.0, 2.0, 1.0]))
    assert not view.core.start.requires_grad
    keep(model, view, torch.tensor([2, 0]))
    assert torch.equal(view.core.start, torch.tensor([1.0, 3.0]))
    assert view.core.moved() == 0
