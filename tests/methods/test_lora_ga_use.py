"""lora-ga in use: fewer ranks, a resumed trainer, a start that shows no life of its own."""

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

import polyrank as pr
from polyrank.errors import CheckpointError, ConfigError
from polyrank.frame import keyed
from polyrank.layers import adapter_of, keep, replica, truncate
from polyrank.testing import MODELS, assert_close

WIDTH = 12


def rows(seed=0, count=16):
    rng = keyed("ga-use", seed)
    return torch.randn(count, WIDTH, generator=rng), torch.randn(count, WIDTH, generator=rng)


def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().sum(1).mean()


def started(method="lora-ga", steps=0, zero=False, **options):
    rng = keyed("ga-use", "net")
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    with torch.no_grad():
        for p in base.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) / 4)
        base[2].weight.mul_(0.0 if zero else 1.0)
    made = pr.method(method, **{"r": 4, "alpha": 4.0, **options})
    model = pr.adapt(base, made, ["2"] if zero else ["0", "2"], seed=1)
    pr.initialise(model, [rows()], loss)
    optimizer = torch.optim.SGD(pr.parameter_groups(model, lr=1e-2), lr=1e-2)
    attached = pr.attach(optimizer, model)
    model.train()
    for n in range(steps):
        optimizer.zero_grad()
        loss(model, rows(n)).backward()
        optimizer.step()
    attached.detach()
    return model.eval()


def by_hand(view, ranks):
    """s (B A − B0 A0) over some ranks."""
    A0, B0, _ = view.shadow
    live = view.B.detach()[:, ranks] @ view.A.detach()[ranks]
    return view.scale * (live - B0[:, ranks] @ A0[ranks])


def test_cut_to_fewer_ranks_each_takes_its_start_along(tmp_path):
    model = started(steps=3)
    views = adapter_of(model).layers
    expected = [by_hand(view, [0, 1]) for view in views]
    assert all(update.any() for update in expected)
    truncate(model, 2)
    for view, update in zip(views, expected, strict=True):
        assert_close(view.delta(), update)
        assert view.shadow[0].shape == (2, WIDTH)
    x = rows(9)[0]
    y = model(x)
    model.save_pretrained(tmp_path)
    assert torch.equal(pr.load(started().unload(), tmp_path).eval()(x), y)


def test_cut_before_a_step_it_answers_as_the_base():
    model, x = started(), rows(9)[0]
    with model.disable_adapter():
        base = model(x)
    for view in adapter_of(model).layers:
        keep(model, view, torch.tensor([3, 1]))
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("how", ["narrow", "mapped", "replica"])
def test_what_is_subtracted_as_a_whole_is_not_cut(how):
    model = started(steps=1)
    first, second = adapter_of(model).layers
    A0, B0, _ = second.shadow
    if how == "replica":
        replica(model, "slow")
    else:
        second.shadow = (A0[:3], B0[:, :3], None) if how == "narrow" else (A0, B0, torch.ones(4))
    words = {"narrow": "has 3 ranks, expected", "mapped": "behind a map", "replica": "replicas of"}
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ConfigError, match=words[how]):
        truncate(model, 2)
    with pytest.raises(ConfigError, match=words[how]):
        keep(model, second, torch.tensor([0]))
    assert first.A.shape[0] == 4
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)


def test_a_weight_of_zero_gives_a_clipped_start_no_size():
    with pytest.raises(ConfigError, match=r"norm_clip at 2: .* all zero.*norm_clip=False"):
        started(norm_clip=True, zero=True)


@pytest.mark.parametrize("method", ["lora-ga", "lora", "allora"])
def test_a_start_alone_shows_no_life(method):
    options = {} if method == "lora-ga" else {"init_by": "lora-ga"}
    options |= {"alpha": 4.0, "scaling": 1.0} if method == "allora" else {}
    quiet, moved = started(method, **options), started(method, steps=2, **options)
    signs = [adapter_of(m).method.vital_sign(adapter_of(m)) for m in (quiet, moved)]
    name = "moved" if method == "lora-ga" else "b_norm"
    assert signs[0][name] == 0
    assert signs[1][name] > 0


def trained(folder, model, steps, resume=None):
    tiny = MODELS["bert"]
    data = [{k: v[i] for k, v in tiny.inputs(n).items()} for n in range(4) for i in range(3)]
    arguments = TrainingArguments(
        output_dir=folder, use_cpu=True, report_to=[], max_steps=steps, save_steps=2, seed=3,
        per_device_train_batch_size=3, learning_rate=1e-2, lr_scheduler_type="constant",
        disable_tqdm=True,
    )  # fmt: skip
    pr.Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=resume)
    return model


@pytest.mark.parametrize(
    "method", [("lora-ga", {"r": 1}), ("lora-sb", {"r": 2, "rows": 3, "eta": 1e-2})], ids=str
)
def test_a_trainer_resumes_a_model_that_has_not_started(method, tmp_path):
    tiny, (name, options) = MODELS["bert"], method

    def fresh():
        return pr.adapt(tiny.build(), pr.method(name, **options), seed=1)

    whole = fresh()
    pr.initialise(whole, [tiny.inputs(0)])
    trained(tmp_path, whole, 4)
    again = trained(tmp_path, fresh(), 4, resume=str(tmp_path / "checkpoint-2"))
    expected = dict(whole.named_parameters())
    found = dict(again.named_parameters())
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
        assert found[key].requires_grad == value.requires_grad
    assert not any(view.waiting for view in adapter_of(again).layers)
    again.save_pretrained(tmp_path / "saved")
    other = pr.adapt(tiny.build(), pr.method(name, **{**options, "alpha": 3.0}), seed=1)
    with pytest.raises(CheckpointError, match=f"resume: the checkpoint holds {name}.*began with"):
        trained(tmp_path, other, 4, resume=str(tmp_path / "checkpoint-2"))
    loaded = pr.load(tiny.build(), tmp_path / "saved")
    assert torch.equal(loaded(**tiny.inputs(9)).logits, again.eval()(**tiny.inputs(9)).logits)
