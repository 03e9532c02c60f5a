"""Balancing all layers at once is what each core would do alone."""

import pytest
import torch

import polyrank as pr
from polyrank.errors import ConfigError
from polyrank.layers import adapter_of
from polyrank.parts import cores
from polyrank.parts.rules import Balance
from polyrank.testing import assert_close


def test_layers_of_unequal_ranks_move_as_each_would_alone():
    torch.manual_seed(0)
    base = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(4)))
    method = pr.method("smora", r=4, k=2)
    model = pr.adapt(base, method, ["0", "1", "2", "3"], rank_pattern={"2": 8}, seed=0)
    adapter = adapter_of(model)
    gates = [layer.core for layer in adapter.layers]
    assert {core.widths[0] for core in gates} == {4, 8}
    expected, rule = [], Balance(0.25)
    rule.bind(adapter, None, None)
    for i, core in enumerate(gates):
        core.balance_bias.copy_(torch.randn(core.balance_bias.shape))
        # The last one saw no token.
        found = torch.randint(0, 5, (core.widths[0],)) if i < 3 else torch.zeros(4).long()
        core.counts = found if i < 3 else None
        shortage = found.double().mean() - found.double()
        expected.append(core.balance_bias + 0.25 * shortage.sign().float())
    rule.after(None)
    assert (expected[0] != gates[0].balance_bias).sum() == 0
    for core, bias in zip(gates, expected, strict=True):
        assert_close(core.balance_bias, bias)
        assert core.counts is None
    assert torch.equal(gates[3].balance_bias, expected[3])


def test_what_replays_of_a_graph_count_reaches_the_rule(monkeypatch):
    model = pr.adapt(
        torch.nn.Sequential(torch.nn.Linear(6, 6)), pr.method("smora", r=4, k=2), ["0"], seed=0
    )
    core, rule = adapter_of(model).layers[0].core, Balance(0.25)
    rule.bind(adapter_of(model), None, None)
    before = core.balance_bias.clone()
    monkeypatch.setattr(cores, "capturing", lambda counts: True)
    with pytest.raises(ConfigError, match="make an update without the graph, then capture"):
        core.count(torch.tensor([4, 0, 0, 0]))
    # What the first eager update on a GPU makes.
    core.kept = kept = torch.zeros(4, dtype=torch.int64)
    core.count(torch.tensor([4, 0, 0, 0]))
    for _ in range(2):
        # A replay adds to the memory that the captured step added to, and runs nothing else.
        kept += torch.tensor([0, 4, 0, 0])
        rule.after(None)
        assert core.counts is None
        assert not kept.any()
    shift = torch.tensor([-0.25, -0.25, 0.25, 0.25]) + torch.tensor([0.25, -0.25, 0.25, 0.25])
    assert_close(core.balance_bias, before + shift)


def test_a_bias_that_is_no_parameter_any_more_still_chooses():
    model = pr.adapt(
        torch.nn.Sequential(torch.nn.Linear(6, 6)), pr.method("smora", r=4, k=2), ["0"]
    )
    core = next(m for m in model.modules() if isinstance(m, cores.RankGate))
    bias = core._parameters.pop("balance_bias").detach() + torch.tensor([3.0, 0, 0, 3])
    # As wrappers do that keep all parameters in one tensor of theirs.
    vars(core)["balance_bias"] = bias
    assert core.fused().bias is bias
