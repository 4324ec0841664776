"""Products with rounded weights on a GPU, of the sizes of LLaVA-1.5-7B.

    python benchmarks/rounded.py

First the arithmetic, for any machine: the bytes of each matrix and the shortest time they allow.
Then, on a GPU, all ways in turns in one run, random weights that are not in the cache: bfloat16
(F.linear), int8 and int4 by kernels/rounded.py, int8 spelled out. benchmarks/rounded.json has them
with GPU, driver and versions. (Whole decoders: benchmarks/generate.py gpu.)
"""

import json
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from gpu import CACHE, DATASHEET, ROUNDS, machine, measured_ceilings, seconds

import kernels
import quantize

HERE = Path(__file__).parent
MATRICES = {"qkv": (12288, 4096), "o": (4096, 4096), "gate and up": (22016, 4096)}
MATRICES |= {"down": (4096, 11008), "head": (32000, 4096)}
BITS = {"bfloat16": 16, "int8": 8, "int4": 4.25}  # a scale and a middle for each 128


def print_arithmetic(bandwidth: float):
    print("| matrix | " + " | ".join(f"{name}: MB | µs" for name in BITS) + " |")
    print("|---" * (1 + 2 * len(BITS)) + "|")
    for name, (n_out, n_in) in MATRICES.items():
        sizes = [n_out * n_in * bits / 8 for bits in BITS.values()]
        cells = [f"{size / 1e6:.1f} | {size / bandwidth * 1e6:.1f}" for size in sizes]
        print(f"| {name} | {' | '.join(cells)} |")


def ways(n_out: int, n_in: int, n_rows: int, device="cuda") -> tuple[dict, int]:
    """name -> a function that multiplies by several matrices, and by how many."""
    n = max(1, min(32, int(CACHE / (n_out * n_in / 2))))
    x = torch.randn(n_rows, n_in, device=device, dtype=torch.bfloat16)
    weights = [torch.randn(n_out, n_in, device=device, dtype=x.dtype) for _ in range(n)]
    int8, int4 = ([quantize.QuantizedLinear(w, bits) for w in weights] for bits in (8, 4))

    def spelled_out():
        for layer in int8:
            F.linear(x, quantize.dequantize(layer.q, layer.scale, layer.mid, 8, x.dtype))

    return {
        "bfloat16": lambda: [F.linear(x, w) for w in weights],
        "int8": lambda: [layer(x) for layer in int8],
        "int4": lambda: [layer(x) for layer in int4],
        "int8, spelled out": spelled_out,
    }, n


def measure(n_out: int, n_in: int, n_rows: int, bandwidth: float) -> dict:
    works, n = ways(n_out, n_in, n_rows)
    times = {name: [] for name in works}
    for i in range(ROUNDS + 3):  # the first ones compile
        for name, work in works.items():
            times[name] += [seconds(work) / n] if i >= 3 else []
    found = {}
    for name, of in times.items():
        n_bytes, median = n_out * n_in * BITS[name.partition(",")[0]] / 8, statistics.median(of)
        found[name] = dict(
            median_us=median * 1e6,
            spread_us=[min(of) * 1e6, max(of) * 1e6],
            share_of_bandwidth=n_bytes / median / bandwidth,
        )
    return found


def main():
    gpu = torch.cuda.is_available()
    bandwidth = (measured_ceilings() if gpu else DATASHEET)[1]
    source = "measured here" if gpu else "by the datasheet of an H200"
    print(f"{bandwidth / 1e9:.0f} GB/s {source}\n")
    print_arithmetic(bandwidth)
    if not gpu:
        print("\nno GPU here: nothing is measured, benchmarks/rounded.json is not written")
        return
    kernels.backend = "kernel"
    results = dict(machine=machine(), bandwidth=bandwidth, products={})
    for name, (n_out, n_in) in MATRICES.items():
        for n_rows in (1, 8, 16):
            title = f"{name}, {n_rows} rows"
            results["products"][title] = measure(n_out, n_in, n_rows, bandwidth)
            print(title, json.dumps(results["products"][title]))
            (HERE / "rounded.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
