"""`initialise`: which model it looks at, what a term of a text is, how exactly it multiplies."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForTokenClassification

import polyrank as pr
from polyrank.errors import ConfigError
from polyrank.frame import Init
from polyrank.layers import adapter_of, gather, statistics
from polyrank.testing import MODELS, assert_close

TINY = {
    "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 12,
    "vocab_size": 11, "num_labels": 3, "max_position_embeddings": 8,
}  # fmt: skip


class Summed(Init):
    """Wants the sum of gradients and does nothing with it."""

    wants = frozenset({"weight_grad"})
    reduction = "sum"
    training = False


def adapted(**options):
    tiny = MODELS["bert"]
    return tiny, pr.adapt(tiny.build(), pr.method("lora-ga", r=1, **options), seed=1).eval()


def test_an_adapter_that_does_not_act_gathers_nothing():
    tiny, model = adapted()
    own = model.peft_config["default"].to_dict()
    config = {key: own[key] for key in ("method", "options", "target_modules")}
    model.add_adapter("other", pr.PolyrankConfig(**config))
    with pytest.raises(ConfigError, match=r"'other' takes no part .*\(active: default\).*set_adap"):
        pr.initialise(model, [tiny.inputs(0)], adapter="other")
    assert all(view.waiting for view in adapter_of(model, "other").layers)
    model.set_adapter("other")
    pr.initialise(model, [tiny.inputs(0)], adapter="other")
    assert not any(view.waiting for view in adapter_of(model, "other").layers)
    assert all(view.waiting for view in adapter_of(model, "default").layers)


def test_a_merged_adapter_does_not_start():
    tiny, model = adapted()
    model.merge_adapter()
    with pytest.raises(ConfigError, match=r"is merged.*unmerge_adapter\(\) first"):
        pr.initialise(model, [tiny.inputs(0)])
    model.unmerge_adapter()
    pr.initialise(model, [tiny.inputs(0)])


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForTokenClassification])
def test_a_head_that_does_not_shift_counts_every_label(kind):
    model = pr.adapt(kind(BertConfig(**TINY)).eval(), pr.method("lora-ga", r=1), ["query"], seed=1)
    ids = torch.arange(10).reshape(2, 5)
    labels = ids % 3
    labels[1, 3:] = -100
    batch = {"input_ids": ids, "labels": labels}
    found = gather(model, [batch], None, Summed())
    mean = gather(model, [batch], lambda m, b: (m(**b).loss, 1), Summed())
    for path, stat in found.items():
        assert stat["count"] == 8
        assert_close(stat["weight_grad"], 8 * mean[path]["weight_grad"])


def test_sums_are_exact_whatever_the_run_allows_and_that_stays(monkeypatch):
    matmul = torch.backends.cuda.matmul
    name, loose, tight = (
        ("fp32_precision", "tf32", "ieee")
        if hasattr(matmul, "fp32_precision")
        else ("allow_tf32", True, False)
    )
    tiny, model = adapted()
    before, seen, real = getattr(matmul, name), [], torch.Tensor.addmm_
    watched = lambda *words: (  # noqa: E731 - a method that notes and goes on
        seen.append((getattr(matmul, name), torch.is_autocast_enabled("cpu"))),
        real(*words),
    )[1]
    monkeypatch.setattr(torch.Tensor, "addmm_", watched)
    try:
        setattr(matmul, name, loose)
        with torch.autocast("cpu"):
            pr.initialise(model, [tiny.inputs(0)])
        assert getattr(matmul, name) == loose
    finally:
        setattr(matmul, name, before)
    assert set(seen) == {(tight, False)}
    assert statistics.processes() == 1
