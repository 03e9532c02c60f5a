"""Times base product and update as one sum, beside torch's product that adds onto an update.

    python bench/product.py --out bench/results/product.csv

What the device does, by replays of CUDA graphs whose calls take turns between two sets of inputs;
r = 64, bf16. `forward` is x Wᵀ + q Bᵀ, with the kernel that writes the update and a product that
adds to it; `backward` is the gradient of x from the layers that read it, with a product for each.
A round runs every way in a new order; medians of rounds.
"""

import argparse

import torch
from common import graph_of, rounds_us, save

from polyrank.ops.rank_gate import launch
from polyrank.ops.rank_gate.product import Product, pays

R, CALLS = 64, 4
# d_in, widths of the layers that read x, tokens
FORWARD = [
    (4096, (4096,), (512, 1024, 2048, 2304, 3072, 4352, 8192)),
    (2048, (2048,), (2048, 4096, 4352, 8192)), (2048, (512,), (8192,)),
    (2048, (8192,), (1024, 2048, 8192)), (8192, (2048,), (2048, 4096, 8192)),
    (4096, (11008,), (1024, 2048, 8192)), (11008, (4096,), (1024, 2048, 8192)),
]  # fmt: skip
BACKWARD = [
    *FORWARD,
    (2048, (2048, 512, 512), (4096, 8192)),
    (2048, (8192, 8192), (4096, 8192)),
    (4096, (4096, 4096, 4096), (2048, 8192)),
    (4096, (11008, 11008), (2048, 8192)),
]


def draw(*shape):
    """Random numbers whose products are of order one."""
    return (torch.randn(*shape, device="cuda") * shape[-1] ** -0.5).bfloat16()


def ways(direction, d, widths, T):
    """Name → a function of the number of an input set."""
    N = widths[0] if direction == "forward" else d
    outs = [draw(T, N) for _ in range(2)]
    if direction == "forward":
        x, W, q, B = [draw(T, d) for _ in range(2)], draw(N, d), draw(T, R), draw(N, R)
        update = launch.write(T, N, R, (N, N, R, 1, R), 1.0, torch.bfloat16)
        both = Product((T, N), (d, R), (N, (d, R), (d, R)), turned=True, bias=False,
                       device=q.device)  # fmt: skip

        def apart(i):
            update(outs[i], outs[i], q, B, outs[i])
            return outs[i].addmm_(x[i], W.t())

        def together(i):
            both.run(outs[i], ((x[i], W), (q, B)))
            return outs[i]

        def alone(i):
            return torch.mm(x[i], W.t(), out=outs[i])

        return {"base alone": alone, "apart": apart, "one sum": together}
    dys, Ws = [[draw(T, n) for n in widths] for _ in range(2)], [draw(n, d) for n in widths]
    rank_rows, AW = draw(T, 2 * R * len(widths)), draw(2 * R * len(widths), d)
    depths, ranks = (*widths, AW.shape[0]), AW.shape[0]
    both = Product((T, d), depths, (d, (*widths, ranks), (d,) * len(depths)), turned=False,
                   bias=False, device=AW.device)  # fmt: skip

    def products(i, first):
        for dy, W in zip(dys[i], Ws, strict=True):
            if first:
                torch.mm(dy, W, out=outs[i])
            else:
                outs[i].addmm_(dy, W)
            first = False
        return outs[i]

    def apart(i):
        torch.mm(rank_rows, AW, out=outs[i])
        return products(i, False)

    def together(i):
        both.run(outs[i], [*zip(dys[i], Ws, strict=True), (rank_rows, AW)])
        return outs[i]

    return {"base alone": lambda i: products(i, True), "apart": apart, "one sum": together}


def measure(direction, d, widths, T, rounds):
    """The row of one case."""
    graphs, found = {}, ways(direction, d, widths, T)
    results = [found[name](0).float() for name in ("apart", "one sum")]
    error = float((results[1] - results[0]).norm() / results[0].norm())
    if not error < 1e-2:
        raise SystemExit(f"the ways differ by {error}; nothing was timed")
    for name, way in found.items():
        graphs[name] = graph_of(lambda way=way: [way(i % 2) for i in range(CALLS)])
    took = {name: us / CALLS for name, us in rounds_us(graphs, rounds, 3).items()}
    row = {"pass": direction, "tokens": T, "d_in": d, "d_out": " ".join(map(str, widths))}
    row |= {name.replace(" ", "_") + "_us": round(us, 1) for name, us in took.items()}
    row["gain"] = round(took["apart"] / took["one sum"], 3)
    row["taken"] = pays(T, widths[0] if direction == "forward" else d, 0)
    print(*(f"{k}={v}" for k, v in row.items()), flush=True)
    return row


def main():
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out")
    args, rows = parser.parse_args(), []
    for direction, cases in (("forward", FORWARD), ("backward", BACKWARD)):
        for d, widths, tokens in cases:
            for T in tokens:
                rows.append(measure(direction, d, widths, T, args.rounds))
                if args.out:
                    save(args.out, rows)


if __name__ == "__main__":
    main()
