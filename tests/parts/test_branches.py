"""What a branch reads, and that it arrives whole whatever a block does to its feed-forward part."""

import copy

import pytest
import torch
import transformers
from torch import nn

import polyrank as pr
from polyrank.frame import Flow, Site, keyed
from polyrank.layers import BlockHost, adapter_of
from polyrank.parts.branches import Expandable, place_of
from polyrank.testing import assert_close

SEMA = pr.method("sema", r=2, q=3, window=4, start=-1)
IMAGE = {"image_size": 8, "patch_size": 4}
TEXT = {"vocab_size": 32, "intermediate_size": 24, "num_key_value_heads": 2, "pad_token_id": 0}
TEXT |= {"eos_token_id": 1, "bos_token_id": 2}
PIXELS = torch.randn(4, 3, 8, 8, generator=keyed("pixels"))
WORDS = torch.randint(1, 32, (2, 5), generator=keyed("ids"))
D = torch.arange(16.0) / 16
SUMS = {"tol": 1e-5, "reason": "differences of fp32 sums"}


def built(name, **more):
    """Return a model of one transformer block with a branch, the branch and the block."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, **more}
    kind = getattr(transformers, f"{name}Model")
    with torch.random.fork_rng(devices=[]):
        base = kind(kind.config_class(**sizes))
    model = pr.adapt(base, SEMA).eval()
    (branch,) = adapter_of(model).blocks
    return model, branch, base.get_submodule(branch.path)


def raised(model):
    """Let every branch give D."""
    with torch.no_grad():
        for block in (m for m in model.modules() if isinstance(m, Expandable)):
            block.adapter.up_bias.copy_(D)


def outputs(model, x, *at):
    """Return what modules give with branches, and without them, after the same draws."""
    found = {module: [] for module in at}
    handles = [
        module.register_forward_hook(
            lambda m, args, y: found[m].append(y if torch.is_tensor(y) else y[0])
        )
        for module in at
    ]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        model(x)
        torch.set_rng_state(state)
        with model.disable_adapter():
            model(x)
    for handle in handles:
        handle.remove()
    return [found[module] for module in at]


@pytest.mark.parametrize(
    ("name", "more", "tap", "last"),
    [
        ("ViT", {}, "layernorm_after", "mlp"),
        ("Dinov2", {"layerscale_value": 0.1}, "norm2", "layer_scale2"),
        ("Olmo2", TEXT, "mlp", "post_feedforward_layernorm"),
        ("Gemma3Text", {**TEXT, "head_dim": 4}, "pre_feedforward_layernorm",
         "post_feedforward_layernorm"),
        ("Glm4", {**TEXT, "head_dim": 8}, "post_attention_layernorm", "post_mlp_layernorm"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_d_reads_the_hidden_states_that_its_sum_starts_from(name, more, tap, last):
    text = "vocab_size" in more
    model, branch, inside = built(name, **(more if text else {**IMAGE, **more}))
    assert (branch.tap, branch.add) == (tap, "")
    raised(model)
    read = []
    branch.register_forward_pre_hook(lambda module, args: read.append(args[2]))
    whole, ffn = outputs(model, WORDS if text else PIXELS, inside, inside.get_submodule(last))
    assert_close(whole[0] - whole[1], D.expand_as(whole[0]), **SUMS)
    assert_close(whole[1] - ffn[1], read[0], **SUMS)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("ViT", {**IMAGE, "hidden_dropout_prob": 0.5}),
        ("Dinov2", {**IMAGE, "layerscale_value": 0.1, "drop_path_rate": 0.9}),
        ("Beit", {**IMAGE, "layer_scale_init_value": 0.1}),
        ("Granite", {**TEXT, "residual_multiplier": 0.2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_block_that_scales_or_drops_its_feed_forward_part_passes_d_whole(name, more):
    model, _, inside = built(name, **more)
    raised(model)
    ((one, two), ffn) = outputs(
        model.train(), WORDS if "vocab_size" in more else PIXELS, inside, inside.mlp
    )
    assert_close(one - two, D.expand_as(one), **SUMS)
    # The feed-forward layers run once with the branch, and once without.
    assert len(ffn) == 2
    assert all(not m.tapped for m in model.modules() if isinstance(m, BlockHost))


def test_branches_of_several_adapters_read_one_forward_and_add_up():
    model, _, inside = built("ViT", **IMAGE)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "second"])
    raised(model)
    read = []
    inside.layernorm_after.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    for held in inside.side_block.owned.values():
        held.register_forward_pre_hook(lambda module, args: read.append(args[2]))
    ((one, two),) = outputs(model, PIXELS, inside)
    assert_close(one - two, 2 * D.expand_as(one), **SUMS)
    # The last one is that of the forward without branches.
    assert len(read) == 4
    assert read[0] is read[1] is read[2]


def test_where_the_norm_comes_last_d_reaches_the_sum_undropped():
    options = {"vocab_size": 32, "intermediate_size": 24, "hidden_dropout_prob": 0.5}
    model, branch, inside = built("Bert", **options)
    assert (branch.tap, branch.add) == ("intermediate", "output.dropout")
    raised(model)
    ((one, two),) = outputs(model.train(), WORDS, inside.output.dropout)
    assert_close(one - two, D.expand_as(one), **SUMS)


class Timm(nn.Module):
    """A transformer block with the names and the order of timm's."""

    def __init__(self):
        super().__init__()
        self.norm2, self.mlp = nn.LayerNorm(16), nn.Linear(16, 16)
        self.drop_path2 = nn.Dropout(0.5)

    def forward(self, x):
        return x + self.drop_path2(0.1 * self.mlp(self.norm2(x)))


class Vision(nn.Module):
    """A model of one such block."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Timm()])

    def forward(self, x):
        return self.blocks[0](x)


def test_blocks_with_the_names_of_timm_have_branches():
    base = Vision()
    model = pr.adapt(base, SEMA).train()
    raised(model)
    x = torch.randn(2, 3, 16, generator=keyed("x"))
    ((one, two),) = outputs(model, x, base.blocks[0])
    assert_close(one - two, D.expand_as(one), **SUMS)


def test_old_blocks_without_a_last_dropout_add_at_their_last_layer():
    modules = ("intermediate", "output.dense")
    assert place_of(Site(path="b", d_in=4, d_out=4, r=2, modules=modules)) == modules


def test_what_a_block_returns_beside_hidden_states_is_handed_on():
    site = Site(path="b", d_in=4, d_out=4, r=2, modules=("norm2", "mlp"))
    block = Expandable(site, r=2, q=3, window=4, scale=1.0, growing=False)
    h, beside = torch.randn(2, 3, 4, generator=keyed("h")), object()
    y, rest = block(lambda x: (x, beside), h, h, Flow())
    assert_close(y, h)
    assert rest is beside
