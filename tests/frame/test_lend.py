"""A start or an optimiser from another method: what is used, what is refused and why."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

import polyrank as pr
from polyrank.errors import ConfigError, InertError
from polyrank.frame import KaimingZero, get, names
from polyrank.frame.lend import lent
from polyrank.layers import adapter_of
from polyrank.pairs import worded
from polyrank.parts.starts import GradientStart
from polyrank.testing import MODELS, Case, assert_close


def case(method, model="bert"):
    return Case(method, 0, MODELS[model])


def test_words_are_a_name_and_options():
    assert worded("lora-ga") == ("lora-ga", {})
    found = worded("lora-ga:direction=ArBr,gamma=64,norm_clip=true,eta=null,x=a:b")
    expected = {"direction": "ArBr", "gamma": 64, "norm_clip": True, "eta": None, "x": "a:b"}
    assert found == ("lora-ga", expected)
    with pytest.raises(ConfigError) as told:
        worded("lora-ga:gamma,r=2,r=3")
    assert len(told.value.problems) == 2


def test_the_lender_has_the_borrowers_rank_and_scaling():
    made = pr.method("lora", r=3, alpha=5.0, scaling=0.5, dropout=0.1, init_by="lora-ga:gamma=64")
    start = lent(made, "init")
    assert (start.name, start.r, start.alpha, start.scaling) == ("lora-ga", 3, 5.0, 0.5)
    assert isinstance(made.starting(), GradientStart)
    assert made.starting().gamma == 64
    assert isinstance(pr.method("lora").starting(), KaimingZero)
    assert lent(made, "optim") is None


def test_a_borrowed_start_is_the_lenders_own():
    own = case(pr.method("lora-ga", r=1, scaling="alpha/r")).build()
    other = case(pr.method("lora", r=1, init_by="lora-ga")).build()
    for a, b in zip(adapter_of(own).layers, adapter_of(other).layers, strict=True):
        assert torch.equal(a.A, b.A)
        assert torch.equal(a.B, b.B)
        assert torch.equal(a.shadow[1], b.shadow[1])


@pytest.mark.parametrize(
    "method",
    [
        {"init_by": "lora-ga:direction=ArBr,magnitude=unit"},
        {"optim_by": "altlora"},
        {"init_by": "lora-ga", "optim_by": "altlora"},
        {"init_by": "lora-ga", "optim_by": "altlora:plus=true"},
    ],
    ids=["start", "optimiser", "both", "plus"],
)
def test_what_is_borrowed_trains_saves_and_loads_without_statistics(method, tmp_path):
    tiny = case(pr.method("lora", r=1, **method))
    model = tiny.build()
    base = tiny.answer(tiny.tiny.build())
    assert torch.equal(tiny.answer(model), base)
    optimizer = pr.optimizer(model, 1e-2)
    kinds = {group.get("update", "adamw") for group in optimizer.param_groups}
    assert ("altlora" in kinds) is ("optim_by" in method)
    tiny.train(model, steps=3)
    trained = tiny.answer(model)
    assert not torch.equal(trained, base)
    model.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {key: about["options"][key] for key in method} == method
    again = PeftModel.from_pretrained(tiny.tiny.build(), str(tmp_path), is_trainable=True).eval()
    assert_close(tiny.answer(again), trained)
    tiny.train(again, steps=1)


def test_borrowed_rules_train_bit_for_bit_like_the_lender():
    ends = []
    for made in (pr.method("allora", r=2), pr.method("lora", r=2, scaling=1.0, optim_by="allora")):
        tiny = case(made)
        model = tiny.build()
        with pytest.raises(InertError, match="did not run"):
            plain_loop(tiny, tiny.build())
        tiny.train(model, steps=3)
        ends.append([view.delta() for view in adapter_of(model).layers])
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)
        assert a.any()


def plain_loop(tiny, model):
    """Training by somebody who forgot the rules."""
    optimizer = torch.optim.AdamW(pr.parameter_groups(model, lr=1e-2))
    model.train()
    for _ in range(3):
        tiny.loss(model).backward()
        optimizer.step()


def test_with_a_start_that_is_not_zero_no_first_step_is_dead():
    """AltLoRA moves one factor a step; where B is zero, a step on A moves nothing."""
    moved = {}
    for start in ("", "lora-ga"):
        tiny = case(pr.method("lora", r=1, init_by=start, optim_by="altlora:first=A"))
        model = tiny.build()
        before = [view.delta() for view in adapter_of(model).layers]
        tiny.train(model, steps=1)
        after = [view.delta() for view in adapter_of(model).layers]
        moved[start] = [not torch.equal(a, b) for a, b in zip(after, before, strict=True)]
    assert not any(moved[""])
    assert all(moved["lora-ga"])


REFUSED = [
    ("lora", {"init_by": "lora-gb"}, r"init_by: method: got 'lora-gb', .*did you mean 'lora-"),
    ("lora", {"init_by": "ewc"}, "init_by: ewc is a strategy; combine it with --with ewc"),
    ("lora", {"init_by": "lora-ga:r=3"}, "init_by: lora-ga: 'r' is shared; give it to lora"),
    ("lora", {"init_by": "lora-ga:gama=3"}, r"unknown option 'gama', .*did you mean 'gamma'"),
    ("lora", {"init_by": "lora-ga:gamma=-1"}, "init_by: lora-ga: gamma: got -1, expected > 0"),
    ("lora", {"init_by": "lora-sb"}, "lora-sb has no start that stands alone"),
    ("lora", {"optim_by": "lora-ga"}, "lora-ga has no optimiser that stands alone"),
    ("smora", {"init_by": "lora-ga"}, "smora has RankGate between them"),
    ("lora-sb", {"init_by": "lora-ga"}, "lora-sb has Square between them"),
    ("lora", {"optim_by": "allora"}, r"optim_by: allora: scaling: got s = 2, expected 1"),
    ("lora", {"optim_by": "allora:form=output", "scaling": 1.0}, 'form "output" acts behind B'),
    ("altlora", {"optim_by": "allora", "scaling": 1.0}, "altlora has its own optimiser"),
    ("lora-ga", {"init_by": "lora-ga"}, "lora-ga has its own start"),
    ("smora", {"optim_by": "altlora"}, "cannot lend its optimiser to smora"),
    ("lora-sb", {"optim_by": "altlora"}, "cannot lend its optimiser to lora-sb"),
    ("lora", {"optim_by": "altlora", "lr_ratio": 4.0}, "lora has its own optimiser"),
    ("lora", {"init_by": 3}, "init_by: got 3, expected a word"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_what_does_not_fit_is_refused_with_the_reason(name, options, message):
    with pytest.raises(ConfigError, match=message):
        pr.method(name, **options)


def test_all_faults_are_told_at_once():
    with pytest.raises(ConfigError) as told:
        pr.method("smora", r=0, alpha=-1.0, init_by="lora-ga:gamma=0", optim_by="nobody")
    said = [p.split(": ")[1] for p in told.value.problems]
    assert {"r", "alpha", "init_by", "optim_by"} <= set(said)


def test_every_method_answers_every_other_in_words():
    methods = [get(name) for name in names() if get(name).kind == "method"]
    fits = set()
    for cls in methods:
        for option in ("init_by", "optim_by"):
            for lender in methods:
                sample = cls.samples()[0]
                problems = replace(sample, **{option: lender.name}).checks()
                assert all(len(problem.split()) > 5 for problem in problems)
                if not problems:
                    fits.add((cls.name, option, lender.name))
    assert {("lora", "init_by", "lora-ga"), ("lora", "optim_by", "altlora")} <= fits
    assert {("olora", "init_by", "lora-ga"), ("lora-ga", "optim_by", "altlora")} <= fits
    assert {("altlora", "init_by", "lora-ga"), ("allora", "init_by", "lora-ga")} <= fits
    assert not any(lender in ("lora", "smora", "lora-sb", "lora-xs") for _, _, lender in fits)
