"""The attention kernels beside torch's FlashAttention-2, cuDNN, memory-efficient and FlexAttention.

    python benchmarks/attention.py            [--tiles: which sizes of tiles are fastest here]

First the arithmetic, for any machine: operations, bytes, and the shortest time either allows; then
how many programs of each kernel a multiprocessor holds, as compiled for sm_90. Then, on a GPU, a
table for every shape: all ways in turns in one run, random data that is not in the cache, medians
and spread; benchmarks/attention.json has them with GPU, driver and versions. Rates are TFLOP/s,
beside those of a large matrix product; of decoding GB/s, beside those of a large copy.
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from gpu import CACHE, DATASHEET, ROUNDS, machine, measured_ceilings, seconds

HERE = Path(__file__).parent
DOCUMENTS = 616, 702, 1010, 655, 830, 590, 1204, 745, 688, 1152  # tokens; 8,192 in all


@dataclass(frozen=True)
class Shape:
    """One row of attention: B rows of T queries and S keys, H heads on K key-value heads."""

    name: str
    B: int
    H: int
    K: int
    T: int
    S: int
    head: int
    causal: bool = True
    documents: tuple = ()

    @property
    def pairs(self) -> int:
        """Queries times the keys they see, of all heads."""
        lengths = self.documents or (self.T,)
        if self.causal and self.T == self.S:
            return self.B * self.H * sum(n * (n + 1) // 2 for n in lengths)
        return self.B * self.H * self.T * self.S

    def operations(self, backward: bool) -> int:
        """Two products of 2 * Dh operations a pair; backward five more."""
        return (2 + 5 * backward) * 2 * self.head * self.pairs

    def bytes(self, backward: bool) -> int:
        """q, k, v read and out written once, in bf16; backward reads all and dOUT, writes three."""
        queries = 2 * self.B * self.H * self.T * self.head
        keys = 2 * 2 * self.B * self.K * self.S * self.head
        return 2 * queries + keys + backward * (4 * queries + 2 * keys)


SHAPES = [
    Shape("vit 577 x 64", 16, 16, 16, 577, 577, 64, causal=False),
    Shape("decoder 1k x 128", 8, 32, 32, 1024, 1024, 128),
    Shape("decoder 2k x 128", 4, 32, 32, 2048, 2048, 128),
    Shape("decoder 4k x 128", 2, 32, 32, 4096, 4096, 128),
    Shape("decoder 2k, 8 kv heads", 4, 32, 8, 2048, 2048, 128),
    Shape("packed 8k x 128", 1, 32, 32, 8192, 8192, 128, documents=DOCUMENTS),
    *[Shape(f"decode, {n}k cached", 1, 32, 32, 1, 1024 * n, 128) for n in (1, 4, 16)],
    *[Shape(f"decode, {n}k, 8 kv heads", 1, 32, 8, 1, 1024 * n, 128) for n in (1, 4, 16)],
]


def floor(shape: Shape, backward: bool, ceilings) -> tuple[float, str]:
    """The shortest time in seconds that operations and bytes allow, and which of them decides."""
    times = shape.operations(backward) / ceilings[0], shape.bytes(backward) / ceilings[1]
    return max(times), "operations" if times[0] > times[1] else "bytes"


def print_arithmetic(ceilings):
    print("| shape | pass | GFLOP | MB | floor µs | decided by |")
    print("|---|---|---|---|---|---|")
    for shape in SHAPES:
        for backward in (False, True)[: 1 + (shape.T > 1)]:
            seconds, by = floor(shape, backward, ceilings)
            print(
                f"| {shape.name} | {'forward + backward' if backward else 'forward'} "
                f"| {shape.operations(backward) / 1e9:.2f} | {shape.bytes(backward) / 1e6:.1f} "
                f"| {seconds * 1e6:.1f} | {by} |"
            )


def print_occupancy():
    """How many programs fit a multiprocessor of sm_90: 65,536 registers, 228 KB, 64 warps."""
    script = HERE.parent / "tests" / "test_compile_kernels.py"
    done = subprocess.run([sys.executable, script, "90"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the kernels do not compile for sm_90: {done.stderr.splitlines()[-1]}")
    print("\n| kernel | head | mask | registers | shared bytes | programs | warps of 64 |")
    print("|---|---|---|---|---|---|---|")
    for line in done.stdout.splitlines():
        report = json.loads(line)
        registers = -(-report["reg"] // 8) * 8 * 32 * report["warps"]
        shared = report["shared"] + 1024  # which every program takes for itself
        programs = min(65_536 // registers, 233_472 // shared, 64 // report["warps"])
        if report["dtype"] == "bfloat16":
            print(
                f"| {report['kernel']} | {report['width']} | {report['mask']} | {report['reg']} "
                f"| {report['shared']} | {programs} | {programs * report['warps']} |"
            )


# From here on a GPU is needed.


def inputs(shape: Shape, requires_grad: bool):
    """q, k, v as the models have them, random."""
    sizes = (shape.T, shape.H), (shape.S, shape.K), (shape.S, shape.K)
    return [
        torch.randn(shape.B, n, heads, shape.head, device="cuda", dtype=torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_(requires_grad)
        for n, heads in sizes
    ]


def ways(shape: Shape) -> dict:
    """name -> function of q, k, v; SDPA's back ends, FlexAttention, and ours."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    import kernels
    from kernels.attention import attention

    causal, grouped = shape.causal and shape.T > 1, shape.H != shape.K
    documents = mask = block_mask = None
    if shape.documents:
        lengths = torch.tensor(shape.documents)
        numbers = (torch.arange(len(lengths)) + 1).repeat_interleave(lengths).cuda()
        documents = kernels.documents(numbers[None])[0]
        mask = (numbers[:, None] == numbers).tril()[None, None]
    if shape.documents or causal:

        def rule(b, h, q, k):
            return (q >= k) & (numbers[q] == numbers[k]) if shape.documents else q >= k

        block_mask = create_block_mask(rule, None, None, shape.T, shape.S, device="cuda")
    flex = torch.compile(flex_attention, dynamic=False)

    def sdpa(backend):
        def run(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    q, k, v, mask, is_causal=causal and mask is None, enable_gqa=grouped
                )

        return run

    return {
        "ours": lambda q, k, v: attention(q, k, v, causal, documents),
        "flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        "efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
        "flex": lambda q, k, v: flex(q, k, v, block_mask=block_mask, enable_gqa=grouped),
    }


def repeated(run, sets, backward: bool):
    """A function that does the work once for every set of inputs: one CUDA graph, if it can be."""
    douts = [torch.randn_like(q) for q, _, _ in sets]

    def work():
        for tensors, dout in zip(sets, douts, strict=True):
            out = run(*tensors)
            if backward:
                torch.autograd.grad(out, tensors, dout)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    if backward:  # takes long enough that launches do not count
        return work
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def measure(shape: Shape, backward: bool, ceilings) -> dict:
    """Rows of one table: each way's median time, spread and rate, all ways in turns."""
    n_sets = max(1, min(64, int(CACHE / shape.bytes(False))))
    sets = [inputs(shape, backward) for _ in range(n_sets)]
    work, rows = {}, {}
    right = None
    for name, run in ways(shape).items():
        try:
            out = run(*sets[0]).detach().float()
            right = out if right is None else right
            assert (out - right).abs().max() < 0.05, f"{name} gives something else"
            work[name] = repeated(run, sets, backward)
        except RuntimeError as error:  # a back end that does not take this shape or mask
            rows[name] = dict(refused=str(error).strip().splitlines()[0])
    times = {name: [] for name in work}
    for _ in range(ROUNDS):
        for name, run in work.items():
            times[name].append(seconds(run) / n_sets)
    decoding = shape.T == 1
    amount = shape.bytes(backward) if decoding else shape.operations(backward)
    for name, of in times.items():
        median = statistics.median(of)
        rows[name] = dict(
            median_us=median * 1e6,
            spread_us=[min(of) * 1e6, max(of) * 1e6],
            rate=amount / median / (1e9 if decoding else 1e12),
            unit="GB/s" if decoding else "TFLOP/s",
            of_ceiling=amount / median / ceilings[1 if decoding else 0],
        )
    return rows


def tune():
    """Print the five fastest cuts into tiles of each shape's forward kernel, and the one in use."""
    import triton

    from kernels import attention as file

    for shape in SHAPES:
        kernel = "split" if shape.T == 1 else "forward" + ", documents" * bool(shape.documents)
        key, column = (kernel, shape.head), 9 - torch.cuda.get_device_capability()[0]
        queries = (16,) if shape.T == 1 else (64, 128)
        used, times = file.TILES[key], {}
        sets, run = [inputs(shape, False)], ways(shape)["ours"]
        for cut in itertools.product(queries, (32, 64, 128), (4, 8), (1, 2, 3, 4)):
            file.TILES[key] = cut, cut
            try:
                work = repeated(run, sets, False)
                times[cut] = statistics.median(seconds(work) for _ in range(ROUNDS))
            except triton.runtime.errors.OutOfResources:
                continue
        file.TILES[key] = used
        for cut in [*sorted(times, key=times.get)[:5], used[column]]:
            print(f"{shape.name:28} {cut} {times.get(cut, math.inf) * 1e6:9.1f} µs")


def print_table(title, rows):
    print(f"\n| {title} | median µs | from - to | rate | of the ceiling |")
    print("|---|---|---|---|---|")
    for name, row in rows.items():
        if "refused" in row:
            print(f"| {name} | - | - | - | {row['refused'][:60]} |")
            continue
        low, high = row["spread_us"]
        print(
            f"| {name} | {row['median_us']:.1f} | {low:.1f} - {high:.1f} "
            f"| {row['rate']:.0f} {row['unit']} | {row['of_ceiling']:.0%} |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiles", action="store_true", help="try sizes of tiles (on a GPU)")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    if args.tiles:
        if not gpu:
            parser.error("--tiles needs a CUDA GPU, there is none here")
        return tune()
    ceilings = measured_ceilings() if gpu else DATASHEET
    print(f"{ceilings[0] / 1e12:.0f} TFLOP/s, {ceilings[1] / 1e9:.0f} GB/s", end=" ")
    print("measured here\n" if gpu else "by the datasheet of an H200\n")
    print_arithmetic(ceilings)
    print_occupancy()
    if not gpu:
        print("\nno GPU here: nothing is measured, benchmarks/attention.json is not written")
        return
    results = dict(machine=machine(), ceilings=ceilings, shapes={})
    for shape in SHAPES:
        for backward in (False, True)[: 1 + (shape.T > 1)]:
            title = f"{shape.name}, {'forward + backward' if backward else 'forward'}"
            results["shapes"][title] = measure(shape, backward, ceilings)
            print_table(title, results["shapes"][title])
            (HERE / "attention.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
