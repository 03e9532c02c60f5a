"""`polyrank bench`: what an adapter costs on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polyrank.errors import ConfigError

HELP = """Time one adapted linear layer on this machine, beside the frozen layer and PEFT's LoRA.

Forward and backward; on a GPU in bf16 over 8192 tokens, on a CPU in fp32 over 512. What counts is
the time over that of the frozen layer. The published tables come from the scripts in bench/.

\b
  polyrank bench
  polyrank bench --size 2048 --r 16 --out layer.csv
"""


def command(
    size: Annotated[int, typer.Option(help="Inputs and outputs of the layer.")] = 0,
    tokens: Annotated[int, typer.Option(help="Tokens of a batch.")] = 0,
    r: Annotated[int, typer.Option(help="Ranks.")] = 64,
    k: Annotated[int, typer.Option(help="Active ranks of smora.")] = 8,
    rounds: Annotated[int, typer.Option(help="Rounds; medians are shown.")] = 20,
    device: Annotated[str, typer.Option(help="cuda or cpu; else cuda where there is one.")] = "",
    out: Annotated[Path | None, typer.Option(help="A CSV file to write.")] = None,
) -> None:
    """Measure and print a table."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    faults = [
        f"{name}: got {value}, expected >= {least}; leave it out for the default"
        for name, value, least in (("size", size, 0), ("tokens", tokens, 0), ("r", r, 1),
                                   ("k", k, 1), ("rounds", rounds, 1))
        if value < least
    ]  # fmt: skip
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        faults.append(f"device: got {device!r}, expected cpu, or cuda where there is one")
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        what = "is a folder" if out.is_dir() else f"lies in {str(out.parent)!r}, which is no folder"
        faults.append(
            f"out: got {str(out)!r}, which {what}, expected a file to write; name another"
        )
    if not faults and k > r:
        faults.append(f"k: got {k}, expected at most r = {r}; lower k or raise r")
    if faults:
        raise ConfigError(faults)
    from rich.console import Console
    from rich.table import Table

    from polyrank.engine.layer_time import layer_times, write_table

    fast = device == "cuda"
    size, tokens = size or (4096 if fast else 512), tokens or (8192 if fast else 512)
    rows = layer_times(size, tokens, r, k, rounds, device)
    title = f"one layer, {size} × {size}, {tokens} tokens, r = {r}, on {rows[0]['machine']}"
    table = Table("system", "forward µs", "step µs", "extra µs", "of PEFT's extra", title=title)
    for row in rows:
        cells = ("forward_us", "step_us", "extra_us", "extra_over_peft")
        table.add_row(str(row["system"]), *(str(row[c]) for c in cells))
    Console().print(table)
    if out is not None:
        write_table(out, rows)
        typer.echo(str(out))
