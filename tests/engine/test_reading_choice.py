"""Which reader is chosen, what it is given, and what is said if something is missing."""

import copy
import json

import numpy as np
import pytest
import torch
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from polyrank.engine.reading import (
    CausalReader,
    ImageReader,
    ImageTextReader,
    Processors,
    RegressionReader,
    Seq2SeqReader,
    SequenceReader,
    load_image_processor,
    load_processor,
    load_tokenizer,
    reader_for,
)
from polyrank.errors import ConfigError
from polyrank.streams import Stream, Task, stream
from polyrank.testing import MODELS

IMAGE = np.zeros((4, 5, 3), np.uint8)
ROWS = {
    "sequence-classification": {"text": "a", "label": 0},
    "regression": {"text": "a", "target": 0.5},
    "text-to-label": {"prompt": "a", "answer": "x", "label": 0},
    "generation": {"prompt": "a", "answer": "b"},
    "language-modelling": {"text": "a"},
    "image-classification": {"image": IMAGE, "label": 0},
    "image-text": {"image": IMAGE, "label": 0},
}
# The model, and the reader of its rows.
SERVED = {
    "sequence-classification": ("bert", SequenceReader),
    "regression": ("bert", RegressionReader),
    "text-to-label": ("t5", Seq2SeqReader),
    "generation": ("llama", CausalReader),
    "language-modelling": ("gpt2", CausalReader),
    "image-classification": ("vit", ImageReader),
    "image-text": ("clip", ImageTextReader),
}


def toy(*kinds):
    """A stream with one task of each kind."""
    tasks = []
    for i, kind in enumerate(kinds):
        rows = [dict(ROWS.get(kind, {"pixel_values": np.zeros((1, 8, 8), np.float32), "label": 0}))]
        facts = {"labels": ("x",), "classes": (0,)} if "label" in rows[0] else {}
        facts = {"labels": (), "classes": (), **facts, "prompt": "a {label}"}
        data = {"train": rows, "test": rows}
        tasks.append(Task(index=i, name=f"t{i}", kind=kind, data=data, **facts))
    return Stream(name="toy", scenario="text", tasks=tuple(tasks))


def problems(call, *words, **options):
    with pytest.raises(ConfigError) as caught:
        call(*words, **options)
    return caught.value.problems


@pytest.mark.parametrize("kind", SERVED)
def test_every_kind_has_its_reader(kind):
    family, expected = SERVED[kind]
    tiny = MODELS[family]
    model = tiny.build()
    processor = None if tiny.kind == "images" else tiny.tokenizer()
    made = toy(kind)
    read = reader_for(made, model, processor)
    assert type(read) is expected
    assert kind in read.kinds
    assert read.problems(model, made) == []
    # What the engine does with readers before anything is trained.
    assert read.join([read.collate([ROWS[kind]])] * 2)["labels"].shape[0] == 2
    assert copy.deepcopy(read).fills() == read.fills()
    if kind != "image-classification":
        [found] = problems(reader_for, made, model)
        assert found.startswith(f"tokenizer: got none, but tasks are {kind}, expected the model's")


def test_rows_that_are_ready_need_neither_kind_nor_processor():
    assert type(reader_for(toy(None), torch.nn.Linear(2, 2))) is ImageReader
    assert type(reader_for(stream("digits"), MODELS["vit"].build())) is ImageReader


def test_kinds_of_one_reader_go_together():
    tokenizer = MODELS["llama"].tokenizer()
    mixed = toy("text-to-label", "generation", "language-modelling")
    assert type(reader_for(mixed, MODELS["llama"].build(), tokenizer)) is CausalReader
    [found] = problems(reader_for, mixed, MODELS["t5"].build(), tokenizer)
    assert "has an encoder and a decoder, but task 't2' is language-modelling" in found
    both = toy("sequence-classification", "regression")
    [found] = problems(reader_for, both, MODELS["bert"].build(), tokenizer)
    assert "got tasks 't0' (sequence-classification) beside 't1' (regression)" in found


def test_all_faults_are_named_together():
    odd = toy("regression", "generation", "generatoin")
    found = problems(reader_for, odd, MODELS["bert"].build(), "nowhere")
    assert len(found) == 3
    assert "task 't2': got kind 'generatoin'" in found[0]
    assert found[0].endswith("did you mean 'generation'?")
    assert "'t0' (regression) beside 't1' (generation)" in found[1]
    assert found[2].startswith("tokenizer: got 'nowhere' (neither a folder here nor a hub id")
    bare = MODELS["t5"].tokenizer()
    bare.eos_token = None
    model = MODELS["t5"].build()
    model.config.decoder_start_token_id = None
    found = problems(reader_for, toy("generation"), model, bare)
    assert [line.split(":")[0] for line in found] == ["tokenizer", "model"]
    found = problems(reader_for, toy("image-text"), torch.nn.Linear(1, 1))
    assert [line.split(":")[0] for line in found] == ["tokenizer", "image processor"]


def test_lengths_are_the_least_of_three():
    tokenizer = MODELS["bert"].tokenizer()
    made, model = toy("sequence-classification"), MODELS["bert"].build()
    assert reader_for(made, model, tokenizer).max_length == 64
    tokenizer.model_max_length = 20
    assert reader_for(made, model, tokenizer).max_length == 20
    assert reader_for(made, model, tokenizer, max_length=9).max_length == 9
    assert reader_for(toy("generation"), MODELS["t5"].build(), tokenizer).max_length == 20
    clip = MODELS["clip"]
    assert reader_for(toy("image-text"), clip.build(), clip.tokenizer()).max_length == 16


def saved(folder, *, images=True):
    MODELS["clip"].tokenizer().save_pretrained(folder)
    if images:
        ViTImageProcessorPil(size={"height": 6, "width": 6}).save_pretrained(folder)
    return folder


def test_processors_come_from_a_folder(tmp_path):
    folder = saved(tmp_path / "all")
    tokenizer = load_tokenizer(folder)
    assert tokenizer("ab")["input_ids"] == [1, 4, 5, 31]
    assert load_image_processor(folder).size["height"] == 6
    for kind, expected in {
        "generation": type(tokenizer),
        "image-classification": ViTImageProcessorPil,
        "image-text": Processors,
        None: type(None),
    }.items():
        assert type(load_processor(folder, toy(kind))) is expected
    read = reader_for(toy("image-text"), MODELS["clip"].build(), str(folder))
    assert read.pixels.processor.size["height"] == 6
    read = reader_for(toy("image-classification"), MODELS["vit"].build(), folder)
    assert read.collate([ROWS["image-classification"]])["pixel_values"].shape[-2:] == (6, 6)
    # Without one the model's configuration decides.
    plain = saved(tmp_path / "plain", images=False)
    assert load_image_processor(plain) is None
    read = reader_for(toy("image-text"), MODELS["clip"].build(), plain)
    assert (read.pixels.height, read.pixels.channels, read.pixels.processor) == (8, 1, None)


def test_what_cannot_be_loaded_is_said(tmp_path):
    found = problems(load_processor, "some/where", toy("image-text"))
    assert [line.split(":")[0] for line in found] == ["tokenizer", "image processor"]
    assert found[0].endswith("pass a folder that save_pretrained wrote, or pass the tokenizer "
                             "itself")  # fmt: skip
    [found] = problems(load_tokenizer, tmp_path)
    assert f"got '{tmp_path}' (a folder)" in found
    assert "save it there with save_pretrained, which writes tokenizer.json" in found


def test_no_code_of_a_folder_is_run(tmp_path):
    folder = saved(tmp_path / "odd")
    (folder / "own.py").write_text("raise SystemExit('this code was run')\n")
    for name, key, value in (
        ("tokenizer_config.json", "AutoTokenizer", ["own.Own", None]),
        ("preprocessor_config.json", "AutoImageProcessor", "own.Own"),
    ):
        path = folder / name
        config = json.loads(path.read_text())
        config["auto_map"] = {key: value}
        config["tokenizer_class"] = config["image_processor_type"] = "Own"
        path.write_text(json.dumps(config))
    for load in (load_image_processor, load_tokenizer):
        [found] = problems(load, folder)
        assert "expected one that loads without code of its own" in found
