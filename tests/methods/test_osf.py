"""osf: what is protected stays, whatever the optimiser; what must equal what."""

import copy

import pytest
import torch
from torch import nn

import polyrank as pr
from polyrank.frame import Step, keyed
from polyrank.layers import adapter_of
from polyrank.layers.views import wide
from polyrank.parts import projection
from polyrank.parts.projection import Project
from polyrank.parts.subspaces import decompose
from polyrank.testing import assert_close

SHAPES = {"square": (12, 12), "tall": (17, 11), "flat": (11, 17)}
SHARES = [0.25, 0.5, 0.75]
STEP = Step(index=0, total=1, lr=0.1, peak=0.1)


def net(shape=(12, 12), dtype=torch.float32):
    """One layer, and the tanh that makes its gradients differ from row to row."""
    o, i = shape
    model = nn.Sequential(nn.Linear(i, o), nn.Tanh())
    with torch.no_grad():
        for number, param in enumerate(model.parameters()):
            param.copy_(torch.randn(param.shape, generator=keyed("osf", number, o, i)) / i**0.5)
    return model.to(dtype)


def start(shape=(12, 12), dtype=torch.float32, name="osf", **options):
    base = net(shape, dtype)
    options = {"effective_rank": 0.5, **options} if name == "osf" else options
    model = pr.adapt(base, pr.method(name, **options), ["0"], seed=0)
    if dtype == torch.float64:
        model.double()
        # Drawn anew, since the first start was rounded to fp32.
        pr.layers.redraw(model)
    return model.eval()


def layer_of(model):
    return adapter_of(model).layers[0]


def rows(shape, count=9, seed=0, dtype=torch.float32):
    rng = keyed("osf rows", seed)
    x, y = (torch.randn(count, n, generator=rng, dtype=torch.float64) for n in shape[::-1])
    return x.to(dtype), y.to(dtype)


def loss_of(model, shape, seed=0, dtype=torch.float32):
    x, y = rows(shape, seed=seed, dtype=dtype)
    return (model(x) - y).square().mean()


def train(model, shape, kind=torch.optim.AdamW, steps=5, lr=1e-2, dtype=torch.float32, **options):
    """Train as one's own loop does, rules attached; each update sees other rows."""
    made = kind(pr.parameter_groups(model, lr=lr), **options)
    attached = pr.attach(made, model, total=steps)
    model.train()
    for step in range(steps):
        loss_of(model, shape, step, dtype).backward()
        made.step()
        made.zero_grad()
    attached.detach()
    return model.eval()


def split_of(model):
    """U_h, S_h, V_h of the base weight in fp64, from torch's own decomposition."""
    view = layer_of(model)
    weight = view.module.dense_weight().detach().double()
    k = min(weight.shape) - view.site.r
    U, S, V = torch.linalg.svd(weight)
    return U[:, :k], S[:k], V[:k], weight


def change(model):
    """ΔW in fp64 from the factors as they are stored."""
    view = layer_of(model)
    A, B, S = (p.detach().double() for p in (view.A, view.B, view.core.weight))
    A0, B0, S0 = (p.detach().double() for p in view.shadow)
    return (B * S) @ A - (B0 * S0) @ A0


def leak(model):
    """The share of ΔW that lies in the protected subspace, on either side."""
    U, _, V, _ = split_of(model)
    delta = change(model)
    inside = [torch.linalg.norm(U.T @ delta), torch.linalg.norm(delta @ V.T)]
    return float(max(inside) / torch.linalg.norm(delta))


def crossing(model):
    """max|U_hᵀU_l| and max|V_l V_hᵀ|."""
    U, _, V, _ = split_of(model)
    view = layer_of(model)
    return max(
        float((U.T @ view.B.detach().double()).abs().max()),
        float((view.A.detach().double() @ V.T).abs().max()),
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_osf_1_a_fresh_model_is_the_base_bit_for_bit(shape, dtype):
    x, _ = rows(shape, dtype=dtype)
    expected = net(shape, dtype)(x)
    for parametrisation in ("factors", "core", "block"):
        model = start(shape, dtype, parametrisation=parametrisation)
        assert torch.equal(model(x), expected)
        assert torch.equal(model.train()(x), expected)


def test_osf_1_a_base_in_bf16_keeps_factors_in_fp32():
    x, y = rows((12, 12), dtype=torch.bfloat16)
    expected = net(dtype=torch.bfloat16)(x)
    model = pr.adapt(net(dtype=torch.bfloat16), pr.method("osf"), ["0"], seed=0)
    view = layer_of(model)
    assert {p.dtype for p in (view.A, view.B, view.core.weight, *view.shadow)} == {torch.float32}
    found = model(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    made = pr.optimizer(model, lr=1e-2)
    attached = pr.attach(made, model)
    for _ in range(3):
        (model(x) - y).square().mean().backward()
        made.step()
        made.zero_grad()
    attached.detach()
    assert leak(model) < 1e-6


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("share", SHARES)
def test_osf_2_gradients_leave_the_protected_directions(shape, share):
    model = start(shape, effective_rank=share).train()
    view, (U, _, V, _) = layer_of(model), split_of(model)
    rule = Project()
    rule.bind(adapter_of(model), None, None)
    loss_of(model, shape).backward()
    before = view.B.grad.clone(), view.A.grad.clone(), view.core.weight.grad.clone()
    rule.grads(STEP)
    for grad, old, crossed in (
        (view.B.grad, before[0], U.T @ view.B.grad.double()),
        (view.A.grad, before[1], view.A.grad.double() @ V.T),
    ):
        assert float(torch.linalg.norm(crossed)) <= 1e-6 * float(torch.linalg.norm(old))
        assert float(torch.linalg.norm(grad - old)) > 1e-2 * float(torch.linalg.norm(old))
    assert torch.equal(view.core.weight.grad, before[2])


OPTIMISERS = {
    "adamw": (torch.optim.AdamW, {}),
    "adam": (torch.optim.Adam, {}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "rmsprop": (torch.optim.RMSprop, {}),
}


@pytest.mark.parametrize("kind", OPTIMISERS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_osf_3_factors_stay_off_after_every_step_of_any_optimiser(shape, kind):
    made, options = OPTIMISERS[kind]
    for dtype, most in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        model = start(shape, dtype)
        for _ in range(3):
            train(model, shape, made, steps=2, dtype=dtype, **options)
            assert crossing(model) <= most
        assert float(torch.linalg.norm(change(model))) > 1e-3


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_osf_3_nothing_leaks_in_200_steps_of_adamw(shape):
    model = train(start(shape), shape, steps=200, lr=1e-3)
    assert leak(model) <= 1e-6
    assert float(torch.linalg.norm(change(model))) > 0.1


def test_osf_3_gradients_alone_leak_under_adam_and_not_under_sgd():
    found = {}
    for kind in ("adamw", "sgd"):
        made, options = OPTIMISERS[kind]
        model = start(reproject=False)
        found[kind] = leak(train(model, (12, 12), made, steps=20, lr=0.1, **options))
    assert found["adamw"] > 0.05
    assert found["sgd"] < 1e-6


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_osf_4_frozen_triplets_stay_singular_triplets(shape):
    model = train(start(shape, torch.float64), shape, dtype=torch.float64)
    U, S, V, weight = split_of(model)
    delta = change(model)
    after = weight + delta
    scale = float(torch.linalg.norm(delta))
    assert float((U.T @ delta).abs().max()) <= 1e-12 * scale
    assert float((delta @ V.T).abs().max()) <= 1e-12 * scale
    assert_close(U.T @ after @ V.T, torch.diag(S))
    assert_close(U.T @ after, S[:, None] * V)
    assert_close(after @ V.T, U * S)
    assert float(torch.linalg.norm(delta)) > 1e-3


def rank_of(matrix):
    """How many singular values stand above what fp32 leaves of zero."""
    values = torch.linalg.svdvals(matrix)
    return int((values > 1e-5 * values[0]).sum())


def test_osf_5_with_all_frozen_nothing_trains_and_with_one_free_the_rank_is_two():
    x, _ = rows((12, 12))
    model = start(effective_rank=12)
    view = layer_of(model)
    assert [p.numel() for p in adapter_of(model).named().values()] == [0, 0, 0]
    assert torch.equal(model(x), net()(x))
    model = train(start(effective_rank=11), (12, 12))
    assert rank_of(change(model)) <= 2
    assert view.site.r == 0


@pytest.mark.parametrize("share", SHARES)
def test_osf_5_the_update_has_twice_the_free_rank(share):
    model = train(start(effective_rank=share), (12, 12))
    U, S, V, weight = split_of(model)
    r = layer_of(model).site.r
    assert r == 12 - int(12 * share)
    assert rank_of(change(model)) <= 2 * r
    left = weight + change(model) - (U * S) @ V
    assert rank_of(left) <= r


def test_osf_6_on_a_square_side_both_bases_project_alike():
    weight = net(dtype=torch.float64)[0].weight.detach()
    U, _, V = decompose(weight)
    for k in (3, 6, 9):
        one = torch.eye(12, dtype=torch.float64)
        assert_close(one - U[:, :k] @ U[:, :k].T, U[:, k:] @ U[:, k:].T)
        assert_close(one - V[:k].T @ V[:k], V[k:].T @ V[k:])
    held = {share: layer_of(start(effective_rank=share)).core for share in SHARES}
    # The smaller basis: kept beside the tail where little is frozen, the tail itself elsewhere.
    assert [held[share].high_u is None for share in SHARES] == [False, True, True]
    tall, flat = (layer_of(start(SHAPES[n], effective_rank=0.75)).core for n in ("tall", "flat"))
    assert (tall.high_u is None, tall.high_v is None) == (False, True)
    assert (flat.high_u is None, flat.high_v is None) == (True, False)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_osf_7_signs_of_singular_pairs_do_not_matter(kind):
    made, options = OPTIMISERS[kind]
    found = []
    for turned in (False, True):
        model = start((17, 11), torch.float64)
        if turned:
            view = layer_of(model)
            sign = torch.tensor([-1.0, 1.0, -1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
            with torch.no_grad():
                for B, A in ((view.B, view.A), view.shadow[1::-1]):
                    B.mul_(sign)
                    A.mul_(sign[:, None])
        train(model, (17, 11), made, dtype=torch.float64, **options)
        found.append(change(model))
    assert_close(*found)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_osf_8_merged_it_answers_the_same_and_splits_into_itself(shape):
    model = train(start(shape), shape)
    x, _ = rows(shape)
    expected = model(x)
    plain = copy.deepcopy(model).merge_and_unload()
    assert type(plain[0]) is nn.Linear
    assert_close(plain(x), expected)
    again = pr.adapt(copy.deepcopy(plain), pr.method("osf"), ["0"], seed=0).eval()
    view, merged = layer_of(again), plain[0].weight.detach().double()
    U, S, V = (t.double() for t in decompose(plain[0].weight.detach()))
    k = min(merged.shape) - view.site.r
    tail = (view.B.double() * view.core.weight.double()) @ view.A.double()
    assert_close((U[:, :k] * S[:k]) @ V[:k] + tail, merged, dtype=torch.float32)
    assert torch.equal(again(x), plain(x))


# In fp32 itself, two singular vectors of these weights cross by up to 1.5e-6.
@pytest.mark.parametrize(
    ("driver", "dtype"),
    [("auto", torch.float32), ("gram", torch.float32), ("auto", torch.float64),
     ("svd", torch.float64)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_decomposition_is_orthonormal_descending_and_complete(shape, dtype, driver):
    weight = net(shape, dtype)[0].weight.detach()
    U, S, V = decompose(weight, driver)
    m, most = min(shape), 1e-6 if dtype == torch.float32 else 1e-13
    one = torch.eye(m, dtype=torch.float64)
    for Q in (U.mT, V):
        assert float((Q.double() @ Q.double().mT - one).abs().max()) <= most
    expected = torch.linalg.svdvals(weight.double())
    assert_close(S, expected, dtype=dtype)
    assert_close((U * S) @ V, weight)
    assert (S.diff() <= 0).all()


def test_a_decomposition_holds_where_singular_values_vanish():
    for weight in (torch.zeros(5, 8), torch.ones(8, 5), torch.diag(10.0 ** -torch.arange(9.0))):
        U, S, V = decompose(weight)
        one = torch.eye(min(weight.shape))
        assert float((U.mT @ U - one).abs().max()) <= 1e-6
        assert float((V @ V.mT - one).abs().max()) <= 1e-6
        assert float(((U * S) @ V - weight).abs().max()) <= 1e-6 * float(weight.abs().max() + 1e-30)


def test_osf_10_the_sum_of_projected_gradients_is_the_projected_sum():
    found = []
    for parts in ([[0, 1, 2]], [[0], [1], [2]]):
        model = start((17, 11), torch.float64).train()
        rule = Project()
        rule.bind(adapter_of(model), None, None)
        view, total = layer_of(model), 0.0
        for part in parts:
            model.zero_grad()
            for seed in part:
                loss_of(model, (17, 11), seed, torch.float64).backward()
            rule.grads(STEP)
            total = total + torch.cat([view.B.grad, view.A.grad.mT])
        found.append(total)
    assert_close(*found)


def test_osf_11_copies_saved_and_compiled_models_keep_off(tmp_path):
    from peft import PeftModel

    shape = SHAPES["tall"]
    model = train(start(shape), shape, steps=2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(shape), str(tmp_path), is_trainable=True)
    others = {"copied": copy.deepcopy(model), "loaded": loaded}
    compiled = copy.deepcopy(model)
    layer_of(compiled).module.compile(backend="eager")
    others["compiled"] = compiled
    train(model, shape, steps=3)
    for name, other in others.items():
        train(other, shape, steps=3)
        assert crossing(other) <= 1e-6, name
        assert_close(change(other), change(model), dtype=torch.float32)


def test_osf_12_what_is_frozen_keeps_its_bits(bench):
    work = bench("osf", dtype=torch.float32)
    work.begin(0)
    trained = {id(p) for p in work.adapter.trained()}
    before = {n: p.clone() for n, p in work.model.named_parameters() if id(p) not in trained}
    names = " ".join(before)
    assert all(word in names for word in ("base_layer.weight", "polyrank_shadow", "high_u"))
    work.steps(count=4)
    for name, param in work.model.named_parameters():
        if name in before:
            assert torch.equal(param, before[name]), name


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_products_are_as_exact_as_asked_for_and_the_switch_is_put_back(precision, monkeypatch):
    place, word = torch.backends.cuda.matmul, "fp32_precision"
    if not hasattr(place, word):
        pytest.skip("torch before 2.9 has another switch")
    seen, before = [], getattr(place, word)
    real = projection.wide
    monkeypatch.setattr(
        projection, "wide", lambda t: (seen.append(getattr(place, word)), real(t))[1]
    )
    model = start(precision=precision)
    seen.clear()
    train(model, (12, 12), steps=2)
    # Bases are widened once when rules are bound, outside.
    assert {word for word in seen if word != before} == {{"fp32": "ieee"}.get(precision, precision)}
    assert getattr(place, word) == before


def test_small_matrices_together_equal_each_alone(bench, monkeypatch):
    found = []
    for small in (0, 2**16):
        monkeypatch.setattr("polyrank.parts.projection.SMALL", small)
        work = bench("osf", dtype=torch.float64, net=Twins)
        work.begin(0)
        work.steps(count=3)
        found.append(work.weights())
    for name, value in found[0].items():
        assert_close(found[1][name], value)


class Twins(nn.Module):
    """Two adapted layers of one shape."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.classifier = nn.Linear(6, 3)

    def features(self, x):
        return self.second(self.first(x).tanh()).tanh()

    def forward(self, x):
        return self.classifier(self.features(x))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("reach", ["range", "all"])
def test_the_core_form_needs_no_projection(shape, reach):
    model = start(shape, torch.float64, parametrisation="core", reach=reach)
    assert adapter_of(model).method.rules() == []
    train(model, shape, dtype=torch.float64, steps=20)
    U, _, V, weight = split_of(model)
    delta = wide(layer_of(model).delta()).double()
    scale = float(torch.linalg.norm(delta))
    assert scale > 1e-3
    assert float(torch.linalg.norm(U.T @ delta)) <= 1e-12 * scale
    assert float(torch.linalg.norm(delta @ V.T)) <= 1e-12 * scale
    o, i = shape
    k, r = len(V), layer_of(model).site.r
    size = r * r if reach == "range" else (o - k) * (i - k)
    assert [p.numel() for p in adapter_of(model).named().values()] == [size]
    # The larger side leaves the range of W only where it may.
    Q, _ = torch.linalg.qr(weight if o > i else weight.mT)
    side = delta if o > i else delta.mT
    outside = float(torch.linalg.norm(side - Q @ (Q.mT @ side))) / scale
    assert (outside > 1e-2) == (reach == "all" and o != i)


def test_on_a_square_weight_the_core_reaches_what_the_rule_allows():
    model = start(dtype=torch.float64, parametrisation="core")
    U, _, V, _ = split_of(model)
    one = torch.eye(12, dtype=torch.float64)
    wanted = (one - U @ U.T) @ torch.randn(12, 12, dtype=torch.float64) @ (one - V.T @ V)
    view = layer_of(model)
    with torch.no_grad():
        view.core.weight.copy_(view.B.T @ wanted @ view.A.T)
    assert_close(view.delta(), wanted)


def test_the_block_rule_removes_the_high_block_alone():
    model = start((17, 11), parametrisation="block")
    U, _, V, _ = split_of(model)
    rule, view = Project(), layer_of(model)
    rule.bind(adapter_of(model), None, None)
    loss_of(model, (17, 11)).backward()
    before = view.A.grad.clone()
    rule.grads(STEP)
    high = U.T @ view.A.grad.double() @ V.T
    assert float(torch.linalg.norm(high)) <= 1e-6 * float(torch.linalg.norm(before))
    assert float(torch.linalg.norm(view.A.grad - before)) > 1e-2 * float(torch.linalg.norm(before))
    model.zero_grad()
    train(model, (17, 11), steps=20)
    delta = layer_of(model).A.detach().double()
    scale = float(torch.linalg.norm(delta))
    assert float(torch.linalg.norm(U.T @ delta @ V.T)) <= 1e-6 * scale
    for mixed in (U.T @ delta, delta @ V.T):
        assert float(torch.linalg.norm(mixed)) > 0.1 * scale


def test_full_trains_the_weight_itself_update_for_update():
    shape = (17, 11)
    model, plain = start(shape, torch.float64, "full"), net(shape, torch.float64)
    plain[0].bias.requires_grad_(False)
    train(model, shape, dtype=torch.float64)
    made = torch.optim.AdamW([plain[0].weight], lr=1e-2, weight_decay=0.0)
    for step in range(5):
        loss_of(plain, shape, step, torch.float64).backward()
        made.step()
        made.zero_grad()
    merged = model.merge_and_unload()
    assert_close(merged[0].weight, plain[0].weight)
    assert (
        float((plain[0].weight - net(shape, torch.float64)[0].weight).detach().abs().max()) > 1e-2
    )
