"""The frozen prefix: what is kept is exact, noticed when stale, and left alone where it may not be.

`cached(...)` is the reader with a cache, `plain` the same one without.
"""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPVisionConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.clip import CLIPForImageClassification

import polyrank as pr
from polyrank.engine.prefix import PrefixReader
from polyrank.engine.reading import Reader
from polyrank.frame import keyed
from polyrank.layers import grow_head, view

LOGITS = frozenset({"logits"})
TOKENS, ROWS = 16, 24
SHAPE = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TEXT = {"vocab_size": 32, "pad_token_id": 0, "max_position_embeddings": 64}
IMAGE = {"image_size": 8, "patch_size": 2, "num_channels": 1}


def bert(**options):
    return BertForSequenceClassification(BertConfig(**{**SHAPE, **TEXT, **CALM, **options}))


def vit(**options):
    return ViTForImageClassification(ViTConfig(**{**SHAPE, **IMAGE, **CALM, **options}))


def llama(**options):
    keys = {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForSequenceClassification(LlamaConfig(**{**SHAPE, **TEXT, **keys, **options}))


def gpt2():
    options = {"n_embd": 24, "n_inner": 40, "n_layer": 4, "n_head": 4, "n_positions": 64}
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "pad_token_id": 0}
    return GPT2ForSequenceClassification(GPT2Config(vocab_size=32, **options, **drops))


def clip():
    config = CLIPConfig(vision_config=CLIPVisionConfig(**SHAPE, **IMAGE).to_dict())
    return CLIPForImageClassification(config)


class Layer(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.fc1, self.fc2 = kind, nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, hidden, start=None):
        out = hidden + self.fc2(self.fc1(hidden).relu())
        out = out + start if self.kind == "skip" else out
        out = out + out.mean(0) if self.kind == "mixed" else out
        return {"tuple": (out, None), "extra": (out, out)}.get(self.kind, out)


class Custom(nn.Module):
    """Four blocks in a list; "kind" says what is odd about them."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.layers = nn.ModuleList([Layer(kind) for _ in range(4)])
        # Defined after the blocks, and run before them.
        self.embed = nn.Embedding(32, 8)
        self.classifier = nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask=None):
        start = hidden = self.embed(input_ids)
        for layer in self.layers:
            out = layer(hidden=hidden, **({"start": start} if self.kind == "skip" else {}))
            hidden = out[0] if isinstance(out, tuple) else out
        return type("Found", (), {"logits": self.classifier(hidden.mean(1))})


# By family: how it is built, what its last two blocks' layers are called, its classifier.
FAMILIES = {
    "bert": (bert, r".*layer\.[23]\..*(query|value|dense)", "classifier"),
    "vit": (vit, r".*layers\.[23]\..*(q_proj|v_proj|fc1|fc2)", "classifier"),
    "llama": (llama, r".*layers\.[23]\..*(q_proj|v_proj|up_proj)", "score"),
    "gpt2": (gpt2, r".*h\.[23]\..*(c_attn|c_fc)", "score"),
    "plain": (lambda: Custom("plain"), r".*layers\.[23]\.fc1", "classifier"),
    "tuple": (lambda: Custom("tuple"), r".*layers\.[23]\.fc1", "classifier"),
    "extra": (lambda: Custom("extra"), r".*layers\.[23]\.fc1", "classifier"),
    "mixed": (lambda: Custom("mixed"), r".*layers\.[23]\.fc1", "classifier"),
    "skip": (lambda: Custom("skip"), r".*layers\.[23]\.fc1", "classifier"),
    "clip": (clip, r".*layers\.[23]\..*(q_proj|v_proj|fc1)", "classifier"),
}


class RowReader(Reader):
    """Rows of ready tensors."""

    name = "a fact of the reader's own"

    def collate(self, rows):
        names = [name for name in rows[0] if name != "label"]
        found = {name: torch.stack([row[name] for row in rows]) for name in names}
        return {**found, "labels": torch.tensor([row["label"] for row in rows])}

    def inputs(self, batch):
        return {name: value for name, value in batch.items() if name != "labels"}


def texts(count=ROWS, seed=0, tokens=TOKENS):
    rng = keyed("prefix", seed)
    found = []
    for number in range(count):
        ids = torch.randint(3, 32, (tokens,), generator=rng)
        mask = (torch.arange(tokens) < tokens - number % 5).long()
        found.append({"input_ids": ids * mask, "attention_mask": mask, "label": number % 3})
    return found


def images(count=ROWS, seed=0):
    rng = keyed("prefix", seed)
    pixels = torch.randn(count, 1, 8, 8, generator=rng)
    return [{"pixel_values": image, "label": n % 3} for n, image in enumerate(pixels)]


def rows_of(family, **options):
    return (images if family in ("vit", "clip") else texts)(**options)


def adapted(family="bert", targets=None, method=None, **options):
    make, last, head = FAMILIES[family]
    torch.manual_seed(3)
    model = make(**options)
    model = pr.adapt(model, method or pr.method("lora", r=4), targets or last, head=head, seed=1)
    grow_head(model, ["a", "b", "c"], seed=1)
    rng = keyed("prefix", "B")
    with torch.no_grad():
        for layer in pr.adapter_of(model).layers:
            layer.B.copy_(torch.randn(layer.B.shape, generator=rng))
    return model


def cached(model, rows, size=8, **options):
    return PrefixReader(RowReader(), model, **options).prefill([rows], size)


def batch_of(rows, numbers):
    return RowReader().collate([rows[number] for number in numbers])


def gradients(reader, model, batch):
    """One training forward and backward; returns logits and gradients by name."""
    model.train().zero_grad()
    out = reader.forward(model, batch, LOGITS)
    reader.loss()(out, batch).backward()
    return out.logits.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def same(a, b):
    (logits, grads), (others, expected) = a, b
    assert torch.equal(logits, others)
    assert grads.keys() == expected.keys()
    assert len(grads) >= 5
    assert all(torch.equal(grads[name], expected[name]) for name in grads)


@pytest.fixture
def count(monkeypatch):
    """Counts how often a block's own forward runs."""

    def counting(block):
        ran = []
        own = type(block).forward

        def forward(self, *args, **kwargs):
            ran.append(self)
            return own(self, *args, **kwargs)

        monkeypatch.setattr(type(block), "forward", forward)
        return ran

    return counting


# --- exact ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"extra", "mixed", "skip"}))
def test_logits_and_gradients_have_the_bits_of_a_run_without(family):
    model, rows = adapted(family), rows_of(family)
    reader, plain = cached(model, rows), RowReader()
    assert reader.reason == ""
    assert reader.kept["rows"] == ROWS
    assert reader._cache.held.prefix.first == 2
    for order in (
        [3, 1, 2, 0, 9, 8, 7, 20],
        [5, 4, 23, 22, 0, 1, 3, 11],
        range(5),
        range(9, 4, -1),
    ):
        batch = batch_of(rows, order)
        same(gradients(reader, model, batch), gradients(plain, model, batch))
    # The first forward with 8 rows and the first with 5 run in full and are compared.
    # The first forwards with 8 and with 5 rows run in full and are compared. 5 images of 17 tokens
    # are no whole number of vectors.
    uneven = family in ("vit", "clip")
    assert (reader.hits, reader.misses) == ((8, 18) if uneven else (13, 13))


def test_what_is_kept_does_not_run(count):
    model, rows = adapted(), texts()
    reader = cached(model, rows)
    batch = batch_of(rows, range(8))
    gradients(reader, model, batch)
    blocks = model.get_base_model().bert.encoder.layer
    ran, embedded = count(blocks[0]), count(model.get_base_model().bert.embeddings)
    gradients(reader, model, batch)
    assert [block is blocks[2 + i] for i, block in enumerate(ran)] == [True, True]
    assert not embedded


def test_a_trained_run_has_the_bits_of_one_without():
    results = []
    for with_cache in (False, True):
        model, rows = adapted(), texts()
        reader = cached(model, rows) if with_cache else RowReader()
        optimizer = torch.optim.AdamW(pr.parameter_groups(model, 1e-2), lr=1e-2)
        attachment = pr.attach(optimizer, model)
        for epoch in range(3):
            order = torch.randperm(ROWS, generator=keyed("order", epoch)).tolist()
            for start in range(0, ROWS, 10):
                logits, _ = gradients(reader, model, batch_of(rows, order[start : start + 10]))
                optimizer.step()
        attachment.detach()
        results.append((logits, {n: t for n, t in model.state_dict().items() if "polyrank" in n}))
        if with_cache:
            # Three epochs of batches of 10, 10 and 4 rows, of which two run in full.
            assert (reader.hits, reader.misses) == (3 * ROWS - 14, 14)
    same(*results)


def test_the_cache_leaves_draws_and_modes_alone():
    model, rows = adapted(method=pr.method("smora", r=4, k=2)), texts()
    model.train()
    model.get_base_model().bert.eval()
    before = torch.get_rng_state(), [m.training for m in model.modules()]
    draw = pr.layers.ensure_flow(model.get_base_model()).draw.clone()
    counts = {n: t.clone() for n, t in model.named_buffers()}
    reader = cached(model, rows)
    assert reader.reason == ""
    assert torch.equal(torch.get_rng_state(), before[0])
    assert [m.training for m in model.modules()] == before[1]
    assert torch.equal(pr.layers.ensure_flow(model.get_base_model()).draw, draw)
    assert all(torch.equal(t, counts[n]) for n, t in model.named_buffers())


def test_views_teachers_and_embeddings_come_through_the_cache():
    model, rows = adapted(), texts()
    pr.layers.replica(model, "old")
    reader, plain = cached(model, rows), RowReader()
    batch = batch_of(rows, range(8))
    model.eval()
    wants = frozenset({"logits", "embedding"})
    for name in ("", "base", "old"):
        for _ in range(2):
            with torch.no_grad(), view(model, name):
                got = reader.forward(model, batch, wants)
                expected = plain.forward(model, batch, wants)
            assert torch.equal(got.logits, expected.logits)
            assert torch.equal(got.embedding, expected.embedding)
    assert (reader.hits, reader.misses) == (5 * 8, 8)


def test_hidden_states_are_those_of_all_blocks():
    model, rows = adapted(), texts()
    reader, plain = cached(model, rows), RowReader()
    batch, wants = batch_of(rows, range(8)), frozenset({"logits", "hidden"})
    for _ in range(2):
        got, expected = reader.forward(model, batch, wants), plain.forward(model, batch, wants)
        assert len(got.hidden) == 5
        assert all(torch.equal(a, b) for a, b in zip(got.hidden, expected.hidden, strict=True))
    assert (reader.hits, reader.misses) == (0, 16)
    # The hooks that transformers has left for this do not keep later forwards from the cache.
    for _ in range(2):
        reader.forward(model, batch, LOGITS)
    assert reader.hits == 8


def test_a_kind_of_batch_whose_bits_differ_runs_in_full(caplog):
    model, rows = adapted(), texts()
    reader, plain = cached(model, rows), RowReader()
    # As if this machine's kernels gave other bits in batches of 4 than in batches of 8.
    held = reader._cache.held
    held.states.held[:4] ^= 1
    for numbers in (range(4), range(4), range(8, 16), range(8, 16)):
        batch = batch_of(rows, numbers)
        same(gradients(reader, model, batch), gradients(plain, model, batch))
    assert (reader.hits, reader.misses) == (8, 4 + 4 + 8)
    assert [r.levelname for r in caplog.records if "other bits" in r.message] == ["WARNING"]


def test_each_mode_and_precision_is_compared_for_itself():
    model, rows = adapted(), texts()
    reader, plain = cached(model, rows), RowReader()
    batch = batch_of(rows, range(8))
    for mode in (True, False):
        for enabled in (True, False):
            model.train(mode)
            for _ in range(2):
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    got = reader.forward(model, batch, LOGITS).logits
                    assert torch.equal(got, plain.forward(model, batch, LOGITS).logits)
    # Under autocast the kept states are not those of the forward.
    assert (reader.hits, reader.misses) == (2 * 8, 6 * 8)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_give_the_same_gradients(tools, reentrant):
    model, rows = adapted(), texts()
    tools.checkpointing(model, reentrant)
    reader, plain = cached(model, rows), RowReader()
    # transformers makes embeddings require gradients by a hook, which must see them.
    assert "hook" in reader.reason
    if not reentrant:
        model.get_input_embeddings()._forward_hooks.clear()
        reader.prefill([rows], 8)
        assert reader.reason == ""
    batch = batch_of(rows, range(8))
    for _ in range(2):
        same(gradients(reader, model, batch), gradients(plain, model, batch))
    assert reader.hits == (0 if reentrant else 8)


@pytest.mark.parametrize(
    ("kind", "word"),
    [("extra", "more than states"), ("skip", "reads more"), ("mixed", "rows beside it")],
)
def test_what_is_more_than_a_row_s_states_is_refused(kind, word):
    model, rows = adapted(kind), texts()
    reader = cached(model, rows)
    assert word in reader.reason
    batch = batch_of(rows, range(8))
    same(gradients(reader, model, batch), gradients(RowReader(), model, batch))


def test_what_trains_before_the_blocks_is_seen_wherever_it_is_defined():
    model = adapted("plain")
    model.get_base_model().embed.weight.requires_grad_(True)
    assert "embed runs before" in cached(model, texts()).reason
