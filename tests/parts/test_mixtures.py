"""Cores of mixtures on their own; methods/test_moe_lora.py holds them inside a layer."""

import pytest
import torch

from polyrank.errors import ConfigError, MergeError
from polyrank.frame import Flow, Site, keyed
from polyrank.parts.cores import RankGate
from polyrank.parts.inits import Gaussian
from polyrank.parts.mixtures import Blocks, Expand, Merged, Mixer, TaskGate
from polyrank.parts.routers import Choice
from polyrank.testing import assert_close

SITE = Site(path="deep.fc", d_in=50, d_out=5, r=6)


def filled(core, seed=0):
    with torch.no_grad():
        core.fill(keyed(seed))
    return core


def draws(*tokens):
    torch.manual_seed(0)
    return torch.randn(*tokens, 6, dtype=torch.float64), torch.randn(
        *tokens, 3, dtype=torch.float64
    )


def test_blocks_in_plain_python_are_the_rank_gate():
    h, z = draws(2, 9)
    for k in (1, 2, 3):
        core = Blocks(SITE, 3, 2, Choice("softmax", k=k))
        gate = RankGate(SITE, k=2 * k, block=2, score="softmax", total=2, balance=False)
        assert_close(core(h, z, Flow()), gate(h, z, Flow()))
        assert_close(core.gates_of(h, z), gate.gates_of(h, z))
        mine, theirs = core.fused(), gate.fused()
        assert (mine.k, mine.block, mine.sum) == (theirs.k, theirs.block, theirs.sum)


@pytest.mark.parametrize(
    ("form", "widths"), [(Blocks, (6, 6)), (Expand, (2, 6)), (Merged, (6, 6))], ids=lambda v: str(v)
)
def test_widths_tell_rows_of_a_and_columns_of_b(form, widths):
    core = form(SITE, 3, 2, Choice("softmax", k=3))
    assert core.widths == widths
    h, z = draws(4)
    assert core(h[:, : widths[0]], z, Flow()).shape == (4, widths[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", [Blocks, Expand, Merged])
def test_weights_are_multiplied_before_rounding(form, dtype):
    core = form(SITE, 3, 2, Choice("softmax", k=3))
    h, z = draws(64)
    h = h[:, : core.widths[0]].to(dtype)
    q = core(h, z.float(), Flow())
    assert q.dtype == dtype
    # At most one rounding, of the result: half a unit in the last place of each number.
    exact = core(h.double(), z, Flow())
    bound = exact.abs() * (torch.finfo(dtype).eps / 2) + 1e-6
    assert ((q.double() - exact).abs() <= bound * (1 + 1e-3)).all()


def test_gumbel_gates_shown_are_those_of_evaluation():
    h, z = draws(5)
    core = Blocks(SITE, 3, 2, Choice("gumbel", tau=0.1)).train()
    assert core.gates_of(h, z).unique().tolist() == [0, 1]


def test_two_layers_draw_different_noise():
    h, z = draws(50)
    first = Blocks(SITE, 3, 2, Choice("gumbel")).train()
    second = Blocks(Site(path="other", d_in=50, d_out=5, r=6), 3, 2, Choice("gumbel")).train()
    assert torch.equal(first(h, z, Flow()), first(h, z, Flow()))
    assert not torch.equal(first(h, z, Flow()), second(h, z, Flow()))


def test_a_mixture_refuses_a_bank():
    with pytest.raises(ConfigError, match="got 4 frozen ranks before 3 experts"):
        Blocks(SITE, 3, 2, Choice("top1")).banked(4)


def test_routers_start_within_their_bound():
    core = filled(Blocks(SITE, 3, 2, Choice("top1")))
    bound = 1 / 50**0.5
    assert core.router.weight.abs().max() <= bound
    assert core.router.weight.abs().max() > 0.9 * bound


def test_task_gate_starts_as_an_embedding_and_a_linear_map():
    gate = filled(TaskGate(SITE, 3, 2, tasks=40, width=64))
    assert gate.table.shape == (40, 64)
    assert abs(gate.table.std().item() - 1) < 0.05
    assert gate.router.weight.abs().max() <= 1 / 8
    assert torch.equal(gate.table, filled(TaskGate(SITE, 3, 2, 40, 64)).table)
    assert not torch.equal(gate.table, filled(TaskGate(SITE, 3, 2, 40, 64), seed=1).table)


def test_task_gate_and_its_matrix():
    gate = filled(TaskGate(SITE, 3, 2, tasks=4, width=8)).double()
    h, _ = draws(3, 7)
    q = gate(h, None, Flow(condition=torch.tensor([[3], [0], [3]])))
    omega = (gate.router.weight @ gate.table[3]).softmax(0)
    assert_close(q[0], h[0] * omega.repeat_interleave(2))
    for n, task in enumerate((3, 0, 3)):
        assert_close(q[n], h[n] @ gate.delta(torch.tensor([task])).T)
    with pytest.raises(MergeError, match=r"deep.fc.*merge for one task"):
        gate.delta()


def test_only_the_tasks_of_a_batch_move():
    gate = filled(TaskGate(SITE, 3, 2, tasks=4, width=8)).double()
    h, _ = draws(2, 7)
    gate(h, None, Flow(condition=torch.tensor([2, 1]))).square().sum().backward()
    assert (gate.table.grad != 0).any(1).tolist() == [False, True, True, False]


def test_mixer_is_its_matrix():
    mixer = filled(Mixer(6))
    h, _ = draws(3)
    assert mixer.weight.abs().max() <= 1 / 6**0.5
    assert_close(mixer.double()(h, None, Flow()), h @ mixer.delta().T)


def test_gaussian_start():
    class Layer:
        A, B, core = torch.empty(30, 400), torch.ones(7, 30), Mixer(30)

    with torch.no_grad():
        Gaussian(0.01).fill(Layer, None, keyed(0))
    assert abs(Layer.A.std().item() - 0.01) < 0.0003
    assert not Layer.B.any()
    assert Layer.core.weight.isfinite().all()
