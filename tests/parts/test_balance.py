"""Balancing all layers at once is what each core would do alone."""

import torch

import polyrank as pr
from polyrank.layers import adapter_of
from polyrank.parts.rules import Balance
from polyrank.testing import assert_close


def test_layers_of_unequal_ranks_move_as_each_would_alone():
    torch.manual_seed(0)
    base = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(4)))
    method = pr.method("smora", r=4, k=2)
    model = pr.adapt(base, method, ["0", "1", "2", "3"], rank_pattern={"2": 8}, seed=0)
    adapter = adapter_of(model)
    cores = [layer.core for layer in adapter.layers]
    assert {core.widths[0] for core in cores} == {4, 8}
    expected, rule = [], Balance(0.25)
    rule.bind(adapter, None, None)
    for i, core in enumerate(cores):
        core.balance_bias.copy_(torch.randn(core.balance_bias.shape))
        # The last one saw no token.
        found = torch.randint(0, 5, (core.widths[0],)) if i < 3 else torch.zeros(4).long()
        core.counts = found if i < 3 else None
        shortage = found.double().mean() - found.double()
        expected.append(core.balance_bias + 0.25 * shortage.sign().float())
    rule.after(None)
    assert (expected[0] != cores[0].balance_bias).sum() == 0
    for core, bias in zip(cores, expected, strict=True):
        assert_close(core.balance_bias, bias)
        assert core.counts is None
    assert torch.equal(cores[3].balance_bias, expected[3])
