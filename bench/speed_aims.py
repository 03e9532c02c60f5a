"""What stands against what was aimed at, line by line; a line without its table is left out."""

from speed_tables import found, markdown, table


def slowest():
    """The largest share of the eager path's time that kernels take, over all that was measured."""
    shares = [
        float(row[f"{what}_triton_us"]) / float(row[f"{what}_eager_us"])
        for row in table("gates") for what in ("forward", "step")
    ]  # fmt: skip
    took = {(r["case"], r["system"]): float(r["step_us"]) for r in table("rank_gate")}
    shares += [us / took[case, f"{name} eager"] for (case, name), us in took.items()
               if (case, f"{name} eager") in took]  # fmt: skip
    return round(max(shares), 3)


def noise(system):
    """The mean gap of losses by kernels as a share of the control's."""
    gaps = [found("losses", "mean_gap", system=system, path=path) for path in ("triton", "naive")]
    return round(gaps[0] / gaps[1], 3)


def throughput(system):
    """How many samples of a mixed batch pass in the time of one of PEFT's."""
    share = found("lanes", "extra_over_peft", system=system)
    return share and round(1 / share, 2)


def layer_aims():
    """Aims of a layer."""

    def layer(system, column, case="main"):
        return found("rank_gate", f"{column}extra_over_peft", case=case, system=system)

    def compiled(column):
        return found("rank_gate_compiled", f"{column}extra_over_peft", case="main", system="smora")

    def peak(system):
        return found("rank_gate", "peak_extra_mib", case="main", system=system)

    return [
        ("`smora`, one layer, device alone", "≤ 0.53", layer("smora", "device_"), ""),
        ("`smora`, one layer, as called", "≤ 0.53", layer("smora", ""),
         "1.01 before. The host is slow. Tried: fewer look-ups (predicted 35 µs less, found "
         "9 on a CPU), counts kept and not copied, starts without Triton's Python (3 µs each). It "
         "would take a cached check of what a layer holds"),
        ("`smora`, one layer, compiled, device alone", "≤ 0.71", compiled("device_"), ""),
        ("`smora`, one layer, compiled, as called", "≤ 0.71", compiled(""), ""),
        ("`lora`, one layer, device alone", "≤ 0.48", layer("lora", "device_"),
         "dy is read by u = dy B and again by dB. One read for both was not tried: its parts of dB "
         "would fill as much memory as dy"),
        ("`lora`, one layer, in a row", "≤ 0.48", layer("lora", "row_"), "the same"),
        ("`smora`, one layer, peak MiB over the frozen layer", "≤ 16", peak("smora"), ""),
        ("`lora`, one layer, peak MiB over the frozen layer", "≤ 16", peak("lora"), ""),
        ("`smora`, d_out 11008, device alone", "≤ 0.53", layer("smora", "device_", "up"), ""),
        ("`lora`, d_out 11008, device alone", "≤ 0.48", layer("lora", "device_", "up"), ""),
        ("`smora`, d 2048, device alone", "≤ 0.53", layer("smora", "device_", "half"), ""),
        ("`lora`, d 2048, device alone", "≤ 0.48", layer("lora", "device_", "half"), ""),
        ("`smora`, 2048 tokens, device alone", "≤ 0.53", layer("smora", "device_", "short"),
         "as called the host rules, yet it is ahead of the eager path. Nine short kernels pay for "
         "their beginnings and ends"),
        ("`lora`, 2048 tokens, device alone", "≤ 0.48", layer("lora", "device_", "short"), ""),
        ("kernels, of the eager path's time, worst case", "≤ 1", slowest(), ""),
    ]  # fmt: skip


def step_aims():
    """Aims of a whole step."""

    def step(table_of, column="over_peft_bf16", system="smora"):
        return found(table_of, column, system=system)

    return [
        ("`smora`, whole step, of PEFT bf16", "≤ 0.91", step("model_step"),
         "its passes take about 10 ms of the device, near their bytes"),
        ("`smora`, whole step, of PEFT's default", "≤ 0.56", step("model_step", "over_peft_fp32"),
         "the frozen model alone is half of PEFT's step on this machine, which leaves a smaller "
         "share than was counted on"),
        ("`lora`, whole step, of PEFT bf16", "≤ 1", step("model_step", system="lora"), ""),
        ("`smora`, compiled", "≤ 0.93", step("model_step_compiled"),
         "not tuned: shared reads are off in a compiled graph, where PEFT's additions vanish"),
        ("`lora`, compiled", "≤ 1", step("model_step_compiled", system="lora"), ""),
        ("`smora`, 4 layers of 7 B, of PEFT bf16", "≤ 0.91", step("model_step_7b"), ""),
        ("`smora`, 4 layers of 7 B, of PEFT's default", "≤ 0.56",
         step("model_step_7b", "over_peft_fp32"), ""),
        ("`smora`, 4 layers of 7 B, compiled", "≤ 0.93", step("model_step_7b_compiled"), ""),
        ("`lora`, 4 layers of 7 B, compiled", "≤ 1",
         step("model_step_7b_compiled", system="lora"), ""),
        ("`smora`, losses of 50 steps, mean gap, of the control's", "≤ 1", noise("smora"), ""),
        ("`lora`, losses of 50 steps, mean gap, of the control's", "≤ 1", noise("lora"), ""),
    ]  # fmt: skip


def few_aims():
    """Aims of few tokens."""

    def few(system, mode, case="1 tokens"):
        return found("decode", "extra_over_peft", case=case, mode=mode, system=system)

    return [
        ("`lora`, one token, CUDA graph", "≤ 0.7", few("lora", "graph"), "0.69 before"),
        ("`smora`, one token, CUDA graph", "≤ 0.7", few("smora", "graph"),
         "0.94 before; two launches for a group were predicted to give 0.53"),
        ("`lora`, one token, eager", "≤ 0.7", few("lora", "eager"),
         "1.55 before; predicted 0.3. Python around the two launches is what is left"),
        ("`smora`, one token, eager", "≤ 0.7", few("smora", "eager"), "1.69 before; the same"),
        ("`lora`, throughput of 64 adapters in a batch", "≥ 5", throughput("lora"), ""),
        ("`smora`, throughput of 64 adapters in a batch", "≥ 5", throughput("smora"), ""),
    ]  # fmt: skip


def aims():
    """The section of what was aimed at: aims as ratios to PEFT's, what was found, what is known."""
    head = ("what", "aim", "found", "what is known of it")
    rows = [row for row in (*layer_aims(), *step_aims(), *few_aims()) if row[2] is not None]
    return markdown(head, rows)
