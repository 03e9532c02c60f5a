"""A trained adapter in a tiny model, its folder, a batch for one layer."""

import pytest
import torch

import polyrank as pr
from polyrank.testing import MODELS, Case


def make(name, model="llama", **options):
    return Case(pr.method(name, **options), 0, MODELS[model])


@pytest.fixture
def case():
    """Builds a case from a method's name, a tiny model's name and options."""
    return make


@pytest.fixture(params=["lora", "smora"])
def either(request):
    """An exact and a routed method in a tiny Llama."""
    options = {"lora": {"r": 3}, "smora": {"r": 4, "k": 2}}[request.param]
    return make(request.param, **options)


@pytest.fixture
def trained():
    """Builds a case's model and trains it for some updates."""

    def build(case, steps=2, **config):
        model = case.build(**config)
        case.train(model, steps=steps)
        return model

    return build


@pytest.fixture
def folder(tmp_path):
    """Saves a model and returns the folder as PEFT wants it, a string."""

    def save(model, name="adapter", **options):
        model.save_pretrained(tmp_path / name, **options)
        return str(tmp_path / name)

    return save


@pytest.fixture
def x():
    """A batch for one adapted layer of width 24."""
    return torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(4))
