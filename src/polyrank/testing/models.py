"""Six tiny models of the families that adapters meet: the same bits in every process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyrank.frame import keyed

VOCABULARY = 32
BATCH, TOKENS = 3, 7
LABELS = 3
# Widths are no powers of two, so that a transposed factor cannot fit by accident.
HIDDEN, INNER = 24, 40
SPREAD = 0.1


@dataclass(frozen=True)
class Tiny:
    """One family: how to build it, what to feed it, where its answer stands.

    Args:
        name: the family's short name.
        make: returns an untrained model without dropout.
        kind: "tokens", "pairs" (encoder-decoder), "sentences", "images" or "captions".
        answer: field of the output that holds the answer.
    """

    name: str
    make: Callable[[], nn.Module]
    kind: str
    answer: str = "logits"

    @property
    def classifies(self) -> bool:
        """Whether the answer is one row of class logits for each sample."""
        return self.kind in ("images", "sentences")

    @property
    def speaks(self) -> bool:
        """Whether the answer is words, none of which may know those to come."""
        return self.kind in ("tokens", "pairs")

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the model in evaluation mode; its weights are drawn from a key."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(keyed("tiny", self.name).get_state())
            model = self.make()
        return model.to(dtype).eval()

    def inputs(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Return one batch with labels; texts are padded to different lengths."""
        rng = keyed("tiny", self.name, seed)
        if self.kind == "images":
            return {**_images(rng, dtype), "labels": _classes(rng)}
        batch = _texts(rng)
        if self.kind == "captions":
            # The pooled token is the one with the highest id.
            batch["input_ids"][:, 3] = VOCABULARY - 1
            return {**batch, **_images(rng, dtype), "return_loss": True}  # type: ignore[dict-item]
        if self.kind == "sentences":
            return {**batch, "labels": _classes(rng)}
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        if self.kind == "pairs":
            labels = torch.randint(3, VOCABULARY, (BATCH, TOKENS - 2), generator=rng)
            return {**batch, "labels": labels}
        return {**batch, "labels": labels}

    def tokenizer(self) -> Any:
        """Return a tokenizer of small letters, blanks and colons that fits the model.

        0 pads, 1 begins and 2 ends a text, 3 is unknown, 4 is "a"; CLIP's texts end with the
        highest token, which is the colon elsewhere.
        """
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers
        from tokenizers.pre_tokenizers import Split
        from tokenizers.processors import TemplateProcessing
        from transformers import PreTrainedTokenizerFast

        letters = [chr(ord("a") + i) for i in range(26)]
        captions = self.kind == "captions"
        last = ["<end>" if captions else ":"]
        known = ["<pad>", "<s>", "</s>", "<unk>", *letters, " ", *last]
        numbers = {token: number for number, token in enumerate(known)}
        bare = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
        bare.normalizer = normalizers.Lowercase()
        bare.pre_tokenizer = Split(Regex("."), "isolated")
        bare.decoder = decoders.Fuse()
        end = "<end>" if captions else "</s>"
        around = {"tokens": "<s> $A", "pairs": "$A </s>"}.get(self.kind, f"<s> $A {end}")
        bare.post_processor = TemplateProcessing(
            single=around,
            pair=f"{around} $B:1 {end}:1",
            special_tokens=[(token, numbers[token]) for token in ("<s>", end)],
        )
        names = ["input_ids", "attention_mask"]
        return PreTrainedTokenizerFast(
            tokenizer_object=bare,
            bos_token="<s>",
            eos_token=end,
            unk_token="<unk>",
            pad_token="<pad>",
            model_input_names=[*names, "token_type_ids"] if self.kind == "sentences" else names,
            clean_up_tokenization_spaces=False,
        )

    def read(self, output: Any) -> Tensor:
        """Return the answer of a forward, (batch, …)."""
        found: Tensor = getattr(output, self.answer)
        return found


def _texts(rng: torch.Generator) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY - 1, (BATCH, TOKENS), generator=rng)
    mask = torch.ones_like(ids)
    mask[1, TOKENS - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _images(rng: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 1, 8, 8, generator=rng).to(dtype)}


def _classes(rng: torch.Generator) -> Tensor:
    return torch.randint(0, LABELS, (BATCH,), generator=rng)


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=SPREAD,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=HIDDEN,
            n_inner=INNER,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=SPREAD,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            # Tied embeddings share memory, which safetensors cannot write.
            tie_word_embeddings=False,
        )
    )


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    options: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "d_model": HIDDEN,
        "d_kv": 6,
        "d_ff": INNER,
        "num_layers": 1,
        "num_decoder_layers": 1,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    return T5ForConditionalGeneration(T5Config(**options))


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    options: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": SPREAD,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": LABELS,
        "pad_token_id": 0,
    }
    return BertForSequenceClassification(BertConfig(**options))


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    options: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 1,
        "initializer_range": SPREAD,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": LABELS,
    }
    return ViTForImageClassification(ViTConfig(**options))


def _clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    shared = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "projection_dim": 16,
        "initializer_range": SPREAD,
        "attention_dropout": 0.0,
    }
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "bos_token_id": 1}
    text |= {"eos_token_id": VOCABULARY - 1, "pad_token_id": 0}
    vision = {"image_size": 8, "patch_size": 4, "num_channels": 1}
    return CLIPModel(
        CLIPConfig(
            text_config={**shared, **text},
            vision_config={**shared, **vision},
            projection_dim=16,
        )
    )


MODELS: dict[str, Tiny] = {
    tiny.name: tiny
    for tiny in (
        Tiny("llama", _llama, "tokens"),
        Tiny("gpt2", _gpt2, "tokens"),
        Tiny("t5", _t5, "pairs"),
        Tiny("bert", _bert, "sentences"),
        Tiny("vit", _vit, "images"),
        Tiny("clip", _clip, "captions", "logits_per_image"),
    )
}
