"""`polyrank new-method`: a method of one's own, in one file that runs as it is."""

from __future__ import annotations

import keyword
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from polyrank.errors import ConfigError

HELP = """Write a file with a working method to start from.

  polyrank new-method scaled
  polyrank run --method-file scaled.py
"""
TEMPLATE = Template('''"""$title: one trained weight per rank.

Idea: a rank that does not help should fade by itself.
Maths: y = W x + b + s · B (c ∘ A x);  A (r, d_in), c (r,), B (d_out, r);  s = alpha / r.
Source: your paper, your equation.
Differs from the released code: nothing is released.
Limits: linear layers only. Cost: r weights and r multiplications per token more than LoRA.
"""

from dataclasses import dataclass

import torch
from polyrank.frame import Core, Method, register


class Weights(Core):
    """φ(h) = c ∘ h."""

    axes = {"weight": ("rank",)}
    gates = frozenset({"weight"})

    def __init__(self, r, start):
        super().__init__()
        self.widths = (r, r)
        self.start = start
        self.weight = torch.nn.Parameter(torch.empty(r))

    def fill(self, rng):
        self.weight.fill_(self.start)

    def forward(self, h, z, flow):
        return h * self.weight.to(h.dtype)

    def delta(self, condition=None):
        return torch.diag(self.weight.float())


@register
@dataclass(frozen=True, kw_only=True)
class $cls(Method):
    """One trained weight per rank.

    Args:
        start: first value of every weight, > 0.
    """

    start: float = 1.0

    def problems(self):
        if self.start <= 0:
            yield f"start: got {self.start}, expected > 0; 1.0 begins as plain LoRA"

    def core(self, site):
        return Weights(site.r, self.start)

    def parameters_per_site(self, site):
        return super().parameters_per_site(site) + site.r

    @classmethod
    def samples(cls):
        return [cls(r=4), cls(r=4, start=0.5)]
''')


def command(
    name: Annotated[str, typer.Argument(help="Name of the method; the file is NAME.py.")],
    folder: Annotated[Path, typer.Option(help="Where to write it.")] = Path(),
) -> None:
    """Write the file and say what to do next."""
    from polyrank import frame

    stem = frame.slug(name).replace("-", "_")
    if not stem.isidentifier() or keyword.iskeyword(stem):
        raise ConfigError(
            f"name: got {name!r}, expected letters, digits and '-', beginning with a letter"
        )
    if frame.slug(name) in frame.names():
        raise ConfigError(f"name: {frame.slug(name)!r} is a shipped method; choose another name")
    path = folder / f"{stem}.py"
    if path.exists():
        raise ConfigError(f"file: {path} exists; choose another name, or remove it")
    if not folder.is_dir():
        raise ConfigError(f"folder: {folder} does not exist; make it first")
    words = stem.split("_")
    text = TEMPLATE.safe_substitute(
        title=" ".join(words).capitalize(), cls="".join(w.capitalize() for w in words)
    )
    aside = path.with_suffix(".py.part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
    typer.echo(
        f"wrote {path}\nrun it: polyrank run --method-file {path}\nread it: polyrank methods --method-file {path}"
    )
