"""Prompts and answers: what is cut, what has a label, what is written, what is likely."""

import math

import numpy as np
import pytest
import torch

import polyrank as pr
from polyrank.engine.reading import CausalReader, Seq2SeqReader
from polyrank.errors import ConfigError
from polyrank.streams import Stream, Task
from polyrank.testing import MODELS, assert_close

LOGITS = frozenset({"logits"})
LABELS = ("ab", "c", "cde")
TURNED = "the same sums over other widths"


def causal(length=32, **options):
    return CausalReader(MODELS["llama"].tokenizer(), length, **options)


def two(length=32, **options):
    return Seq2SeqReader(MODELS["t5"].tokenizer(), length, start=0, **options)


READERS = {"llama": causal, "gpt2": causal, "t5": two}


def rows(count=6, labels=LABELS):
    """Rows whose prompts differ in length."""
    return [
        {
            "prompt": "is it " + "x" * (3 * i) + ":",
            "answer": labels[i % 3],
            "label": i % 3,
            "task": 0,
            "row": i,
        }
        for i in range(count)
    ]


def task(data, kind="text-to-label", labels=LABELS, metric="accuracy"):
    classes = tuple(range(len(labels)))
    return Task(
        index=0, name="t", kind=kind, labels=labels, classes=classes, data={"test": data},
        metric=metric,
    )  # fmt: skip


def stream(data, **facts):
    made = task(data, **facts)
    both = {"train": data, "test": data}
    facts = {name: getattr(made, name) for name in ("kind", "labels", "classes", "metric")}
    made = Task(index=0, name="t", data=both, **facts)
    return Stream(name="toy", scenario="text", tasks=(made,))


def test_a_causal_sequence_is_begun_asked_answered_and_ended():
    batch = causal().collate([{"prompt": "ab:", "answer": "c", "task": 2}])
    assert batch["input_ids"].tolist() == [[1, 4, 5, 31, 6, 2]]
    assert batch["labels"].tolist() == [[-100, -100, -100, -100, 6, 2]]
    assert batch["attention_mask"].tolist() == [[1] * 6]
    assert batch["task"].tolist() == [2]
    plain = causal().collate([{"text": "abc"}, {"text": ""}])
    assert plain["input_ids"].tolist() == [[1, 4, 5, 6, 2], [1, 2, 0, 0, 0]]
    assert plain["labels"].tolist() == [[-100, 4, 5, 6, 2], [-100, 2, -100, -100, -100]]
    assert causal(8).collate([{"text": "a" * 20}])["labels"].tolist() == [[-100] + [4] * 7]


def test_an_encoder_reads_and_a_decoder_writes():
    batch = two().collate([{"prompt": "ab:", "answer": "c"}, {"prompt": "a", "answer": "cde"}])
    assert batch["input_ids"].tolist() == [[4, 5, 31, 2], [4, 2, 0, 0]]
    assert batch["decoder_input_ids"].tolist() == [[0, 6, 2, 0, 0], [0, 6, 7, 8, 2]]
    assert batch["labels"].tolist() == [[-100, 6, 2, -100, -100], [-100, 6, 7, 8, 2]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert two().mask(batch).tolist() == batch["decoder_attention_mask"].bool().tolist()


@pytest.mark.parametrize("cut", ["middle", "left"])
def test_a_long_prompt_keeps_its_end_and_the_answer(cut):
    prompt = "task" + "x" * 40 + "end:"
    end = "".join(f"{c}" for c in "end:")
    read = causal(16, cut=cut)
    ids = read.collate([{"prompt": prompt, "answer": "ok"}])["input_ids"][0].tolist()
    assert len(ids) == 16
    text = read.tokenizer.decode(ids)
    assert text.startswith("<s>task" if cut == "middle" else "<s>xx")
    assert text.endswith(f"{end}ok</s>")
    read = two(16, cut=cut)
    batch = read.collate([{"prompt": prompt, "answer": "ok"}])
    text = read.tokenizer.decode(batch["input_ids"][0])
    assert batch["input_ids"].shape == (1, 16)
    assert text.startswith("task" if cut == "middle" else "xx")
    assert text.endswith(f"{end}</s>")


def test_a_long_answer_leaves_the_prompt_its_half():
    read = causal(12)
    batch = read.collate([{"prompt": "x" * 30, "answer": "a" * 30}])
    assert batch["input_ids"].tolist() == [[1] + [27] * 5 + [4] * 6]
    assert 2 not in batch["labels"], "an answer that is cut has no end"
    batch = causal(12, answer_length=3).collate([{"prompt": "x" * 30, "answer": "a" * 30}])
    assert (batch["labels"] != -100).sum() == 3
    assert batch["input_ids"].shape == (1, 12)


def test_padding_to_a_fixed_width():
    assert causal(20, padding="max_length").collate(rows(2))["labels"].shape == (2, 20)
    batch = two(20, padding="max_length").collate(rows(2))
    assert batch["input_ids"].shape == (2, 20)
    assert batch["labels"].shape == (2, 11)
    assert batch["decoder_input_ids"].shape == (2, 11)


@pytest.mark.parametrize("family", READERS)
def test_the_loss_is_that_of_the_model_itself(family):
    read, model = READERS[family](), MODELS[family].build()
    batch = read.collate(rows())
    out = read.forward(model, batch, LOGITS)
    loss = read.loss()
    assert loss.per == "label"
    count = (batch["labels"][:, 1:] != -100).sum()
    if family == "t5":
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        found = model(**inputs, labels=batch["labels"][:, 1:].contiguous()).loss
    else:
        found = model(**read.inputs(batch), labels=batch["labels"]).loss
    assert_close(loss(out, batch) / count, found)


@pytest.mark.parametrize("family", READERS)
def test_joining_changes_no_row(family):
    read, model = READERS[family](48), MODELS[family].build()
    data = rows()
    parts = [read.collate(data[:1]), read.collate(data[4:]), read.collate(data[1:3])]
    joined = read.join(parts)
    out, loss = read.forward(model, joined, LOGITS), read.loss()
    single = [read.forward(model, part, LOGITS) for part in parts]
    losses = [loss(one, part) for one, part in zip(single, parts, strict=True)]
    assert_close(loss(out, joined), sum(losses), tol=1e-6, reason=TURNED)
    start = 0
    for one in single:
        n, width = one.logits.shape[:2]
        real = one.mask[:, :width]
        mine = out.logits[start : start + n, :width]
        assert_close(mine[real], one.logits[real], tol=1e-6, reason=TURNED)
        start += n
    assert joined["row"].tolist() == [0, 4, 5, 1, 2]


@pytest.mark.parametrize("family", READERS)
def test_states_come_with_their_mask(family):
    read, model = READERS[family](), MODELS[family].build()
    batch = read.collate(rows(3))
    out = read.forward(model, batch, frozenset({"logits", "hidden"}))
    assert all(h.shape[:2] == out.mask.shape == batch["labels"].shape for h in out.hidden)
    with pytest.raises(ConfigError, match=r"got a wish for \['embedding'\]"):
        read.forward(model, batch, frozenset({"embedding"}))


@torch.no_grad()
def written(model, read, prompt, limit):
    """Greedy writing without a cache, a batch or padding."""
    given = read.asked([prompt], limit)
    ids, new = given["input_ids"], []
    for _ in range(limit):
        if isinstance(read, Seq2SeqReader):
            begun = torch.tensor([[0, *new]])
            logits = model(**given, decoder_input_ids=begun).logits
        else:
            logits = model(input_ids=torch.cat([ids, torch.tensor([new]).long()], 1)).logits
        new.append(int(logits[0, -1].argmax()))
        if new[-1] == 2:
            break
    return read.tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", READERS)
def test_writing_in_a_batch_is_writing_alone(family):
    read, model = READERS[family](), MODELS[family].build()
    # What the model's maker prefers when it is talked to is no part of a greedy measurement.
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    prompts = [row["prompt"] for row in rows()]
    found = read.write(model, prompts, 7)
    assert found == [written(model, read, prompt, 7) for prompt in prompts]
    assert len(set(found)) > 1
    assert model.generation_config.do_sample


@torch.no_grad()
def log_probability(model, read, prompt, label, room):
    """The sum over the tokens of a label and the end of text, one row at a time."""
    batch = read.pairs([(prompt, label)], room)
    logits = read.forward(model, batch, LOGITS).logits[0, :-1].double().log_softmax(-1)
    wanted = batch["labels"][0, 1:]
    return sum(float(line[y]) for line, y in zip(logits, wanted, strict=True) if y != -100)


@pytest.mark.parametrize("family", READERS)
def test_the_chosen_label_is_the_most_likely_text(family):
    read, model = READERS[family](18), MODELS[family].build()
    prompts = [row["prompt"] for row in rows()] + ["abc " * 9, "k:", "zz"]
    chosen = read.choose(model, prompts, LABELS)
    for prompt, label in zip(prompts, chosen, strict=True):
        odds = [log_probability(model, read, prompt, other, 4) for other in LABELS]
        assert label == LABELS[int(np.argmax(odds))]


def test_labels_are_compared_after_the_same_prompt(monkeypatch):
    read, model, seen = causal(18), MODELS["llama"].build(), []
    ranked = read.ranked
    monkeypatch.setattr(
        read, "ranked", lambda model, batch, memory: seen.append(batch) or ranked(model, batch, {})
    )
    read.choose(model, ["abc " * 9, "k:"], LABELS)
    prompts = [
        [ids[(ids != 0) & (labels == -100)].tolist() for ids, labels in zip(*pair, strict=True)]
        for pair in ((batch["input_ids"], batch["labels"]) for batch in seen)
    ]
    # The longest label and its end take four of eighteen places.
    assert [len(ids) for ids in prompts[0]] == [14, 3]
    assert prompts == [prompts[0]] * 3


@pytest.mark.parametrize("family", READERS)
def test_a_task_with_labels_is_scored_twice(family):
    read, model = READERS[family](answer_length=10), MODELS[family].build()
    data = rows()
    prompts = [row["prompt"] for row in data]
    chosen = read.choose(model, prompts, LABELS)
    for row, answer in zip(data, chosen, strict=True):
        row["answer"] = answer if row["row"] else "x"
    found = read.score(model, task(data), data, 4)
    assert found.restricted == 5 / 6
    for row, answer in zip(data, read.write(model, prompts, 10), strict=True):
        row["answer"] = answer if row["row"] > 1 else "x" * 12
    found = read.score(model, task(data, kind="generation", labels=()), data, 4)
    assert found.unrestricted == 4 / 6
    assert math.isnan(found.restricted)
    assert found.count == 6


def test_plain_text_is_scored_by_its_likelihood():
    data = [{"text": text} for text in ("abc", "a", "hello there", "")]
    read, model = causal(), MODELS["llama"].build()
    total, count = 0.0, 0
    for row in data:
        batch = read.collate([row])
        out = model(**read.inputs(batch), labels=batch["labels"])
        total += float(out.loss.detach()) * (batch["labels"].shape[1] - 1)
        count += batch["labels"].shape[1] - 1
    for size in (1, 3):
        found = read.score(model, task(data, kind="language-modelling", labels=()), data, size)
        assert_close(found.unrestricted, -total / count, dtype=torch.float32)
        assert math.isnan(found.restricted)
        assert found.count == 4


def test_an_adapter_writes_with_what_it_learned():
    read = causal(16)
    model = pr.adapt(MODELS["llama"].build(), pr.method("lora", r=8), "all-linear", seed=0)
    data = [
        {"prompt": "say:", "answer": "abc", "label": 0},
        {"prompt": "please tell:", "answer": "de", "label": 1},
    ]
    batch, loss = read.collate(data), read.loss()
    optimizer = torch.optim.AdamW(pr.parameter_groups(model, 2e-2))
    attached = pr.attach(optimizer, model)
    for _ in range(50):
        loss(read.forward(model, batch, LOGITS), batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    attached.detach()
    found = read.score(model.eval(), task(data, labels=("abc", "de")), data, 2)
    assert (found.restricted, found.unrestricted) == (1.0, 1.0)
    with model.disable_adapter():
        base = read.score(model, task(data, labels=("abc", "de")), data, 2)
    assert base.unrestricted == 0.0


def test_models_and_tokenizers_that_do_not_fit_are_said():
    assert causal().problems(MODELS["llama"].build(), stream(rows())) == []
    assert two().problems(MODELS["t5"].build(), stream(rows())) == []
    found = causal().problems(MODELS["bert"].build(), stream(rows()))
    assert len(found) == 1
    assert "BertForSequenceClassification cannot generate" in found[0]
    found = causal(65).problems(MODELS["llama"].build(), stream(rows()))
    assert found[0].startswith("max_length: got 65, but the model has 64 positions")
    other = Seq2SeqReader(MODELS["t5"].tokenizer(), 16, start=3)
    [found] = other.problems(MODELS["t5"].build(), stream(rows()))
    assert found.startswith("start: got 3, expected the model's decoder_start_token_id, 0")
    plain = stream([{"text": "a"}], kind="language-modelling", labels=())
    found = two().problems(MODELS["t5"].build(), plain)
    assert "is of kind language-modelling, expected generation or text-to-label" in found[0]


def test_options_out_of_range_are_named_together():
    bare = MODELS["llama"].tokenizer()
    bare.eos_token = None
    with pytest.raises(ConfigError) as caught:
        CausalReader(bare, 3, cut="right", padding="none", answer_length=0)
    starts = ("max_length", "padding", "cut", "answer_length", "tokenizer")
    assert len(caught.value.problems) == 5
    for word, problem in zip(starts, caught.value.problems, strict=True):
        assert problem.startswith(f"{word}: got")
    with pytest.raises(ConfigError, match="answer_length: got 7, expected <= 6"):
        causal(8, answer_length=7)


def test_a_tokenizer_without_a_beginning_still_asks_something():
    tokenizer = MODELS["llama"].tokenizer()
    tokenizer.bos_token = None
    read = CausalReader(tokenizer, 8)
    batch = read.collate([{"prompt": "", "answer": "a"}, {"prompt": "b", "answer": "a"}])
    assert batch["input_ids"].tolist() == [[2, 4, 2], [5, 4, 2]]
    assert batch["labels"].tolist() == [[-100, 4, 2]] * 2
