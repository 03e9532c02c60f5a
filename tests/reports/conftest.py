"""Made-up results, only ever written into a test's own directory."""

import math

import numpy as np
import pytest

from polyrank import metrics
from polyrank.io import RunFolder

TASKS = ["4-5", "6-7", "8-9"]
COUNTS = [104, 103, 98]
NAN = math.nan


def keep(tasks, kept, learnt, seed):
    """Lower-triangular: `learnt` on the diagonal, `kept` of it left after each later task."""
    rng = np.random.default_rng(seed)
    full = np.full((tasks, tasks), NAN)
    for j in range(tasks):
        for i in range(j, tasks):
            noise = rng.uniform(-0.015, 0.015)
            full[i, j] = np.clip(learnt * kept ** (i - j) + noise, 0, 1)
    return full


def only_last(tasks, value, seed):
    full = np.full((tasks, tasks), NAN)
    full[-1] = np.clip(value + np.random.default_rng(seed).uniform(-0.02, 0.02, tasks), 0, 1)
    return full


def system(name, label, role, matrix, restricted, counts, **more):
    views = {"unrestricted": matrix, "restricted": restricted}
    return {
        "name": name,
        "label": label,
        "role": role,
        **views,
        "counts": counts,
        "metrics": {v: metrics.summary(m, counts, missing="nan") for v, m in views.items()},
        "seconds": None,
        "trainable": None,
        "adapter": None,
        "routing": None,
        **more,
    }


def routing(tasks, layers=8, ranks=16, active=4, seed=0):
    rng = np.random.default_rng(seed)
    paths = [
        f"base_model.model.vit.encoder.layer.{i // 2}.attention.{'query' if i % 2 else 'value'}"
        for i in range(layers)
    ]
    load = rng.dirichlet(np.full(ranks, 0.7), size=(len(tasks), layers))
    load = np.minimum(load * active, 1)
    share = load / load.sum(-1, keepdims=True)
    entropy = -(share * np.log(np.maximum(share, 1e-30))).sum(-1) / math.log(ranks)
    return {"layers": paths, "tasks": tasks, "load": load, "entropy": entropy}


def made_up(tasks=TASKS, counts=COUNTS):
    """Results of four systems as an engine would report them; the numbers are invented."""
    n = len(tasks)
    return {
        "tasks": [
            {"name": t, "labels": t.split("-"), "n_train": 205, "n_test": c}
            for t, c in zip(tasks, counts, strict=True)
        ],
        "systems": [
            system(
                "smora",
                "smora r=16 k=4",
                "method",
                keep(n, 0.86, 0.95, 1),
                keep(n, 0.99, 0.97, 2),
                counts,
                seconds=14.2,
                trainable=24_832,
                routing=routing(tasks),
            ),
            system(
                "lora",
                "sequential lora r=16",
                "reference",
                keep(n, 0.1, 0.97, 3),
                keep(n, 0.9, 0.98, 4),
                counts,
                seconds=11.8,
                trainable=20_480,
            ),
            system(
                "joint",
                "joint lora r=16",
                "reference",
                only_last(n, 0.96, 5),
                only_last(n, 0.98, 6),
                counts,
                seconds=12.4,
                trainable=20_480,
            ),
            system(
                "probe",
                "frozen probe",
                "reference",
                keep(n, 0.93, 0.9, 7),
                keep(n, 1.0, 0.95, 8),
                counts,
                seconds=0.6,
                trainable=390,
            ),
        ],
    }


def asked(tasks=TASKS, counts=COUNTS):
    described = [
        {"name": t, "labels": t.split("-"), "n_train": 205, "n_validation": 52, "n_test": c}
        for t, c in zip(tasks, counts, strict=True)
    ]
    return {
        "method": {"name": "smora", "options": {"r": 16, "k": 4, "scaling": "alpha/sqrt(r)"}},
        "stream": {
            "name": "digits",
            "scenario": "class-incremental",
            "hash": "0e940864171936a3d4613f1dbc07c304b9fdeac99ddd2d8a8da130f78295fdb6",
            "seed": 0,
            "tasks": described,
        },
        "model": {"kind": "ViT", "layers": 4, "width": 64, "pretrained": "digits 0-3"},
        "seed": 0,
        "train": {"epochs": 10, "batch_size": 32, "lr": 0.002, "optimizer": "adamw"},
    }


def build(path, results=None, run=None, command=("polyrank", "run", "--method", "smora")):
    folder = RunFolder.create(path, run or asked(), command=list(command))
    folder.write_results(results or made_up())
    folder.finish()
    return path


@pytest.fixture
def results():
    return made_up()


@pytest.fixture
def build_run():
    """What writes a run folder: (path, results, run)."""
    return build


@pytest.fixture
def run_folder(tmp_path):
    return build(tmp_path / "run")


@pytest.fixture
def long_folder(tmp_path):
    """Twenty tasks, more than four systems, more layers than fit a screen."""
    tasks = [f"task-{i}" for i in range(20)]
    counts = list(range(40, 60))
    data = made_up(tasks, counts)
    data["systems"][0]["routing"] = routing(tasks[:2], layers=40, ranks=64)
    extra = [{**data["systems"][1], "name": f"lora{i}", "label": f"lora {i}"} for i in range(3)]
    data["systems"] += extra
    return build(tmp_path / "long", data, asked(tasks, counts))
