"""replay and der: what is asked of the store, and what stored logits owe."""

import pytest
import torch
import torch.nn.functional as F

import polyrank as pr
from polyrank.frame import Out, Replay
from polyrank.testing import assert_close

NAN = float("nan")


def test_replay_mixes_rows_into_the_task_loss():
    found = pr.method("replay", capacity=0.1, by="class", ratio=0.5, bytes=1000).replay()
    assert found == Replay(capacity=0.1, by="class", ratio=0.5, bytes=1000, shared=True)
    assert pr.method("replay").losses() == []
    assert pr.method("replay").boundary() is None


def test_der_keeps_logits_and_reads_current_rows_alone():
    plain, plus = pr.method("der").replay(), pr.method("der", plus=True).replay()
    assert (plain.draws, plus.draws) == (1, 2)
    assert plain.stores == plus.stores == {"logits"}
    assert not plain.shared
    assert not plus.shared


def test_constraints_keep_rows_and_put_none_into_batches():
    assert pr.method("gem").replay() == Replay(by="task", ratio=0.0)
    assert pr.method("agem").replay() == Replay(by="task", ratio=0.0)
    assert pr.method("agem", by="stream").replay().by == "stream"


def losses(**options):
    return {loss.role: loss for loss in pr.method("der", **options).losses()}


def test_stored_logits_are_compared_on_the_classes_known_then():
    (loss,) = losses(alpha=0.3).values()
    torch.manual_seed(0)
    z = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    stored = torch.randn(3, 4, dtype=torch.float64)
    stored[0, 2:] = NAN
    stored[1, 3:] = NAN
    found = loss.weight * loss(Out(logits=z, stored=stored), {})
    expected = 0.3 * sum(
        (z[i, :n] - stored[i, :n]).square().mean() for i, n in enumerate([2, 3, 4])
    )
    assert_close(found, expected)
    (grad,) = torch.autograd.grad(found, z)
    assert grad.isfinite().all()
    for i, n in enumerate([2, 3, 4]):
        assert_close(grad[i, :n], 0.6 / n * (z[i, :n] - stored[i, :n]))
        assert not grad[i, n:].any()


def test_at_the_stored_logits_nothing_pulls():
    (loss,) = losses().values()
    z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    found = loss(Out(logits=z, stored=z.detach().clone()), {})
    assert found == 0
    assert not torch.autograd.grad(found, z)[0].any()


def test_der_plus_plus_adds_the_labels_of_a_second_draw():
    found = losses(plus=True, beta=0.7)
    assert set(found) == {"replay", "again"}
    torch.manual_seed(0)
    z, labels = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 2, 1, 4])
    again = found["again"]
    value = again.weight * again(Out(logits=z), {"labels": labels})
    assert_close(value, 0.7 * F.cross_entropy(z, labels, reduction="sum"))


def test_rehearsal_free_6_renaming_classes_changes_nothing():
    found = losses(plus=True)
    torch.manual_seed(0)
    z, stored = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    order, labels = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([0, 2, 1, 4])
    for loss in found.values():
        renamed = loss(
            Out(logits=z[:, order], stored=stored[:, order]), {"labels": order.argsort()[labels]}
        )
        assert_close(renamed, loss(Out(logits=z, stored=stored), {"labels": labels}))


def test_rows_without_logits_of_classes_are_refused():
    (loss,) = losses().values()
    for out in (Out(logits=torch.zeros(2, 3)), Out(logits=torch.zeros(2, 3, 4))):
        with pytest.raises(pr.ConfigError, match="no logits of classes"):
            loss(out, {})
    assert "classes" in pr.method("der").needs


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("replay", {"capacity": 0}, "capacity: got 0, expected > 0"),
        ("replay", {"capacity": -3}, "capacity: got -3"),
        ("replay", {"capacity": 10.5}, "expected a whole number of rows"),
        ("replay", {"ratio": 0.0}, "ratio: got 0"),
        ("replay", {"bytes": -1}, "bytes: got -1"),
        ("replay", {"by": "clas"}, "did you mean 'class'"),
        ("der", {"alpha": 0.0}, "alpha: got 0"),
        ("der", {"beta": -1.0}, "beta: got -1"),
        ("der", {"plus": "yes"}, "plus: got 'yes'"),
        ("der", {"ratio": -1.0}, "ratio: got -1"),
    ],
)
def test_bad_options_are_named(name, options, says):
    with pytest.raises(pr.ConfigError, match=says):
        pr.method(name, **options)


def test_all_faults_come_together():
    with pytest.raises(pr.ConfigError) as caught:
        pr.method("der", capacity=0, by="rows", alpha=0.0, bytes=-1)
    assert len(caught.value.problems) == 4
