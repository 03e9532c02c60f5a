"""One answer against one reference: what the scores of generated text are means of.

Texts are compared in Unicode's composed form (NFC), so that é is one letter however it was typed.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeAlias

Grams: TypeAlias = Counter[tuple[str, ...]]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
# A capital that is no part of a Latin word or number; other scripts may stand right beside it.
_ALONE = re.compile(r"(?<![0-9A-Za-zÀ-ɏ_'’])[A-D](?![0-9A-Za-zÀ-ɏ_'’])")
_ARTICLE = re.compile(r"A[ \t]+(?!(?:is|because|since|as|and|or|an?|the)\b)[a-z]")
_SMALL = re.compile(r"\W*([a-d])(?:\W*$|[).:\]]\s)")
# The rules of mteval-v13a, which sacreBLEU and the usual implementations of SARI cut tokens by.
_CUTS = (
    (re.compile(r"([{-~\[-` -&(-+:-@/])"), r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
_LONGEST = 4


def composed(text: str) -> str:
    """The text in Unicode's composed form."""
    return unicodedata.normalize("NFC", text)


def normalised(text: str) -> str:
    """Lower-case, ASCII punctuation deleted, runs of white space one blank, none at the ends."""
    return " ".join(composed(text).lower().translate(_PUNCTUATION).split())


def choice(text: str) -> str | None:
    """The letter A, B, C or D that an answer chooses; None if it chooses none.

    The first capital A to D that stands alone, as in "B", "(B)", "B. because", "The answer is B";
    no letter of a word counts, nor does "A" as an article ("A plant needs light"). A small letter
    counts only as the whole answer or marked at its beginning: "b", "b) light".
    """
    text = composed(text)
    if small := _SMALL.match(text):
        return small[1].upper()
    found = (m for m in _ALONE.finditer(text) if not _ARTICLE.match(text, m.start()))
    return next((m[0] for m in found), None)


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words; 1 if neither text has a word.

    F = 2 L / (m + n),  L: length of the subsequence;  m, n: words of the two texts

    A word is what stands between blanks and marks, in lower case, not stemmed. Source: Lin,
    "ROUGE", 2004, with β = 1.
    """
    ours, theirs = _words(prediction), _words(reference)
    if not ours and not theirs:
        return 1.0
    return 2 * _common(ours, theirs) / (len(ours) + len(theirs))


def edit_similarity(prediction: str, reference: str) -> float:
    """1 − d / max(m, n), d: least number of inserted, deleted or replaced letters; 1 if both empty.

    Letters are code points as they stand, upper and lower case, blanks and all.
    """
    ours, theirs = composed(prediction), composed(reference)
    longest = max(len(ours), len(theirs))
    return 1 - _distance(ours, theirs) / longest if longest else 1.0


def sari(source: str, prediction: str, references: Sequence[str]) -> float:
    """How well a text was rewritten: mean of what was rightly kept, deleted and added.

    SARI = (1/3)(F_keep + P_delete + F_add), each the mean over n-grams of n = 1..4.

    Counts of source and prediction are taken times the number of references, as n-grams of all
    references are counted together; 0/0 is 1, so that an exact rewrite scores 1. Tokens are
    lower-case. Source: Xu, Napoles, Pavlick, Chen, Callison-Burch, TACL 4, 2016; the recall of
    kept n-grams sums counts as the equations say, where their program has a slip.
    """
    tokens = [_tokens(text) for text in (source, prediction, *references)]
    total = 0.0
    for n in range(1, _LONGEST + 1):
        before, after, *wanted = (_grams(each, n) for each in tokens)
        total += _keep_delete_add(before, after, sum(wanted, Counter()), len(wanted))
    return total / (3 * _LONGEST)


def _keep_delete_add(before: Grams, after: Grams, wanted: Grams, copies: int) -> float:
    old = Counter({gram: count * copies for gram, count in before.items()})
    new = Counter({gram: count * copies for gram, count in after.items()})
    kept, rightly_kept = old & new, old & new & wanted
    keep = _f_measure(
        _ratio(sum(rightly_kept[gram] / count for gram, count in kept.items()), len(kept)),
        _ratio(rightly_kept.total(), (old & wanted).total()),
    )
    gone = old - new
    rightly_gone = gone - wanted
    delete = _ratio(sum(rightly_gone[gram] / count for gram, count in gone.items()), len(gone))
    added, missing = after.keys() - before.keys(), wanted.keys() - before.keys()
    right = len(added & missing)
    add = _f_measure(_ratio(right, len(added)), _ratio(right, len(missing)))
    return keep + delete + add


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _f_measure(precision: float, recall: float) -> float:
    both = precision + recall
    return 2 * precision * recall / both if both else 0.0


def _words(text: str) -> list[str]:
    # Categories P and S are punctuation and symbols of all scripts.
    parts = (" " if unicodedata.category(c)[0] in "PS" else c for c in composed(text).lower())
    return "".join(parts).split()


def _tokens(text: str) -> list[str]:
    text = f" {composed(text).lower()} "
    for rule, cut in _CUTS:
        text = rule.sub(cut, text)
    return text.split()


def _grams(tokens: Sequence[str], n: int) -> Grams:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def _positions(values: Iterable[Hashable]) -> dict[Hashable, int]:
    """Bit i of a value's mask says that it stands at place i."""
    found: dict[Hashable, int] = {}
    for i, value in enumerate(values):
        found[value] = found.get(value, 0) | 1 << i
    return found


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, one row of the table as the bits of a number.

    Source: Hyyrö, "Bit-parallel LCS-length computation revisited", 2004; a cleared bit is a step.
    """
    places, full = _positions(a), (1 << len(a)) - 1
    row = full
    for value in b:
        match = row & places.get(value, 0)
        row = (row + match | row - match) & full
    return len(a) - bin(row).count("1")


def _distance(a: str, b: str) -> int:
    """Levenshtein distance, the steps down one column of the table as the bits of two numbers.

    Source: Myers, "A fast bit-vector algorithm", 1999, in the form of Hyyrö, 2001.
    """
    if not a:
        return len(b)
    places, full, last = _positions(a), (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, found = full, 0, len(a)
    for value in b:
        match = places.get(value, 0)
        level = ((match & up) + up ^ up) | match | down
        rise = (down | ~(level | up)) & full
        fall = up & level
        found += bool(rise & last) - bool(fall & last)
        rise, fall = rise << 1 | 1, fall << 1
        up = (fall | ~(match | down | rise)) & full
        down = rise & (match | down) & full
    return found
