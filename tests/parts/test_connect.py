"""What lies between two adapters: both roads, the barrier, and the distances."""

import pytest
import torch
from torch import nn

import polyrank as pr
from polyrank.parts.connect import along, barrier, between, distance, place, similarity
from polyrank.testing import assert_close

GRID = [0.0, 0.25, 0.5, 0.75, 1.0]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def adapted(r=3, **options):
    torch.manual_seed(0)
    made = pr.method("lora", r=r, scaling=2.0, **options)
    return pr.adapt(Net(), made, ["first", "second"], seed=0).to(torch.float64)


def states(ranks=(3, 3)):
    found = []
    for seed, r in enumerate(ranks):
        model = adapted(r)
        torch.manual_seed(seed + 1)
        with torch.no_grad():
            for p in pr.adapter_of(model).named().values():
                p.normal_()
        found.append({n: p.detach() for n, p in pr.adapter_of(model).named().items()})
    return found


def inputs():
    torch.manual_seed(7)
    return torch.randn(11, 5, dtype=torch.float64)


def answers(state, r=3):
    model = adapted(r)
    place(pr.adapter_of(model), state)
    with torch.no_grad():
        return model(inputs())


def test_ilora_12_the_ends_of_both_roads_are_the_two_models():
    first, second = states()
    for t, end in ((0.0, first), (1.0, second)):
        state = between(first, second, t)
        assert all(torch.equal(state[name], value) for name, value in end.items())
        assert_close(answers(between(first, second, t, path="product"), r=6), answers(end))


def test_ilora_12_identical_ends_have_no_barrier():
    first, _ = states()
    losses = along(first, first, GRID, lambda state: float(answers(state).square().mean()))
    assert barrier(losses, GRID) == 0
    assert distance(first, first) == 0


def test_on_the_product_road_the_updates_are_mixed_and_not_the_factors():
    first, second = states((3, 2))
    state = between(first, second, 0.3, path="product")
    for path in ("first", "second"):
        A, B = (state[f"{path}.{side}.0"] for side in "AB")
        assert A.shape[0] == B.shape[1] == 5
        ends = [s[f"{path}.B.0"] @ s[f"{path}.A.0"] for s in (first, second)]
        assert_close(B @ A, 0.7 * ends[0] + 0.3 * ends[1])
    mixed = between(*states(), 0.5)
    apart = [0.5 * s["first.B.0"] @ s["first.A.0"] for s in states()]
    assert not torch.allclose(mixed["first.B.0"] @ mixed["first.A.0"], sum(apart))


def test_both_roads_agree_where_one_factor_is_shared():
    first, second = states()
    second = {n: first[n] if ".A." in n else v for n, v in second.items()}
    product = answers(between(first, second, 0.4, path="product"), r=6)
    assert_close(answers(between(first, second, 0.4)), product)


def test_the_barrier_is_the_greatest_height_over_the_line_between_the_ends():
    assert barrier([1.0, 2.0, 5.0, 2.0, 3.0], GRID) == pytest.approx(3.0)
    assert barrier([1.0, 0.0, 0.0, 0.0, 3.0], GRID) == 0
    for losses, grid in (([1.0], [0.0]), ([1.0, 2.0], [0.0, 0.5]), ([1.0], GRID)):
        with pytest.raises(pr.ConfigError, match="expected as many, from 0 to 1"):
            barrier(losses, grid)


def test_the_distance_is_that_of_all_tensors_together():
    first, second = states()
    flat = [torch.cat([s[name].reshape(-1) for name in sorted(s)]) for s in (first, second)]
    assert_close(distance(first, second), float((flat[0] - flat[1]).norm()))


@pytest.mark.parametrize("width", [3, 30])
def test_similarity_knows_no_rotation_scale_or_shift(width):
    torch.manual_seed(0)
    x = torch.randn(12, width, dtype=torch.float64)
    Q, _ = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))
    assert_close(similarity(x, 3 * x @ Q + 1), 1.0)
    y = torch.randn(12, 5, dtype=torch.float64)
    found = similarity(x, y)
    assert 0 < found < 1
    assert_close(similarity(y, x), found)
    K, L = ((side - side.mean(0)) @ (side - side.mean(0)).T for side in (x, y))
    assert_close(found, float((K * L).sum() / (K.norm() * L.norm())))


def test_what_does_not_fit_together_is_named_before_anything_is_copied():
    first, second = states((3, 2))
    with pytest.raises(pr.ConfigError) as caught:
        between(first, second, 0.5)
    assert len(caught.value.problems) == 4
    assert "product path alone" in str(caught.value)
    model = adapted()
    before = {n: p.clone() for n, p in pr.adapter_of(model).named().items()}
    part = {name: value for name, value in first.items() if name != "second.B.0"}
    with pytest.raises(pr.ConfigError, match=r"'second\.B\.0' is in one of the two only"):
        place(pr.adapter_of(model), part)
    with pytest.raises(pr.ConfigError):
        distance(first, second)
    for name, value in pr.adapter_of(model).named().items():
        assert torch.equal(value, before[name])
    with pytest.raises(pr.ConfigError, match="path: got 'line'"):
        between(first, first, 0.5, path="line")
    core = [{**s, "first.core.0": torch.full((2,), float(i))} for i, s in enumerate([first, first])]
    with pytest.raises(pr.ConfigError, match="belongs to a core and differs"):
        between(*core, 0.5, path="product")


def test_saved_names_are_factors_too():
    first, second = (
        {f"base_model.model.fc.polyrank_{n[6]}.weight": v for n, v in s.items() if n[:5] == "first"}
        for s in states((3, 2))
    )
    state = between(first, second, 0.5, path="product")
    assert state["base_model.model.fc.polyrank_A.weight"].shape == (5, 5)
    assert state["base_model.model.fc.polyrank_B.weight"].shape == (6, 5)


def test_features_that_cannot_be_compared_are_refused():
    x = torch.randn(4, 3)
    for bad in ((x, x[:3]), (x[None], x[None]), (x[:1], x[:1])):
        with pytest.raises(pr.ConfigError, match="the same rows, two at least"):
            similarity(*bad)
    with pytest.raises(pr.ConfigError, match="the same for all rows"):
        similarity(x, torch.ones(4, 3))
