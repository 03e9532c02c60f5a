"""Makes docs/speed.md, its picture and README's table out of the tables in bench/results.

python bench/speed_page.py
"""

from pathlib import Path

from speed_aims import aims
from speed_tables import markdown, measured, table

ROOT = Path(__file__).parents[1]
# Tables without which there is no page; those of other sections may be made later.
TABLES = ("rank_gate", "model_step", "model_step_compiled", "losses", "steps_gpu", "memory",
          "gates", "decode", "lanes", "rank_gate_tiles", "product")  # fmt: skip
NAMES = {
    "base": "frozen layer", "peft bf16": "PEFT LoRA, bf16 adapters",
    "peft fp32": "PEFT LoRA, its default (fp32 adapters)", "naive mixture": "mixture, naive torch",
    "smora eager": "`smora`, without kernels", "lora eager": "`lora`, without kernels",
    "smora": "`smora`", "lora": "`lora`", "mixlora": "`mixlora`, 8 experts",
    "xlora": "PEFT X-LoRA", "public mixlora": "mixlora 0.2.3", "eulerforge": "eulerforge 0.1.0",
}  # fmt: skip
# Systems of README.md's table.
SHOWN = ("smora", "lora", "peft bf16", "peft fp32")
# Milliseconds of the device, counted from bytes at 3.0 TB/s (a copy, measured) for the main case.
FLOOR_TB = 3.0


def section(name, text, made):
    """A text and what is made from a table; nothing while there is no table."""
    return f"\n\n{text}\n\n{made(name)}" if measured(name) else ""


def origin(row):
    """Where a row came from, in a sentence."""
    versions = f"torch {row['torch']}, Triton {row['triton']}, PEFT {row['peft']}"
    return f"{row['device']}, {versions}, {row['date']}; `{row['command']}`"


def layers(name):
    """The section of single layers."""
    rows = table(name)
    found = []
    for row in rows:
        if row["system"] == "base":
            size = f"{row['tokens']} tokens, {row['d_in']} → {row['d_out']}"
            found.append((f"**{size}**", "", "", "", "", "", ""))
        device = row["device_extra_us"]
        found.append((
            NAMES[row["system"]], row["step_us"], row["extra_us"], row["extra_over_peft"],
            "–" if row["row_us"] == "nan" else row["row_extra_over_peft"],
            "–" if device == "nan" else f"{device} ({row['device_extra_over_peft']})",
            # Below zero: something older was let go meanwhile.
            row["peak_extra_mib"] if float(row["peak_extra_mib"]) >= 0 else "–",
        ))  # fmt: skip
    peft = "PEFT compiled" if rows[0].get("mode") == "compiled" else "PEFT's"
    head = ("system", "step, µs", "over the frozen layer, µs", f"of {peft}", f"in a row, of {peft}",
            f"device alone, µs (of {peft})", "peak memory, MiB")  # fmt: skip
    return f"{markdown(head, found)}\n\n{origin(rows[0])}"


def steps(name):
    """The section of whole training steps."""
    rows = table(name)
    found = [
        (NAMES[r["system"]].replace("layer", "model"), r["ms"], r["over_peft_bf16"],
         r["over_peft_fp32"] or "–", r["peak_mib"])
        for r in rows
    ]  # fmt: skip
    how = ", compiled" if rows[0]["mode"] == "compiled" else ""
    head = ("system", "ms a step", f"of PEFT, bf16{how}", f"of PEFT's default{how}",
            "peak memory, MiB")  # fmt: skip
    return f"{markdown(head, found)}\n\n{origin(rows[0])}"


def losses():
    """The section of losses beside those of the eager path."""
    rows = table("losses")
    paths = {"naive": "the reference (control)", "triton": "kernels"}
    found = [
        (f"`{r['system']}`", paths[r["path"]], r["first"], r["last"], r["last_eager"],
         r["largest_gap"], r["mean_gap"])
        for r in rows
    ]  # fmt: skip
    head = ("system", "by", "first loss", "last", "last, eager", "largest gap", "mean gap")
    return f"{markdown(head, found)}\n\n{origin(rows[0])}"


def methods():
    """The section of other training methods: time, and memory."""
    rows = table("steps_gpu")
    found = [
        (f"`{r['system']}`", *(round(float(r[n]), 3) for n in (
            "median_ms", "update_ms", "ratio_median", "ratio_q1", "ratio_q3")))
        for r in rows
    ]  # fmt: skip
    head = ("system", "ms a step", "its update, ms", "of `lora`", "lower quartile", "upper")
    first = rows[0]
    about = f"{first['machine']}, torch {first['torch']}, {first['date']}; `{first['command']}`"
    memory = [
        (r["what"], f"`{r['system']}`" if r["what"] == "step" else r["system"], r["peak_mib"],
         r["held_mib"], r["largest_gradient_mib"] or "–")
        for r in table("memory")
    ]  # fmt: skip
    tops = ("what", "system", "peak, MiB", "held before, MiB", "largest layer's gradient, MiB")
    tables = (markdown(head, found), about, markdown(tops, memory), origin(table("memory")[0]))
    return "\n\n".join(tables)


def gates():
    """The section of every gate against the eager path."""
    rows = table("gates")
    found = [
        (r["kind"], r["dtype"], f"{r['tokens']} × {r['d_in']} → {r['d_out']}",
         r["forward_eager_us"], r["forward_triton_us"], r["step_eager_us"], r["step_triton_us"])
        for r in rows
    ]  # fmt: skip
    head = ("gate", "dtype", "size", "forward, eager, µs", "kernels, µs", "step, eager, µs",
            "kernels, µs")  # fmt: skip
    return f"{markdown(head, found)}\n\n{origin(rows[0])}"


def decoding():
    """The section of few tokens."""
    rows = table("decode")
    found = [
        (r["case"], r["mode"], NAMES[r["system"]].replace("layer", "model"), r["us"],
         r["extra_us"] or "–", r["extra_over_peft"])
        for r in rows
    ]  # fmt: skip
    head = ("case", "mode", "system", "µs a forward", "over the base, µs", "of PEFT's")
    return f"{markdown(head, found)}\n\n{origin(rows[0])}"


def lanes(name):
    """The section of a batch of many adapters."""
    rows = table(name)
    found = [
        (r["case"], NAMES[r["system"]], r["us"], round(1 / float(r["extra_over_peft"]), 2),
         r.get("setup_seconds") or "–")
        for r in rows
    ]  # fmt: skip
    head = ("case", "system", "µs a forward", "throughput, of PEFT's", "made in, s")
    return f"{markdown(head, found)}\n\n{origin(rows[0])}"


def kernels():
    """The section of single kernels, beside torch's products and their bytes."""
    rows = table("rank_gate_tiles")
    best: dict = {}
    for row in rows:
        kept = best.get(row["kernel"])
        if kept is None or float(row["us"]) < float(kept["us"]):
            best[row["kernel"]] = row
    # MiB-free counts of the main case: x, y, dx, dy are 67.1 MB each, factors 0.5 MB a piece.
    passes = {
        "read-router": ("[h, z] = x [A; rows]ᵀ, gates", 72.4, "torch read"),
        "read-plain": ("h = x Aᵀ", 68.7, "torch read"),
        "write-y": ("s q Bᵀ, for the base product to add onto", 68.7, "torch write-y"),
        "add-y": ("y += s q Bᵀ", 135.8, "torch add-y"),
        "inner-router": ("u = dy B, through the gates", 72.9, "torch inner"),
        "inner-plain": ("u = dy B", 68.7, "torch inner"),
        "outer-B": ("dB = s dyᵀ q", 69.2, "torch outer-B"),
        "outer-AW": ("d[A; rows] = [dh, dz]ᵀ x", 71.3, "torch outer-AW"),
        "write-dx": ("[dh, dz] [A; rows], for the base product", 70.3, "torch write-dx"),
        "add-dx": ("dx += [dh, dz] [A; rows]", 137.4, "torch add-dx"),
        "torch base": ("x Wᵀ", None, ""),
        "torch base, beta=1": ("x Wᵀ added onto the update", None, ""),
        "torch dx base": ("dy W", None, ""),
        "torch dx base, beta=1": ("dy W added onto the gradient", None, ""),
    }
    found = []
    for name, (what, megabytes, other) in passes.items():
        floor = "–" if megabytes is None else round(megabytes / FLOOR_TB, 1)
        beside = f"{float(best[other]['us']):.1f}" if other else "–"
        found.append((what, f"{float(best[name]['us']):.1f}", best[name]["tile"] or "torch",
                      beside, floor))  # fmt: skip
    head = ("pass", "µs", "tile", "torch's product, µs", "its bytes at 3.0 TB/s, µs")
    about = rows[0]
    return f"{markdown(head, found)}\n\n{about['device']}, {about['date']}; `{about['command']}`"


def sums():
    """The section of base products that hold the update."""
    rows = table("product")
    found = [
        (r["pass"], r["tokens"], r["d_in"], r["d_out"].replace(" ", " + "), r["base_alone_us"],
         r["apart_us"], r["one_sum_us"], r["gain"], "yes" if r["taken"] == "True" else "no")
        for r in rows
    ]  # fmt: skip
    head = ("pass", "tokens", "d_in", "d_out", "base alone, µs", "apart, µs", "one sum, µs",
            "gain", "taken")  # fmt: skip
    return f"{markdown(head, found)}\n\n{origin(rows[0])}"


TEXT = """<!-- Made by bench/speed_page.py from bench/results; do not edit. -->
# Speed on a GPU

What an adapter costs on top of the frozen model, beside PEFT's LoRA of the same rank (64; `smora`
has 8 active ranks), in bf16 with fp32 master weights unless said otherwise. One run each, so that a
few per cent are noise: `smora` does more than `lora`, and where it comes out faster that is why.

![A layer and a whole training step beside PEFT](images/speed.png)

## One layer, forward and backward

*Step* and *over the frozen layer* are one layer as called from Python: sizes that the device
finishes sooner show the host. *In a row*: eight such layers in one step, by the layer. *Device
alone* replays the same work as a CUDA graph. How fast the host is varies between machines of one
kind; ratios hold within a case.

{layers}{layers_compiled}{layers_public}

## A whole training step

1.2 B parameters in Llama's shape, 8 × 1024 tokens, all seven projections of a block adapted, AdamW
(fused, as transformers' Trainer has it).

{steps}{steps_7b}

Four layers of 1.2 B's shape under `torch.compile`, where PEFT's additions become one kernel with
their neighbours and layers that read the same x are not computed together:

{compiled}{compiled_7b}{public}

Losses of 50 steps from factors drawn at random, both methods at one rate that nobody tuned: paths
are compared here, not methods. The control makes all products in fp32, and so differs from the
eager path by what bf16 rounds; gates that choose ranks turn such differences into other choices.

{losses}

## Other methods

The 1.2 B model, the same batch. `gather` is one batch whose gradients by every layer's weight are
summed for a start from data, and a control that passes the same tensors on and sums nothing. Both
are at their highest elsewhere, before a sum is made; then a sum itself holds the gradient of one
layer and wide copies of 1024 tokens.

{methods}

## Every gate

One layer as called, without gradients and a whole step, by kernels and by the eager path: the table
that `POLYRANK_OPS=auto` follows.

{gates}

## Few tokens

A forward of the 1.2 B model with the adapter unmerged. Up to 64 tokens without gradients, q, k and
v (gate and up) take two launches beside the base products.

{decoding}

64 adapters in one batch of 64 samples, each with its own, in a model of four layers:

{lanes}

## Kernels

8192 tokens, 4096 → 4096, r = 64: every pass at its fastest tile, beside the same product in torch.
The passes over x and dy lie 17 to 56 % above their bytes (dy is read twice: parts of dB for one
read would fill as much memory as dy); this table and that of the gates are older than the one sum.
Nothing is accumulated onto y and dx: on a Hopper GPU large results are the one sum below, elsewhere
the base product adds onto the update.

{kernels}

## The one sum

On Hopper `x Wᵀ + q Bᵀ`, and the gradient of x from every layer that reads it, are one product over
several pairs of matrices, so that no update passes through memory. *Apart*: a kernel writes the
update and torch's products add to it; both on the device alone. With the update in it the kernel
mostly takes 1 to 9 % longer at 8192 tokens than torch's base product alone, and less where several
layers read x. *Taken*: where it is used, from 2048 tokens and results of 2048 × 4096 on, if whole
tiles fill the processors.

{sums}

## What stands against what was aimed at

{aims}
"""

# What stands over tables that may not be there yet.
COMPILED = """Under `torch.compile`, every system as one graph; PEFT's is then compiled as well."""
LAYERS_PUBLIC = """Beside experts of another package (eulerforge: 8 experts of rank 8 with a router,
2 of them a token), which are looked for on the host, so that no graph can replay them:"""
SEVEN = "Four layers of 7 B's shape (4096 wide, FFN of 11008), the same batch:"
SEVEN_COMPILED = "Four layers of 7 B's shape under `torch.compile`:"
UNMEASURED = """Mixtures of LoRA experts by others, systems of `bench/public_mixtures.py`, were not
measured yet."""
MIXTURES = """Mixtures of LoRA experts by others, in the dtype of the base, 64 ranks in 8 experts,
2 of them a token, four layers of 7 B's shape. PEFT's X-LoRA weighs whole adapters after a forward
of the frozen model; mixlora has experts in the FFN, as `mixlora` here, and LoRA of rank 8 in the
attention; eulerforge has experts and a router in every layer. Not beside them: moe-peft and mlora,
which ask for torch below 2.6 and 2.4; concadptr, which is X-LoRA's way again; PEFT's Poly, which
chooses by task, and Lily, which mixes by the mean of all tokens."""


def page():
    """The text of docs/speed.md."""
    return TEXT.format(
        layers=layers("rank_gate"),
        layers_compiled=section("rank_gate_compiled", COMPILED, layers),
        layers_public=section("rank_gate_public", LAYERS_PUBLIC, layers),
        steps=steps("model_step"), steps_7b=section("model_step_7b", SEVEN, steps),
        compiled=steps("model_step_compiled"),
        compiled_7b=section("model_step_7b_compiled", SEVEN_COMPILED, steps),
        public=section("model_step_public", MIXTURES, steps) or f"\n\n{UNMEASURED}",
        losses=losses(), methods=methods(), gates=gates(), decoding=decoding(),
        lanes=lanes("lanes"), kernels=kernels(), sums=sums(), aims=aims(),
    )  # fmt: skip


def summary():
    """The table of README.md."""

    def numbers(name, column, factor, unit, digits, **where):
        rows = [r for r in table(name) if all(r[key] == value for key, value in where.items())]
        values = {r["system"]: float(r[column]) * factor for r in rows}
        return [f"{values[system]:.{digits}f} {unit}" for system in SHOWN]

    frozen = next(float(r["ms"]) for r in table("model_step") if r["system"] == "base")
    one = {"case": "1 tokens", "mode": "graph"}
    token = next(float(r["us"]) for r in table("decode") if r["system"] == "base"
                 and r["mode"] == "graph") / 1e3  # fmt: skip
    rows = [
        (f"training step, 1.2 B in Llama's shape, 8 × 1024 tokens, every linear layer (frozen "
         f"model: {frozen:.0f} ms)", *numbers("model_step", "ms", 1, "ms", 0)),
        ("one layer 4096 → 11008, 8192 tokens: time over the frozen layer, forward and backward",
         *numbers("rank_gate", "extra_us", 1, "µs", 0, case="up")),
        ("its memory over the frozen layer",
         *numbers("rank_gate", "peak_extra_mib", 1, "MiB", 0, case="up")),
        (f"one token, CUDA graph: time over the frozen model ({token:.1f} ms)",
         *numbers("decode", "extra_us", 1e-3, "ms", 2, **one)),
    ]  # fmt: skip
    head = ("", "`smora`", "`lora`", "PEFT's LoRA, bf16 adapters", "its default (fp32)")
    return markdown(head, rows).replace("|  |", "| |", 1)


def picture(path):
    """Draw what adapters add to a layer and to a step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    shown = ("peft bf16", "naive mixture", "smora", "lora")
    rows = [r for r in table("rank_gate") if r["system"] in shown]
    cases = list(dict.fromkeys(r["case"] for r in rows))
    for i, system in enumerate(shown):
        values = [float(r["device_extra_us"]) for r in rows if r["system"] == system]
        places = [n + 0.2 * (i - 1.5) for n in range(len(cases))]
        left.bar(places, values, 0.18, label=NAMES[system].replace("`", ""))
    sizes = {r["case"]: f"{r['tokens']} × {r['d_in']}\n→ {r['d_out']}" for r in rows}
    left.set_xticks(range(len(cases)), [sizes[case] for case in cases], fontsize=8)
    left.set(ylabel="µs over the frozen layer", title="one layer, device alone")
    left.legend(frameon=False, fontsize=8)
    found = table("model_step")
    names = [NAMES[r["system"]].replace("`", "").replace("layer", "model") for r in found]
    right.barh(names[::-1], [float(r["ms"]) for r in found][::-1], color="C2")
    right.set(xlabel="ms", title="a training step, 1.2 B, as called")
    right.tick_params(axis="y", labelsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main():
    """Write the page and its picture."""
    (ROOT / "docs" / "speed.md").write_text(page(), encoding="utf-8")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    start = text.index("| | `smora` | `lora` |")
    end = text.index("\n\n", start)
    readme.write_text(text[:start] + summary() + text[end:], encoding="utf-8")
    picture(ROOT / "docs" / "images" / "speed.png")


if __name__ == "__main__":
    main()
