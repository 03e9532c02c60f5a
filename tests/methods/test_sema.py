"""sema: branches, routers, descriptors, statistics and the task loss against the formulas."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

import polyrank as pr
from polyrank.errors import ConfigError, RunError
from polyrank.frame import Flow, Out, Site, keyed
from polyrank.layers import LinearHead, adapter_of
from polyrank.parts.branches import Adapters, Descriptors, Expandable
from polyrank.parts.describe import HoldRows, _gathered
from polyrank.parts.optimizer import build_optimizer
from polyrank.parts.windows import Windows
from polyrank.testing import MODELS, assert_close

D, R, Q, M = 6, 3, 4, 8
SITE = Site(
    path="layers.1", d_in=D, d_out=D, r=R, depth=1, depths=2, modules=("norm2", "mlp"), masks="mask"
)
EXACT = "a claim of the paper about equal sums, held to fp64's own rounding"


def branch(adapters=1, live=True, growing=True, seed=0):
    """Return a block in fp64 with so many adapters, nothing of which is zero."""
    block = Expandable(SITE, r=R, q=Q, window=M, scale=1.0, growing=growing)
    for number in range(1, adapters):
        block.freeze()
        block.expand(keyed("expand", seed, number))
    if not live:
        block.freeze()
    rng = keyed("values", seed)
    with torch.no_grad():
        for p in block.parameters():
            if p.is_floating_point():
                p.copy_(torch.randn(p.shape, generator=rng))
    return block.double()


def hidden(batch=5, tokens=4, seed=0):
    return torch.randn(batch, tokens, D, generator=keyed("h", seed), dtype=torch.float64)


def base(x):
    return 0.5 * x


def run(block, h, mask=None):
    return block(base, h, h, Flow(mask=mask))


def pieces(block, kind, name, axis=0):
    """Return the tensors of all adapters, one each, old ones first."""
    parts = [getattr(block, f"held_{kind}"), getattr(block, kind)]
    whole = torch.cat([getattr(p, name) for p in parts if p is not None], axis)
    return whole.chunk(block.count, axis)


def functions(block, h):
    """f_k(h) one after another, as the formula says."""
    parts = [
        pieces(block, "adapter", name, axis)
        for name, axis in (("down", 0), ("down_bias", 0), ("up", 1), ("up_bias", 0))
    ]
    return [(h @ a.T + b).relu() @ u.T + c[0] for a, b, u, c in zip(*parts, strict=True)]


def weights(block, h):
    m = h.mean(1)
    rows, biases = (torch.cat(pieces(block, "router", n)) for n in ("weight", "bias"))
    return (m @ rows.T + biases).softmax(-1)


# --- answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [1, 2, 4])
@pytest.mark.parametrize("live", [True, False], ids=["pending", "fused"])
def test_the_mixture_is_that_of_the_formula(adapters, live):
    block, h = branch(adapters, live), hidden()
    f, w = functions(block, h), weights(block, h)
    expected = base(h) + sum(w[:, k, None, None] * f[k] for k in range(adapters))
    assert_close(run(block, h), expected)


def test_a_fresh_adapter_adds_exactly_nothing_and_a_new_one_acts_through_the_softmax():
    h = hidden()
    fresh = Expandable(SITE, r=R, q=Q, window=M, scale=1.0, growing=True).double()
    assert torch.equal(run(fresh, h), base(h))
    block = branch(2)
    before, f, w = run(block, h), functions(block, h), weights(block, h)
    block.freeze()
    block.expand(keyed("third"))
    block.double()
    changed = weights(block, h)
    assert (changed[:, :2] < w).all()
    moved = sum((changed[:, k] - w[:, k])[:, None, None] * f[k] for k in range(2))
    assert_close(run(block, h), before + moved)
    with torch.no_grad():
        block.router.bias.fill_(-math.inf)
    assert torch.equal(weights(block, h)[:, 2], torch.zeros(5, dtype=h.dtype))
    assert_close(run(block, h), before, tol=1e-13, reason=EXACT)


def test_one_adapter_has_the_weight_one_and_teaches_its_router_nothing():
    block, h = branch(1), hidden()
    assert torch.equal(run(block, h), base(h) + block.adapter(h, h.new_ones(5, 1)))
    run(block, h).square().sum().backward()
    assert not block.router.weight.grad.any()
    assert not block.router.bias.grad.any()
    assert block.adapter.up.grad.any()
    assert {"router.weight", "router.bias"} <= block.unreached


def test_equal_adapters_need_no_router_and_equal_shifts_of_it_change_nothing():
    block, h = branch(3, live=False), hidden()
    with torch.no_grad():
        for name, axis in Adapters.axes.items():
            held = getattr(block.held_adapter, name)
            first = held.chunk(3, axis)[0]
            held.copy_(torch.cat([first] * 3, axis))
    before = run(block, h)
    with torch.no_grad():
        block.held_router.weight.normal_(generator=keyed("other"))
    assert_close(run(block, h), before, tol=1e-12, reason=EXACT)
    block = branch(3)
    before = run(block, h)
    with torch.no_grad():
        block.held_router.bias.add_(0.7)
        block.router.bias.add_(0.7)
    assert_close(run(block, h), before, tol=1e-12, reason=EXACT)


def permuted(block, order):
    """Return a fused block whose adapters, rows, descriptors and windows are in another order."""
    made = copy.deepcopy(block)
    for kind in ("adapter", "router", "descriptor"):
        part = getattr(made, f"held_{kind}")
        for name, axis in part.axes.items():
            chunks = getattr(part, name).detach().chunk(block.count, axis)
            getattr(part, name).data = torch.cat([chunks[k] for k in order], axis)
    for name in ("values", "length"):
        held = getattr(made.held_window, name)
        held.data = held[list(order)]
    return made


def test_the_order_of_adapters_means_nothing():
    block, h = branch(3, live=False), hidden()
    with torch.no_grad():
        block.held_window.length.copy_(torch.tensor([8, 5, 7]))
    other = permuted(block, (2, 0, 1))
    assert_close(run(other, h), run(block, h))
    errors = {}
    for name, one in (("here", block), ("there", other)):
        one.eval().watched = True
        run(one, h)
        errors[name] = one.left.pop("errors")
    assert_close(errors["there"], errors["here"][:, [2, 0, 1]])
    assert other.score(errors["there"]) == pytest.approx(block.score(errors["here"]), rel=1e-12)


def test_what_is_fused_answers_as_what_was_pending_and_old_rows_keep_their_bits():
    block, h = branch(3), hidden()
    before, rows = run(block, h), pieces(block, "router", "weight")
    own = block.router.weight.detach().clone()
    old = [p.detach().clone() for p in rows[:2]]
    block.freeze()
    assert_close(run(block, h), before, tol=1e-13, reason=EXACT)
    now = pieces(block, "router", "weight")
    assert all(torch.equal(a, b) for a, b in zip(now, [*old, own], strict=True))
    assert not any(p.requires_grad for p in block.parameters())
    assert block.settings() == {"held": 3, "live": False, "described": True}


def test_padding_counts_neither_for_the_router_nor_for_descriptors():
    block, h = branch(2), hidden(batch=2)
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[1, 2:] = False
    block.eval().watched = True
    padded = run(block, h, mask)
    told = block.left.pop("errors")
    for row, real in ((0, 4), (1, 2)):
        alone = run(block, h[row : row + 1, :real])
        assert_close(padded[row : row + 1, :real], alone)
        assert_close(told[row : row + 1], block.left.pop("errors"))


def test_a_recomputed_forward_records_once_and_processes_share_what_they_record(monkeypatch):
    from torch.utils.checkpoint import checkpoint

    block, h = branch(2), hidden().requires_grad_()
    block.train().recording = True
    for number, reentrant in enumerate((False, True)):
        checkpoint(run, block, h, use_reentrant=reentrant).sum().backward()
        assert len(block.pending) == number + 1
    errors = block.pending[0]
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)

    def both(found, own):
        found[:] = [own, own[:2] + 1]

    monkeypatch.setattr(dist, "all_gather_object", both)
    assert torch.equal(_gathered(errors), torch.cat([errors, errors[:2] + 1]))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_in_low_precision_means_and_statistics_stay_fine(kind):
    block = branch(2).to(kind)
    assert {p.dtype for n, p in block.named_parameters() if "window" not in n} == {kind}
    low = block.float() if kind == torch.float32 else block
    for held in low.window.parameters():
        assert held.dtype in (torch.float32, torch.float64)
    h = hidden().to(kind)
    block.eval().watched = True
    answer = run(block, h)
    assert answer.dtype == kind
    assert block.left.pop("errors").dtype == torch.float32
    exact = branch(2).to(kind).double()
    assert_close(answer.double(), run(exact, h.double()), dtype=kind)


def test_autocast_rounds_neither_logits_nor_what_is_recorded():
    block, h = branch(2).float(), hidden().float()
    block.train().recording = True
    told = {}
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            run(block, h)
            block.eval().watched = True
            run(block, h)
        block.train().watched = False
        told[enabled] = block.pending.pop(), block.left.pop("errors")
    assert all(map(torch.equal, told[True], told[False]))
    seen = []
    block._logits = lambda m: seen.append(type(block)._logits(block, m)) or seen[-1]
    run(block, h)
    with torch.autocast("cpu", torch.bfloat16):
        run(block, h)
    assert torch.equal(*seen)


def test_processes_decide_on_their_rows_together(monkeypatch):
    block = branch(3, live=False)
    with torch.no_grad():
        block.held_window.length.fill_(M)
        block.held_window.values.copy_(torch.rand(3, M, generator=keyed("held")))
    errors = torch.rand(7, 3, generator=keyed("errors")) + 2
    other = block.held_window.scores(errors[5:], signed=False)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        dist, "all_reduce", lambda sums: sums.add_(torch.cat([other.sum(0), other.new_tensor([2])]))
    )
    together = block.score(errors[:5])
    monkeypatch.undo()
    assert together == pytest.approx(block.score(errors), rel=1e-12)


def test_errors_are_means_over_features_and_teach_the_hidden_state_nothing():
    descriptors = Descriptors(D, Q, 2, keyed("ae")).double()
    m = hidden().mean(1).requires_grad_()
    found = descriptors(m)
    for k in range(2):
        code = m @ descriptors.encode[k].T + descriptors.encode_bias[k]
        back = code @ descriptors.decode[k].T + descriptors.decode_bias[k]
        assert_close(found[:, k], (back - m).square().mean(-1))
    found.sum().backward()
    assert m.grad is None
    assert descriptors.encode.grad.any()


def test_counts_are_those_of_the_paper():
    def size(module):
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        adapter, descriptor, head = Adapters(768, 16), Descriptors(768, 128), nn.Linear(768, 100)
    assert size(adapter) == 2 * 768 * 16 + 16 + 768 == 25_360
    assert size(descriptor) == 2 * 768 * 128 + 128 + 768 == 197_504
    assert (12 + 27) * size(adapter) + size(head) == 1_065_940
    assert 69 * size(adapter) + 2 * size(head) == 1_903_640


def test_starts_are_those_of_the_program():
    block = Expandable(
        Site(path="x", d_in=400, d_out=400, r=50, modules=("norm2", "mlp")),
        r=50, q=60, window=M, scale=1.0, growing=True,
    )  # fmt: skip
    for tensor, inner in (
        (block.adapter.down, 400),
        (block.router.weight, 400),
        (block.descriptor.encode, 400),
        (block.descriptor.decode, 60),
    ):
        values = tensor.detach()
        assert float(values.abs().max()) <= 1 / math.sqrt(inner)
        # U(±b) has a mean square of b² / 3; 400 numbers and more.
        assert float(values.square().mean() * 3 * inner) == pytest.approx(1, abs=0.15)
    for name in ("adapter.down_bias", "adapter.up", "adapter.up_bias", "descriptor.encode_bias"):
        assert not block.get_parameter(name).any()


# --- statistics ----------------------------------------------------------------------------------


class Oracle:
    """A list, filled and slid as the program does."""

    def __init__(self, size):
        self.size, self.held = size, []

    def push(self, values):
        if len(self.held) < self.size:
            self.held += values[: self.size - len(self.held)]
        else:
            self.held = (self.held + values)[-self.size :]


@pytest.mark.parametrize("size", [3, 8, 11])
def test_windows_fill_without_wrapping_and_slide(size):
    rng, windows, oracle = keyed("window", size), Windows(2, size), Oracle(size)
    other = Oracle(size)
    for count in (1, 1, 4, 3, 2, 5, size + 2, 1, 3):
        values = torch.rand(count, 2, generator=rng)
        assert_z(windows, oracle, values)
        windows.push(values)
        oracle.push(values[:, 0].tolist())
        other.push(values[:, 1].tolist())
        for row, one in enumerate((oracle, other)):
            assert windows.length[row] == len(one.held)
            assert windows.values[row][: len(one.held)].tolist() == one.held


def assert_z(windows, oracle, values):
    """Hold z of the first window to the oracle's unbiased moments."""
    found = windows.scores(values, signed=False)[:, 0]
    if len(oracle.held) <= 2:
        assert not found.any()
        return
    held = torch.tensor(oracle.held, dtype=torch.float64)
    mean = held.sum() / len(held)
    variance = (held - mean).square().sum() / (len(held) - 1)
    assert_close(found, (values[:, 0].double() - mean).abs() / variance.sqrt())
    signed = windows.scores(values, signed=True)[:, 0]
    assert_close(signed, (values[:, 0].double() - mean) / variance.sqrt())


def test_a_window_without_spread_or_with_what_is_not_finite_is_refused():
    windows = Windows(1, 4)
    windows.push(torch.full((3, 1), 0.5))
    with pytest.raises(RunError, match=r"all 3 recorded errors are equal.*more different rows"):
        windows.scores(torch.rand(2, 1), signed=False)
    windows.push(torch.tensor([[math.nan]]))
    with pytest.raises(RunError, match=r"not finite; lower the learning rate"):
        windows.scores(torch.rand(2, 1), signed=False)
    sound = Windows(1, 4)
    sound.push(torch.tensor([[0.1], [0.2], [0.4]]))
    with pytest.raises(RunError, match="not finite"):
        sound.scores(torch.tensor([[math.inf]]), signed=False)


def test_the_score_is_the_least_of_means_and_an_empty_window_vetoes():
    block = branch(3, live=False)
    with torch.no_grad():
        block.held_window.length.fill_(M)
        block.held_window.values.copy_(torch.rand(3, M, generator=keyed("held")))
    errors = torch.rand(7, 3, generator=keyed("errors")) + 2
    z = [
        ((errors[:, k].double() - v.double().mean()) / v.double().std()).abs().mean()
        for k, v in enumerate(block.held_window.values)
    ]
    assert block.score(errors) == pytest.approx(float(min(z)), rel=1e-6)
    assert block.score(errors) > 2
    with torch.no_grad():
        block.held_window.length[1] = 2
    assert block.score(errors) == 0


def test_the_rows_that_it_was_trained_on_are_usual():
    # The mean of |z| of a normal is √(2/π) = 0.80, so that tau = 1 adds nothing.
    windows, rng = Windows(1, 500), keyed("normal")
    seen = torch.randn(2000, 1, generator=rng) * 0.3 + 5
    windows.push(seen[:700])
    for part in seen[700:].split(100):
        windows.push(part)
    again = [float(windows.scores(part, signed=False).mean()) for part in seen.split(128)[:-1]]
    assert sum(again) / len(again) == pytest.approx(math.sqrt(2 / math.pi), abs=0.05)
    assert max(again) < 1


def test_a_trained_descriptor_finds_its_own_rows_usual_and_others_not():
    block = Expandable(SITE, r=R, q=Q, window=500, scale=1.0, growing=True)
    mix = torch.randn(D, D, generator=keyed("mix"))
    rows = torch.randn(640, 1, D, generator=keyed("own")) @ mix / D**0.5
    optimizer = torch.optim.SGD(block.descriptor.parameters(), lr=0.03, momentum=0.9)
    block.train()
    block.describing = block.recording = True
    for epoch in range(6):
        order = torch.randperm(640, generator=keyed("order", epoch))
        for index in order.split(32):
            run(block, rows[index])
            optimizer.zero_grad()
            block.left.pop("newest").mean().backward()
            optimizer.step()
            block.window.push(block.pending.pop()[:, None])
    block.freeze()
    block.eval().watched = True

    def score(batch):
        run(block, batch)
        return block.score(block.left.pop("errors"))

    usual = [score(batch) for batch in rows.split(128)]
    # Errors are squares, whose spread is wider than a normal's: below its 0.80.
    assert 0.5 < min(usual) <= max(usual) < 1
    assert score(rows[:128] * 3) > 2


# --- the loss of the task ------------------------------------------------------------------------


def test_all_parameters_of_a_model_can_be_told_to_require_gradients():
    model = pr.adapt(MODELS["vit"].build(), pr.method("sema", r=2, q=3, window=4, start=-1))
    model.requires_grad_(True)
    block = adapter_of(model).blocks[-1]
    window = block.window
    with torch.no_grad():
        window.push(torch.tensor([[1.0], [2.0], [4.0]]))
        assert window.length.tolist() == [3]
        z = window.scores(torch.tensor([[4.0]]), signed=True)
        assert_close(z, torch.tensor([[5 / 3 / math.sqrt(7 / 3)]], dtype=torch.float64))
        # Above 256 bf16 has no odd numbers.
        window.length.fill_(499)
    assert block.bfloat16().window.length.tolist() == [499]


class Known:
    """What a loss and a rule ask of the engine."""

    def __init__(self, classes, known):
        self.classes, self.known = classes, known


@pytest.mark.parametrize("held", [False, True], ids=["decays", "held"])
def test_rows_of_other_classes_get_no_gradient_and_shrink_by_the_decay_alone(held):
    head = LinearHead(D)
    head.grow([f"class {n}" for n in range(6)], keyed("head"))
    start = head.weight.detach().clone()
    model = pr.adapt(MODELS["vit"].build(), pr.method("sema", r=2, q=3, window=4, start=-1))
    adapter = adapter_of(model)
    adapter.head = head
    loss, rule = model.peft_config["default"].build().task_loss(), HoldRows()
    loss.bind(adapter, Known((2, 3), 2))
    rule.bind(adapter, None, Known((2, 3), 2))
    group = {"params": [head.weight], "update": "sgd", "momentum": 0.9, "weight_decay": 0.5}
    optimizer = build_optimizer([{**group, "lr": 0.1}], torch.optim.AdamW, {})
    velocity, expected = torch.zeros_like(start), start.clone()
    for step, lr in enumerate((0.1, 0.07, 0.04)):
        optimizer.param_groups[0]["lr"] = lr
        embedding = torch.randn(4, D, generator=keyed("rows", step))
        labels = torch.tensor([2, 3, 3, 2])
        optimizer.zero_grad()
        loss(Out(logits=head(embedding)), {"labels": labels}).backward()
        assert not head.weight.grad[[0, 1, 4, 5]].any()
        assert head.weight.grad[[2, 3]].abs().sum(1).all()
        optimizer.step()
        if held:
            rule.after(None)
        velocity = 0.9 * velocity + 0.5 * expected
        expected = expected - lr * velocity
    with pytest.raises(ConfigError, match=r"^sema: 1 of 2 rows have labels outside the current"):
        loss(Out(logits=torch.zeros(2, 6)), {"labels": torch.tensor([3, 1])})
    if held:
        assert torch.equal(head.weight[:2], start[:2])
    else:
        assert_close(head.weight[:2], expected[:2])
    assert_close(head.weight[4:], expected[4:])
