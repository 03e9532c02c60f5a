"""The kinds of tasks: which columns each needs, what its rows hold, and how it is scored.

This is the one place that says what a row is. "task" is the number of the task in the stream,
"label" the number of the class in the order in which the stream shows them first.

| kind | row |
|---|---|
| sequence-classification | "text" str, "text_pair" str if the file names one, "label" int |
| text-to-label | "prompt" str, "answer" str (the label's name), "label" int |
| generation | "prompt" str, "answer" str |
| image-classification | "image" uint8 (height, width, channels), "label" int; or "pixel_values" |
| image-text | "image" uint8 (height, width, channels), "label" int |
| language-modelling | "text" str |
| regression | "text" str, "text_pair" str if the file names one, "target" float |

and "task" int in every row. Text is not tokenised and images are neither resized nor normalised:
that belongs to the model and happens where rows are made into batches. A row with "pixel_values",
float32 (channels, height, width), is ready for its model as it is, as those of `digits` are.
Text-to-label and generation serve causal and encoder-decoder models alike: the model reads the
prompt and writes the answer. For image-text, the text of a class is the task's prompt with the
label's name put in for {label}, and the classes of all tasks compete.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

# Scores a task may name, each with its range; of every one more is better.
METRICS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "accuracy": (0.0, 1.0),
        "exact_match": (0.0, 1.0),  # after lower-casing, without punctuation and doubled blanks
        "choice_accuracy": (0.0, 1.0),  # of the answer's first letter, for A, B, C, D
        "edit_similarity": (0.0, 1.0),
        "f1": (0.0, 1.0),
        "matthews": (-1.0, 1.0),
        "negative_loss": (-float("inf"), 0.0),  # mean log-likelihood of a token, in nats
        "negative_mse": (-float("inf"), 0.0),
        "pearson": (-1.0, 1.0),
        "r2": (-float("inf"), 1.0),
        "rouge_l": (0.0, 1.0),
        "sari": (0.0, 1.0),
        "spearman": (-1.0, 1.0),
    }
)
_CLASSES = ("accuracy", "f1", "matthews")
_TEXTS = ("exact_match", "choice_accuracy", "rouge_l", "sari", "edit_similarity")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What tasks of one kind need and how they are scored."""

    about: str
    fields: tuple[str, ...]  # columns that must be there
    optional: tuple[str, ...] = ()
    labelled: bool = False  # whether tasks have classes
    prompted: bool = False  # whether a row's text is made by the prompt
    metrics: tuple[str, ...] = ()  # the first one unless the file names another


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "sequence-classification": Kind(
            about="a text, or a pair of texts, gets one of the labels",
            fields=("text", "label"),
            optional=("text_pair", "label_name"),
            labelled=True,
            metrics=_CLASSES,
        ),
        "text-to-label": Kind(
            about="a language model writes the name of the label",
            fields=("label",),
            optional=("text", "prompt", "label_name"),
            labelled=True,
            prompted=True,
            metrics=_TEXTS,
        ),
        "generation": Kind(
            about="a language model writes an answer",
            fields=("answer",),
            optional=("text", "prompt"),
            prompted=True,
            metrics=_TEXTS,
        ),
        "image-classification": Kind(
            about="an image gets one of the labels",
            fields=("image", "label"),
            optional=("label_name",),
            labelled=True,
            metrics=_CLASSES,
        ),
        "image-text": Kind(
            about="an image is matched with the texts of all classes, as CLIP does",
            fields=("image", "label"),
            optional=("label_name",),
            labelled=True,
            metrics=_CLASSES,
        ),
        "language-modelling": Kind(
            about="a language model predicts each next token",
            fields=("text",),
            metrics=("negative_loss",),
        ),
        "regression": Kind(
            about="a text, or a pair of texts, gets a number",
            fields=("text", "target"),
            optional=("text_pair",),
            metrics=("pearson", "spearman", "r2", "negative_mse"),
        ),
    }
)
FIELDS = tuple(dict.fromkeys(f for k in KINDS.values() for f in (*k.fields, *k.optional)))
