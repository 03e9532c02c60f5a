"""Every check can fail: one method that breaks each promise, and the words that say so."""

import inspect
import re
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from polyrank.frame import Core, Group, Init, Method, Rule, load_file, registry
from polyrank.layers import AdaptedLinear, PolyrankModel
from polyrank.testing import CHECKS, check_method


class Plain(Core):
    """φ(h) = h, served without a kernel."""

    def __init__(self, r):
        super().__init__()
        self.widths = (r, r)

    def forward(self, h, z, flow):
        return h

    def delta(self, condition=None):
        return torch.eye(self.widths[0])


class Gated(Plain):
    gates = frozenset({"weight"})

    def __init__(self, r):
        super().__init__(r)
        self.weight = nn.Parameter(torch.ones(r))

    def fill(self, rng):
        self.weight.fill_(1.0)

    def forward(self, h, z, flow):
        return h * self.weight.to(h.dtype)

    def delta(self, condition=None):
        return torch.diag(self.weight)


@dataclass(frozen=True, kw_only=True)
class Toy(Method):
    """LoRA with one trained weight per rank; keeps every promise."""

    r: int = 4

    def core(self, site):
        return Gated(site.r)

    def parameters_per_site(self, site):
        return super().parameters_per_site(site) + site.r


class Shifted(Init):
    def fill(self, layer, stat, rng):
        layer.A.normal_(generator=rng)
        layer.B.fill_(1e-4)
        layer.core.fill(rng)


class StartsElsewhere(Toy):
    """Declared neutral, but B does not start at zero."""

    def init(self):
        return Shifted()


class Unkeyed(Toy):
    """Draws from the global generator."""

    def init(self):
        class Global(Shifted):
            def fill(self, layer, stat, rng):
                super().fill(layer, stat, None)

        return Global()


class Unfrozen(Gated):
    """Trains what it declares as frozen, after a verb gave it the chance."""

    frozen = frozenset({"weight"})

    def trained(self):
        self.weight.requires_grad_(True)
        return []


class MovesFrozen(Toy):
    def core(self, site):
        return Unfrozen(site.r)


class Reaching(Rule):
    """Writes into the base."""

    def bind(self, adapter, optimizer, workshop):
        self.layer = adapter.layers[0].module

    def after(self, step):
        self.layer.get_base_layer().weight.data.mul_(1.5)


class MovesBase(Toy):
    def rules(self):
        return [Reaching()]


class HoldsTooLittle(Toy):
    """Its groups forget the gates, which train on paper only."""

    def groups(self, adapter, args=None):
        return [Group(params=[*adapter.roles()["A"], *adapter.roles()["B"]])]


class Bent(Gated):
    """A curve cannot be merged as the line that `delta` claims."""

    def forward(self, h, z, flow):
        return torch.sin(3 * h) * self.weight.to(h.dtype)


class MergesWrongly(Toy):
    def core(self, site):
        return Bent(site.r)


class Sleepy(Gated):
    """Acts in training only."""

    def forward(self, h, z, flow):
        return super().forward(h, z, flow) if self.training else 0 * h


class MergesInOneMode(Toy):
    def core(self, site):
        return Sleepy(site.r)


class Curve(Plain):
    """Says that it cannot be merged, and may be asked only by those who check first."""

    merges = "never"

    def forward(self, h, z, flow):
        return h.relu()

    def delta(self, condition=None):
        return Core.delta(self)


class HalfCurved(Toy):
    """Merges in the first half of the blocks only; the sum of a model's layers does not."""

    merges = "never"

    def core(self, site):
        return Plain(site.r) if site.depth == 0 else Curve(site.r)

    def parameters_per_site(self, site):
        return site.r * (site.d_in + site.d_out)


class Idle(Gated):
    """Has a weight that no output depends on."""

    def forward(self, h, z, flow):
        return h


class GradientMissing(Toy):
    def core(self, site):
        return Idle(site.r)


class Cut(Gated):
    """The weight is there and multiplied by nothing."""

    def forward(self, h, z, flow):
        return h + 0 * self.weight.to(h.dtype)


class GradientZero(Toy):
    def core(self, site):
        return Cut(site.r)


class MiscountsWeights(Toy):
    def parameters_per_site(self, site):
        return site.r * (site.d_in + site.d_out)


class Undeclared(Gated):
    gates = frozenset()


class DecaysGates(Toy):
    def core(self, site):
        return Undeclared(site.r)


class Lax(Toy):
    """Takes any option."""

    def checks(self):
        return []


@dataclass(frozen=True, kw_only=True)
class Forgetful(Toy):
    """Changes an option each time it is built."""

    def __post_init__(self):
        object.__setattr__(self, "r", 2 * self.r)


class Dead(Toy):
    """Its figure stays at zero whatever happens."""

    def vital_sign(self, adapter):
        return {"pruned": 0.0}


class Silent(Toy):
    def vital_sign(self, adapter):
        return {}


BROKEN = {
    StartsElsewhere: ("neutral", "differs from the base at start"),
    Unkeyed: ("neutral", "the global generator was used"),
    MovesFrozen: ("declared", "polyrank_core.default.weight"),
    MovesBase: ("declared", "base_layer.weight'"),
    HoldsTooLittle: ("counted", "in groups,"),
    MergesWrongly: ("merged", "values differ"),
    MergesInOneMode: ("merged", "values differ"),
    GradientMissing: ("gradients", "gets no gradient"),
    GradientZero: ("gradients", "gets a gradient of zero"),
    MiscountsWeights: ("size", "the formula says"),
    DecaysGates: ("undecayed", "decayed"),
    Lax: ("refusals", "was taken"),
    Forgetful: ("refusals", "change on their way through JSON"),
    Dead: ("vital", r"pruned of .* stayed zero through training"),
    Silent: ("vital", "publishes no vital sign"),
}


@pytest.fixture
def known(monkeypatch):
    """Registers a class for one test, under a name of its own."""

    def register(cls):
        cls.name = f"toy-{cls.__name__.lower()}"
        monkeypatch.setitem(registry._found, cls.name, cls)
        return cls

    return register


def test_the_toy_itself_keeps_every_promise(known):
    made = check_method(known(Toy), models=["llama", "gpt2"], checks=CHECKS)
    assert made == 2 * len(CHECKS)


@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
def test_a_broken_method_fails_its_check(cls, known):
    check, words = BROKEN[cls]
    known(cls)
    with pytest.raises(AssertionError, match=words):
        check_method(cls, models=["llama"], checks=[check])


def test_every_check_has_a_method_that_breaks_it():
    assert {check for check, _ in BROKEN.values()} | {"base"} == set(CHECKS)


def test_an_adapter_that_acts_while_disabled_fails(known, monkeypatch):
    def deaf(self, enabled):
        self._train_only(set(self.active_adapters), enabled, others=True)

    monkeypatch.setattr(AdaptedLinear, "enable_adapters", deaf)
    with pytest.raises(AssertionError, match="a disabled adapter still acts"):
        check_method(known(Toy), models=["llama"], checks=["base"])


def test_a_base_that_does_not_come_back_fails(known):
    with pytest.raises(AssertionError, match=r"of the base moved|still acts"):
        check_method(known(MovesBase), models=["llama"], checks=["base"])


def test_a_merge_that_is_refused_too_late_fails(known, monkeypatch):
    known(HalfCurved)
    assert check_method(HalfCurved, models=["llama"], checks=["merged"]) == 1
    monkeypatch.setattr(PolyrankModel, "_check_merge", lambda self, names, safe: None)
    with pytest.raises(AssertionError, match="a refused merge moved"):
        check_method(HalfCurved, models=["llama"], checks=["merged"])


def test_a_merge_that_goes_through_against_the_word_of_the_core_fails(known, monkeypatch):
    monkeypatch.setattr(PolyrankModel, "_check_merge", lambda self, names, safe: None)
    monkeypatch.setattr(Curve, "delta", Plain.delta)
    with pytest.raises(AssertionError, match="a merge, though no matrix equals the forward, was"):
        check_method(known(HalfCurved), models=["llama"], checks=["merged"])


def test_an_integer_input_that_is_taken_fails(known, monkeypatch):
    forward = AdaptedLinear.forward
    monkeypatch.setattr(AdaptedLinear, "forward", lambda self, x: forward(self, x.real.float()))
    with pytest.raises(AssertionError, match=r"an input of torch\.int64 was taken"):
        check_method(known(Toy), models=["llama"], checks=["refusals"])


LEAKY = '''
from dataclasses import dataclass
import torch
from polyrank.frame import Method, register
from polyrank.frame.plain import Identity


class Leaky(Identity):
    """Keeps what it needs in a plain attribute, which no file holds."""

    epilogue = "python"
    seen = 1.0

    def forward(self, h, z, flow):
        if self.training:
            self.seen = 2.0
        return h * self.seen


@register
@dataclass(frozen=True, kw_only=True)
class LeakyMethod(Method):
    """Saves too little."""

    def core(self, site):
        return Leaky(site.r)
'''


def test_what_a_fresh_process_cannot_give_back_fails(tmp_path, known, monkeypatch):
    file = tmp_path / "leaky.py"
    file.write_text(LEAKY)
    leaky = load_file(file)
    monkeypatch.delitem(registry._found, "leaky")
    monkeypatch.setitem(registry._found, "leaky", leaky)
    with pytest.raises(AssertionError, match="2 of 2 checks failed") as caught:
        check_method(leaky, known(Toy), models=["llama"], checks=["fresh"])
    _, first, second = str(caught.value).split("\n", 2)
    assert re.match("leaky-0-llama fresh: the loaded adapter answers differently", first)
    # This file registers nothing under its own name, so another process cannot know the toy.
    assert re.match("toy-toy-0-llama fresh: ConfigError: method file: test_broken.py", second)


def test_several_broken_promises_are_listed_together(known):
    known(Dead)
    bad = replace(Dead(), alpha=-1.0)
    with pytest.raises(AssertionError, match=r"2 of 2 checks failed:\n.*\n.*") as caught:
        check_method(bad, models=["llama"], checks=["size", "vital"])
    assert str(caught.value).count("alpha: got -1.0") == 2
    assert inspect.getfile(Dead).endswith("test_broken.py")
