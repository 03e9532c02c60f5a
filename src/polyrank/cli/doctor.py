"""`polyrank doctor`: what is installed, and whether the parts work together."""

from __future__ import annotations

from collections.abc import Callable

import typer
from rich import box
from rich.console import Console
from rich.table import Table

HELP = """Check the installation: versions, devices, PEFT's plug-in point, one training step, save and load."""


def command() -> None:
    """Run every check and exit with 1 if one fails."""
    from polyrank.io.environment import hardware, versions

    console = Console(highlight=False)
    table = Table(box=box.SIMPLE, show_header=False)
    for name, version in {**versions(), **{k: str(v) for k, v in hardware().items()}}.items():
        table.add_row(name, str(version))
    console.print(table)
    failed = 0
    for name, check in CHECKS.items():
        try:
            console.print(f"ok      {name}: {check()}")
        except Exception as error:  # noqa: BLE001  every check is reported, whatever it raises
            failed += 1
            console.print(f"FAILED  {name}: {type(error).__name__}: {error}", soft_wrap=True)
    if failed:
        console.print(
            f"{failed} of {len(CHECKS)} checks failed; reinstall with the tested versions in constraints.txt"
        )
        raise typer.Exit(1)


def _devices() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"CPU, {torch.get_num_threads()} threads"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _plugin() -> str:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import PeftType

    from polyrank import layers

    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType("POLYRANK")] is layers.PolyrankModel
    return "PEFT knows the type POLYRANK"


def _methods() -> str:
    from polyrank import frame

    problems = [
        p for name in frame.names() for sample in frame.get(name).samples() for p in sample.checks()
    ]
    assert not problems, "; ".join(problems)
    return f"{len(frame.names())} load, all samples valid"


def _step() -> str:
    import tempfile

    import torch

    from polyrank import engine, frame, layers

    def fresh() -> torch.nn.Module:
        made = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
        for index, parameter in enumerate(made.parameters()):
            parameter.data = (
                torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape) + index
            )
        return made

    x = torch.linspace(-1, 1, 24).reshape(4, 6)
    model = layers.adapt(fresh(), frame.method("smora", r=4, k=2), ["0", "2"])
    optimizer = torch.optim.AdamW(layers.parameter_groups(model, lr=0.1))
    attached = engine.attach(optimizer, model)
    before = model(x).detach()
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    attached.detach()
    model.eval()
    after = model(x).detach()
    assert not torch.equal(before, after), "two steps changed nothing"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = layers.load(fresh(), folder).eval()
    assert torch.equal(again(x), after), "a loaded adapter gives other values"
    return "SMoRA trains, saves, loads to the same bits"


CHECKS: dict[str, Callable[[], str]] = {
    "devices": _devices,
    "plug-in": _plugin,
    "methods": _methods,
    "training": _step,
}
