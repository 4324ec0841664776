"""A few rows times a rounded matrix: weights stay 8 or 4 bits until they are in registers.

A token that is decoded reads every weight once, so its time is bytes over bandwidth; spelled out
before each product (quantize.py), a matrix would be read, written and read again. Here a tile of
whole numbers is multiplied as it is, and scale and middle are applied to the sums:

    w[n, k] = q[n, k] * scale[n]                        int8
    y[m, n] = scale[n] * sum_k x[m, k] q[n, k]

    w[n, k] = (q[n, k] - 8) * scale[n, g] + mid[n, g]   int4, k in group g
    y[m, n] = sum_g (scale[n, g] * sum_k x[m, k] (q[n, k] - 8) + mid[n, g] * sum_k x[m, k])

Numbers up to 127 are exact in float16 and bfloat16, sums are float32. Of int4 a byte holds an even
and an odd k: two products, with every other number of x. A matrix of 4,096 rows has too few tiles
for a GPU, so each is summed in several parts, as decoding is in kernels/attention.py.

Measured: not yet, no GPU was at hand. Triton 3.7.1 compiles it for sm_80 and sm_90 without spills
(tests/test_compile_kernels.py), its interpreter gives the right numbers (tests/test_rounded.py).
"""

import torch
import triton
import triton.language as tl

INTERPRET = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on the CPU, slowly
BLOCK_M, BLOCK_N = 16, 32 if INTERPRET else 64
BLOCK_K = 128  # of int8; of int4 it is a group
PROGRAMS = 4 if INTERPRET else 256  # wanted at least, for the multiprocessors of a GPU


@triton.jit(do_not_specialize=["M"])
def product_kernel(
    X, Q, SCALE, MID, OUT, M, N, D, n_blocks,
    BITS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y, summed over n_blocks blocks of k; part i of the sum lies in OUT[i]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    n_exists, m_exists = (n < N)[:, None], (m < M)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    x_rows = X + m[:, None].to(tl.int64) * D
    for block in tl.range(part * n_blocks, min((part + 1) * n_blocks, tl.cdiv(D, BLOCK_K))):
        if BITS == 8:
            k = block * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
            x = tl.load(x_rows + k, mask=m_exists & (k < D), other=0.0)
            q = tl.load(Q + n[:, None].to(tl.int64) * D + k, mask=n_exists & (k < D), other=0)
            acc = tl.dot(x, tl.trans(q.to(x.dtype)), acc, input_precision=PRECISION)
        else:
            pair = block * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)[None, :]
            even = tl.load(x_rows + 2 * pair, mask=m_exists, other=0.0)
            odd = tl.load(x_rows + 2 * pair + 1, mask=m_exists, other=0.0)
            both = tl.load(Q + n[:, None].to(tl.int64) * (D // 2) + pair, mask=n_exists, other=0)
            low, high = (both & 15).to(tl.int8) - 8, (both >> 4).to(tl.int8) - 8
            sums = tl.dot(even, tl.trans(low.to(even.dtype)), input_precision=PRECISION)
            sums = tl.dot(odd, tl.trans(high.to(odd.dtype)), sums, input_precision=PRECISION)
            group = n.to(tl.int64) * (D // BLOCK_K) + block
            scale = tl.load(SCALE + group, mask=n < N, other=0.0).to(tl.float32)
            mid = tl.load(MID + group, mask=n < N, other=0.0).to(tl.float32)
            total = tl.sum(even.to(tl.float32), 1) + tl.sum(odd.to(tl.float32), 1)
            acc += sums * scale[None, :] + total[:, None] * mid[None, :]
    if BITS == 8:
        acc *= tl.load(SCALE + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    place = OUT + (part * M + m[:, None]).to(tl.int64) * N + n[None, :]
    tl.store(place, acc, mask=m_exists & (n < N)[None, :])


def product(x, q, scale, mid, bits: int):
    """x float[M, D] times the transpose of what `quantize.quantize` made: float[M, N].

    bits 8: q int8[N, D], scale [N, 1]; bits 4: q uint8[N, D/2], scale and mid [N, groups of D].
    Raises ValueError where the kernel cannot run.
    """
    if not (x.is_cuda or INTERPRET):
        raise ValueError(
            f"the kernel for rounded weights runs on a CUDA GPU, the tensors are on {x.device}: "
            "leave it out, or set TRITON_INTERPRET=1 to test it"
        )
    if INTERPRET:  # numpy has no bfloat16
        return multiply(x.float(), q, scale.float(), mid.float(), bits).to(x.dtype)
    return multiply(x, q, scale, mid, bits)


def multiply(x, q, scale, mid, bits: int):
    (M, D), N = x.shape, len(q)
    block = BLOCK_K if bits == 8 else D // scale.shape[1]
    tiles, blocks = (triton.cdiv(N, BLOCK_N), triton.cdiv(M, BLOCK_M)), triton.cdiv(D, block)
    parts = min(blocks, max(1, PROGRAMS // (tiles[0] * tiles[1])))
    n_blocks = triton.cdiv(blocks, parts)  # in each part
    parts = triton.cdiv(blocks, n_blocks)
    out = torch.empty(parts, M, N, dtype=torch.float32, device=x.device)
    product_kernel[(*tiles, parts)](
        x.contiguous(), q, scale, mid, out, M, N, D, n_blocks,
        BITS=bits, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=block, num_warps=4, num_stages=4,
    )  # fmt: skip
    return out.sum(0).to(x.dtype)
