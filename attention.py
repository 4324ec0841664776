"""Attention, softmax(q k^T / sqrt(Dh)) v, computed by what is fastest where it runs.

Three ways give the same numbers, but for rounding. torch's scaled_dot_product_attention is the
usual one. On a CPU that multiplies bfloat16 in hardware it is slower than the formula written out
with two matrix products, twice as slow in training (benchmarks/attention_cpu.py), so there the
formula is written out. In both cases queries are taken in tiles, each with only the keys that it
can see: half the work is saved in a causal sequence, and nearly all between packed documents.

llama.py says who sees whom (`visible_keys`); vit.py has no mask. Read next: llama.py.
"""

import math

import torch
import torch.nn.functional as F

import kernels

TILE = 256  # queries at a time, on a CPU
SCORES = 2**21  # and scores at a time: 4 MB in bfloat16


def query_tiles(visible):
    """Cut the queries in tiles: bool[B, T, S] -> [(queries, keys, mask)].

    `queries` and `keys` are slices of T and S, mask is bool[B, 1, t, s]. All keys that a query of
    the tile sees are in it. Elsewhere than on a CPU there is one tile. With tiles of two queries:

        x . . . .
        x x . . .      queries 0-1 with keys 0-1
        . . x . .      queries 2-3 with keys 2-3: another document, what came before is not read
        . . x x .
        . . x x x      query 4 with keys 2-4
    """
    n_queries = visible.shape[1]
    if visible.device.type != "cpu" or n_queries == 1:
        return [(slice(None), slice(None), visible[:, None])]
    tiles = []
    for start in range(0, n_queries, TILE):
        queries = slice(start, start + TILE)
        seen = visible[:, queries].flatten(0, 1).any(0).nonzero()
        keys = slice(int(seen[0]), int(seen[-1]) + 1)
        tiles.append((queries, keys, visible[:, None, queries, keys]))
    return tiles


def attend(q, k, v, tiles=None, causal: bool = False):
    """float[B, H, T, Dh] with K heads of keys and values, float[B, K, S, Dh] -> like q.

    `tiles` come from query_tiles; without them every query sees every key, or with `causal` those
    that are not after it. On a GPU our kernel may be the one to run (kernels/), and `tiles` are
    what it takes: those of `kernels.documents`.
    """
    if kernels.takes(q, tiles):
        return kernels.attend(q, k, v, tiles, causal)
    if tiles is None:
        if q.shape[2] == 1:  # a lone query is after all keys
            causal = False
        assert not causal or q.shape[2] == k.shape[2], "SDPA counts from the first key"
        return one_tile(q, k, v, causal=causal)
    parts = [one_tile(q[:, :, i], k[:, :, j], v[:, :, j], mask) for i, j, mask in tiles]
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def one_tile(q, k, v, mask=None, causal: bool = False):
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] > 1 and not causal:
        return written_out(q, k, v, mask)
    grouped = True if q.shape[1] != k.shape[1] else False  # torch.compile wants a plain bool
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )


def written_out(q, k, v, mask=None):
    """The formula, for a few heads at a time, so that their scores stay in the cache."""
    (B, H, T, Dh), K, S = q.shape, k.shape[1], k.shape[2]
    q = (q * Dh**-0.5).reshape(B, K, -1, Dh)  # (B, K, H/K * T, Dh): who share keys, end to end
    heads = max(1, SCORES // (H // K * T * S))  # of keys, at a time
    rows, heads = max(1, heads // K), min(heads, K)
    parts = []
    for b in range(0, B, rows):
        for i in range(0, K, heads):
            some = slice(b, b + rows), slice(i, i + heads)
            scores = q[some] @ k[some].transpose(2, 3)  # (rows, heads, H/K * T, S)
            if mask is not None:
                hidden = ~mask[b : b + rows, :, None]  # (rows, 1, 1, T, S)
                scores = scores.unflatten(2, (-1, T)).masked_fill(hidden, -math.inf).flatten(2, 3)
            parts.append((scores.softmax(-1) @ v[some]).flatten(0, 1))  # (rows * heads, ...)
    return torch.cat(parts).view(B, H, T, Dh)


def main():
    """Print how three packed documents are cut into tiles, and that nothing is lost."""
    from llama import visible_keys

    visible = visible_keys(torch.tensor([[1] * 300 + [2] * 200 + [3] * 100]), 600)
    print("documents of 300, 200 and 100 tokens in a row of 600")
    tiles = query_tiles(visible)
    for queries, keys, _ in tiles:
        print(f"    queries from {queries.start:3}   keys {keys.start:3} to {keys.stop:3}")
    q, k, v = (torch.randn(1, 4, 600, 64) for _ in range(3))
    whole = one_tile(q, k, v, visible[:, None])
    for name, way in (("torch", one_tile), ("written out", written_out)):
        parts = [way(q[:, :, i], k[:, :, j], v[:, :, j], mask) for i, j, mask in tiles]
        error = (torch.cat(parts, dim=2) - whole).abs().max()
        print(f"{name:12} in tiles: {list(whole.shape)} (B, H, T, Dh), difference {error:.0e}")


if __name__ == "__main__":
    import argparse

    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    main()
