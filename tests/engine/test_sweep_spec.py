"""A sweep's file: what it means, and every fault in it as a line of its own."""

import dataclasses
import json
from pathlib import Path

import pytest

from polyrank.engine.sweep import resolve as resolving
from polyrank.engine.sweep.outline import moved, outline
from polyrank.engine.sweep.records import by_group
from polyrank.engine.sweep.resolve import resolve
from polyrank.engine.sweep.schedule import Group, Point, pending
from polyrank.errors import ConfigError
from polyrank.testing import assert_close


def write(text, name="sweep.yaml"):
    Path(name).write_text(text, encoding="utf-8")
    return Path(name)


def faults(text):
    with pytest.raises(ConfigError) as caught:
        resolve(write(text))
    lines = caught.value.problems
    assert all(line.startswith("sweep.yaml: ") and "\n" not in line for line in lines)
    return [line.removeprefix("sweep.yaml: ") for line in lines]


SMALL = """
lr: {low: 1e-3, high: 1e-2}
seeds: [3, 5]
train: {epochs: 4, batch_size: 64}
methods:
  lora:
  plus: {method: lora, options: {lr_ratio: 16}, lr: {low: 2e-4}}
  chain: {method: lora, strategies: [sequential], lr: 2e-4, lr_fixed_because: the paper's}
axes: {rank: [4, 8]}
"""


def test_runs_measure_no_general_ability_which_no_table_shows():
    sweep = resolve(write(SMALL))
    seen = sweep.stream_for(5)
    assert sweep.stream.general is not None
    assert (seen.general, seen.seed) == (None, 5)
    assert [task.size("test") for task in seen] == [task.size("test") for task in sweep.stream]


def test_methods_axes_and_rates_make_the_groups():
    sweep = resolve(write(SMALL))
    names = [group.name for group in sweep.groups]
    assert names == [f"{m} rank={r}" for m in ("lora", "plus", "chain") for r in (4, 8)]
    assert [sweep.recipes[g.id].method.r for g in sweep.groups] == [4, 8] * 3
    assert_close(sweep.groups[0].grid.rates(), [2e-4 * 10 ** (i / 4) for i in range(3, 7)])
    assert_close(sweep.groups[2].grid.rates(), [2e-4 * 10 ** (i / 4) for i in range(7)])
    assert sweep.groups[4].grid.rates() == [2e-4]
    assert sweep.groups[4].fixed == "the paper's"
    assert sweep.groups[0].fixed is None
    assert [s.name for s in sweep.recipes[sweep.groups[4].id].strategies] == ["sequential"]
    assert sweep.recipes[sweep.groups[2].id].method.lr_ratio == 16
    assert sweep.spec.reference == "lora"
    # Three tasks of about 205 rows.
    assert sweep.updates(sweep.groups[0]) == 4 * 3 * 4
    left = list(pending(sweep.groups, {}))
    assert len(left) == 2 * 2 * (4 + 7 + 1)
    assert {point.seed for point in left} == {3, 5}


def test_defaults_are_those_of_the_study():
    sweep = resolve(write("methods: {lora: }"))
    rates = sweep.groups[0].grid.rates()
    assert len(rates) == 10
    assert_close([rates[0], rates[-1]], [2e-4 * 10**-1.25, 2e-3])
    assert sweep.groups[0].seeds == (0, 1, 2)
    assert (sweep.spec.stream, sweep.spec.keep, sweep.worst) == ("digits", "best", 0.0)
    assert sweep.groups[0].extend


def test_batch_sizes_are_an_axis_too():
    sweep = resolve(write("methods: {lora: }\naxes: {rank: [2], batch: [16, 32]}\n"))
    assert [dict(group.axes) for group in sweep.groups] == [
        {"rank": 2, "batch": 16},
        {"rank": 2, "batch": 32},
    ]
    sizes = [sweep.recipes[group.id].settings.batch_size for group in sweep.groups]
    assert sizes == [16, 32]


BROKEN = """
stream: digit
lr: {low: 1e-4, hihg: 1e-2}
seeds: []
train: {epohcs: 3, lr: 1e-3}
methods:
  lora: {options: {alpa: 3}}
  smora: {options: {r: 4, k: 9}}
  lroa:
  mixed: {method: lora, strategies: [smora]}
  chain: {method: sequential}
  short: {method: lora, train: {epochs: 1}}
axes: {rank: 4}
keep: al
baseline: lore
"""


def test_every_fault_is_a_line():
    lines = faults(BROKEN)
    expected = [
        "methods.short.train: unknown key, expected one of method, options, strategies, lr,",
        "lr.hihg: unknown key; did you mean 'high'?",
        "seeds: got [], expected a list of at least one number; write [0, 1, 2]",
        "axes.rank: got 4, expected a list of at least one number",
        "keep: got 'al', expected one of best, all; did you mean 'all'?",
        "baseline: got 'lore', expected one of lora, smora, lroa,",
        "train.lr: got 0.001, but rates are swept; leave it out, and write lr:",
        "stream: stream: got 'digit', expected a file or one of:",
        "methods.lora.options: lora: unknown option 'alpa'",
        "train: unknown setting 'epohcs'",
        "methods.smora.options: smora: k: got 9,",
        "methods.lroa: method: got 'lroa', expected one of",
    ]
    for line, start in zip(lines, expected, strict=False):
        assert line.startswith(start)
    assert len(lines) == len(expected)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "got [], expected keys with values such as `methods:`"),
        ("seeds: [0]", "methods: are missing"),
        ("methods: {}", "methods: are missing"),
        ("methods: {lora: }\nlr: 1e-3", "lr: holds one rate (0.001), at which methods cannot be"),
        ("methods: {lora: {lr: 3}}", "methods.lora.lr: holds one rate (3)"),
        ("methods: {lora: }\nlr: {low: 3e-4, high: 3.1e-4}", "lr: holds no point of the grid (0.0"),
        ("methods: {lora: }\nlr: {low: -1}", "lr.low: got -1, expected greater than 0"),
        ("methods: {lora: }\nlr: {per_decade: 9}", "lr.per_decade: got 9, expected less than or"),
        ("methods: {lora: }\nlr: {low: fast}", "lr.low: got 'fast', expected a number"),
        ("methods: {lora: }\nlr_fixed_because: x", "lr_fixed_because: every method has several"),
        (
            "methods: {lora: {lr_fixed_because: x}}",
            "methods.lora.lr_fixed_because: lora has several rates",
        ),
        ("methods: {lora: }\nseeds: [1, 1]", "seeds: got 1 twice, expected each once"),
        ("methods: {lora: }\nseeds: [-1]", "seeds[0]: got -1, expected greater than or equal to 0"),
        (
            "methods: {lora: {options: {r: 4}}}\naxes: {rank: [4]}",
            "methods.lora.options.r: stands in axes.rank as well",
        ),
        (
            "methods: {lora: }\naxes: {batch: [4]}\ntrain: {batch_size: 3}",
            "train.batch_size: stands in axes.batch as well",
        ),
        ("methods: {lora: }\ntrain: {epochs: 1}\nprobe: true", "train.epochs: got 1 epochs, "),
        ("methods: {lora: {strategies: [{a: 1}]}}", "methods.lora.strategies: got {'a': 1}, "),
        ("methods: {lora: {strategies: [lora]}}", "methods.lora: strategies: 'lora' is no "),
        ("methods: {sequential: }", "methods.sequential: method: 'sequential' is no method"),
        ("methods: {lora: , again: {method: lora}}", "methods.again: trains the same as 'lora'"),
        ("methods: {lora: }\ntarget_modules: [1]", "target_modules: got [1], expected names of"),
        ("methods: {lora: }\naxes: {rank: [x, 4]}", "axes.rank[0]: got 'x', expected a whole num"),
        ("methods: {lora: }\nscore: forgetting", "score: got 'forgetting', expected one of avera"),
        ("methods: {lora: }\nmodl: x", "modl: unknown key; did you mean 'model'?"),
    ],
)
def test_each_fault_alone_is_one_line(text, says):
    (line,) = faults(text)
    assert line.startswith(says)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match=r"sweep: the file 'missing.yaml' does not exist"):
        resolve(Path("missing.yaml"))
    with pytest.raises(ConfigError, match=r"bad.yaml: line 2, column \d+: no YAML"):
        resolve(write("methods: {\n]", "bad.yaml"))


def test_a_stream_without_validation_rows_is_refused():
    rows = [json.dumps({"text": f"t{i}", "label": i % 2}) for i in range(8)]
    Path("rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    task = "{name: news, path: rows.jsonl, train: 0.5, test: 0.5, labels: [a, b]}"
    head = "kind: sequence-classification\nscenario: class-incremental\n"
    write(f"{head}tasks: [{task}]\n", "shop.yaml")
    (line,) = faults("methods: {lora: }\nstream: shop.yaml")
    assert line.startswith("stream: tasks news have no validation rows, by which rates are to be")
    assert "validation: {from: test, fraction: 0.5}" in line


def test_paths_are_relative_to_the_file():
    Path("deep").mkdir()
    write("use: digits\noptions: {tasks: 2}\n", "deep/two.yaml")
    sweep = resolve(write("methods: {lora: }\nstream: two.yaml\nmodel: base\n", "deep/s.yaml"))
    assert len(sweep.stream) == 2
    assert sweep.model == "base"
    Path("deep/base").mkdir()
    assert sweep.model == str(Path("deep/base"))


def test_identities_follow_what_decides_a_run(monkeypatch):
    def ids(text):
        sweep = resolve(write(text))
        return [Point(group=group, index=0, seed=0).id for group in sweep.groups]

    text = "methods: {lora: {options: {r: 4}}}\n"
    (first,) = ids(text)
    same = [
        "methods: {other: {method: lora, options: {r: 4}}}\n",
        "methods: {lora: {lr: {low: 1e-6, high: 1e-1}}}\naxes: {rank: [4]}\n",
        f"{text}seeds: [7]\nextend: false\nkeep: all\nbaseline: lora\ntrain: {{epochs: 15}}\n",
    ]
    for other in same:
        assert ids(other) == [first]
    different = [
        f"{text}lr: {{anchor: 3e-4}}\n",
        f"{text}train: {{epochs: 14}}\n",
        f"{text}score: average_incremental_accuracy\n",
        "methods: {lora: {options: {r: 4, alpha: 3}}}\n",
        "methods: {lora: {options: {r: 4}, strategies: [sequential]}}\n",
    ]
    found = [ids(other)[0] for other in different]
    assert len({first, *found}) == 6
    monkeypatch.setattr(resolving, "code_version", lambda: "other")
    assert ids(text) != [first]


def test_a_probe_comes_before_full_runs():
    text = "methods: {lora: , fixed: {method: lora, options: {r: 2}, lr: 1e-3, "
    text += "lr_fixed_because: x}}\ntrain: {epochs: 10}\nseeds: [0]\n"
    plain = resolve(write(text))
    sweep = resolve(write(text), probe=True)
    assert [group.stage for group in sweep.groups] == ["probe", "full", "full"]
    probe, full, fixed = sweep.groups
    assert sweep.recipes[probe.id].settings.epochs == 1
    assert sweep.recipes[full.id].settings.epochs == 10
    assert (full.probe, full.points, full.extend, fixed.probe) == (probe.id, 3, False, None)
    # What was run in full without a probe need not be run again.
    assert [group.id for group in plain.groups] == [full.id, fixed.id]
    share = resolve(write(f"{text}probe: {{share: 0.4, points: 2}}\n")).groups
    assert (share[0].config["train"]["epochs"], share[1].points) == (4, 2)


def test_the_outline_counts_and_estimates():
    sweep = resolve(write(SMALL))
    lines = outline(sweep.groups, [], sweep.updates)
    assert lines[0] == (
        "lora rank=4: 4 rates from 1.12e-03 to 6.32e-03, 2 seeds, 48 updates a run; 8 runs left"
    )
    assert lines[4].startswith("chain rank=4: one rate, 2.00e-04, 2 seeds")
    assert lines[6] == (
        "48 runs left, 2304 updates; at most 32 runs more where the best rate is at an edge"
    )
    assert lines[7] == "time: no run is finished yet to tell from"
    point = next(pending(sweep.groups, {}))
    scores = {"validation": 0.5, "test": 0.5, "seconds": 24.0, "updates": 48}
    done = {**point.line(), "state": "ok", **scores}
    lines = outline(sweep.groups, [done], sweep.updates)
    assert lines[0].endswith("7 runs left")
    assert lines[7] == "time: about 19 min by the runs that are finished"
    probed = resolve(write(SMALL), probe=True)
    text = outline(probed.groups, [], probed.updates)
    assert text[0].startswith("lora rank=4, probe: 4 rates")
    assert text[1].startswith("lora rank=4: the best 3 rates of the probe")


def test_the_outline_expects_more_runs_only_where_a_grid_may_still_grow():
    sweep = resolve(write(SMALL.replace("  plus:", "  #plus:").replace("[4, 8]", "[4]")))
    group = sweep.groups[0]
    scores = {"state": "ok", "test": 0.5, "seconds": 24.0, "updates": 48}

    def left(*validation, first):
        lines = [
            {**Point(group=group, index=first + n, seed=seed).line(), "validation": v, **scores}
            for n, v in enumerate(validation)
            for seed in group.seeds
        ]
        return outline(sweep.groups, lines, sweep.updates)[2].partition(", ")[::2]

    first = group.grid.first
    most = "; at most {} runs more where the best rate is at an edge"
    assert left(first=first) == ("10 runs left", f"480 updates{most.format(8)}")
    # The best rate is the smallest one: one more point is missing, and three may follow.
    assert left(0.9, 0.8, 0.7, 0.6, first=first) == ("4 runs left", f"192 updates{most.format(6)}")
    assert left(0.8, 0.9, 0.7, 0.6, first=first) == ("2 runs left", "96 updates")
    grown = (0.99, 0.98, 0.97, 0.96, 0.9, 0.8, 0.7, 0.6)
    assert left(*grown, first=first - 4) == ("2 runs left", "96 updates")


def test_ends_of_a_range_that_are_no_points_of_the_grid_are_told():
    spec = resolve(write(SMALL)).spec
    assert moved(spec) == [
        "lr of lora: low 0.001 and high 0.01 are no points 0.0002·10^(i/4), so that rates from "
        "0.001125 to 0.006325 are run; `anchor: 0.001` makes the low end one",
        "lr of plus: high 0.01 is no point 0.0002·10^(i/4), so that rates from 0.0002 to 0.006325 "
        "are run; `anchor: 0.01` makes the high end one",
    ]
    followed = SMALL.replace("high: 1e-2}", "high: 1e-2, anchor: 1e-3}")
    followed = followed.replace("lr: {low: 2e-4}", "lr: {low: 2e-4, anchor: 2e-4, high: 2e-3}")
    assert moved(resolve(write(followed)).spec) == []
    assert moved(resolve(write("methods: {lora: }")).spec) == []


def test_the_lock_holds_all_that_a_table_needs():
    sweep = resolve(write(SMALL))
    lock = json.loads(json.dumps(sweep.lock()))
    assert [Group.read(values) for values in lock["groups"]] == list(sweep.groups)
    assert lock["versions"]["python"]
    assert lock["hardware"]["cores"] >= 1
    assert (lock["name"], lock["baseline"], lock["worst"]) == ("sweep", "lora", 0.0)
    assert lock["spec"]["lr"]["plus"]["last"] == 6
    assert dataclasses.asdict(sweep.groups[0].grid) == lock["groups"][0]["grid"]
    assert by_group([]) == {}
