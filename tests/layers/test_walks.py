"""What looks for layers and blocks sees what is around adapters, however many there are."""

from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import polyrank
from polyrank.layers.hosts import BlockHost
from polyrank.layers.linear import AdaptedLinear
from polyrank.layers.walks import outer


class Tied(nn.Module):
    """Two layers, one of them reached by two names."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.none = None
        self.last = nn.Linear(6, 6)
        self.again = self.last

    def forward(self, x):
        return self.again(self.block(x))


def test_without_adapters_it_is_named_modules():
    model = Tied()
    model.register_module("absent", None)
    assert outer(model) == list(model.named_modules())


def test_modules_inside_of_adapters_are_left_out_and_no_others():
    model = polyrank.adapt(Tied(), polyrank.method("smora", r=4, k=2), ["0", "last"])
    found = outer(model)
    held = (*AdaptedLinear.adapter_layer_names, *AdaptedLinear.other_param_names)
    inside = [path for path, _ in model.named_modules() if set(path.split(".")) & set(held)]
    assert inside
    assert found == [(p, m) for p, m in model.named_modules() if p not in inside]
    for i in range(3):
        model.add_adapter(f"more{i}", model.peft_config["default"])
    assert outer(model) == found


def test_a_block_around_an_adapted_layer_is_found():
    config = BertConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=30,
    )  # fmt: skip
    method = polyrank.method("mixlora", r=2, experts=3, k=2)
    model = polyrank.adapt(BertForSequenceClassification(config), method, "all-linear")
    hosts = [m for m in model.modules() if isinstance(m, BlockHost)]
    assert hosts
    assert [m for _, m in outer(model) if isinstance(m, BlockHost)] == hosts
