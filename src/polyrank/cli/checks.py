"""What `polyrank doctor` tries: each check says what it found, or raises."""

from __future__ import annotations

from collections.abc import Callable


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
