"""moe-lora against mixtures written out as loops over experts."""

import pytest
import torch
from torch import nn

import polyrank as pr
from polyrank.frame import Flow, Site, get
from polyrank.layers import AdaptedLinear
from polyrank.parts.catalogue import ROUTERS
from polyrank.testing import assert_close

D_IN, D_OUT, BATCH, TOKENS = 7, 5, 3, 11
E, R_E = 4, 3
TOKEN_ROUTERS = [name for name, row in ROUTERS.items() if row.kind]
TASKS = torch.tensor([[2], [0], [1]])


def options(router):
    """Options that leave no router trivial."""
    own = {"topp": {"top_p": 0.6, "tau": 1.3}, "task": {"tasks": 3, "task_width": 6}}
    return {"router": router, "experts": E, "r": E * R_E, "k": 2, **own.get(router, {})}


def build(method, dtype=torch.float64, seed=0, **place):
    """One adapted layer, every factor drawn, its router decided enough to matter."""
    torch.manual_seed(seed)
    layer = AdaptedLinear(nn.Linear(D_IN, D_OUT), Flow())
    site = Site(path="fc", d_in=D_IN, d_out=D_OUT, r=method.r, alpha=method.alpha, **place)
    layer.update_layer("default", method, site, {}, seed)
    layer.set_adapter("default")
    layer.eval()
    with torch.no_grad():
        layer.views["default"].B.normal_()
        if hasattr(layer.views["default"].core, "router"):
            layer.views["default"].core.router.weight.mul_(3)
    return layer.to(dtype)


def moe(router="topk", dtype=torch.float64, **changed):
    return build(pr.method("moe-lora", **{**options(router), **changed}), dtype)


def inputs(dtype=torch.float64, seed=1):
    torch.manual_seed(seed)
    return torch.randn(BATCH, TOKENS, D_IN, dtype=dtype, requires_grad=True)


def trained(layer):
    view = layer.views["default"]
    return [view.A, view.B, *view.core.trained()]


def copy_factors(source, target, tied=False):
    with torch.no_grad():
        a, b = source.views["default"], target.views["default"]
        b.A.copy_(a.A.repeat(len(b.A) // len(a.A), 1) if tied else a.A)
        b.B.copy_(a.B)
        if hasattr(a.core, "router") and hasattr(b.core, "router"):
            b.core.router.weight.copy_(a.core.router.weight)
        target.base_layer.load_state_dict(source.base_layer.state_dict())


def weights_of(z, method):
    """ω of one token with logits z (E,), written out for one token at a time."""
    p = z.exp() / z.exp().sum()
    order = sorted(range(len(z)), key=lambda e: (-z[e].item(), e))
    if method.router in ("topk", "mola"):
        on = order[: method.k]
        total = sum(z[e].exp() for e in on)
        return [z[e].exp() / total if e in on else z[e] * 0 for e in range(len(z))]
    if method.router == "top1":
        return [p[e] if e == order[0] else z[e] * 0 for e in range(len(z))]
    if method.router == "top1_gumbel":
        return [z[e] * 0 + (e == order[0]) for e in range(len(z))]
    if method.router == "topp":
        found, mass = [z[e] * 0 for e in range(len(z))], 0.0
        for e in order:
            found[e] = p[e] / method.tau
            mass += found[e].item()
            if mass > method.top_p:
                break
        return found
    return list(p)


def mixture(layer, x, condition=None):
    """The layer's output by one loop over tokens and one over experts."""
    view = layer.views["default"]
    method, core, W = view.method, view.core, layer.base_layer.weight
    shared = method.router == "hydra"
    As = [view.A] * E if shared else view.A.split(R_E)
    Bs = view.B.split(R_E, dim=1)
    rows = []
    for n, sample in enumerate(x):
        for token in sample:
            if method.router == "task":
                e_task = core.table[int(condition[n])]
                omega = list((core.router.weight @ e_task).softmax(0))
            else:
                omega = weights_of(core.router.weight @ token, method)
            y = W @ token + layer.base_layer.bias
            if method.router == "smear":
                A = sum(w * A_e for w, A_e in zip(omega, As, strict=True))
                B = sum(w * B_e for w, B_e in zip(omega, Bs, strict=True))
                y = y + method.alpha / R_E * (B @ (A @ token))
            else:
                for w, A_e, B_e in zip(omega, As, Bs, strict=True):
                    y = y + method.alpha / R_E * w * (B_e @ (A_e @ token))
            rows.append(y)
    return torch.stack(rows).view(*x.shape[:-1], D_OUT)


def gradients(y, wanted, seed=2):
    torch.manual_seed(seed)
    direction = torch.randn(y.shape).to(y)
    found = torch.autograd.grad((y * direction).sum(), wanted, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("router", [*TOKEN_ROUTERS, "task"])
def test_the_layer_is_the_mixture_gradients_included(router, dtype):
    layer, x = moe(router, dtype), inputs(dtype)
    with layer.flow.put(condition=TASKS if router == "task" else None):
        y = layer(x)
    expected = mixture(layer, x, TASKS)
    assert_close(y, expected)
    wanted = [x, *trained(layer)]
    for got, want in zip(gradients(y, wanted), gradients(expected, wanted), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("router", [*TOKEN_ROUTERS, "task"])
def test_bf16_layer_follows_the_mixture(router):
    layer = moe(router, torch.float32)
    layer.base_layer.bfloat16()
    x = inputs(torch.bfloat16)
    with layer.flow.put(condition=TASKS if router == "task" else None):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    layer.double()
    expected = mixture(layer, x.double(), TASKS)
    assert_close(
        y, expected, tol=2e-2, reason="A, B, h and q are rounded to bf16, one after another"
    )


def test_moslora_mixes_all_ranks():
    layer, x = moe("moslora"), inputs()
    view = layer.views["default"]
    expected = layer.base_layer(x) + view.method.alpha / (E * R_E) * (
        x @ view.A.T @ view.core.weight.T @ view.B.T
    )
    assert_close(layer(x), expected)
    wanted = [x, *trained(layer)]
    pairs = zip(gradients(layer(x), wanted), gradients(expected, wanted), strict=True)
    for got, want in pairs:
        assert_close(got, want)


@pytest.mark.parametrize("k", [2, 4])
def test_smora_with_blocks_of_an_experts_ranks_is_top_k(k):
    ours, x = moe("topk", k=k), inputs()
    method = pr.method("smora", r=E * R_E, k=k * R_E, block=R_E, gate="softmax_topk", balance=0.0)
    theirs = build(method)
    copy_factors(ours, theirs)
    assert_close(theirs(x), ours(x))
    for got, want in zip(
        gradients(theirs(x), [x, *trained(theirs)]),
        gradients(ours(x), [x, *trained(ours)]),
        strict=True,
    ):
        assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_zero_b_is_the_base_bit_for_bit(router, dtype, training):
    layer, x = moe(router, dtype).train(training), inputs(dtype)
    with torch.no_grad():
        layer.views["default"].B.zero_()
    with layer.flow.put(condition=TASKS if router == "task" else None):
        assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("router", ["soft", "topk", "hydra", "smear"])
def test_one_expert_is_plain_lora(router):
    ours, x = moe(router, experts=1, r=R_E, k=1), inputs()
    lora = build(pr.method("lora", r=R_E))
    copy_factors(ours, lora)
    assert_close(ours(x), lora(x))
    A, B = trained(ours)[:2]
    for got, want in zip(
        gradients(ours(x), [x, A, B]), gradients(lora(x), [x, *trained(lora)]), strict=True
    ):
        assert_close(got, want)


@pytest.mark.parametrize("router", ["soft", "topk", "smear", "hydra"])
def test_identical_experts_are_one_lora(router):
    ours, x = moe(router), inputs()
    lora = build(pr.method("lora", r=R_E))
    with torch.no_grad():
        view = ours.views["default"]
        view.B.copy_(lora.views["default"].B.repeat(1, E))
        view.A.copy_(lora.views["default"].A.repeat(len(view.A) // R_E, 1))
        lora.base_layer.load_state_dict(ours.base_layer.state_dict())
    assert_close(ours(x), lora(x))


def test_top_k_of_all_is_soft():
    ours, soft, x = moe("topk", k=E), moe("soft"), inputs()
    copy_factors(soft, ours)
    assert torch.equal(ours(x), soft(x))


@pytest.mark.parametrize(("router", "even"), [("topk", True), ("topp", False), ("top1", False)])
def test_weights_sum_to_one_only_where_they_are_normalised(router, even):
    layer, x = moe(router, tau=None), inputs()
    core = layer.views["default"].core
    gates = core.gates_of(None, x @ core.rows().T)
    total = gates[..., ::R_E].sum(-1)
    if even:
        assert_close(total, torch.ones_like(total))
    else:
        assert (total < 1 - 1e-3).any()


def test_smear_minus_soft_are_the_cross_terms():
    smear, soft, x = moe("smear"), moe("soft"), inputs()
    copy_factors(smear, soft)
    view = smear.views["default"]
    omega = (x @ view.core.router.weight.T).softmax(-1)
    expected = 0
    for e, B_e in enumerate(view.B.split(R_E, dim=1)):
        for f, A_f in enumerate(view.A.split(R_E)):
            share = omega[..., e] * omega[..., f] - (e == f) * omega[..., e]
            expected = expected + share[..., None] * (x @ A_f.T @ B_e.T)
    assert_close(smear(x) - soft(x), view.scale * expected)


def test_smear_is_soft_where_one_expert_has_all_weight():
    smear, soft, x = moe("smear"), moe("soft"), inputs()
    with torch.no_grad():
        smear.views["default"].core.router.weight.mul_(1e6)
    copy_factors(smear, soft)
    omega = (x @ soft.views["default"].core.router.weight.T).softmax(-1)
    assert torch.equal(omega.amax(-1), torch.ones_like(omega[..., 0]))
    assert_close(smear(x), soft(x))


def test_hydra_is_soft_with_tied_a():
    hydra, soft, x = moe("hydra"), moe("soft"), inputs()
    copy_factors(hydra, soft, tied=True)
    assert hydra.views["default"].A.shape == (R_E, D_IN)
    assert_close(hydra(x), soft(x))
    dx, dA, dB, dW = gradients(hydra(x), [x, *trained(hydra)])
    sx, sA, sB, sW = gradients(soft(x), [x, *trained(soft)])
    assert_close(dA, sA.view(E, R_E, D_IN).sum(0))
    for got, want in ((dx, sx), (dB, sB), (dW, sW)):
        assert_close(got, want)


@pytest.mark.parametrize("router", TOKEN_ROUTERS)
def test_experts_may_change_places(router):
    layer, x = moe(router), inputs()
    before = layer(x)
    order = torch.tensor([2, 0, 3, 1])
    view = layer.views["default"]
    with torch.no_grad():
        for factor in (view.B.T,) if router == "hydra" else (view.A, view.B.T):
            factor.copy_(factor.clone().view(E, R_E, -1)[order].flatten(0, 1))
        view.core.router.weight.copy_(view.core.router.weight.clone()[order])
    assert_close(layer(x), before)


@pytest.mark.filterwarnings("ignore:k. got 1, one expert a token")
@pytest.mark.parametrize(
    ("router", "learns"),
    [("top1_gumbel", False), ("topk", False), ("top1", True), ("soft", True), ("topp", True)],
)
def test_a_unit_weight_teaches_the_router_nothing(router, learns):
    layer, x = moe(router, k=1), inputs()
    dW = gradients(layer(x), [layer.views["default"].core.router.weight])[0]
    assert bool((dW.abs() > 1e-12).any()) is learns


def test_top1_gumbel_trains_soft_and_draws_by_key():
    layer, x = moe("top1_gumbel"), inputs()
    layer.train()
    state = torch.get_rng_state()
    first, again = layer(x), layer(x)
    layer.flow.draw = layer.flow.draw + 1
    other = layer(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (gradients(first, [layer.views["default"].core.router.weight])[0] != 0).any()
    # tau → 0 turns the soft weights into the one-hot of z + noise, so that single experts show.
    cold = moe("top1_gumbel", tau=1e-8).train()
    copy_factors(layer, cold)
    view = cold.views["default"]
    single = torch.stack(
        [
            cold.base_layer(x) + view.scale * (x @ A_e.T @ B_e.T)
            for A_e, B_e in zip(view.A.split(R_E), view.B.split(R_E, dim=1), strict=True)
        ]
    )
    distance = (single - cold(x)).abs().amax(-1)
    assert_close(
        single.gather(0, distance.argmin(0)[None, ..., None].expand(1, -1, -1, D_OUT))[0], cold(x)
    )
    assert len(distance.argmin(0).unique()) == E


def test_autocast_does_not_round_the_logits():
    layer = moe("top1", torch.float32, experts=2, r=2)
    x = torch.ones(1, 1, D_IN)
    with torch.no_grad():
        view = layer.views["default"]
        view.core.router.weight.copy_(torch.tensor([[1.0], [1.0005]]).expand(2, D_IN))
        view.B[:, 0] = 0
    assert torch.equal(view.core.router.weight[1].bfloat16(), view.core.router.weight[0].bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        update = layer(x) - layer.base_layer(x)
    assert update.abs().max() > 0.1


def test_every_router_is_a_sample():
    samples = get("moe-lora").samples()
    assert {method.router for method in samples} == set(ROUTERS)
    assert [method.checks() for method in samples] == [[]] * len(samples)


@pytest.mark.parametrize("method", get("moe-lora").samples(), ids=lambda m: m.router)
def test_the_count_of_weights_is_the_formula(method):
    layer = build(method, depth=1, depths=2)
    site = layer.views["default"].site
    assert sum(p.numel() for p in trained(layer)) == method.parameters_per_site(site)


@pytest.mark.parametrize(
    ("router", "epilogue"),
    [("soft", "linear"), ("topk", "linear"), ("loramoe", "linear"), ("mola", "linear")]
    + [(name, "python") for name in ("top1", "top1_gumbel", "topp", "hydra", "smear", "task")],
)
def test_plain_softmax_gates_run_fused(router, epilogue):
    assert moe(router).views["default"].core.epilogue == epilogue


def test_a_loss_takes_the_fused_form_away_in_training_alone():
    layer, x = moe("topk", z_loss=0.1), inputs()
    core = layer.views["default"].core
    fused = layer(x)
    assert core.epilogue == "linear"
    layer.train()
    assert core.epilogue == "python"
    assert_close(layer(x), fused)


def test_the_condition_is_the_batchs_own_or_for_tasks_its_task():
    task, given = torch.tensor([1, 0]), torch.tensor([[0], [1]])
    gate = pr.method("moe-lora", router="task", tasks=2)
    typed = pr.method("moe-lora", router="loramoe", beta=0.1)
    assert gate.needs == {"task_id"}
    assert typed.needs == {"condition"}
    assert gate.condition({"task": task}) is task
    assert typed.condition({"task": task}) is None
    for method in (gate, typed):
        assert method.condition({"task": task, "condition": given}) is given


def test_ranks_are_counted_in_total_or_per_expert():
    total, each = moe("soft"), moe("soft", r=R_E, rank_per="expert")
    copy_factors(total, each)
    x = inputs()
    assert torch.equal(total(x), each(x))


@pytest.mark.parametrize(
    ("scaling", "s"), [("alpha/r_e", 16 / 3), ("alpha/r", 16 / 12), ("alpha", 16), (0.5, 0.5)]
)
@pytest.mark.parametrize("rank_per", ["total", "expert"])
def test_scaling_names_its_rank(scaling, s, rank_per):
    r = E * R_E if rank_per == "total" else R_E
    layer = moe("topk", scaling=scaling, rank_per=rank_per, r=r)
    assert layer.views["default"].scale == pytest.approx(s, rel=1e-15)


def test_mola_gives_deeper_blocks_more_experts():
    method = pr.method("moe-lora", router="mola", experts_by_depth=[2, 4, 6, 8], experts=3, r=24)
    site = {"d_in": D_IN, "d_out": D_OUT, "r": 24}
    found = [
        method.core(Site(path="fc", depth=depth, depths=6, **site)).router.weight.shape[0]
        for depth in range(6)
    ]
    assert found == [2, 2, 4, 6, 6, 8]
    outside = method.core(Site(path="lm_head", **site))
    assert outside.router.weight.shape[0] == 3


def test_a_site_whose_rank_does_not_divide_is_named():
    method = pr.method("moe-lora", experts=4, r=8)
    with pytest.raises(pr.ConfigError, match=r"'deep.fc': got 6, expected a multiple of 4 experts"):
        method.core(Site(path="deep.fc", d_in=D_IN, d_out=D_OUT, r=6))


@pytest.mark.parametrize("router", ["top1", "topk", "smear"])
def test_logits_that_are_not_finite_are_refused(router):
    layer, x = moe(router), inputs()
    with torch.no_grad():
        layer.views["default"].core.router.weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match="logits of 33 of 33 tokens are not finite"):
        layer(x)


def test_no_tokens_are_no_trouble():
    for router in ROUTERS:
        layer = moe(router).train()
        with layer.flow.put(condition=TASKS[:0] if router == "task" else None):
            assert layer(inputs()[:0]).shape == (0, TOKENS, D_OUT)


REFUSED = [
    ({"experts": 0}, "experts: got 0"),
    ({"r": 0}, "r: got 0"),
    ({"rank_per": "expert", "r": 0}, "r: got 0"),
    ({"k": 0}, "k: got 0, expected 1..4"),
    ({"k": 5}, "k: got 5, expected 1..4"),
    ({"r": 10}, r"r: got 10, expected a multiple of the experts \[4\]"),
    ({"router": "mola", "experts_by_depth": (2, 5)}, r"multiple of the experts \[2, 5\]"),
    ({"router": "mola", "experts_by_depth": (2, 0)}, r"experts_by_depth: got \[2, 0\]"),
    ({"router": "mola", "experts_by_depth": (2, 4), "k": 3}, "k: got 3, expected 1..2"),
    ({"router": "loramoe", "experts": 3, "beta": 0.1}, r"experts: got \[3\], expected even"),
    ({"router": "task"}, "tasks: got 0"),
    ({"router": "task", "tasks": 2, "task_width": 0}, "task_width: got 0, expected >= 1"),
    ({"router": "topp", "top_p": 0.0}, "top_p: got 0.0"),
    ({"router": "topp", "top_p": 1.1}, "top_p: got 1.1"),
    ({"router": "topp", "tau": 0.0}, "tau: got 0.0, expected a number > 0"),
    ({"router": "top1_gumbel", "tau": -1.0}, "tau: got -1.0"),
    ({"router": "top1_gumbel", "tau": "cold"}, "tau: got 'cold'"),
    ({"aux": -1e-3}, "aux: got -0.001, expected >= 0"),
    ({"z_loss": -1.0}, "z_loss: got -1.0"),
    ({"router": "loramoe", "beta": -0.1}, "beta: got -0.1"),
    ({"router": "loramoe", "delta": -0.1}, "delta: got -0.1"),
    ({"router": "soft", "aux": 0.1}, "aux: every expert serves every token"),
    ({"k": 4, "aux": 0.1}, "aux: every expert serves every token"),
    ({"router": "soft", "beta": 0.1}, "beta: router 'soft' does not read it.*loramoe"),
    ({"router": "task", "tasks": 2, "z_loss": 0.1}, "z_loss: router 'task' does not read it"),
    ({"tau": 0.5}, "tau: router 'topk' does not read it"),
    ({"rank_per": "layer"}, "rank_per: got 'layer', expected one of total, expert"),
    ({"aux_form": "mixtal"}, "did you mean 'mixtral'"),
    ({"scaling": "alpha/k"}, "scaling: got 'alpha/k', expected one of alpha/r_e"),
    ({"router": "mixlora"}, "mixlora weighs whole FFN experts"),
    ({"router": "hidra"}, "did you mean 'hydra'"),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED, ids=lambda v: str(v)[:40])
def test_refused(wrong, message):
    with pytest.raises(pr.ConfigError, match=message):
        pr.method("moe-lora", **{"experts": 4, "r": 12, **wrong})


def test_all_problems_come_at_once():
    with pytest.raises(pr.ConfigError) as error:
        pr.method("moe-lora", experts=4, r=10, k=7, aux=-1.0, tau=2.0)
    assert len(error.value.problems) == 4


@pytest.mark.parametrize("router", ["topk", "mola"])
def test_one_normalised_expert_of_several_is_warned_of(router):
    with pytest.warns(UserWarning, match="k: got 1, one expert a token"):
        pr.method("moe-lora", router=router, k=1)
