"""lwf, featkd and masked: what a student owes its teacher, held to the formulas written out."""

import pytest
import torch
import torch.nn.functional as F

import polyrank as pr
from polyrank.frame import ROLES, Out
from polyrank.testing import assert_close

OLD, NEW, ROWS = 3, 2, 7
C = OLD + NEW


class Told:
    """A workshop that says which task it is."""

    def __init__(self, known=OLD, classes=tuple(range(OLD, C)), first=False):
        self.known, self.classes, self.first = known, classes, first


def logits(seed=0, spread=2.0):
    torch.manual_seed(seed)
    return (spread * torch.randn(ROWS, C, dtype=torch.float64)).requires_grad_()


def batch(classes=range(OLD, C)):
    torch.manual_seed(9)
    return {"labels": torch.tensor(list(classes))[torch.randint(len(classes), (ROWS,))]}


def bound(strategy, told=None, task_loss=False):
    loss = strategy.task_loss() if task_loss else strategy.losses()[0]
    loss.bind(None, told or Told())
    return loss


def value(loss, z, taught, rows=None):
    return loss.weight * loss(Out(logits=z, teacher=Out(logits=taught)), rows or batch())


def entropy(z):
    p = z.softmax(-1)
    return -(p * p.log()).sum()


# --- masked --------------------------------------------------------------------------------------


def test_rehearsal_free_1_masked_softmax_is_cross_entropy_of_the_slice():
    loss, z, rows = bound(pr.method("masked"), task_loss=True), logits(), batch()
    found = loss(Out(logits=z), rows)
    assert_close(found, F.cross_entropy(z[:, OLD:], rows["labels"] - OLD, reduction="sum"))


def test_rehearsal_free_1_the_head_rows_of_old_classes_get_a_gradient_of_exactly_zero(bench):
    work = bench()
    work.begin(0)
    work.begin(1)
    work.nudge()
    rows = work.rows()
    loss = pr.method("masked").task_loss()
    loss.bind(work.adapter, work)
    loss(work.out(rows), rows).backward()
    head = work.adapter.head
    for grad in (head.weight.grad, head.bias.grad):
        assert not grad[: work.known].any()
        assert grad[work.known :].all()


def test_masked_reads_classes_in_any_order_and_refuses_labels_outside():
    told = Told(classes=(4, 1))
    loss, z = bound(pr.method("masked"), told, task_loss=True), logits()
    rows = batch(classes=[1, 4])
    expected = F.cross_entropy(z[:, [1, 4]], (rows["labels"] == 4).long(), reduction="sum")
    assert_close(loss(Out(logits=z), rows), expected)
    with pytest.raises(pr.ConfigError, match="masked: 7 of 7 rows have labels outside"):
        loss(Out(logits=z), {"labels": torch.full((ROWS,), 2)})
    with pytest.raises(pr.ConfigError, match="must know the classes"):
        pr.method("masked").task_loss().bind(None, None)
    with pytest.raises(pr.ConfigError, match="must know the classes"):
        pr.method("masked").task_loss().bind(None, Told(classes=()))


# --- predictions ---------------------------------------------------------------------------------


def test_rehearsal_free_2_bce_is_labels_on_new_classes_and_the_teacher_on_old_ones():
    loss = bound(pr.method("lwf", form="bce"), task_loss=True)
    z, taught, rows = logits(), logits(1).detach(), batch()
    one_hot = F.one_hot(rows["labels"], C).double()[:, OLD:]
    bce = F.binary_cross_entropy_with_logits
    new = bce(z[:, OLD:], one_hot, reduction="sum")
    old = bce(z[:, :OLD], taught[:, :OLD].sigmoid(), reduction="sum")
    assert_close(value(loss, z, taught, rows), new + old)


def test_bce_of_a_first_task_is_one_hot_and_asks_for_no_teacher():
    told = Told(known=0, classes=tuple(range(C)), first=True)
    loss = bound(pr.method("lwf", form="bce"), told, task_loss=True)
    z, rows = logits(), batch(range(C))
    assert loss.needs == {"logits"}
    target = F.one_hot(rows["labels"], C).double()
    expected = F.binary_cross_entropy_with_logits(z, target, reduction="sum")
    assert_close(loss(Out(logits=z), rows), expected)


def test_bce_of_classes_that_come_again_takes_their_labels():
    loss = bound(pr.method("lwf", form="bce"), Told(classes=(1, 3)), task_loss=True)
    z, taught, rows = logits(), logits(1).detach(), batch([1, 3])
    target = taught.sigmoid()
    target[:, [1, 3, 4]] = F.one_hot(rows["labels"], C).double()[:, [1, 3, 4]]
    expected = F.binary_cross_entropy_with_logits(z, target, reduction="sum")
    assert_close(value(loss, z, taught, rows), expected)


def test_rehearsal_free_3_at_the_teacher_the_softmax_forms_rest():
    z = logits()
    for form, left in (("softmax", 0.0), ("softmax-ce", entropy(z[:, :OLD].detach() / 3))):
        loss = bound(pr.method("lwf", form=form, temperature=3.0))
        found = value(loss, z, z.detach())
        (grad,) = torch.autograd.grad(found, z)
        assert float(grad.abs().max()) < 1e-15
        assert abs(float(found.detach() - left)) < 1e-12


def test_rehearsal_free_3_at_the_teacher_bce_is_its_entropy_and_rests_on_old_logits():
    loss, z, rows = bound(pr.method("lwf", form="bce"), task_loss=True), logits(), batch()
    found = value(loss, z, z.detach(), rows)
    (grad,) = torch.autograd.grad(found, z)
    assert float(grad[:, :OLD].abs().max()) < 1e-15
    assert grad[:, OLD:].all()
    p = z.detach()[:, :OLD].sigmoid()
    rest = F.binary_cross_entropy_with_logits(
        z[:, OLD:], F.one_hot(rows["labels"], C).double()[:, OLD:], reduction="sum"
    )
    assert_close(found - rest, -(p * p.log() + (1 - p) * (1 - p).log()).sum())


@pytest.mark.parametrize("form", ["softmax", "softmax-ce", "bce"])
def test_rehearsal_free_6_renaming_classes_with_their_rows_changes_no_loss(form):
    strategy = pr.method("lwf", form=form)
    z, taught, rows = logits(), logits(1).detach(), batch()
    # Old classes among themselves, and new ones: which is which is part of the meaning.
    order = torch.tensor([2, 0, 1, 4, 3])
    renamed = {"labels": torch.argsort(order)[rows["labels"]]}
    loss = bound(strategy, task_loss=form == "bce")
    assert_close(value(loss, z[:, order], taught[:, order], renamed), value(loss, z, taught, rows))


def test_rehearsal_free_6_renaming_classes_leaves_the_masked_loss():
    loss, z, rows = bound(pr.method("masked"), task_loss=True), logits(), batch()
    order = torch.tensor([1, 2, 0, 4, 3])
    renamed = {"labels": torch.argsort(order)[rows["labels"]]}
    assert_close(loss(Out(logits=z[:, order]), renamed), loss(Out(logits=z), rows))


def test_rehearsal_free_11_at_high_temperature_the_gradient_is_the_centred_difference():
    z, taught, T = logits(), logits(1).detach(), 1e5
    gap = (z - taught).detach()[:, :OLD]
    centred = (gap - gap.mean(-1, keepdim=True)) / OLD
    for form, factor in (("softmax", 1.0), ("softmax-ce", T**-2)):
        loss = bound(pr.method("lwf", form=form, temperature=T))
        (grad,) = torch.autograd.grad(value(loss, z, taught), z)
        assert_close(grad[:, :OLD], factor * centred, tol=1e-3, reason="the limit is met up to 1/T")


def test_rehearsal_free_11_at_temperature_one_it_is_cross_entropy_with_soft_targets():
    z, taught = logits(), logits(1).detach()
    loss = bound(pr.method("lwf", form="softmax-ce", temperature=1.0))
    soft = F.cross_entropy(z[:, :OLD], taught[:, :OLD].softmax(-1), reduction="sum")
    assert_close(value(loss, z, taught), soft)
    kl = bound(pr.method("lwf", temperature=1.0))
    assert_close(value(kl, z, taught), soft - entropy(taught[:, :OLD]))


def test_t_squared_keeps_the_gradient_and_the_two_softmax_forms_differ_by_it():
    z, taught, T = logits(), logits(1).detach(), 2.5
    grads = []
    for form in ("softmax", "softmax-ce"):
        loss = bound(pr.method("lwf", form=form, temperature=T))
        grads += torch.autograd.grad(value(loss, z, taught), z)
    assert_close(grads[0], T**2 * grads[1])


def test_rehearsal_free_12_new_classes_do_not_enter_the_distillation():
    loss = bound(pr.method("lwf"))
    z, taught = logits(), logits(1).detach()
    found = value(loss, z, taught)
    (grad,) = torch.autograd.grad(found, z)
    assert not grad[:, OLD:].any()
    moved = taught.clone()
    moved[:, OLD:] += 100
    assert torch.equal(value(loss, z, moved), found)
    bce = bound(pr.method("lwf", form="bce"), task_loss=True)
    assert torch.equal(value(bce, z, moved), value(bce, z, taught))


def test_bce_keeps_its_gradient_where_a_sigmoid_is_one():
    loss = bound(pr.method("lwf", form="bce"), task_loss=True)
    z = torch.full((1, C), 30.0, requires_grad=True)
    taught = torch.zeros(1, C)
    (grad,) = torch.autograd.grad(value(loss, z, taught, {"labels": torch.tensor([3])}), z)
    assert_close(grad[:, :OLD], torch.full((1, OLD), 0.5))


def test_text_is_distilled_over_the_vocabulary_where_a_label_is_predicted():
    torch.manual_seed(0)
    z, taught = (torch.randn(2, 5, 11, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([[-100, 3, 4, -100, -100], [-100, -100, 5, 6, 7]])
    loss = bound(pr.method("lwf", temperature=1.0), Told(known=0, classes=()))
    expected = sum(
        F.kl_div(z[i, t - 1].log_softmax(-1), taught[i, t - 1].softmax(-1), reduction="sum")
        for i in range(2)
        for t in range(1, 5)
        if labels[i, t] != -100
    )
    assert_close(value(loss, z, taught, {"labels": labels}), expected)
    assert loss.per == "label"


def test_a_first_task_has_no_teacher_and_a_later_one_must():
    z = logits()
    for strategy in (pr.method("lwf"), pr.method("featkd"), pr.method("featkd", layer=0)):
        loss = bound(strategy, Told(first=True, known=0))
        assert not any(need.startswith("teacher") for need in loss.needs)
        out = Out(logits=z, embedding=z, hidden=[z])
        assert loss(out, batch()) == 0
        loss = bound(strategy)
        assert any(need.startswith("teacher") for need in loss.needs)
        with pytest.raises(pr.ConfigError, match="its teacher left nothing"):
            loss(out, batch())
        with pytest.raises(pr.ConfigError, match=r"polyrank\.run"):
            strategy.losses()[0].bind(None, None)


def test_bce_refuses_labels_of_other_tasks_but_takes_replayed_rows():
    loss = bound(pr.method("lwf", form="bce"), task_loss=True)
    z, taught = logits(), logits(1).detach()
    rows = {"labels": torch.tensor([0, 3, 3, 4, 4, 3, 4])}
    with pytest.raises(pr.ConfigError, match="1 of 7 rows have labels outside"):
        value(loss, z, taught, rows)
    rows["role"] = torch.tensor([ROLES["replay"], *[ROLES["train"]] * 6])
    target = taught.sigmoid()
    target[:, OLD:] = F.one_hot(rows["labels"], C).double()[:, OLD:]
    expected = F.binary_cross_entropy_with_logits(z, target, reduction="sum")
    assert_close(value(loss, z, taught, rows), expected)


def test_the_teacher_is_the_model_as_the_last_task_left_it(bench):
    strategy = pr.method("lwf")
    boundary = strategy.boundary()
    work = bench()
    work.begin(0, boundary)
    work.nudge()
    rows = work.rows()
    left = work.out(rows).logits.detach()
    work.end()
    work.begin(1, strategy.boundary())
    work.nudge(seed=1)
    loss = bound(strategy, work)
    out = work.out(rows, teacher=loss.teacher)
    assert_close(out.teacher.logits[:, : work.known], left)
    assert not torch.allclose(out.logits[:, : work.known], left)
    own = work.rows()
    assert value(loss, out.logits, out.teacher.logits, own) > 0
    assert boundary.next(None, work, {}) is None


# --- features ------------------------------------------------------------------------------------


def test_rehearsal_free_3_and_the_distance_of_features():
    torch.manual_seed(0)
    h = torch.randn(ROWS, 4, dtype=torch.float64, requires_grad=True)
    then = torch.randn(ROWS, 4, dtype=torch.float64)
    loss = bound(pr.method("featkd", weight=0.5))
    assert loss.needs == {"embedding", "teacher.embedding"}

    def found(taught):
        return loss.weight * loss(Out(embedding=h, teacher=Out(embedding=taught)), batch())

    assert_close(found(then), 0.5 * (h - then).square().sum())
    at = found(h.detach())
    assert at == 0
    assert not torch.autograd.grad(at, h)[0].any()


def test_features_of_tokens_are_averaged_over_the_real_ones():
    torch.manual_seed(0)
    hidden = [torch.randn(3, 5, 4, dtype=torch.float64) for _ in range(3)]
    then = [torch.randn(3, 5, 4, dtype=torch.float64) for _ in range(3)]
    mask = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    for layer in (1, -2):
        loss = bound(pr.method("featkd", layer=layer))
        found = loss(Out(hidden=hidden, mask=mask, teacher=Out(hidden=then)), batch())
        expected = sum(
            (hidden[1][i, :n] - then[1][i, :n]).square().sum() / n for i, n in enumerate([5, 2, 3])
        )
        assert_close(found, expected)
        bare = loss(Out(hidden=hidden, teacher=Out(hidden=then)), batch())
        assert_close(bare, (hidden[1] - then[1]).square().sum(-1).mean(-1).sum())


def test_a_layer_that_is_not_there_is_named():
    z = torch.zeros(2, 3, 4)
    loss = bound(pr.method("featkd", layer=7))
    with pytest.raises(pr.ConfigError, match=r"layer: got 7, but .* 0\.\.1"):
        loss(Out(hidden=[z, z], teacher=Out(hidden=[z, z])), batch())
    with pytest.raises(pr.ConfigError, match="no classifier whose input"):
        bound(pr.method("featkd"))(Out(logits=z, teacher=Out()), batch())


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("lwf", {"temperature": 0.0}, "temperature: got 0"),
        ("lwf", {"temperature": -1.0}, "temperature: got -1"),
        ("lwf", {"weight": -0.1}, "weight: got -0.1"),
        ("lwf", {"form": "sofmax"}, "did you mean 'softmax'"),
        ("featkd", {"weight": -1.0}, "weight: got -1"),
        ("featkd", {"layer": "last"}, "layer: got 'last'"),
        ("featkd", {"layer": True}, "layer: got True"),
    ],
)
def test_bad_options_are_named(name, options, says):
    with pytest.raises(pr.ConfigError, match=says):
        pr.method(name, **options)


def test_a_weight_of_zero_runs_no_teacher():
    assert pr.method("lwf", weight=0.0).losses() == []
    assert pr.method("featkd", weight=0.0).losses() == []
