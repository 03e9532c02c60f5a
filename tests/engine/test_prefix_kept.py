"""When outputs of a frozen prefix are kept, when they are not, where, and when they are dropped."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, CLIPConfig, CLIPModel

import polyrank as pr
from polyrank.engine.prefix import PrefixReader
from polyrank.engine.prefix_find import prefix_of
from polyrank.engine.reading import Reader
from polyrank.errors import ConfigError
from polyrank.frame import keyed
from polyrank.layers import grow_head
from polyrank.streams import OnePass, Task

LOGITS = frozenset({"logits"})
TOKENS, ROWS, WIDTH = 16, 20, 24
BYTES = ROWS * TOKENS * WIDTH * 4
LAST = r".*layer\.[23]\..*(query|value|dense)"
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert(**options):
    torch.manual_seed(3)
    shape = {"hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": 4}
    rest = {"num_attention_heads": 4, "vocab_size": 32, "max_position_embeddings": 64}
    return BertForSequenceClassification(BertConfig(**{**shape, **rest, **CALM, **options}))


def adapted(model=None, targets=LAST, head="classifier"):
    model = pr.adapt(model or bert(), pr.method("lora", r=4), targets, head=head, seed=1)
    if head:
        grow_head(model, ["a", "b", "c"], seed=1)
    return model


class RowReader(Reader):
    """Rows of ready tensors; `name` is an attribute of its own."""

    def __init__(self, name="rows"):
        self.name = name

    def collate(self, rows):
        columns = [column for column in rows[0] if column != "label"]
        found = {column: torch.stack([row[column] for row in rows]) for column in columns}
        return {**found, "labels": torch.tensor([row["label"] for row in rows])}

    def inputs(self, batch):
        return {name: value for name, value in batch.items() if name != "labels"}


def texts(count=ROWS, seed=0, tokens=TOKENS):
    rng = keyed("prefix", seed)
    ids = torch.randint(3, 32, (count, tokens), generator=rng)
    mask = torch.ones_like(ids)
    mask[1::3, tokens - 4 :] = 0
    return [
        {"input_ids": i, "attention_mask": m, "label": 0} for i, m in zip(ids, mask, strict=True)
    ]


def cached(model, rows=None, size=8, **options):
    return PrefixReader(RowReader(), model, **options).prefill([rows or texts()], size)


def logits(reader, model, rows):
    with torch.no_grad():
        return reader.forward(model.eval(), RowReader().collate(rows), LOGITS).logits


def used(reader, model, rows=None):
    """Say whether a second forward of the same rows takes what is kept; both have to be right."""
    part = (rows or texts())[:8]
    for _ in range(2):
        before = reader.hits
        assert torch.equal(logits(reader, model, part), logits(RowReader(), model, part))
    return reader.hits == before + 8


@pytest.fixture
def ran(monkeypatch):
    """The blocks that run, in order, from now on."""
    from transformers.models.bert.modeling_bert import BertLayer

    found, own = [], BertLayer.forward

    def forward(self, *args, **kwargs):
        found.append(self)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(BertLayer, "forward", forward)
    return found


# --- what has a prefix ----------------------------------------------------------------------------


def test_the_prefix_ends_below_the_first_adapted_block():
    found = prefix_of(adapted())
    assert (found.first, found.path, found.reason) == (2, "base_model.model.bert.encoder.layer", "")
    assert prefix_of(adapted(targets=r".*layer\.3\..*dense")).first == 3


def test_where_no_block_is_adapted_the_last_one_counts():
    assert prefix_of(adapted(targets=["pooler.dense"])).first == 3


def unfrozen():
    model = adapted()
    model.get_base_model().bert.embeddings.LayerNorm.weight.requires_grad_(True)
    return model


def two_stacks():
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    part = {**tiny, "num_attention_heads": 2, "projection_dim": 8}
    vision = {**part, "image_size": 8, "patch_size": 4}
    config = CLIPConfig(text_config={**part, "vocab_size": 32}, vision_config=vision)
    return CLIPModel(config)


@pytest.mark.parametrize(
    "make",
    [
        lambda: adapted(targets="all-linear"),
        lambda: adapted(targets=r".*layer\.[03]\..*query"),
        unfrozen,
        lambda: adapted(two_stacks(), r".*layers\.1\..*fc1", None),
        lambda: adapted(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), ["1"], None),
    ],
    ids=["all blocks", "first block", "embeddings train", "two stacks", "no blocks"],
)
def test_models_without_a_frozen_prefix_run_as_they_are(make):
    model = make()
    assert prefix_of(model) is None
    assert "frozen" in cached(model).reason


def normed():
    model = bert()
    model.bert.encoder.layer[0].output.LayerNorm = nn.BatchNorm1d(TOKENS)
    return model


def listened():
    model = bert()
    model.bert.encoder.layer[1].register_forward_hook(lambda *args: None)
    return model


def compiled():
    model = bert()
    model.bert.encoder.layer[1].compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: bert(hidden_dropout_prob=0.1), "Dropout drops 0.1"),
        (lambda: bert(attention_probs_dropout_prob=0.1), "drops 0.1"),
        (normed, "BatchNorm1d mixes"),
        (listened, "has a hook"),
        (compiled, "is compiled"),
    ],
    ids=["dropout", "attention dropout", "batch norm", "hook", "compiled"],
)
def test_a_prefix_that_cannot_be_kept_says_why(make, word):
    model = make()
    model = adapted(model)
    assert word in prefix_of(model).reason
    reader = cached(model)
    assert word in reader.reason
    assert reader.kept["rows"] == 0


def test_a_compiled_model_runs_as_it_is():
    model = torch.compile(adapted(), backend="eager")
    assert "is compiled" in prefix_of(model).reason


def test_dropout_given_as_a_number_is_seen():
    model = adapted()
    model.get_base_model().bert.encoder.layer[0].attention.self.attention_dropout = 0.2
    assert "attention_dropout is 0.2" in prefix_of(model).reason


def test_dropout_above_the_prefix_is_no_obstacle():
    model = bert(hidden_dropout_prob=0.1)
    for module in (model.bert.embeddings, *model.bert.encoder.layer[:2]):
        for inner in module.modules():
            if isinstance(inner, nn.Dropout):
                inner.p = 0.0
    model = adapted(model)
    reader = cached(model)
    assert reader.reason == ""
    assert used(reader, model)


# --- rows -----------------------------------------------------------------------------------------


def test_unknown_rows_run_in_full_and_so_do_those_beside_them():
    model, rows = adapted(), texts()
    reader = cached(model, rows)
    assert used(reader, model)
    mixed = rows[:7] + texts(1, seed=9)
    before = reader.hits, reader.misses
    for _ in range(2):
        assert torch.equal(logits(reader, model, mixed), logits(RowReader(), model, mixed))
    assert (reader.hits, reader.misses) == (before[0], before[1] + 16)


def test_rows_are_known_by_what_they_are_and_not_by_where_they_come_from():
    model, rows = adapted(), texts()
    reader = PrefixReader(RowReader(), model).prefill([rows, rows[:5], texts(4, seed=1)], 8)
    assert reader.kept == {**reader.kept, "rows": 24, "bytes": 24 * TOKENS * WIDTH * 4}
    again = [{**row, "label": 2} for row in (*rows[3:9], *texts(2, seed=1))]
    assert used(reader, model, again)


class Noisy(list):
    def __getitem__(self, index):
        row = super().__getitem__(index)
        return {**row, "input_ids": torch.randint(3, 32, row["input_ids"].shape)}


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        (Noisy(texts()), "augmented"),
        (texts(8) + texts(8, tokens=12), "2 shapes"),
        ([], "no rows"),
    ],
    ids=["augmented", "lengths", "empty"],
)
def test_rows_that_cannot_be_kept_are_not(rows, word):
    reader = PrefixReader(RowReader(), adapted()).prefill([rows], 8)
    assert word in reader.reason


def test_inputs_that_are_not_one_entry_a_row_are_refused():
    class Whole(RowReader):
        def inputs(self, batch):
            return {**super().inputs(batch), "position_ids": torch.arange(TOKENS)[None]}

    reader = PrefixReader(Whole(), adapted()).prefill([texts()], 8)
    assert "one entry a row" in reader.reason


def test_rows_of_an_online_stream_stay_unread():
    rows = OnePass(texts(), "online")
    reader = cached(adapted(), rows)
    assert reader.reason == ""
    assert len([rows[i] for i in range(ROWS)]) == ROWS


def test_other_models_run_in_full():
    model = adapted()
    reader = cached(model)
    assert used(reader, model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_base_model().bert.encoder.layer[0].output.dense.weight.add_(1)
    assert not used(reader, other)
    assert used(reader, model)


def test_a_reader_stays_what_it_is_and_scores_through_the_cache():
    model, rows = adapted(), texts()
    reader = PrefixReader(RowReader("mine"), model).prefill([rows], 8)
    assert isinstance(reader, RowReader)
    assert reader.name == "mine"
    task = Task(name="t", index=0, labels=("a", "b", "c"), classes=(0, 1, 2), data={"test": rows})
    expected = RowReader().score(model.eval(), task, rows, 8)
    # Of 8, 8 and 4 rows the first with 8 and the one with 4 run in full.
    assert reader.score(model, task, rows, 8) == expected
    assert (reader.hits, reader.misses) == (8, 12)
    other = copy.copy(reader)
    assert other.score(model, task, rows, 8) == expected
    assert (reader.hits, other.name) == (8 + 20, "mine")


# --- changes --------------------------------------------------------------------------------------


def trained(model):
    weight = model.get_base_model().bert.encoder.layer[0].output.dense.weight.requires_grad_(True)
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()
    weight.requires_grad_(False)


def loaded(model):
    values = {k: v + 1 for k, v in model.state_dict().items() if "layer.1.output.LayerNorm" in k}
    model.load_state_dict(values, strict=False)


def written(model):
    model.get_base_model().bert.embeddings.word_embeddings.weight.data.mul_(1.1)


def exchanged(model):
    layers = model.get_base_model().bert.encoder.layer
    layers[0] = copy.deepcopy(layers[1])


def dropping(model):
    model.get_base_model().bert.encoder.layer[0].output.dropout.p = 0.5


def rebuilt(model):
    encoder = model.get_base_model().bert.encoder
    encoder.layer = nn.ModuleList([copy.deepcopy(encoder.layer[1]), *encoder.layer[1:]])


def shortened(model):
    encoder = model.get_base_model().bert.encoder
    encoder.layer = nn.ModuleList(encoder.layer[2:])


def adapted_below(model):
    model.add_adapter(
        "second",
        pr.PolyrankConfig(
            **{**model.peft_config["default"].to_dict(), "target_modules": r".*layer\.1\..*query"}
        ),
    )


CHANGES = [trained, loaded, written, exchanged, dropping, rebuilt, shortened, adapted_below]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_prefix_is_noticed(change, caplog):
    model = adapted()
    reader = cached(model)
    assert used(reader, model)
    change(model)
    hits = reader.hits
    assert not used(reader, model)
    assert reader.hits == hits
    assert reader.reason
    assert "dropped" in caplog.text
    assert reader.kept["rows"] == 0


def test_a_changed_prefix_can_be_kept_anew():
    model = adapted()
    reader = cached(model)
    loaded(model)
    assert not used(reader, model)
    assert used(reader.prefill([texts()], 8), model)


def test_what_changes_above_the_prefix_is_not_its_business():
    model = adapted()
    reader = cached(model)
    assert used(reader, model)
    grow_head(model, ["d"], seed=1)
    pr.layers.append(model, 2, seed=1)
    pr.layers.absorb(model, seed=1)
    assert used(reader, model)


def test_who_listens_inside_of_the_prefix_sees_it_run():
    model, heard = adapted(), []
    reader = cached(model)
    assert used(reader, model)
    block = model.get_base_model().bert.encoder.layer[0]
    handle = block.register_forward_hook(lambda *args: heard.append(1))
    assert not used(reader, model)
    # Two forwards of each reader.
    assert len(heard) == 4
    handle.remove()
    assert used(reader, model)


def test_an_error_leaves_the_model_whole(ran):
    model, rows = adapted(), texts()
    reader = cached(model, rows)
    assert used(reader, model)
    block = model.get_base_model().bert.encoder.layer[3]

    def fail(*args):
        raise RuntimeError("of the model's own")

    handle = block.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="of the model's own"):
        logits(reader, model, rows[:8])
    handle.remove()
    ran.clear()
    logits(RowReader(), model, rows[:8])
    assert len(ran) == 4
    assert used(reader, model)


def test_wrapped_for_several_processes_it_is_the_same_model(tmp_path):
    model = adapted()
    reader = cached(model)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert used(reader, wrapped)
        assert used(reader, model)
    finally:
        torch.distributed.destroy_process_group()


# --- where states are kept ------------------------------------------------------------------------


def test_another_run_reads_the_file_that_one_has_written(tmp_path, ran):
    reader = cached(adapted(), memory=0, folder=tmp_path)
    assert reader.reason == ""
    assert reader.kept["bytes"] == BYTES
    assert reader.kept["place"].startswith(str(tmp_path))
    ran.clear()
    model = adapted()
    again = cached(model, memory=0, folder=tmp_path)
    # What shows how the model works: all blocks, those above the prefix, and the prefix twice.
    assert len(ran) == 4 + 2 + 2 * 2
    assert again.kept["place"] == reader.kept["place"]
    assert used(again, model)


@pytest.mark.parametrize("change", [loaded, written], ids=lambda change: change.__name__)
def test_other_weights_have_another_file(tmp_path, change):
    model = adapted()
    first = cached(model, memory=0, folder=tmp_path).kept["place"]
    change(model)
    reader = cached(model, memory=0, folder=tmp_path)
    assert reader.kept["place"] != first
    assert used(reader, model)


def test_other_rows_sizes_and_depths_have_other_files(tmp_path):
    places = {
        cached(adapted(), memory=0, folder=tmp_path).kept["place"],
        cached(adapted(), texts()[::-1], memory=0, folder=tmp_path).kept["place"],
        cached(adapted(), size=16, memory=0, folder=tmp_path).kept["place"],
        cached(adapted(targets=r".*layer\.3\..*query"), memory=0, folder=tmp_path).kept["place"],
    }
    assert len(places) == 4


def test_a_damaged_file_is_made_anew_with_a_warning(tmp_path, caplog):
    model = adapted()
    place = cached(model, memory=0, folder=tmp_path).kept["place"]
    [file] = tmp_path.glob("*/*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-8] + bytes(8))
    reader = cached(model, memory=0, folder=tmp_path)
    assert (reader.reason, reader.kept["place"]) == ("", place)
    assert "made anew" in caplog.text
    assert file.read_bytes() == whole
    assert used(reader, model)


def test_limits_decide_where_and_whether(tmp_path):
    model = adapted()
    assert cached(model, memory=BYTES, folder=tmp_path).kept["place"] == "memory"
    assert not list(tmp_path.iterdir())
    assert cached(model, memory=BYTES - 1, folder=tmp_path).kept["place"] != "memory"
    reader = cached(model, memory=BYTES, limit=BYTES - 1, folder=tmp_path)
    assert f"{BYTES} bytes are needed, and the limit is {BYTES - 1}" in reader.reason
    assert not used(reader, model)


def test_a_folder_that_cannot_be_written_is_said(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    model = adapted()
    reader = cached(model, memory=0, folder=tmp_path / "file")
    assert "could not be written" in reader.reason
    assert "could not be written" in caplog.text
    assert not used(reader, model)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match=r"memory: got -1.*\n.*limit: got -2"):
        PrefixReader(RowReader(), adapted(), memory=-1, limit=-2)
    with pytest.raises(ConfigError, match="size: got 0"):
        cached(adapted(), size=0)
