"""TRL's trainers with the mixin: the same losses as elsewhere, the right reference model."""

import copy

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import polyrank as pr
from polyrank.testing import MODELS, assert_close

trl = pytest.importorskip("trl", reason="the extra `trl` is not installed")

# TRL's own defaults use names that transformers 5.2x renames, as their warnings say.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

WORDS = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, 32))]


@pytest.fixture(scope="module")
def words():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def text(row):
    return " ".join(WORDS[i] for i in row["input_ids"][row["attention_mask"] == 1])


class SFT(pr.TrainerMixin, trl.SFTTrainer):
    pass


class DPO(pr.TrainerMixin, trl.DPOTrainer):
    pass


METHODS = {
    "lora": ("lora", {}),
    "lora+": ("lora", {"lr_ratio": 16.0}),
    "smora": ("smora", {"balance": 0.01}),
}


@pytest.mark.parametrize(
    ("method", "accumulation", "recompute"),
    [
        ("lora", 1, False),
        ("lora+", 2, False),
        ("smora", 1, False),
        ("smora", 2, False),
        ("smora", 2, True),
    ],
)
def test_sft_equals_trainer_equals_a_plain_loop(
    tools, tmp_path, words, method, accumulation, recompute
):
    name, options = METHODS[method]
    rows = tools.rows(8)
    shared = {
        "gradient_accumulation_steps": accumulation,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
    }
    # In fp32, Adam's g / |g| turns the rounding of a gradient near zero into a step.
    options = {"dtype": torch.float64, **options}
    loop = tools.adapted(name, **options).double()
    wanted, _ = tools.loop(loop, rows, accumulation=accumulation, decay=0.1, clip=0.5)

    ours = tools.adapted(name, **options).double()
    trainer = pr.Trainer(ours, tools.arguments(tmp_path, **shared), train_dataset=rows)
    trainer.train()

    theirs = tools.adapted(name, **options).double()
    data = Dataset.from_dict(
        {"input_ids": [r["input_ids"][r["attention_mask"] == 1].tolist() for r in rows]}
    )
    sft = SFT(
        theirs,
        tools.arguments(tmp_path, trl.SFTConfig, gradient_checkpointing=recompute, **shared),
        train_dataset=data,
        processing_class=words,
    )
    sft.train()
    assert tools.losses(trainer) == wanted
    assert_close(tools.losses(sft), wanted, dtype=torch.float32)
    assert len(wanted) == 4 // accumulation
    assert wanted[0] != wanted[1]
    if name == "smora":
        assert torch.equal(tools.biases(theirs), tools.biases(loop))
        assert torch.equal(tools.biases(ours), tools.biases(loop))


def test_sft_without_the_mixin_stops(tools, tmp_path, words):
    rows = tools.rows(8)
    trainer = trl.SFTTrainer(
        tools.adapted("smora"),
        tools.arguments(tmp_path, trl.SFTConfig),
        train_dataset=Dataset.from_dict({"text": [text(row) for row in rows]}),
        processing_class=words,
    )
    with pytest.raises(pr.InertError, match="TrainerMixin"):
        trainer.train()


def preferences(tools, count):
    rows = tools.rows(3 * count, tokens=6)
    texts = [text(row) for row in rows]
    return Dataset.from_dict(
        {
            "prompt": texts[:count],
            "chosen": [f" {t}" for t in texts[count : 2 * count]],
            "rejected": [f" {t}" for t in texts[2 * count :]],
        }
    )


class Spying(DPO):
    """Compares the reference's log-probabilities of every batch with those of a given model."""

    def spy(self, before):
        self.before, self.pairs = before, []
        unspied = type(self.model).forward

        def forward(*args, **kwargs):
            out = unspied(self.model, *args, **kwargs)
            if not torch.is_grad_enabled():
                with torch.no_grad():
                    expected = self.before(*args, **kwargs)
                self.pairs.append((out.log_probs, expected.log_probs))
            return out

        self.model.forward = forward


@pytest.mark.parametrize(
    ("method", "start"),
    [("smora", "fresh"), ("smora", "trained"), ("smora", "config"), ("lora", "trained")],
)
def test_dpo_refers_to_the_model_before_the_phase(tools, tmp_path, words, method, start):
    name, options = METHODS[method]
    model, config = tools.adapted(name, **options), None
    if start == "trained":
        tools.loop(model, tools.rows(8), lr=0.05)
    elif start == "config":
        options = {"r": 8, **({"k": 2} if name == "smora" else {}), **options}
        config = pr.PolyrankConfig(
            method=name, options=options, target_modules=["q_proj", "v_proj"]
        )
        model = MODELS["llama"].build()
    trainer = Spying(
        model=model,
        args=tools.arguments(tmp_path, trl.DPOConfig, learning_rate=0.05),
        train_dataset=preferences(tools, 8),
        processing_class=words,
        peft_config=config,
    )
    model = trainer.model
    assert ("ref" in model.peft_config) is (start != "config")
    before = copy.deepcopy(model).eval()
    weights = tools.trained(before)
    trainer.spy(before)
    trainer.train()
    assert trainer.attachment.index == 4
    assert len(trainer.pairs) == 4
    for reference, expected in trainer.pairs:
        assert torch.equal(reference, expected)
    after = tools.trained(model)
    moved = [key for key in after if not torch.equal(after[key], weights[key])]
    assert moved
    assert all(".default." in key for key in moved), "the reference trained as well"
    margins = [e["rewards/margins"] for e in trainer.state.log_history if "rewards/margins" in e]
    assert float(margins[0]) == 0.0
    assert float(margins[-1]) != 0.0


def test_a_reference_forward_is_not_counted(tools, tmp_path, words):
    """Policy and reference see the same tokens; only the policy's choices move the bias."""
    model = tools.adapted("smora", balance=0.01)
    tools.loop(model, tools.rows(4))
    arguments = tools.arguments(tmp_path, trl.DPOConfig)
    data = preferences(tools, 4)
    trainer = DPO(model=model, args=arguments, train_dataset=data, processing_class=words)
    trainer.train()
    assert "ref" in model.peft_config
    for layer in pr.adapter_of(model, "ref").layers:
        assert layer.core.counts is None
        assert not layer.A.requires_grad
    assert {p.requires_grad for p in pr.adapter_of(model, "default").trained()} == {True}
