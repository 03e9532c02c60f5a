"""Scores of predictions: hand-computed values, empty answers, other scripts, refusals."""

import math
import random
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from polyrank import metrics
from polyrank.errors import ConfigError
from polyrank.metrics import RANGES, _texts, score
from polyrank.streams.kinds import METRICS

EXACT = 1e-12
TEXTS = ("exact_match", "choice_accuracy", "rouge_l", "edit_similarity")


def near(value):
    return pytest.approx(value, rel=0, abs=EXACT)


def one(name, prediction, reference):
    return score(name, [prediction], [reference])


def test_names_and_ranges_are_those_that_streams_may_ask_for():
    assert dict(RANGES) == dict(METRICS)


@pytest.mark.parametrize(
    ("prediction", "reference", "same"),
    [
        ("Very Positive.", "very positive", True),
        ("  very\n\tpositive ", "very positive", True),
        ("verypositive", "very positive", False),
        # Deleted, not turned into a blank: marks inside a word join its parts.
        ("well-known", "wellknown", True),
        ("good!?", "bad", False),
        ("", "", True),
        ("", "good", False),
        ("...", "", True),
        ("ÄRGER", "ärger", True),
        # Marks of other scripts stay.
        ("好。", "好", False),
        ("e\u0301", "\u00e9", True),
    ],
)
def test_exact_match_forgets_case_marks_and_blanks(prediction, reference, same):
    assert one("exact_match", prediction, reference) == same


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        (" (C) ", "C"),
        ("**D**", "D"),
        ("D.", "D"),
        ("B. Banana", "B"),
        # No letter of a word: the first capital A to D here is that of "Answer".
        ("Answer: B", "B"),
        ("Because of Carbon, C", "C"),
        ("The answer is B, not A.", "B"),
        ("A is right", "A"),
        ("A\nbecause of the rain", "A"),
        ("A, B", "A"),
        ("A plant needs light", None),
        ("A plant needs light, so C", "C"),
        ("b", "B"),
        ("b) light", "B"),
        ("b. Light", "B"),
        ("a cat", None),
        ("it is b", None),
        ("D'accord", None),
        ("B2", None),
        ("É", None),
        ("ÉA", None),
        ("答案是B。", "B"),
        ("E", None),
        ("", None),
        ("   ", None),
    ],
)
def test_which_letter_an_answer_chooses(answer, letter):
    assert _texts.choice(answer) == letter
    for wanted in "ABCD":
        assert one("choice_accuracy", answer, wanted) == (wanted == letter)


def test_an_empty_answer_counts_as_wrong():
    assert score("choice_accuracy", ["B", "", "C", ""], ["B", "B", "A", "A. rain"]) == 0.25
    assert score("exact_match", ["x", ""], ["x", "y"]) == 0.5
    assert score("rouge_l", ["x", ""], ["x", "y"]) == 0.5
    assert score("edit_similarity", ["x", ""], ["x", "yy"]) == 0.5


@pytest.mark.parametrize(
    ("prediction", "reference", "value"),
    [
        # "the cat": L = 2 of 3 and 5 words, so 4/8.
        ("the cat sat", "The cat on the mat.", 0.5),
        # Order counts: of "b a" only one word is common to "a b".
        ("b a", "a b", 0.5),
        # A gap does not: a, c, d, e of 4 and 6.
        ("a c d e", "a b c d x e", 0.8),
        ("", "", 1.0),
        ("?!", "", 1.0),
        ("", "a", 0.0),
        ("a", "", 0.0),
        ("straße, groß", "GROSS Straße", 0.5),
        ("don't", "don t", 1.0),
    ],
)
def test_rouge_l_by_hand(prediction, reference, value):
    assert one("rouge_l", prediction, reference) == near(value)


def test_rouge_l_is_the_mean_over_rows():
    found = score("rouge_l", ["the cat sat", "x", ""], ["the cat on the mat", "x", "y"])
    assert found == near((0.5 + 1 + 0) / 3)


@pytest.mark.parametrize(
    ("prediction", "reference", "value"),
    [
        ("kitten", "sitting", 1 - 3 / 7),
        ("abc", "abc", 1),
        ("abc", "ABC", 0),
        ("", "abc", 0),
        ("abc", "", 0),
        ("", "", 1),
        ("ab", "ba", 0),
        ("naïve", "naive", 0.8),
        ("日本語", "日本", 2 / 3),
        ("e\u0301", "\u00e9", 1),
    ],
)
def test_edit_similarity_by_hand(prediction, reference, value):
    assert one("edit_similarity", prediction, reference) == near(value)
    assert one("edit_similarity", reference, prediction) == near(value)


def table_of_distances(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


def table_of_common(a, b):
    rows = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            rows[i + 1][j + 1] = rows[i][j] + 1 if x == y else max(rows[i][j + 1], rows[i + 1][j])
    return rows[-1][-1]


def test_bits_count_what_tables_count():
    draws = random.Random(0)
    # Beyond 64 letters too, where a machine word would end.
    for length in [7] * 400 + [150] * 5:
        a, b = ("".join(draws.choices("abc", k=draws.randint(0, length))) for _ in range(2))
        longest = max(len(a), len(b), 1)
        distance = 1 - table_of_distances(a, b) / longest if a or b else 1
        assert one("edit_similarity", a, b) == near(distance)
        spaced = one("rouge_l", " ".join(a), " ".join(b))
        common = 2 * table_of_common(a, b) / (len(a) + len(b)) if a or b else 1
        assert spaced == near(common)


SOURCE = "About 95 species are currently accepted."
REFERENCES = [
    "About 95 species are currently known.",
    "About 95 species are now accepted.",
    "95 species are now accepted.",
]


def test_sari_of_the_published_example():
    # The example of EASSE and of Hugging Face's evaluate, which print 26.953601953601954.
    found = score("sari", ["About 95 you now get in."], [REFERENCES], [SOURCE])
    assert found == near(0.26953601953601954)


@pytest.mark.parametrize(
    ("source", "prediction", "references", "value"),
    [
        # Keep: precision 1, recall (2 of 3 counts), F 4/5; for pairs 0. Delete 1/2, 1/2. Else 1.
        ("a b", "a", ["a", "a b"], ((0.8 + 0 + 2) / 4 + (0.5 + 0.5 + 2) / 4 + 1) / 3),
        # Add: 1 of 1 and 1 of 2 words, F 2/3; the pair "a a" is in no reference: 0.
        ("", "a a", ["a", "b"], (1 + 1 + (2 / 3 + 0 + 2) / 4) / 3),
        # One reference, nothing changed: "c" should go. Keep 2/3: F 4/5; pairs 1/2: F 2/3;
        # triples 0 of 1. Delete: nothing was, 1. Add: nothing was to be, 1.
        ("a b c", "a b c", ["a b"], ((0.8 + 2 / 3 + 0 + 1) / 4 + 1 + 1) / 3),
        # Exactly what was asked for.
        ("a b c d e", "a c x", ["a c x"], 1),
        ("", "", [""], 1),
        ("", "", ["a"], (1 + 1 + 0.75) / 3),
        # An empty answer: all of the source was deleted, which was right for b alone.
        ("a b", "", ["a"], ((0 + 1 + 1 + 1) / 4 + (0.5 + 1 + 1 + 1) / 4 + 1) / 3),
    ],
)
def test_sari_by_hand(source, prediction, references, value):
    assert score("sari", [prediction], [references], [source]) == near(value)
    if len(references) == 1:
        assert score("sari", [prediction], references, [source]) == near(value)


def test_sari_is_the_mean_over_rows_and_cuts_marks_off():
    both = score("sari", ["About 95 you now get in .", "x"], [REFERENCES, "x"], [SOURCE, "x"])
    assert both == near((0.26953601953601954 + 1) / 2)
    assert _texts._tokens('Er sagt: "3.5, (gut)".') == [
        *("er", "sagt", ":", '"', "3.5", ",", "(", "gut", ")", '"', ".")
    ]


def test_the_best_of_several_references_counts():
    assert one("exact_match", "World", ["Sports", "world"]) == 1
    assert one("rouge_l", "a b", ["x", "a c", "a b c"]) == near(0.8)
    assert one("edit_similarity", "ab", ("cd", "abc")) == near(2 / 3)
    assert one("choice_accuracy", "C", ["A", "C"]) == 1


def test_classes_by_hand():
    wanted, given = [0, 0, 1, 1, 2], [0, 1, 1, 1, 0]
    # F1 of the classes: 2·1/(2+2) = 1/2, 2·2/(3+2) = 4/5, 0.
    assert score("accuracy", given, wanted) == 0.6
    assert score("f1", given, wanted) == near((0.5 + 0.8 + 0) / 3)
    names = ["b", "a", "a"]
    assert score("f1", names, ["b", "b", "a"]) == near((2 / 3 + 2 / 3) / 2)
    # 2 true positives, 1 true negative, 1 false positive: (2 - 0)/sqrt(3·2·2·1).
    assert score("matthews", [1, 1, 0, 1], [1, 1, 0, 0]) == near(2 / math.sqrt(12))
    assert score("matthews", [1, 1, 1], [1, 0, 1]) == 0
    assert score("matthews", [0, 1], [1, 0]) == near(-1)
    # A class that is never right and never predicted is left out, one only predicted is not.
    assert score("f1", [0, 5], [0, 0]) == near((2 / 3 + 0) / 2)


def test_numbers_by_hand():
    wanted, given = [1.0, 2.0, 4.0], [1.0, 3.0, 4.0]
    assert score("negative_mse", given, wanted) == near(-1 / 3)
    # Deviations from 7/3: squares sum to 42/9.
    assert score("r2", given, wanted) == near(1 - 1 / (42 / 9))
    assert score("spearman", [10, 20, 15], [1, 2, 3]) == near(0.5)
    assert score("spearman", [1, 8, 27], [1, 2, 3]) == near(1)
    assert score("pearson", [1, 2, 3], [-2, -4, -6]) == near(-1)
    assert score("pearson", [5.0, 5.0, 5.0], wanted) == 0
    assert score("spearman", [5.0, 5.0, 5.0], wanted) == 0
    assert score("r2", [1e3] * 3, wanted) < -1e5


@pytest.mark.parametrize("seed", range(5))
def test_correlations_are_those_of_scipy(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=40).round(1), rng.normal(size=40).round(1)
    assert score("pearson", a, b) == near(stats.pearsonr(a, b).statistic)
    assert score("spearman", a, b) == near(stats.spearmanr(a, b).statistic)


def test_arrays_and_tensors():
    torch = pytest.importorskip("torch")
    ints, floats = [1, 0, 2, 2], [0.5, 0.25, 4.0, 1.0]
    for make in (np.array, torch.tensor, tuple):
        assert score("accuracy", make(ints), [1, 0, 2, 0]) == 0.75
        assert score("negative_mse", make(floats), floats) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("accurate", [1], [1]), "score: got 'accurate', expected one of.*did you mean 'accuracy'"),
        (("negative_loss", [1.0], [1.0]), "log-likelihood of a token under the model; take that"),
        (("accuracy", [], []), "accuracy: predictions: got none, expected at least one"),
        (("accuracy", [1, 2], [1]), "accuracy: references: got 1, expected 2, one per prediction"),
        (("exact_match", "one", ["one"]), "predictions: got str, expected a list"),
        (("exact_match", ["one"], 3), "references: got int, expected a list"),
        (("exact_match", ["a", None], ["a", "b"]), "predictions: got NoneType in row 1"),
        (("rouge_l", ["a"], [[]]), r"references: got \[\] in row 0, expected a text or a list"),
        (("rouge_l", ["a"], [["b", 3]]), r"references: got \['b', 3\] in row 0"),
        (("choice_accuracy", ["A"], ["rain"]), "references: got 'rain' in row 0.*chooses A, B, C"),
        (("sari", ["a"], ["a"]), "sari: sources: got none, expected the text of each row"),
        (("sari", ["a"], ["a"], ["a", "b"]), "sari: sources: got 2, expected 1"),
        (("sari", ["a"], ["a"], [3]), "sari: sources: got int in row 0"),
        (("rouge_l", ["a"], ["a"], ["a"]), "sources: 'rouge_l' reads none; leave them out"),
        (("f1", [0, 1], ["0", "1"]), "f1: got values of int, str, expected class numbers or"),
        (("accuracy", [0.5], [1]), "accuracy: got values of float, int"),
        (("pearson", [1, math.nan], [1, 2]), "predictions: got nan in row 1.*diverged"),
        (("negative_mse", [1.0], [math.inf]), "references: got inf in row 0"),
        (("negative_mse", [1e300, 1], [0, 1]), "negative_mse: got -inf, the predictions are too"),
        (("pearson", [1, 2], [3, 3]), "references: got 2 equal to 3, expected at least two"),
        (("spearman", [1], [2]), "spearman: references: got 1 equal to 2"),
        (("r2", [1, 2], [3, 3]), "use negative_mse"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_malformed_input_is_refused_with_the_remedy(call, message):
    with pytest.raises(ConfigError, match=message):
        score(*call)


def test_all_faults_at_once():
    with pytest.raises(ConfigError) as caught:
        score("sari", ["a", "b"], ["a"])
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("name", [n for n in RANGES if n != "negative_loss"])
def test_the_best_predictions_reach_the_upper_end(name):
    low, high = RANGES[name]
    if name in ("pearson", "spearman", "r2", "negative_mse"):
        rows = [0.1, 0.7, 0.3, 1 / 3]
    elif name in ("accuracy", "f1", "matthews"):
        rows = [0, 1, 2, 1]
    else:
        rows = ["A", "B. mild rain", "(C)", "D"]
    sources = ["x"] * 4 if name == "sari" else None
    assert score(name, rows, rows, sources) == near(high)
    assert low < high
    worse = score(name, rows[::-1], rows, sources)
    assert low <= worse < high


def test_scores_enter_the_matrix_with_their_range():
    for name, limits in RANGES.items():
        value = max(limits[0], -7.5)
        assert metrics.average_accuracy([[value]], limits=limits) == value, name


def test_libraries_are_loaded_when_they_are_needed():
    code = (
        "import sys; from polyrank.metrics import score; score('rouge_l', ['a'], ['a'])\n"
        "print([m for m in ('sklearn', 'scipy', 'torch') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
