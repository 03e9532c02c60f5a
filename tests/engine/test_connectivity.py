"""The path between I-LoRA's fast and slow learner: its ends are the two, and it changes nothing."""

import pytest
import torch

import polyrank as pr
from polyrank import engine
from polyrank.engine.reading import ImageReader
from polyrank.errors import ConfigError
from polyrank.reports import path_picture
from polyrank.testing.streams import few_digits, tiny_vit


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return engine.run(
        tiny_vit(),
        few_digits(rows=24, tasks=2),
        pr.method("lora", r=2),
        strategies=["ilora"],
        train={"epochs": 4, "batch_size": 8, "lr": 1e-2},
        references=[],
        out=tmp_path_factory.mktemp("path") / "run",
        progress=False,
    )


def test_the_ends_are_the_two_learners(ran, tmp_path):
    model, stream = ran.model, few_digits(rows=24, tasks=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast, slow = engine.adapter_state(model), engine.adapter_state(model, "slow")
    found = engine.connectivity(model, fast, slow, stream, ImageReader(), steps=5)
    assert found["position"] == [0, 0.25, 0.5, 0.75, 1]
    # Matrices of the run: the slow learner is the system's own, the fast one beside it.
    for column, task in enumerate(stream):
        assert found["scores"][task.name][0] == ran.system("lora@fast")["unrestricted"][1][column]
        assert found["scores"][task.name][-1] == ran.matrix[1, column]
    assert found["distance"] > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    written = path_picture(found, tmp_path / "path.png", ("fast", "slow"))
    assert written.read_bytes().startswith(b"\x89PNG")


def test_identical_ends_have_no_barrier(ran):
    stream = few_digits(rows=24, tasks=2)
    state = engine.adapter_state(ran.model)
    found = engine.connectivity(ran.model, state, state, stream, ImageReader(), steps=3)
    assert found["distance"] == 0
    assert set(found["barrier"].values()) == {0.0}


def test_a_path_needs_two_ends(ran):
    state = engine.adapter_state(ran.model)
    with pytest.raises(ConfigError, match="expected an integer >= 2"):
        engine.connectivity(ran.model, state, state, [], ImageReader(), steps=1)
