"""SMoRA in a layer, under an optimiser and on disk; tests/ops holds the gate to its definition."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import polyrank as pr
from polyrank.frame import get
from polyrank.layers import gate_statistics
from polyrank.testing import assert_close

D_IN, D_OUT, BATCH, TOKENS, R = 6, 5, 4, 9, 8
GATES = [
    {"gate": gate, "bias_in_weight": weighs, "gate_sum": total}
    for gate in ("sigmoid_sum", "softmax_topk")
    for weighs in (False, True)
    for total in ("k", "1")
]
EVERY_GATE = pytest.mark.parametrize("gate", GATES, ids=lambda g: "-".join(map(str, g.values())))
BOTH_KINDS = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])


class Net(nn.Module):
    """Two adapted layers and a non-linearity; a mask comes as language models bring it."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.first, self.second = nn.Linear(D_IN, D_IN), nn.Linear(D_IN, D_OUT)
        self.reentrant = reentrant

    def body(self, x):
        return self.second(self.first(x).tanh())

    def forward(self, x, attention_mask=None):
        if self.reentrant is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


def adapted(name="smora", reentrant=None, dtype=torch.float64, drawn=True, **options):
    torch.manual_seed(0)
    own = {"smora": {"r": R, "k": 2}, "moe-lora": {"r": R, "experts": 4}, "lora": {"r": R}}[name]
    method = pr.method(name, **{**own, **options})
    model = pr.adapt(Net(reentrant), method, target_modules=["first", "second"], seed=0).to(dtype)
    with torch.no_grad():
        for layer in pr.adapter_of(model).layers if drawn else ():
            layer.B.normal_()
            if hasattr(layer.core, "router"):
                layer.core.router.weight.mul_(2)
            if getattr(layer.core, "balance_bias", None) is not None:
                layer.core.balance_bias.normal_(0, 0.2)
    return model.train()


def inputs(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(BATCH, TOKENS, D_IN, dtype=dtype, requires_grad=True)


def padding():
    return (torch.arange(TOKENS) < torch.tensor([9, 4, 7, 1])[:, None]).long()


def layers(model):
    return pr.adapter_of(model).layers


def biases(model):
    return [layer.core.balance_bias.detach().clone() for layer in layers(model)]


def task_loss(y):
    torch.manual_seed(3)
    return (y * torch.randn(y.shape).to(y)).sum()


def gradients(model, x, **keys):
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return torch.autograd.grad(task_loss(model(x, **keys)), wanted)


def copy_factors(source, target):
    with torch.no_grad():
        for a, b in zip(layers(source), layers(target), strict=True):
            b.A.copy_(a.A)
            b.B.copy_(a.B)
            if hasattr(a.core, "router"):
                b.core.router.weight.copy_(a.core.router.weight)


def counts_by_hand(model, x, mask=None):
    """How many tokens chose each rank, layer by layer, by sorting p + b one token at a time."""
    found, seen = [], x
    model.eval()
    for layer in layers(model):
        method, core = layer.method, layer.core
        counts = torch.zeros(R, dtype=torch.int64)
        z = (seen @ core.router.weight.T).repeat_interleave(method.block, -1)
        score = z.sigmoid() if method.gate == "sigmoid_sum" else z
        for n in range(len(x)):
            for t in range(x.shape[1]):
                if mask is None or mask[n, t]:
                    row = (score[n, t] + core.balance_bias).tolist()
                    for rank in sorted(range(R), key=lambda i: (-row[i], i))[: method.k]:
                        counts[rank] += 1
        found.append(counts)
        seen = layer.module(seen).tanh()
    model.train()
    return found


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@EVERY_GATE
def test_zero_b_is_the_base_bit_for_bit(gate, training, dtype):
    model = adapted(dtype=dtype, **gate).train(training)
    for layer in layers(model):
        with torch.no_grad():
            layer.B.zero_()
        x = inputs(dtype)
        assert torch.equal(layer.module(x), layer.module.base_layer(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("gate", ["sigmoid_sum", "softmax_topk"])
def test_all_ranks_and_a_router_of_zeros_are_plain_lora(gate, dtype):
    ours, lora = adapted(k=R, gate=gate, dtype=dtype), adapted("lora", dtype=dtype)
    copy_factors(lora, ours)
    with torch.no_grad():
        for p in (p for layer in layers(ours) for p in layer.core.parameters()):
            p.zero_()
    assert [layer.scale for layer in layers(ours)] == [16 / R] * 2
    x = inputs(dtype)
    assert_close(ours(x), lora(x))
    task_loss(ours(x)).backward()
    task_loss(lora(x)).backward()
    for a, b in zip(layers(ours), layers(lora), strict=True):
        assert_close(a.A.grad, b.A.grad)
        assert_close(a.B.grad, b.B.grad)


@pytest.mark.filterwarnings("ignore:k. got 4, one expert a token")
@pytest.mark.parametrize("gate_sum", ["k", "1"])
@pytest.mark.parametrize("block", [1, 2, 4])
def test_a_block_is_an_expert_of_an_explicit_mixture(block, gate_sum):
    model, x = adapted(k=4, block=block, gate_sum=gate_sum).eval(), inputs()
    with torch.no_grad():
        for layer in layers(model):
            bias = layer.core.balance_bias
            bias.copy_(bias[::block].repeat_interleave(block))
    layer = layers(model)[0]
    core, E = layer.core, R // block
    p = (x @ core.router.weight.T).sigmoid()
    chosen = (p + core.balance_bias[::block]).topk(4 // block, dim=-1).indices
    on = torch.zeros_like(p).scatter(-1, chosen, 1.0)
    total = 4 if gate_sum == "k" else 1
    omega = total / block * p * on / (p * on).sum(-1, keepdim=True)
    gates = core.gates_of(x @ layer.A.T, x @ core.router.weight.T)
    assert_close(gates, omega.repeat_interleave(block, -1))
    expected = layer.module.base_layer(x)
    for e in range(E):
        ranks = slice(e * block, (e + 1) * block)
        update = x @ layer.A[ranks].T @ layer.B[:, ranks].T
        expected = expected + 16 / 4 * omega[..., e, None] * update
    assert_close(layer.module(x), expected)


@pytest.mark.parametrize("active", [2, 4])
def test_blocks_of_softmax_gates_are_top_k_experts(active):
    ours = adapted(k=2 * active, block=2, gate="softmax_topk", balance=0.0)
    theirs, x = adapted("moe-lora", k=active), inputs()
    copy_factors(ours, theirs)
    assert_close(ours(x), theirs(x))
    for a, b in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        assert_close(a, b)


@EVERY_GATE
def test_ranks_may_change_places(gate):
    model, x = adapted(**gate).eval(), inputs()
    before = model(x)
    order = torch.tensor([3, 7, 0, 5, 1, 2, 6, 4])
    with torch.no_grad():
        for layer in layers(model):
            for p in (layer.A, layer.core.router.weight, layer.core.balance_bias):
                p.copy_(p[order].clone())
            layer.B.copy_(layer.B[:, order].clone())
    assert_close(model(x), before)


@pytest.mark.filterwarnings("ignore:k. got .*, one expert a token")
@pytest.mark.parametrize(("k", "block"), [(1, 1), (2, 2)])
@EVERY_GATE
def test_a_single_choice_leaves_the_router_untaught(gate, k, block):
    model, x = adapted(k=k, block=block, balance=0.0, **gate), inputs()
    task_loss(model(x)).backward()
    for layer in layers(model):
        assert layer.core.router.weight.grad.abs().max() < 1e-12
        assert layer.A.grad.abs().max() > 1e-3


@pytest.mark.parametrize(("k", "block", "warned"), [(1, 1, True), (4, 4, True), (2, 1, False)])
def test_a_single_choice_is_warned_of(k, block, warned, recwarn):
    pr.method("smora", r=R, k=k, block=block)
    assert [str(w.message).startswith("k: got") for w in recwarn] == [True] * warned


@EVERY_GATE
def test_a_constant_on_all_biases_moves_the_output_only_if_they_weigh(gate):
    model, x = adapted(**gate).eval(), inputs()
    before = model(x)
    with torch.no_grad():
        for layer in layers(model):
            layer.core.balance_bias.add_(0.5)
    # A constant cancels in a softmax, so there it is silent even inside the weight.
    weighs = gate["bias_in_weight"] and gate["gate"] == "sigmoid_sum"
    if weighs:
        assert (model(x) - before).abs().max() > 1e-3
    else:
        assert_close(model(x), before)


@EVERY_GATE
def test_a_token_does_not_see_the_others(gate):
    model, x = adapted(**gate), inputs()
    whole = model(x)
    assert_close(model(x[2:3, 4:6]), whole[2:3, 4:6])


def trainer(model, lr=0.0, accumulation=1):
    optimizer = torch.optim.SGD(pr.parameter_groups(model, lr=lr))
    pr.attach(optimizer, model, accumulation=accumulation)
    return optimizer


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("gate", ["sigmoid_sum", "softmax_topk"])
@pytest.mark.parametrize(("k", "block"), [(2, 1), (4, 2)])
def test_a_step_moves_each_bias_by_the_sign_of_its_shortage(k, block, gate, masked):
    model, x = adapted(k=k, block=block, gate=gate, balance=1e-2), inputs()
    with torch.no_grad():
        for layer in layers(model):
            bias = layer.core.balance_bias
            bias.copy_(bias[::block].repeat_interleave(block))
    mask = padding() if masked else None
    expected = counts_by_hand(model, x, mask)
    before = biases(model)
    optimizer = trainer(model)
    task_loss(model(x, attention_mask=mask)).backward()
    for layer, counts in zip(layers(model), expected, strict=True):
        assert torch.equal(layer.core.counts, counts)
        assert counts.sum() == k * (mask.sum() if masked else BATCH * TOKENS)
    assert all(map(torch.equal, biases(model), before))
    optimizer.step()
    for bias, old, counts in zip(biases(model), before, expected, strict=True):
        assert torch.equal(bias, old + 1e-2 * (counts.double().mean() - counts).sign())
        assert torch.equal(bias[::block].repeat_interleave(block), bias)
    assert all(layer.core.counts is None for layer in layers(model))


def test_counts_of_all_micro_batches_make_one_step():
    whole, parts = adapted(balance=1e-2), adapted(balance=1e-2)
    x = inputs().detach()
    for model, batches in ((whole, [x]), (parts, x.split(1))):
        optimizer = trainer(model, accumulation=len(batches))
        for batch in batches:
            task_loss(model(batch)).backward()
        optimizer.step()
    assert all(map(torch.equal, biases(whole), biases(parts)))


def test_evaluation_moves_nothing():
    model, x = adapted(balance=1e-2), inputs()
    before = biases(model)
    optimizer = trainer(model)
    model.eval()
    model(x)
    with torch.no_grad():
        model.train()(x)
    model.eval()
    task_loss(model(x)).backward()
    assert all(layer.core.counts is None for layer in layers(model))
    optimizer.step()
    assert all(map(torch.equal, biases(model), before))


def test_equal_counts_and_no_tokens_move_nothing():
    for options, x in (({"k": R}, inputs()), ({}, inputs()[:0])):
        model = adapted(balance=1e-2, **options)
        before = biases(model)
        optimizer = trainer(model)
        task_loss(model(x)).backward()
        optimizer.step()
        assert all(map(torch.equal, biases(model), before))


def test_every_micro_batch_moves_the_bias_at_once_if_asked():
    model, x = adapted(balance=1e-2, balance_every="micro_batch"), inputs()
    assert pr.adapter_of(model).method.rules() == []
    for _ in range(3):
        before, expected = biases(model), counts_by_hand(model, x)
        model(x)
        for bias, old, counts in zip(biases(model), before, expected, strict=True):
            assert torch.equal(bias, old + 1e-2 * (counts.double().mean() - counts).sign())


@pytest.mark.parametrize("balance_every", ["step", "micro_batch"])
def test_the_optimiser_never_trains_the_bias(balance_every):
    model, x = adapted(balance=1e-3, balance_every=balance_every), inputs()
    optimizer = torch.optim.AdamW(pr.parameter_groups(model, lr=0.5, weight_decay=0.5))
    attachment = pr.attach(optimizer, model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    bias = [layer.core.balance_bias for layer in layers(model)]
    assert not any(p.requires_grad or id(p) in held for p in bias)
    before = biases(model)
    for _ in range(2):
        task_loss(model(x)).backward()
        optimizer.step()
    attachment.detach()
    for new, old in zip(biases(model), before, strict=True):
        steps = (new - old) / 1e-3
        assert_close(steps, steps.round(), tol=1e-9, reason="differences of numbers near 0.2")
        assert 0 < steps.abs().max() < 2.5


def test_without_balance_there_is_no_bias():
    model, x = adapted(balance=0.0), inputs()
    assert not any("balance_bias" in name for name in model.state_dict())
    assert pr.adapter_of(model).method.rules() == []
    task_loss(model(x)).backward()
    assert all(layer.core.counts is None for layer in layers(model))


@BOTH_KINDS
@pytest.mark.parametrize("balance_every", ["step", "micro_batch"])
@pytest.mark.parametrize("bias_in_weight", [False, True], ids=["balances", "weighs"])
def test_gradient_checkpointing_changes_nothing(reentrant, balance_every, bias_in_weight):
    found = []
    for mode in (None, reentrant):
        model = adapted(
            reentrant=mode,
            balance=1e-2,
            balance_every=balance_every,
            bias_in_weight=bias_in_weight,
        )
        x = inputs()
        optimizer = trainer(model, lr=0.1)
        y = model(x, attention_mask=padding())
        task_loss(y).backward()
        grads = [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
        optimizer.step()
        found.append((y, grads, biases(model)))
    (y, grads, bias), (y_again, grads_again, bias_again) = found
    assert torch.equal(y, y_again)
    if balance_every == "step":
        for a, b in zip(grads, grads_again, strict=True):
            assert_close(a, b)
    assert all(map(torch.equal, bias, bias_again))


@BOTH_KINDS
def test_dropout_is_the_same_when_a_segment_is_computed_again(reentrant):
    found = []
    for mode in (None, reentrant):
        model, x = adapted(reentrant=mode, dropout=0.4), inputs()
        task_loss(model(x)).backward()
        found.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("gate", ["sigmoid_sum", "softmax_topk"])
def test_balancing_on_fixed_data_evens_the_load(gate):
    model = adapted(balance=1e-2, gate=gate)
    torch.manual_seed(5)
    # Inputs off centre, so that the router prefers some ranks from the start.
    x = torch.randn(16, 32, D_IN, dtype=torch.float64) + 1
    with torch.no_grad():
        for layer in layers(model):
            layer.core.balance_bias.zero_()
    optimizer = trainer(model)
    spread = []
    for _ in range(200):
        task_loss(model(x)).backward()
        spread.append([layer.core.counts.double().std().item() for layer in layers(model)])
        optimizer.step()
        optimizer.zero_grad()
    for before, after in zip(spread[0], spread[-1], strict=True):
        assert after < before / 2


def test_a_disabled_adapter_is_the_base():
    model, x = adapted(), inputs()
    base = adapted(drawn=False).base_model.model
    plain = Net().double()
    plain.load_state_dict(
        {k.replace(".base_layer", ""): v for k, v in base.state_dict().items() if "poly" not in k}
    )
    with model.disable_adapter():
        assert torch.equal(model(x), plain(x))
    assert not torch.equal(model(x), plain(x))


@EVERY_GATE
def test_save_and_load_give_the_same_bits(gate, tmp_path):
    model, x = adapted(dtype=torch.float32, **gate), inputs(torch.float32)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = pr.load(Net(), tmp_path)
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert all(map(torch.equal, biases(again), biases(model)))
    assert pr.adapter_of(again).method == pr.adapter_of(model).method


def test_merging_is_refused_before_anything_changes():
    model = adapted()
    before = {name: p.clone() for name, p in model.named_parameters()}
    for verb in (model.merge_and_unload, model.merge_adapter, lambda: pr.merge(model)):
        with pytest.raises(pr.MergeError, match=r"for each token.*approximate=batches"):
            verb()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_approximate_merge_takes_the_mean_gate():
    model, x = adapted().eval(), inputs().detach()
    batch = {"x": x, "attention_mask": padding()}
    mean = [stats.mean() for stats in gate_statistics(model, layers(model), [batch])]
    expected = []
    seen = x
    for layer, gate in zip(layers(model), mean, strict=True):
        gates = layer.core.gates_of(seen @ layer.A.T, seen @ layer.core.router.weight.T)
        assert_close(gate, gates[padding().bool()].mean(0), dtype=torch.float32)
        update = layer.scale * (layer.B * gate) @ layer.A
        expected.append(layer.module.base_layer.weight + update)
        seen = layer.module(seen).tanh()
    merged = pr.merge(model, approximate=[batch])
    for W, want in zip((merged.first.weight, merged.second.weight), expected, strict=True):
        assert_close(W, want, dtype=torch.float32)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": 0}, "k: got 0, expected 1..r=8"),
        ({"k": 9}, "k: got 9, expected 1..r=8"),
        ({"block": 0}, "block: got 0"),
        ({"block": 3, "k": 6}, "block: got 3, expected a divisor of r=8"),
        ({"block": 4, "k": 2}, "block: got 4, expected a divisor"),
        ({"alpha": 0.0}, "alpha: got 0.0"),
        ({"balance": -1e-3}, "balance: got -0.001, expected >= 0"),
        ({"gate": "softmax"}, "gate: got 'softmax', expected one of sigmoid_sum, softmax_topk"),
        ({"gate_sum": "r"}, "gate_sum: got 'r'"),
        ({"balance_every": "epoch"}, "balance_every: got 'epoch'"),
        ({"dropout": 1.0}, "dropout: got 1.0"),
        ({"epsilon": 0.1}, "unknown option 'epsilon'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refused(wrong, message):
    with pytest.raises(pr.ConfigError, match=message):
        pr.method("smora", **{"r": 8, "k": 2, **wrong})


def test_a_site_with_fewer_ranks_than_are_active_is_named():
    with pytest.raises(pr.ConfigError, match="rank gate at 'second': got r=1, k=2"):
        pr.adapt(
            Net(),
            pr.method("smora", r=8, k=2),
            target_modules=["first", "second"],
            rank_pattern={"second": 1},
        )


def test_logits_that_are_not_finite_are_refused():
    model = adapted()
    with torch.no_grad():
        layers(model)[0].core.router.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="logits of 36 of 36 tokens are not finite"):
        model(inputs())


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
def test_inputs_that_are_not_floating_are_refused(dtype):
    with pytest.raises(pr.ConfigError, match=f"got {dtype}, expected float"):
        layers(adapted())[0].module(torch.ones(2, D_IN, dtype=dtype))


def test_samples_hold_every_gate_and_block():
    samples = get("smora").samples()
    assert [method.checks() for method in samples] == [[]] * len(samples)
    assert {(m.gate, m.bias_in_weight) for m in samples} == {
        (gate, weighs) for gate in ("sigmoid_sum", "softmax_topk") for weighs in (False, True)
    }
    assert {m.block > 1 for m in samples} == {True, False}
