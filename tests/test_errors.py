"""The exception classes: their bases, the list of problems, the suggestion of a near name."""

import pickle

import pytest

from polyrank import errors

BASES = [
    ("ConfigError", ValueError),
    ("StreamError", ValueError),
    ("MergeError", ValueError),
    ("CheckpointError", ValueError),
    ("InertError", RuntimeError),
    ("RunError", RuntimeError),
]


@pytest.mark.parametrize(("name", "base"), BASES, ids=[name for name, _ in BASES])
def test_every_error_is_ours_and_the_builtin_kind(name, base):
    with pytest.raises(errors.PolyrankError, match="what happened") as caught:
        raise getattr(errors, name)("what happened")
    assert isinstance(caught.value, base)


def test_no_error_class_is_missing_from_the_list():
    found = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.PolyrankError)
    }
    assert found == {"PolyrankError", *(name for name, _ in BASES)}


def test_stream_error_is_a_config_error():
    assert issubclass(errors.StreamError, errors.ConfigError)


def test_config_error_takes_one_problem():
    error = errors.ConfigError("r: got 0, expected >= 1")
    assert error.problems == ["r: got 0, expected >= 1"]
    assert str(error) == "r: got 0, expected >= 1"


def test_config_error_lists_all_problems_one_per_line():
    error = errors.ConfigError(f"fault {number}" for number in range(3))
    assert error.problems == ["fault 0", "fault 1", "fault 2"]
    assert str(error).splitlines() == error.problems


def test_config_error_without_a_problem_is_refused():
    with pytest.raises(ValueError, match="got no problem"):
        errors.ConfigError([])


def test_problems_survive_a_process_boundary():
    error = pickle.loads(pickle.dumps(errors.StreamError(["one", "two"])))
    assert type(error) is errors.StreamError
    assert error.problems == ["one", "two"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("lora_alhpa", " did you mean 'lora_alpha'?"),
        ("targets", " did you mean 'target_modules'?"),
        ("SMORA", " did you mean 'smora'?"),
        ("zzz", ""),
    ],
)
def test_nearest(word, expected):
    words = ["r", "lora_alpha", "dropout", "target_modules", "smora"]
    assert errors.nearest(word, words) == expected
    assert errors.nearest(word, reversed(words)) == expected


def test_nearest_keeps_the_spelling_of_the_known_name():
    assert errors.nearest("arrow", iter(["ARROW"])) == " did you mean 'ARROW'?"


def test_nearest_of_nothing():
    assert errors.nearest("word", []) == ""
