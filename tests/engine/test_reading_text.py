"""Texts that get a class or a number: what a model reads, and that batch mates do not matter."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification

import polyrank as pr
from polyrank.engine.reading import RegressionReader, SequenceReader
from polyrank.errors import ConfigError
from polyrank.frame import keyed
from polyrank.metrics.scores import score
from polyrank.streams import Stream, Task
from polyrank.testing import MODELS, assert_close

LOGITS = frozenset({"logits"})
TEXTS = ("abc", "a", "hello world", "de: f", "xyz " * 30)


def rows(start=0, count=5):
    """Rows with texts of different lengths and classes in turn."""
    return [
        {"text": TEXTS[i % len(TEXTS)], "label": i % 3, "task": 0, "row": i}
        for i in range(start, start + count)
    ]


def reader(length=16, kind=SequenceReader, **options):
    return kind(MODELS["bert"].tokenizer(), length, **options)


def stream(data, kind="sequence-classification", **facts):
    facts = {"labels": "abc", "classes": (0, 1, 2), **facts}
    task = Task(index=0, name="t", kind=kind, data={"train": data, "test": data}, **facts)
    return Stream(name="toy", scenario="text", tasks=(task,))


def decoder(**options):
    """A tiny decoder that classifies by its last token."""
    shape = {"n_embd": 24, "n_layer": 1, "n_head": 4, "n_positions": 32, "vocab_size": 32}
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.set_rng_state(keyed("decoder").get_state())
        config = GPT2Config(**shape, **drops, **ends, num_labels=3, **options)
        return GPT2ForSequenceClassification(config).eval()


def test_a_batch_holds_tokens_mask_and_origin():
    batch = reader(8).collate(rows(count=3))
    assert batch["input_ids"][0].tolist() == [1, 4, 5, 6, 2, 0, 0, 0]
    assert batch["attention_mask"].sum(1).tolist() == [5, 3, 8]
    assert batch["input_ids"][2, -1] == 2, "a text that is cut keeps its end"
    assert batch["labels"].tolist() == [0, 1, 2]
    assert batch["row"].tolist() == [0, 1, 2]
    assert batch["task"].dtype == torch.int64
    assert set(reader().inputs(batch)) == {"input_ids", "attention_mask", "token_type_ids"}


def test_pairs_and_single_texts_stand_in_one_batch():
    pair = {"text": "ab", "text_pair": "cd", "label": 0, "task": 0, "row": 0}
    batch = reader(9).collate([pair, *rows(count=1)])
    assert batch["input_ids"][0].tolist() == [1, 4, 5, 2, 6, 7, 2, 0, 0]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 0, 0], [0] * 9]
    long = {**pair, "text": "ab" * 20}
    assert reader(9).collate([long])["input_ids"][0].tolist() == [1, 4, 5, 4, 5, 2, 6, 7, 2]


def test_a_rows_bits_do_not_depend_on_its_batch_mates():
    model, short = MODELS["bert"].build(), rows(count=2)
    fixed = reader()
    beside = fixed.collate([*short, *rows(4, count=2)])
    assert torch.equal(fixed.collate(short)["input_ids"], beside["input_ids"][:2])
    longest = reader(padding="longest")
    assert longest.collate(short)["input_ids"].shape == (2, 5)
    apart = longest.forward(model, longest.collate(short), LOGITS).logits
    assert_close(
        longest.forward(model, longest.collate([*short, *rows(4, count=2)]), LOGITS).logits[:2],
        apart,
        tol=1e-6,
        reason="the same sums over other widths",
    )


@pytest.mark.parametrize("padding", ["max_length", "longest"])
def test_joining_changes_no_row(padding):
    model, read = MODELS["bert"].build(), reader(padding=padding)
    parts = [read.collate(rows(start, count)) for start, count in ((0, 2), (2, 1), (4, 3))]
    out = read.forward(model, read.join(parts), LOGITS)
    singles = [read.forward(model, part, LOGITS) for part in parts]
    reason = "the same sums over other widths"
    apart = torch.cat([single.logits for single in singles])
    assert_close(out.logits, apart, tol=1e-6, reason=reason)
    losses = [read.loss()(one, part) for one, part in zip(singles, parts, strict=True)]
    assert_close(read.loss()(out, read.join(parts)), sum(losses), tol=1e-6, reason=reason)


def test_numbers_have_one_output_and_a_squared_error():
    data = [{"text": t, "target": i - 1.5} for i, t in enumerate(TEXTS)]
    read = reader(kind=RegressionReader)
    assert (read.growing, read.outputs) == (False, ("value",))
    model = pr.adapt(MODELS["bert"].build(), "lora", head="classifier").eval()
    pr.adapter_of(model).head.grow(read.outputs, keyed("head"))
    batch = read.collate(data)
    assert batch["labels"].dtype == torch.float32
    out = read.forward(model, batch, LOGITS)
    assert out.logits.shape == (5, 1)
    loss = read.loss()
    assert loss.per == "sample"
    assert_close(loss(out, batch), ((out.logits[:, 0] - batch["labels"]) ** 2).sum())
    loss(out, batch).backward()
    assert float(pr.adapter_of(model).head.weight.grad.abs().sum()) > 0


def test_numbers_are_scored_by_the_tasks_metric():
    targets = [0.5, -1.0, 2.0, 0.25, 3.0]
    data = [{"text": t, "target": y} for t, y in zip(TEXTS, targets, strict=True)]
    read, model = reader(kind=RegressionReader), MODELS["bert"].build()
    values = read.forward(model, read.collate(data), LOGITS).logits[:, 0].detach().double().numpy()
    expected = {
        "negative_mse": -np.mean((values - targets) ** 2),
        "pearson": np.corrcoef(values, targets)[0, 1],
        "r2": 1 - np.sum((values - targets) ** 2) / np.sum((targets - np.mean(targets)) ** 2),
    }
    for name, value in expected.items():
        task = stream(data, "regression", labels=(), classes=(), metric=name)[0]
        found = read.score(model, task, data, 2)
        assert np.isnan(found.restricted)
        assert_close(found.unrestricted, value, dtype=torch.float32)


@pytest.mark.parametrize("metric", ["f1", "matthews"])
def test_classes_are_scored_by_the_tasks_metric(metric):
    read, model, data = reader(), MODELS["bert"].build(), rows()
    task = stream(data, metric=metric)[0]
    guesses = read.forward(model, read.collate(data), LOGITS).logits.argmax(-1).tolist()
    expected = score(metric, guesses, [row["label"] for row in data])
    assert read.score(model, task, data, 2).unrestricted == expected


def test_a_decoders_classifier_reads_the_last_token():
    model = pr.adapt(decoder(pad_token_id=0), "lora", ["c_attn"], head="score").eval()
    pr.adapter_of(model).head.grow(["a", "b"], keyed("head"))
    read = reader(12, padding="longest")
    batch = read.collate(rows(count=3))
    out = read.forward(model, batch, frozenset({"logits", "embedding"}))
    assert out.embedding.shape == (3, 24)
    assert_close(pr.adapter_of(model).head(out.embedding), out.logits)
    assert out.mask.sum(1).tolist() == [5, 3, 12]


def test_what_does_not_belong_together_is_said():
    assert reader().problems(MODELS["bert"].build(), stream(rows())) == []
    assert reader(32).problems(decoder(pad_token_id=0), stream(rows())) == []
    [found] = reader(32).problems(decoder(), stream(rows()))
    assert "got pad_token_id None, expected the tokenizer's 0" in found
    [found] = reader(65).problems(MODELS["bert"].build(), stream(rows()))
    assert found.startswith("max_length: got 65, but the model has 64 positions")
    large = MODELS["bert"].tokenizer()
    large.add_tokens(["new"])
    [found] = SequenceReader(large, 8).problems(MODELS["bert"].build(), stream(rows()))
    assert found.startswith("tokenizer: got 33 tokens, but the model embeds 32")
    [found] = reader().problems(MODELS["llama"].build(), stream(rows()))
    assert "gives logits of shape (2, 16, 32), expected (rows, classes)" in found
    [found] = reader().problems(MODELS["bert"].build(), stream([{"label": i} for i in range(3)]))
    assert found == "stream: task 't': KeyError: 'text'"


def test_options_out_of_range_are_named_together():
    with pytest.raises(ConfigError) as caught:
        reader(0, padding="short")
    assert len(caught.value.problems) == 2
    assert "max_length: got 0, expected an integer >= 1" in caught.value.problems[0]
    assert "padding: got 'short', expected max_length or longest" in caught.value.problems[1]
