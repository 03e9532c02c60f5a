"""The contract that every method keeps, one function per promise.

`CHECKS` are run on every case of `contract_cases()`; `check_method` runs them all on one method,
yours included. A broken promise is an AssertionError, or an error of polyrank's own. What must
survive in another process is checked for many cases at once by `polyrank.testing.fresh`.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from polyrank.errors import ConfigError, MergeError, PolyrankError
from polyrank.frame import Method, method
from polyrank.layers import AdaptedLinear, adapter_of, merge, parameter_groups
from polyrank.testing.cases import Case, Condition, contract_cases
from polyrank.testing.fresh import fresh_problems
from polyrank.testing.models import MODELS
from polyrank.testing.probes import (
    assert_unmoved,
    bits_of,
    declared,
    difference,
    ids,
    nudge,
    same,
    stateful,
    unreached,
)
from polyrank.testing.tolerance import assert_close
from polyrank.testing.verbs import VERBS

REFUSED = (torch.int64, torch.bool, torch.complex64)


def check_neutral(case: Case) -> None:
    """A method declared neutral starts as the base, bit for bit; its start is drawn from a key."""
    base, before = case.tiny.build(), torch.get_rng_state()
    model = case.build()
    assert torch.equal(before, torch.get_rng_state()), "the global generator was used"
    twin = dict(case.build().named_parameters())
    for name, param in model.named_parameters():
        assert torch.equal(param, twin[name]), f"{name} starts differently with the same seed"
    for mode in (False, True):
        base.train(mode)
        model.train(mode)
        expected, found = case.answer(base), case.answer(model)
        assert torch.isfinite(found).all(), f"training={mode}: the answer is not finite"
        if case.method.neutral:
            assert torch.equal(expected, found), f"training={mode}: differs from the base at start"


def check_declared(case: Case) -> None:
    """Only declared weights train and move, after every verb of PEFT; the base keeps its bits."""
    model = case.build()
    own = declared(model)
    for verb, act in VERBS.items():
        bits = bits_of(model)
        act(model)
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        assert names == own.keys(), f"after {verb}: {difference(names, own.keys())}"
        assert adapter_of(model).name == "default", f"after {verb}: another adapter is active"
        before = bits_of(model)
        if verb != "merge":
            assert_unmoved(bits, before, f"{verb} itself")
        others = [
            p for p in model.parameters() if p.requires_grad and id(p) not in ids(own.values())
        ]
        case.train(model, steps=1, extra=others)
        moved = {n for n, value in bits_of(model).items() if not same(value, before[n])}
        allowed = own.keys() | stateful(model)
        assert moved <= allowed, f"after {verb}: {sorted(moved - allowed)[:5]} moved"
        assert moved & own.keys(), f"after {verb}: nothing moved"


def check_counted(case: Case) -> None:
    """What the optimiser holds, what requires gradients and what is printed are the same."""
    model = case.build()
    groups = parameter_groups(model, lr=1e-3, weight_decay=0.1)
    held = [p for group in groups for p in group["params"]]
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    assert len(held) == len(ids(held)), "a tensor stands in two groups"
    assert ids(held) == trained.keys(), (
        f"{len(held)} tensors in groups, {len(trained)} require gradients"
    )
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        model.print_trainable_parameters()
    found = re.search(r"trainable params: ([\d,]+)", text.getvalue())
    assert found is not None, f"print_trainable_parameters said {text.getvalue()!r}"
    printed = int(found[1].replace(",", ""))
    assert printed == sum(p.numel() for p in trained.values()), "another number is printed"


def check_base(case: Case) -> None:
    """After training, disabling gives the base's answer and `unload` the base, bit for bit."""
    base = case.tiny.build()
    expected, bits = case.answer(base), dict(base.state_dict())
    model = case.build()
    case.train(model)
    trained = case.answer(model)
    with model.disable_adapter():
        assert torch.equal(case.answer(model), expected), "a disabled adapter still acts"
    assert torch.equal(case.answer(model), trained), "switching off and on changes the answer"
    plain = model.unload()
    found = dict(plain.state_dict())
    assert found.keys() == bits.keys(), f"unload leaves {difference(found.keys(), bits.keys())}"
    for name, value in found.items():
        assert torch.equal(value, bits[name]), f"{name} of the base moved"
    assert torch.equal(case.answer(plain), expected), "the unloaded model answers differently"


def check_merged(case: Case) -> None:
    """A merge gives the forward's answer in both modes, or `MergeError` before anything changed."""
    # fp64 activations: what is left between the two is the rounding of the fp32 update.
    model = case.build(method=case.undropped(), dtype=torch.float64)
    nudge(model)
    exact = {layer.core.merges for layer in adapter_of(model).layers} <= {"exact"}
    expected = {mode: _in_mode(case, model, mode) for mode in (True, False)}
    if exact and not adapter_of(model).blocks:
        assert case.method.merges == "exact", "the cores merge, but the method says it does not"
        _equal_after(case, model.merge_and_unload(), expected)
        return
    for attempt in (model.merge_adapter, model.merge_and_unload):
        bits, kinds = bits_of(model), [type(m) for m in model.modules()]
        text = _refusal(attempt, MergeError, "a merge, though no matrix equals the forward,")
        assert "approximat" in text or "unmerged" in text, f"no remedy in: {text}"
        assert kinds == [type(m) for m in model.modules()], "a refused merge changed modules"
        assert_unmoved(bits, bits_of(model), "a refused merge")
    condition = case.conditions()
    if case.method.merges == "per-condition" and condition is not None:
        one = condition[:1].expand_as(condition)
        expected = {mode: _in_mode(case, model, mode, one) for mode in (True, False)}
        _equal_after(case, merge(model, condition=condition[:1]), expected)


def check_gradients(case: Case) -> None:
    """Every trainable weight gets a gradient once B has left zero, but those declared otherwise."""
    model = case.build(method=case.undropped())
    nudge(model)
    model.train()
    case.loss(model).backward()
    aside = unreached(model)
    for name, param in model.named_parameters():
        if name in aside:
            assert param.grad is None or not param.grad.any(), f"{name} is reached by the loss"
        elif param.requires_grad:
            assert param.grad is not None, f"{name} gets no gradient"
            assert torch.isfinite(param.grad).all(), f"{name} gets a gradient that is not finite"
            assert param.grad.any(), f"{name} gets a gradient of zero"
        else:
            assert param.grad is None, f"{name} is frozen and gets a gradient"


def check_size(case: Case) -> None:
    """Each layer trains as many weights as `parameters_per_site` says; some have no layers."""
    adapter = adapter_of(case.build())
    assert bool(adapter.layers) is case.method.linear, "layers are adapted, or not, as declared"
    for layer in adapter.layers:
        found = sum(p.numel() for params in layer.parameters().values() for p in params)
        expected = case.method.parameters_per_site(layer.site)
        assert found == expected, (
            f"{layer.site.path}: {found} weights train, the formula says {expected}"
        )


def check_undecayed(case: Case) -> None:
    """Weight decay shrinks factors and never gates: what a core lists, and weights per rank."""
    model = case.build()
    nudge(model)
    adapter = adapter_of(model)
    gates = {
        id(p)
        for layer in adapter.layers
        for n, p in layer.core.named_parameters()
        if n in layer.core.gates or p.dim() < 2
    }
    before = bits_of(model)
    groups = parameter_groups(model, lr=0.1, weight_decay=0.5)
    for group in groups:
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    torch.optim.AdamW(groups).step()
    shrunk = 0
    for name, param in model.named_parameters():
        if id(param) in gates or not param.requires_grad:
            assert same(param, before[name]), f"{name} decayed"
        shrunk += int(not same(param, before[name]))
    # Weights that a method trains in place of the base's own may all be left alone.
    declared = any(group["weight_decay"] for group in groups)
    assert bool(shrunk) is declared, "nothing decayed, so the check saw nothing"


def check_refusals(case: Case) -> None:
    """Inputs that are not floating and options without sense are refused in words that help."""
    model = case.build()
    layers = [m for m in model.modules() if isinstance(m, AdaptedLinear)][:1]
    for layer, dtype in product(layers, REFUSED):
        x = torch.ones(2, layer.in_features, dtype=dtype)
        text = _refusal(partial(layer, x), PolyrankError, f"an input of {dtype}")
        assert str(dtype) in text, f"{dtype} is not named in: {text}"
    options = case.method.options()
    again = method(case.method.name, **json.loads(json.dumps(options)))
    assert again.options() == options, "the options change on their way through JSON"
    for key, bad in _bad_options(case.method):
        call = partial(method, case.method.name, **{**options, key: bad})
        text = _refusal(call, ConfigError, f"option {key}={bad!r}")
        assert key in text, f"option {key}={bad!r} is not named in: {text}"


def check_vital(case: Case) -> None:
    """Training moves the vital sign: a figure that stays zero raises `InertError`."""
    model = case.build()
    before = case.method.vital_sign(adapter_of(model))
    case.train(model, steps=3)
    after = case.method.vital_sign(adapter_of(model))
    assert after, "the method publishes no vital sign"
    adapter_of(model).check_alive(before)


CHECKS: dict[str, Callable[[Case], None]] = {
    "neutral": check_neutral,
    "declared": check_declared,
    "counted": check_counted,
    "base": check_base,
    "merged": check_merged,
    "gradients": check_gradients,
    "size": check_size,
    "undecayed": check_undecayed,
    "refusals": check_refusals,
    "vital": check_vital,
}


def check_method(
    *methods: str | Method | type[Method],
    models: Iterable[str] = tuple(MODELS),
    checks: Iterable[str] = (*CHECKS, "fresh"),
    condition: Condition | None = None,
) -> int:
    """Hold methods to the contract, all samples in all models.

    Args:
        *methods: names, classes or instances.
        models: names out of `MODELS`; one of them is quick.
        checks: names out of `CHECKS`, and "fresh" for what a fresh process sees.
        condition: what a conditioned method reads, made from the method, (batch of `BATCH`, c).

    Returns:
        The number of checks that were made.

    Raises:
        AssertionError: listing every promise that is broken.
    """
    cases = contract_cases(*methods, models=models, condition=condition)
    wanted, problems, made = list(checks), [], 0
    for case in cases:
        found = {name: _problem(case, name) for name in wanted if name != "fresh"}
        problems += [f"{case} {name}: {text}" for name, text in found.items() if text]
        made += len(found)
    if "fresh" in wanted:
        made += len(cases)
        problems += [
            f"{name} fresh: {text}" for name, text in fresh_problems(cases).items() if text
        ]
    if not made:
        raise AssertionError("the contract was held against nothing: no sample in any model")
    if problems:
        raise AssertionError("\n".join([f"{len(problems)} of {made} checks failed:", *problems]))
    return made


def _problem(case: Case, name: str) -> str:
    try:
        CHECKS[name](case)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _refusal(call: Callable[[], Any], kind: type[Exception], what: str) -> str:
    """Return the words with which a call is refused."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"{what} was taken")


def _in_mode(case: Case, model: nn.Module, mode: bool, condition: Tensor | None = None) -> Tensor:
    model.train(mode)
    found = case.answer(model, dtype=torch.float64, condition=condition)
    model.eval()
    return found


def _equal_after(case: Case, plain: nn.Module, expected: dict[bool, Tensor]) -> None:
    left = [n for n, m in plain.named_modules() if isinstance(m, AdaptedLinear)]
    assert not left, f"a merged model still holds adapted layers: {left[:3]}"
    for mode, answer in expected.items():
        assert_close(_in_mode(case, plain, mode), answer, dtype=torch.float32)


def _bad_options(sample: Method) -> Iterator[tuple[str, Any]]:
    yield "no_such_option", 1
    for spec in fields(sample):
        value = getattr(sample, spec.name)
        if isinstance(value, bool):
            yield spec.name, "yes"
        elif isinstance(value, (int, float)) and "str" not in str(spec.type):
            yield spec.name, "many"
            yield spec.name, math.nan
        elif isinstance(value, str) and "float" not in str(spec.type):
            yield spec.name, 1.5
