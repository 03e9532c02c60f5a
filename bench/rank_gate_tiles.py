"""Times the rank gate's kernels alone, over sizes of their tiles, beside what torch has.

    python bench/rank_gate_tiles.py --out tiles.csv [--kernels read,write] [--tokens 8192]
    python bench/rank_gate_tiles.py --compile 3/12   # fills Triton's cache: one of 12 processes

Times are medians of CUDA graph replays over four sets of buffers, larger than the L2 cache.
"""

import argparse
import csv
import itertools
import statistics

import torch

from polyrank.ops.rank_gate import launch, tiles

SETS = 4


def median_us(work, sets=SETS, replays=12):
    """Median time of work(i), i rotating over sets of buffers, in microseconds."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(sets):
            work(i)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(2):
                for i in range(sets):
                    work(i)
        times = []
        for _ in range(replays + 2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / (2 * sets))
    return statistics.median(times[2:])


class Data:
    """Four sets of what the passes read and write; r ranks, a router."""

    def __init__(self, T, d, n, r):
        rng = torch.Generator("cuda").manual_seed(0)

        def draw(*shape, dtype=torch.bfloat16):
            return torch.randn(*shape, generator=rng, device="cuda").to(dtype)

        self.T, self.dim, self.n, self.r = T, d, n, r
        self.x = [draw(T, d) for _ in range(SETS)]
        self.y = [draw(T, n) for _ in range(SETS)]
        self.d = [draw(T, 2 * r) for _ in range(SETS)]
        self.q = [draw(T, r) for _ in range(SETS)]
        self.W = draw(n, d) / d**0.5
        self.A, self.rows = (draw(r, d, dtype=torch.float32) / 64 for _ in range(2))
        self.B32, self.bias = draw(n, r, dtype=torch.float32), torch.zeros(r, device="cuda")
        self.AW, self.B = draw(2 * r, d) / 64, draw(n, r)
        self.kept = draw(T, r, dtype=torch.float32)
        self.out_k = torch.empty(2 * r, d, device="cuda")
        self.out_v = torch.empty(n, r, device="cuda")


def member(kind, k=8):
    """The constants of a projection."""
    return launch.Member(kind, k, 1, False, 8.0, 1e-30, 1.0, 0.0, 1e-12, 2.0, 0, False)


def reads(D, m, keep=True, packed=True):
    """The first pass."""
    A, rows = (D.AW, D.AW[D.r :]) if packed else (D.A, D.rows)
    work = launch.read(
        m, D.T, D.dim, D.r, (D.dim, D.dim, D.dim, D.r), torch.bfloat16, keep=keep, counts=False,
        bias=m.linear, mask=False, dropout=0.0, seeded=False, packed=packed,
    )  # fmt: skip
    flag = launch.flag(D.AW.device)
    return lambda i: work(
        D.x[i], A, rows, D.x[i], D.bias, D.x[i], D.q[i], D.q[i], D.kept, D.q[i], flag,
        *work.split(D.AW),
    )  # fmt: skip


def inners(D, m):
    """The pass over dy."""
    strides = (D.n, D.r, 1, 2 * D.r)
    work = launch.inner(m, D.T, D.n, D.r, strides, 0, torch.bfloat16, scale=2.0, bias=m.linear,
                        scaled=False)  # fmt: skip
    return lambda i: work(
        D.y[i], D.B, D.bias, D.bias, D.q[i], D.kept, D.d[i], D.d[i][:, D.r :], D.bias,
        *work.split(D.AW),
    )  # fmt: skip


def writes(D, which, add):
    """A thin product onto y, or onto the gradient of x."""
    N, K = (D.n, D.r) if which == "y" else (D.dim, 2 * D.r)
    weight = (1, D.r) if which == "y" else (D.dim, 1)
    work = launch.write(D.T, N, K, (N, N, K, *weight), 2.0, torch.bfloat16, add=add)
    if which == "y":
        return lambda i: work(D.y[i], D.y[i], D.q[i], D.B, D.y[i])
    return lambda i: work(D.x[i], D.x[i], D.d[i], D.AW, D.x[i])


def outers(D, which):
    """Gradient of B, of [A; rows], of A."""
    if which == "B":
        work = launch.outer(D.T, D.n, D.r, (D.n, D.r, D.r, 1), 2.0, torch.bfloat16)
        return lambda i: work(D.y[i], D.q[i], D.out_v, D.y[i], *work.split(D.AW))
    K = 2 * D.r if which == "AW" else D.r
    work = launch.outer(D.T, D.dim, K, (D.dim, K, 1, D.dim), 1.0, torch.bfloat16)
    right = D.d if which == "AW" else D.q
    return lambda i: work(D.x[i], right[i], D.out_k.t(), D.x[i], *work.split(D.AW))


def packs(D):
    """Casts of the factors."""
    work = launch.pack(member("sigmoid"), D.dim, D.n, D.r, D.r, (D.dim, D.dim, D.r), 2.0)
    return lambda i: work(D.A, D.rows, D.B32, D.AW, D.B, D.AW)


# Name → (function of the data that gives the work, kind of tile).
WORKS = {
    "read-router": (lambda D: reads(D, member("sigmoid")), "read"),
    "read-all-on": (lambda D: reads(D, member("sigmoid", D.r)), "read"),
    "read-plain": (lambda D: reads(D, member("none")), "read"),
    "read-unpacked": (lambda D: reads(D, member("sigmoid"), keep=False, packed=False), "read"),
    "inner-router": (lambda D: inners(D, member("sigmoid")), "read"),
    "inner-plain": (lambda D: inners(D, member("none")), "read"),
    "write-y": (lambda D: writes(D, "y", False), "write"),
    "write-dx": (lambda D: writes(D, "dx", False), "write"),
    "add-y": (lambda D: writes(D, "y", True), "write"),
    "add-dx": (lambda D: writes(D, "dx", True), "write"),
    "outer-B": (lambda D: outers(D, "B"), "outer"),
    "outer-AW": (lambda D: outers(D, "AW"), "outer"),
    "outer-A": (lambda D: outers(D, "A"), "outer"),
    "pack": (packs, ""),
}


def torch_works(D, r):
    """The same passes, and the base product, by torch."""
    Wt = D.W.t()
    return {
        "torch base": lambda i: torch.mm(D.x[i], Wt, out=D.y[i]),
        "torch base, beta=1": lambda i: D.y[i].addmm_(D.x[i], Wt),
        "torch dx base": lambda i: torch.mm(D.y[i], D.W, out=D.x[i]),
        "torch dx base, beta=1": lambda i: D.x[i].addmm_(D.y[i], D.W),
        "torch read": lambda i: torch.mm(D.x[i], D.AW.t()),
        "torch write-y": lambda i: torch.mm(D.q[i], D.B.t(), out=D.y[i]),
        "torch write-dx": lambda i: torch.mm(D.d[i], D.AW, out=D.x[i]),
        "torch add-y": lambda i: D.y[i].addmm_(D.q[i], D.B.t()),
        "torch add-dx": lambda i: D.x[i].addmm_(D.d[i], D.AW),
        "torch inner": lambda i: torch.mm(D.y[i], D.B),
        "torch outer-B": lambda i: torch.mm(D.q[i].t(), D.y[i]),
        "torch outer-AW": lambda i: torch.mm(D.d[i].t(), D.x[i]),
        "torch copy of y": lambda i: D.y[i].copy_(D.y[(i + 1) % SETS]),
        "torch y += y": lambda i: D.y[i].add_(D.y[(i + 1) % SETS]),
        "torch x.float()": lambda i: D.x[i].float(),
    }


GRID = {
    "": [None],
    "few": [(16, bk, split, 4, 2) for bk, split in ((128, 4), (128, 8), (128, 16), (64, 16))],
    "read": [
        (64, 128, 1, 4, 5), (64, 256, 1, 4, 2), (64, 256, 1, 8, 2), (32, 128, 1, 4, 4),
        (64, 64, 1, 4, 8), (128, 128, 1, 8, 3), (64, 64, 1, 4, 4), (64, 64, 1, 4, 6),
        (64, 128, 1, 4, 3), (64, 128, 1, 4, 4), (64, 128, 1, 8, 3), (128, 64, 1, 8, 4),
        (128, 64, 2, 8, 3), (128, 64, 2, 8, 4), (128, 64, 2, 4, 4), (128, 128, 2, 8, 2),
        (128, 128, 2, 8, 3), (128, 64, 4, 8, 3), (128, 32, 2, 8, 5), (256, 64, 4, 8, 3),
    ],
    "write": [
        (bm, bn, None, w, s)
        for bm, bn in ((64, 128), (64, 256), (128, 128), (128, 256), (32, 256), (128, 64))
        for w, s in ((4, 2), (8, 2))
    ],
    "outer": [
        (bn, None, bt, split, w, s)
        for bn, bt, w in ((64, 64, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8), (256, 64, 8))
        for split in (4, 8)
        for s in (3, 4)
    ],
}  # fmt: skip


def cases(D, only):
    """(name, tile, function) of every kernel under every tile."""
    for name, (make, grid) in WORKS.items():
        if only and not any(name.startswith(o) for o in only):
            continue
        for size in GRID[grid if D.T > 256 or grid != "read" else "few"]:
            yield name, size, tiled(lambda make=make: make(D), grid, size)


def tiled(make, grid, size):
    """The work, made under one size of tile when it is first done."""
    made = []

    def run(i):
        kept = tiles.read, tiles.write, tiles.outer
        if grid == "read":
            tiles.read = lambda *a: tiles.Tile(*size)
        elif grid == "write":
            tiles.write = lambda T, n, k, b: (*size[:2], min(128, tiles.padded(k)), *size[3:])
        elif grid == "outer":
            tiles.outer = lambda T, n, k, b: (size[0], min(128, tiles.padded(k)), *size[2:])
        try:
            if not made:
                made.append(make())
        finally:
            tiles.read, tiles.write, tiles.outer = kept
        return made[0](i)

    return run


def attempt(name, size, function):
    """What the function gives, or None where the tile does not fit the device."""
    try:
        return function()
    except Exception as error:
        print(name, size, type(error).__name__, str(error)[:80])
        return None


def main():
    """Measure every kernel under every tile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--d", type=int, default=4096)
    parser.add_argument("--out-features", type=int, default=0)
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--kernels", default="")
    parser.add_argument("--compile", default="")
    parser.add_argument("--out", default="")
    a = parser.parse_args()
    D = Data(a.tokens, a.d, a.out_features or a.d, a.r)
    every = cases(D, [k for k in a.kernels.split(",") if k])
    if a.compile:
        part, parts = map(int, a.compile.split("/"))
        for name, size, work in itertools.islice(every, part, None, parts):
            attempt(name, size, lambda work=work: work(0))
        return
    found = []
    if not a.kernels:
        found += [(n, "", median_us(w)) for n, w in torch_works(D, a.r).items()]
    for name, size, work in every:
        us = attempt(name, size, lambda work=work: median_us(work))
        found += [] if us is None else [(name, size, us)]
    best: dict = {}
    for name, size, us in found:
        best.setdefault(name, []).append((us, size))
    for name, rows in best.items():
        top = sorted(rows, key=lambda row: row[0])[:4]
        print(f"{name:24}", "  ".join(f"{us:.1f} {size or ''}" for us, size in top))
    if a.out:
        with open(a.out, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("kernel", "tile", "us", "tokens", "d", "r", "device"))
            device = torch.cuda.get_device_name()
            for name, size, us in found:
                writer.writerow((name, size, f"{us:.2f}", a.tokens, a.d, a.r, device))


if __name__ == "__main__":
    main()
