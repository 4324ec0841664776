"""Attention on a CPU in bfloat16: torch's scaled_dot_product_attention, and ours.

    python benchmarks/attention_cpu.py

Forward and, where it trains, backward, in turns in one process; median milliseconds.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from attention import attend, query_tiles  # noqa: E402
from llama import visible_keys  # noqa: E402

ROUNDS = 9
SHAPES = {  # batch, heads, tokens, head width, documents (0: no mask), does it train?
    "ViT-L/14-336, one picture": (1, 16, 577, 64, 0, False),
    "decoder, 2 x 700 tokens": (2, 16, 700, 64, 1, True),
    "decoder, head width 128": (1, 32, 700, 128, 1, True),
    "four documents in a row of 2,800": (1, 16, 2800, 64, 4, True),
    "tiny model, 64 x 100 tokens": (64, 4, 100, 64, 1, True),
}


def milliseconds(function, inputs, trains: bool) -> float:
    started = time.perf_counter()
    result = function(*inputs)
    if trains:
        result.sum().backward()
    return 1e3 * (time.perf_counter() - started)


def main():
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    print(f"{'':34} torch   ours  ratio")
    for name, (B, H, T, Dh, documents, trains) in SHAPES.items():
        visible = None
        if documents:
            visible = visible_keys(torch.arange(T)[None] * documents // T + 1, T)
        tiles = query_tiles(visible) if documents else None
        ways = {
            "torch": lambda q, k, v, seen=visible, n=documents: F.scaled_dot_product_attention(
                q, k, v, attn_mask=seen if n > 1 else None, is_causal=n == 1
            ),
            "ours": lambda q, k, v, tiles=tiles: attend(q, k, v, tiles),
        }
        times = {way: [] for way in ways}
        for _ in range(ROUNDS + 1):
            for way, function in ways.items():
                inputs = (
                    torch.randn(B, T, H, Dh, dtype=torch.bfloat16, requires_grad=trains)
                    for _ in range(3)
                )
                inputs = [x.transpose(1, 2) for x in inputs]
                times[way].append(milliseconds(function, inputs, trains))
        torchs, ours = (statistics.median(t[1:]) for t in times.values())
        print(f"{name:34} {torchs:5.1f}  {ours:5.1f}  {torchs / ours:4.2f}")


if __name__ == "__main__":
    main()
