"""Nested ranks: set, cut, saved and banked, shown by replicas, compiled, and agreed upon."""

import json

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from torch._dynamo.utils import counters

import polyrank as pr
from polyrank import at_rank, set_rank
from polyrank.errors import RunError
from polyrank.frame import Step
from polyrank.layers import absorb, adapter_of, append, replica, truncate, view
from polyrank.parts.prefix import Draw
from polyrank.testing import assert_close

R, D_IN, D_OUT = 4, 6, 5
MODES = ["full", "frozen"]
STEP = Step(index=0, total=0, lr=0.1, peak=0.1)


def base(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D_IN, D_OUT)).to(dtype)


def made(mode="full", *, dtype=torch.float64, method="dylora", **options):
    """One layer, with A and B away from their start."""
    chosen = {"r": R, **({"mode": mode} if method == "dylora" else {}), **options}
    model = pr.adapt(base(dtype), pr.method(method, **chosen), ["0"], seed=1).to(dtype).eval()
    layer = adapter_of(model).layers[0]
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (layer.A, layer.B):
            p.copy_(torch.empty(p.shape, dtype=dtype).normal_(generator=rng))
    return model, layer


def x(count=7, seed=2, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, D_IN, generator=rng, dtype=dtype)


def drawn(model, b):
    """Bring the model into a training update of rank b."""
    model.train()
    for layer in adapter_of(model).layers:
        layer.core.draw(b)


def test_a_set_rank_is_saved_and_cut_adapters_are_smaller(tmp_path):
    model, _ = made(dtype=torch.float32)
    set_rank(model, 3)
    expected = model(x(dtype=torch.float32))
    model.save_pretrained(tmp_path / "set")
    truncate(model, 3)
    assert_close(model(x(dtype=torch.float32)), expected)
    model.save_pretrained(tmp_path / "cut")
    for name, r in (("set", R), ("cut", 3)):
        again = PeftModel.from_pretrained(base(torch.float32), tmp_path / name).eval()
        assert_close(again(x(dtype=torch.float32)), expected)
        layer = adapter_of(again).layers[0]
        assert (layer.A.shape[0], layer.core.rank) == (r, 3)
        about = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert about["options"]["r"] == R
    set_rank(again, 2)
    with at_rank(model, 2):
        assert_close(again(x(dtype=torch.float32)), model(x(dtype=torch.float32)))


@pytest.mark.parametrize("b", [0, 5, 2.0, True, "2", None])
def test_no_other_rank_can_be_set(b):
    model, layer = made()
    with pytest.raises(pr.ConfigError, match=r"expected an integer in 1\.\.4"):
        set_rank(model, b)
    assert layer.core.rank == 4


def test_only_ranks_that_were_trained_can_be_set_or_cut_to():
    model, _ = made(r_min=2, r_max=3)
    for b in (1, 4):
        with pytest.raises(pr.ConfigError, match=r"integer in 2\.\.3"):
            set_rank(model, b)
    with pytest.raises(pr.ConfigError, match=r"expected r_min\.\.r = 2\.\.4"):
        truncate(model, 1)
    model, _ = made(method="lora")
    with pytest.raises(pr.ConfigError, match="no nested ranks"):
        set_rank(model, 1)


def test_a_cut_adapter_trains_on_within_its_ranks():
    model, _ = made()
    truncate(model, 2)
    seen = set()
    model.double().train()
    optimizer = pr.optimizer(model, 0.1)
    attachment = pr.attach(optimizer, model)
    for index in range(12):
        model(x(seed=index)).square().mean().backward()
        seen.add(int(adapter_of(model).layers[0].core.drawn))
        optimizer.step()
        optimizer.zero_grad()
    attachment.detach()
    assert seen == {1, 2}


def test_an_update_that_was_not_finished_leaves_no_draw():
    model, layer = made()
    attachment = pr.attach(pr.optimizer(model, 0.1), model)
    model.train()
    expected = model.eval()(x())
    model.train()(x())
    assert int(layer.core.drawn)
    attachment.detach()
    assert not int(layer.core.drawn)
    with torch.no_grad():
        assert torch.equal(model(x()), expected)


def test_a_replica_acts_at_the_set_rank_too():
    model, layer = made()
    replica(model, "slow")
    set_rank(model, 2)
    expected = model(x())
    with torch.no_grad():
        layer.B.zero_()
    with view(model, "slow"):
        assert_close(model(x()), expected)
    drawn(model, 1)
    with view(model, "slow"):
        assert_close(model(x()), expected)


@pytest.mark.parametrize("mode", MODES)
def test_frozen_ranks_stand_before_its_own_at_their_own_weight(mode):
    model, layer = made(mode)
    set_rank(model, 3)
    expected = model(x())
    append(model, R, seed=1)
    model.double()
    layer = adapter_of(model).layers[0]
    assert layer.bank[0].shape == (3, D_IN)
    assert_close(model.eval()(x()), expected)
    with torch.no_grad():
        layer.B.normal_(generator=torch.Generator().manual_seed(5))
    for b in (1, 4):
        set_rank(model, b)
        own = x() @ layer.A[:b].T @ layer.B[:, :b].T
        assert_close(model(x()), expected + 16.0 / b * own)
        drawn(model, b)
        model.zero_grad()
        model(x()).sum().backward()
        learning = [b - 1] if mode == "frozen" else list(range(b))
        assert layer.A.grad.any(1).nonzero().flatten().tolist() == learning
        model.eval()
        assert_close(layer.delta() @ x().T, (model(x()) - layer.module.base_layer(x())).T)


def test_an_archive_acts_as_a_bank_on_the_original_base(tmp_path):
    model, layer = made(dtype=torch.float32)
    set_rank(model, 3)
    rows = x(dtype=torch.float32)
    expected = model(rows)
    absorb(model, archive=True)
    assert_close(model(rows), expected)
    with torch.no_grad():
        layer.B.normal_(generator=torch.Generator().manual_seed(5))
    expected = model(rows)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(torch.float32), tmp_path).eval()
    found = adapter_of(again).layers[0]
    assert (found.bank[0].shape[0], found.core.rank) == (3, 3)
    assert_close(again(rows), expected)


# --- compiled -------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def train(model, compiled, updates=10):
    """Train, compiled or not; returns losses and ranks."""
    optimizer = pr.optimizer(model, 0.05, 0.1)
    attachment = pr.attach(optimizer, model, seed=2)
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    model.train()
    losses, ranks = [], []
    for index in range(updates):
        attachment.begin()
        rows = x(seed=index)
        loss = F.mse_loss(call(rows), rows[:, :D_OUT].sin())
        loss.backward()
        ranks.append(int(adapter_of(model).layers[0].core.drawn))
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    attachment.detach()
    return losses, ranks, call


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("banked", [False, True], ids=["plain", "banked"])
@pytest.mark.parametrize("mode", MODES)
def test_one_graph_serves_all_ranks(mode, banked):
    models, results = [made(mode)[0] for _ in range(2)], []
    for model in models:
        if banked:
            append(model, R, seed=1)
            model.double()
    for model, compiled in zip(models, (False, True), strict=True):
        results.append(train(model, compiled))
    (losses, ranks, _), (found, again, call) = results
    assert_close(found, losses)
    assert ranks == again
    assert set(ranks) == set(range(1, R + 1))
    # A core without a fused form is handed a copy of the flow, which is another one once.
    graphs = 2 if banked else 1
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    for name, p in adapter_of(models[0]).named().items():
        assert_close(adapter_of(models[1]).named()[name], p)
    for model in models:
        model.eval()
    for b in range(1, R + 1):
        for model in models:
            set_rank(model, b)
        assert_close(call(x()), models[0](x()))
    assert counters["stats"]["unique_graphs"] == graphs + 1


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("mode", MODES)
def test_compiled_code_neither_reads_nor_trains_what_is_beyond_b(mode):
    model, layer = made(mode)
    with torch.no_grad():
        layer.A[2:].fill_(torch.nan)
        layer.B[:, 2:].fill_(torch.nan)
    drawn(model, 2)
    rows = x().requires_grad_()
    torch.compile(model, backend="aot_eager", fullgraph=True)(rows).square().sum().backward()
    assert rows.grad.isfinite().all()
    learning = [1] if mode == "frozen" else [0, 1]
    for grad in (layer.A.grad, layer.B.grad.T):
        assert grad.any(1).nonzero().flatten().tolist() == learning
        assert grad.isfinite().all()


# --- processes ------------------------------------------------------------------------------------


class Two:
    """Two processes, the other of which drew a rank of its own."""

    def __init__(self, monkeypatch, other, level=dist.DebugLevel.OFF):
        self.other, self.asked = other, 0
        for name, value in {
            "is_initialized": lambda: True,
            "get_world_size": lambda: 2,
            "get_debug_level": lambda: level,
            "all_gather": self.gather,
        }.items():
            monkeypatch.setattr(dist, name, value)

    def gather(self, found, here):
        self.asked += 1
        found[0].copy_(here)
        found[1].copy_(here + self.other)


def bound():
    model, _ = made()
    rule = Draw([1.0] * R)
    rule.bind(adapter_of(model), pr.optimizer(model, 0.1), None)
    return rule


def test_processes_that_drew_different_ranks_stop(monkeypatch):
    Two(monkeypatch, other=1)
    with pytest.raises(RunError, match="same seed, task, phase"):
        bound().begin(STEP)


def test_processes_are_asked_once_and_always_if_torch_debugs(monkeypatch):
    for level, asked in ((dist.DebugLevel.OFF, 1), (dist.DebugLevel.DETAIL, 3)):
        both, rule = Two(monkeypatch, other=0, level=level), bound()
        for _ in range(3):
            rule.begin(STEP)
        assert both.asked == asked


def test_a_rule_alone_needs_nested_ranks():
    model, _ = made(method="lora")
    with pytest.raises(pr.ConfigError, match="use dylora"):
        Draw([1.0]).bind(adapter_of(model), None, None)
