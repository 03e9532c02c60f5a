"""The contract over the registry: a method is covered by being registered.

`pytest tests/contracts -k smora-0-llama` runs one case, `-k "neutral and smora"` one promise.
By default the first sample of a method stands in every model and the others in two;
`--every-case` runs every sample in every model, as the CI does.
"""

import json
import os
from pathlib import Path

import pytest
from filelock import FileLock

import polyrank.methods
from polyrank.errors import ConfigError
from polyrank.frame import Method, Strategy, get, method, names, slug
from polyrank.testing import CHECKS, MODELS, check_method, contract_cases, fresh_problems

CASES = contract_cases()


def covering(cases):
    """The cases that show each method every model, and each further sample two of them.

    What a sample varies is an option, and where a model is odd all samples of a method meet it in
    the same layers; the second model goes round, so that the samples share out all of them.
    """
    found = []
    for case in cases:
        first, *others = models_of(case.method)
        second = others[(case.index - 1) % len(others)]
        if case.index == 0 or case.tiny.name in (first, second):
            found.append(case)
    return found


def models_of(method):
    """The models that a method or its class may act in."""
    return [name for name, tiny in MODELS.items() if method.words or not tiny.speaks]


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        every = metafunc.config.getoption("--every-case")
        metafunc.parametrize("case", CASES if every else covering(CASES), ids=str)


@pytest.mark.parametrize("check", CHECKS)
def test_contract(check, case):
    CHECKS[check](case)


@pytest.fixture(scope="module")
def fresh(request, tmp_path_factory):
    """What went wrong in a fresh process, for the cases that this run selected."""
    wanted = {
        item.callspec.params["case"]
        for item in request.session.items
        if item.path == request.path and "fresh" in item.fixturenames
    }
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return fresh_problems(wanted)
    # Every worker comes here; the first one does the work for all.
    shared = tmp_path_factory.getbasetemp().parent / "fresh.json"
    with FileLock(f"{shared}.lock"):
        if not shared.is_file():
            shared.write_text(json.dumps(fresh_problems(wanted)))
    return json.loads(shared.read_text())


def test_same_bits_in_a_fresh_process(case, fresh):
    assert fresh[str(case)] == ""


def shipped():
    files = Path(polyrank.methods.__file__).parent.glob("[!_]*.py")
    return {slug(file.stem): get(file.stem) for file in files}


def test_every_registered_method_is_covered_with_every_sample_in_every_model():
    methods = {name: cls for name, cls in shipped().items() if issubclass(cls, Method)}
    assert set(shipped()) <= set(names())
    assert {"lora", "smora"} <= set(methods)
    assert len(MODELS) == 6
    expected = sum(len(cls.samples()) * len(models_of(cls)) for cls in methods.values())
    assert len(CASES) == len({str(case) for case in CASES}) == expected
    assert {(case.method.name, case.tiny.name) for case in CASES} == {
        (name, tiny) for name, cls in methods.items() for tiny in models_of(cls)
    }
    # Nobody is excused by chance.
    assert [name for name, cls in methods.items() if not cls.words] == ["sema"]


def test_each_method_meets_all_its_models_and_each_sample_two_of_them():
    chosen = covering(CASES)
    assert {(c.method.name, c.tiny.name) for c in chosen} == {
        (c.method.name, c.tiny.name) for c in CASES
    }
    for case in chosen:
        met = [c for c in chosen if (c.method, c.index) == (case.method, case.index)]
        models = models_of(case.method)
        assert len(met) == (len(models) if case.index == 0 else 2)
        assert models[0] in {c.tiny.name for c in met}


def strategies():
    return [(name, cls) for name, cls in sorted(shipped().items()) if issubclass(cls, Strategy)]


@pytest.mark.parametrize(("name", "cls"), strategies(), ids=str)
def test_samples_of_strategies_are_sound_and_survive_json(name, cls):
    assert cls.samples()
    for sample in cls.samples():
        assert sample.checks() == []
        assert method(name, **sample.options()) == sample
        assert [rule.order for rule in sample.all_rules()] == sorted(
            rule.order for rule in sample.all_rules()
        )


def test_third_parties_call_one_function():
    assert check_method("lora", models=["llama"], checks=["neutral", "size"]) == 4 * 2


def test_an_unknown_model_is_refused():
    with pytest.raises(ConfigError, match=r"got \['lama'\], expected some of llama"):
        contract_cases("lora", models=["lama"])


def test_a_contract_held_against_nothing_fails():
    with pytest.raises(AssertionError, match="against nothing"):
        check_method("lora", models=[])
