"""A run that is stopped anywhere goes on to the same bits; what cannot go on says why."""

import copy
import json

import pytest
import torch

import polyrank as pr
from polyrank import engine
from polyrank.engine import machine
from polyrank.errors import CheckpointError, RunError
from polyrank.testing.streams import few_digits, tiny_vit

FAST = {"epochs": 2, "batch_size": 8, "lr": 1e-2}
SMALL = {"rows": 16, "tasks": 2}
# Method, its options, strategies.
SYSTEMS = {
    "sequential": ("lora", {"r": 2}, ["sequential"]),
    "smora": ("smora", {"r": 4, "k": 2}, []),
    "replay": ("lora", {"r": 2}, ["replay"]),
    "der": ("lora", {"r": 2}, ["der"]),
    "ewc": ("lora", {"r": 2}, ["ewc"]),
    "lwf": ("lora", {"r": 2}, ["lwf"]),
    "gem": ("lora", {"r": 2}, ["gem"]),
    "ilora": ("lora", {"r": 2}, ["ilora"]),
    "absorb": ("lora", {"r": 2}, ["l2", "absorb"]),
    "altlora": ("altlora", {"r": 2, "plus": True}, []),
    "olora": ("olora", {"r": 2}, []),
    "lora-ga": ("olora", {"r": 1, "init_by": "lora-ga:batches=2"}, []),
    "lora-sb": ("lora-sb", {"r": 2, "rows": 8}, ["absorb"]),
    "codyra": ("codyra", {"r": 2, "levels": 2, "dense": 0.0}, []),
    "dylora": ("dylora", {"r": 3, "mode": "frozen", "evaluate": [1]}, []),
    "mora": ("mora", {"r": 2}, []),
    "mixlora": ("mixlora", {"r": 2, "experts": 3, "jitter": 0.1, "dropout": 0.1}, []),
    "osf": ("osf", {"schedule": "adaptive", "trr": 0.5, "unsure": "uniform"}, []),
    "sora": ("sora", {"r": 2, "schedule": [0.0, 0.02, 0.05], "stage_steps": 2}, []),
}


class Killed(BaseException):
    """Stands for a kill: nothing in the engine catches it to tidy up."""


def go(name, out, **changes):
    method, options, strategies = SYSTEMS[name]
    given = {"train": FAST, "references": [], "save_every": 1, "progress": False, **changes}
    return engine.run(
        tiny_vit(),
        few_digits(**SMALL),
        pr.method(method, **options),
        strategies=strategies,
        out=out,
        **given,
    )


def killed_after(saves, monkeypatch):
    """Let the engine die right after it has written so many checkpoints."""
    written = 0
    save = machine.Checkpoints.save

    def dying(self, state):
        nonlocal written
        path = save(self, state)
        written += 1
        if written == saves:
            raise Killed
        return path

    monkeypatch.setattr(machine.Checkpoints, "save", dying)


def cut(name, out, saves, monkeypatch, **changes):
    """Make a run that dies after so many checkpoints."""
    with monkeypatch.context() as patched:
        killed_after(saves, patched)
        with pytest.raises(Killed):
            go(name, out, **changes)


def same(first, second):
    ours, theirs = first.model.state_dict(), second.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    for kind in ("restricted", "unrestricted", "general"):
        assert str(first.system().get(kind)) == str(second.system().get(kind))
    assert first.system()["extra_samples"] == second.system()["extra_samples"]


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_killed_run_goes_on_to_the_same_bits(name, tmp_path, monkeypatch):
    whole = go(name, tmp_path / "whole")
    saves = len([e for e in _events(whole.path) if e["event"] == "checkpoint"])
    assert saves >= 8
    for stop in (2, saves - 2):
        out = tmp_path / f"killed-{stop}"
        cut(name, out, stop, monkeypatch)
        again = go(name, out)
        assert "resumed" in [event["event"] for event in _events(out)]
        same(whole, again)


def _events(path):
    lines = (path / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_a_kill_inside_a_job_goes_on_inside_it(tmp_path, monkeypatch):
    whole = go("ewc", tmp_path / "whole")
    stages = [e for e in _events(whole.path) if e["event"] in ("checkpoint", "job")]
    first = next(i for i, event in enumerate(stages) if event["event"] == "job")
    saves = len([e for e in stages[:first] if e["event"] == "checkpoint"]) + 1
    cut("ewc", tmp_path / "killed", saves, monkeypatch)
    same(whole, go("ewc", tmp_path / "killed"))


def test_a_damaged_newest_checkpoint_is_left_out_loudly(tmp_path, monkeypatch, caplog):
    whole = go("smora", tmp_path / "whole")
    cut("smora", tmp_path / "cut", 4, monkeypatch)
    newest = sorted((tmp_path / "cut" / "checkpoints").iterdir())[-1]
    data = bytearray((newest / "tensors.safetensors").read_bytes())
    data[-3] ^= 1
    (newest / "tensors.safetensors").write_bytes(bytes(data))
    again = go("smora", tmp_path / "cut")
    assert "is damaged" in caplog.text
    assert "checkpoint_damaged" in [event["event"] for event in _events(again.path)]
    same(whole, again)


def test_nothing_begins_anew_when_all_checkpoints_are_damaged(tmp_path, monkeypatch):
    cut("smora", tmp_path / "cut", 3, monkeypatch)
    for folder in (tmp_path / "cut" / "checkpoints").iterdir():
        (folder / "state.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"all checkpoints are damaged.*to start anew"):
        go("smora", tmp_path / "cut")


def test_a_changed_config_refuses_and_says_what_changed(tmp_path, monkeypatch):
    cut("smora", tmp_path / "cut", 2, monkeypatch)
    with pytest.raises(RunError, match=r"train\.lr: 0\.01 here, 0\.02 asked for"):
        go("smora", tmp_path / "cut", train={**FAST, "lr": 2e-2})
    with pytest.raises(RunError, match=r"stream\.hash: .* here, .* asked for"):
        engine.run(
            tiny_vit(),
            few_digits(rows=15, tasks=2),
            pr.method("smora", r=4, k=2),
            train=FAST,
            references=[],
            out=tmp_path / "cut",
            progress=False,
        )
    with pytest.raises(RunError, match=r"model\.fingerprint"):
        engine.run(
            tiny_vit(seed=1),
            few_digits(**SMALL),
            pr.method("smora", r=4, k=2),
            train=FAST,
            references=[],
            out=tmp_path / "cut",
            progress=False,
        )


def test_a_finished_run_is_read_back(tmp_path):
    first = go("sequential", tmp_path / "run")
    before = (first.path / "events.jsonl").read_bytes()
    again = go("sequential", tmp_path / "run")
    assert again.metrics == first.metrics
    assert again.model is None
    assert (first.path / "events.jsonl").read_bytes() == before
    assert not (first.path / "checkpoints").exists()


def test_references_after_the_method_resume_too(tmp_path, monkeypatch):
    chosen = {"references": ["sequential", "joint"]}
    whole = go("smora", tmp_path / "whole", **chosen)
    saves = len([e for e in _events(whole.path) if e["event"] == "checkpoint"])
    cut("smora", tmp_path / "cut", saves - 2, monkeypatch, **chosen)
    again = go("smora", tmp_path / "cut", **chosen)
    for system in ("smora", "sequential", "joint"):
        assert str(again.system(system)["unrestricted"]) == str(
            whole.system(system)["unrestricted"]
        )


def test_a_diverged_run_keeps_its_last_checkpoint(tmp_path, monkeypatch):
    from polyrank.engine.phase_trainer import PhaseTrainer

    own = PhaseTrainer._own_loss

    def diverging(self, model, batch):
        loss, out = own(self, model, batch)
        bad = self.run.task == 1 and self.state.global_step >= 2
        return (loss * float("nan") if bad else loss), out

    whole = go("sequential", tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(PhaseTrainer, "_own_loss", diverging)
        with pytest.raises(RunError, match=r"lower the learning rate"):
            go("sequential", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    same(whole, go("sequential", tmp_path / "run"))


def test_a_full_disk_ends_clearly_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    import os

    whole = go("sequential", tmp_path / "whole")
    sync, calls = os.fsync, 0

    def full(handle):
        nonlocal calls
        calls += 1
        if calls > 40:
            raise OSError(28, "No space left on device")
        sync(handle)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=r"No space left on device.*free some space"):
            go("sequential", tmp_path / "run")
    same(whole, go("sequential", tmp_path / "run"))


def test_two_tasks_at_once_equal_one_after_the_other(tmp_path, monkeypatch):
    whole = go("replay", tmp_path / "whole", save_every=1000)
    for _ in range(2):
        # One checkpoint a task: each call trains one task and ends.
        cut("replay", tmp_path / "parts", 1, monkeypatch, save_every=1000)
    same(whole, go("replay", tmp_path / "parts", save_every=1000))


def test_checkpoints_do_not_change_what_is_trained(tmp_path):
    often = go("ilora", tmp_path / "often")
    never = go("ilora", tmp_path / "never", save_every=10**6)
    same(often, never)


def test_the_callers_model_is_untouched(tmp_path):
    model = tiny_vit()
    before = copy.deepcopy(model.state_dict())
    engine.run(
        model,
        few_digits(**SMALL),
        pr.method("lora", r=2),
        strategies=["absorb"],
        train=FAST,
        references=[],
        out=tmp_path / "run",
        progress=False,
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
