"""Attention that never writes its scores to memory: forward, decoding and backward in Triton.

Papers: "FlashAttention" (arXiv 2205.14135, algorithm 1), "FlashAttention-2" (arXiv 2307.08691,
sections 3.1 and 3.2: the loops as they are here); decoding split over the keys is "Flash-Decoding"
(Dao et al. 2023, a blog post).

    S = q k^T * scale        float[T, S]      scores
    P = softmax(S)           over the keys that a query sees; a query that sees none gives 0
    out = P v                float[T, Dh]

For 4,096 tokens S has 16.8 million entries a head, and writing and reading it takes longer than
the arithmetic. But softmax can be summed up piece by piece. Of each query three things are kept:
m, the largest score so far; total, the sum of exp(score - m); acc, the sum of exp(score - m) * v.
When a tile of keys brings a larger score, what was summed before shrinks by exp(m_old - m_new):

    q = 1, keys 0 1 | 2 3 in two tiles, v = 10 20 | 30 40, and 2^x for e^x, so that it can be read
    tile 1   scores 0 1   m = 1   p = 1/2 1   total = 3/2                  acc = 5 + 20 = 25
    tile 2   scores 2 3   m = 3   p = 1/2 1   total = 3/2 * 1/4 + 3/2      acc = 25 * 1/4 + 15 + 40
    out = acc / total = 61.25 / 1.875 = 32.67

(`tests/test_attention.py` does these steps.) The kernels too work with 2^x, because the GPU does:
scores are multiplied by log2(e) beforehand. Of the forward pass, backward needs one more number per
query, lse = m + log2(total); it computes the tiles of P again.

Who sees whom is the rule of llama.py without its dense mask: see `kernels.documents`. Keys end
where queries end: with S keys, query t of T stands at position t + S - T.

Measured: not yet, no GPU was at hand. Triton 3.7.1 compiles every kernel for sm_80 and sm_90
(tests/test_compile_kernels.py), its interpreter gives the right numbers (tests/test_attention.py).
Known limits: float32 is exact and slow (no tensor cores); heads not 64, 128 or 256 wide are
computed in tiles of the next of these; no dropout, no bias, no gradients of gradients.
"""

import math

import torch
import triton
import triton.language as tl

INTERPRET = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on the CPU, slowly
LOG2_E = math.log2(math.e)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = ["H", "G", "T", "S"]  # one compiled kernel serves all lengths and numbers of heads


def attention_plain(q, k, v, causal=False, documents=None, scale=None):
    """The formula above, line by line; arguments, result and errors are those of `attention`."""
    scale = check(q, k, v, causal, documents, scale)
    H, T, S = q.shape[1], q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))  # (B, H, S, Dh)
    scores = q @ k.transpose(-1, -2) * scale  # (B, H, T, S)
    visible = torch.ones(T, S, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril(S - T)
    if documents is not None:
        name = documents[:, 0]  # (B, S)
        visible = visible & (name[:, -T:, None] == name[:, None]) & (name[:, None] >= 0)
        visible = visible[:, None]  # (B, 1, T, S)
    P = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return P.masked_fill(~visible, 0) @ v  # a row of -inf gave NaN, which becomes 0


# Pieces that all kernels share. A tile is a block of rows of one head: queries or keys.


@triton.jit
def head_of(base, strides, b, h):
    """Where head h of row b begins. Offsets are 64 bits wide: 2^31 elements are 4 GB only."""
    return base + b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1]


@triton.jit
def tile_of(head, strides, row, n_rows, ROWS: tl.constexpr, COLS: tl.constexpr, HEAD: tl.constexpr):
    """Pointers to rows [row, row + ROWS) of a head, and which of them exist."""
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    inside = rows[:, None] * strides[2] + cols[None, :] * strides[3]  # the same for every tile
    pointers = head + tl.cast(row, tl.int64) * strides[2] + inside
    exist = (row + rows < n_rows)[:, None]
    if HEAD != COLS:
        exist = exist & (cols < HEAD)[None, :]
    return pointers, exist


@triton.jit
def read_tile(
    base, strides, b, h, row, n_rows, ROWS: tl.constexpr, COLS: tl.constexpr, HEAD: tl.constexpr
):
    """Rows [row, row + ROWS) of head h; what does not exist is 0."""
    pointers, exist = tile_of(head_of(base, strides, b, h), strides, row, n_rows, ROWS, COLS, HEAD)
    return tl.load(pointers, mask=exist, other=0.0)


@triton.jit
def write_tile(base, strides, b, h, row, n_rows, tile, HEAD: tl.constexpr):
    head = head_of(base, strides, b, h)
    pointers, exist = tile_of(head, strides, row, n_rows, tile.shape[0], tile.shape[1], HEAD)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=exist)


@triton.jit
def sees(p, name_p, s, name_s, S, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr):
    """bool[queries, keys] of positions p and s: the rule of `llama.visible_keys`, for a tile."""
    visible = (s < S)[None, :]
    if CAUSAL:
        visible = visible & (s[None, :] <= p[:, None])
    if DOCUMENTS:
        visible = visible & (name_s[None, :] == name_p[:, None])
    return visible


@triton.jit
def names_of(names, p, S):
    """Documents of query positions. A nameless query sees nobody, no nameless key either."""
    name = tl.load(names + p, mask=(p >= 0) & (p < S), other=-1)
    return tl.where(name < 0, -2, name)


@triton.jit
def read_keys(
    acc, total, m, q, p, name_p, k_head, k_strides, v_head, v_strides, names, begin, end, S, scale,
    HEAD: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The worked example: tiles of keys in [begin, end) go into acc, total and m of some queries.

    MASKED=False: every query of the tile sees every key, so nothing is compared.
    """
    for n in tl.range(begin, end, BLOCK_N):
        pointers, exist = tile_of(k_head, k_strides, n, S, BLOCK_N, BLOCK_D, HEAD)
        if MASKED or HEAD != BLOCK_D:
            k = tl.load(pointers, mask=exist, other=0.0)
        else:
            k = tl.load(pointers)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        pointers, exist = tile_of(v_head, v_strides, n, S, BLOCK_N, BLOCK_D, HEAD)
        if MASKED or HEAD != BLOCK_D:
            v = tl.load(pointers, mask=exist, other=0.0)
        else:
            v = tl.load(pointers)
        if MASKED:
            s = n + tl.arange(0, BLOCK_N)
            name_s = tl.load(names + s, mask=s < S, other=-1) if DOCUMENTS else s
            if CAUSAL:
                # 0 * NaN is NaN: a key's NaN goes from v to its scores, where it can be hidden.
                broken = tl.max((v != v).to(tl.int32), 1) > 0  # (BLOCK_N)
                v = tl.where(v != v, 0.0, v)
                scores = tl.where(broken[None, :], float("nan"), scores)
            visible = sees(p, name_p, s, name_s, S, CAUSAL, DOCUMENTS)
            scores = tl.where(visible, scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1) * scale)
        # -inf - -inf is NaN: rows that have seen nothing yet are measured from 0.
        top = tl.where(m_new == float("-inf"), 0.0, m_new)
        P = tl.exp2(scores * scale - top[:, None])
        shrink = tl.exp2(m - top)
        total = total * shrink + tl.sum(P, 1)
        acc = tl.dot(P.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        m = m_new
    return acc, total, m


@triton.jit
def attend_tile(
    q, p, name_p, k_head, k_strides, v_head, v_strides, names, begin, whole, end, S, scale,
    HEAD: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out float[BLOCK_M, BLOCK_D] and lse of a tile of queries over the keys in [begin, end).

    The keys in [begin, whole) are seen by every query of the tile.
    """
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if not DOCUMENTS:
        acc, total, m = read_keys(
            acc, total, m, q, p, name_p, k_head, k_strides, v_head, v_strides, names, begin, whole,
            S, scale, HEAD, CAUSAL, DOCUMENTS, False, PRECISION, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    acc, total, m = read_keys(
        acc, total, m, q, p, name_p, k_head, k_strides, v_head, v_strides, names, whole, end,
        S, scale, HEAD, CAUSAL, DOCUMENTS, True, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)  # who sees nothing gets 0 / 1, and lse = -inf
    return acc / total[:, None], m + tl.log2(total)


@triton.jit
def key_range(row, p, name_p, T, S, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
              CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr):  # fmt: skip
    """Keys that the queries [row, row + BLOCK_M) need: begin, end, and where comparing begins.

    Tiles of 2 x 2, causal: the queries 4 and 5 read the keys 0 to 3 without a look at the mask,
    and 4 to 5, on the diagonal, with one.
    """
    begin, whole, end = 0, S // BLOCK_N * BLOCK_N, S
    if CAUSAL:
        position = row + S - T
        whole = min(whole, max(position + 1, 0) // BLOCK_N * BLOCK_N)
        end = max(min(S, position + BLOCK_M), 0)
    if DOCUMENTS:  # a document is named after its first token
        begin = tl.min(tl.where(name_p >= 0, name_p, S)) // BLOCK_N * BLOCK_N
        whole = begin
    return begin, whole, end


# Forward: one program per tile of queries and head.


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    Q, K, V, OUT, LSE, DOCS, q_strides, k_strides, v_strides, out_strides, H, G, T, S, scale,
    HEAD: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # The last tiles have the most keys to read when causal: they start first.
    n_tiles = tl.cdiv(T, BLOCK_M)
    row = (n_tiles - 1 - tl.program_id(0) % n_tiles) * BLOCK_M
    b, h = tl.program_id(0) // n_tiles // H, tl.program_id(0) // n_tiles % H
    k_head, v_head = head_of(K, k_strides, b, h // G), head_of(V, v_strides, b, h // G)
    q = read_tile(Q, q_strides, b, h, row, T, BLOCK_M, BLOCK_D, HEAD)
    t = row + tl.arange(0, BLOCK_M)
    p = t + S - T
    names = DOCS + b.to(tl.int64) * 2 * S if DOCUMENTS else DOCS
    name_p = names_of(names, p, S) if DOCUMENTS else p
    begin, whole, end = key_range(row, p, name_p, T, S, BLOCK_M, BLOCK_N, CAUSAL, DOCUMENTS)
    out, lse = attend_tile(
        q, p, name_p, k_head, k_strides, v_head, v_strides, names, begin, whole, end, S, scale,
        HEAD, CAUSAL, DOCUMENTS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    write_tile(OUT, out_strides, b, h, row, T, out, HEAD)
    tl.store(LSE + (b * H + h).to(tl.int64) * T + t, lse, mask=t < T)


# Decoding: few queries, many keys. One program per head would leave most of the GPU without work,
# so the keys are cut into parts, one program each, and a second kernel adds up the parts. The rows
# of a tile are the queries of all heads that share a key-value head: its keys are read once for 16.


@triton.jit(do_not_specialize=[*SIZES, "n_parts", "part"])
def split_kernel(
    Q, K, V, PARTS, LSE, DOCS, q_strides, k_strides, v_strides, H, G, T, S, n_parts, part, scale,
    HEAD: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i, head = tl.program_id(0) % n_parts, tl.program_id(0) // n_parts
    n_tiles = tl.cdiv(G * T, BLOCK_M)
    row, head = head % n_tiles * BLOCK_M, head // n_tiles
    b, kv = head // (H // G), head % (H // G)
    k_head, v_head = head_of(K, k_strides, b, kv), head_of(V, v_strides, b, kv)
    rows, cols = row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    t, exist = rows % T, (rows < G * T)[:, None] & (cols < HEAD)[None, :]
    q = head_of(Q, q_strides, b, kv * G + rows // T) + t.to(tl.int64) * q_strides[2]
    q = tl.load(q[:, None] + cols[None, :] * q_strides[3], mask=exist, other=0.0)
    p = t + S - T
    names = DOCS + b.to(tl.int64) * 2 * S if DOCUMENTS else DOCS
    name_p = names_of(names, p, S) if DOCUMENTS else p
    begin = i * part  # a multiple of BLOCK_N
    end = min(begin + part, S)
    whole = begin
    if not DOCUMENTS:
        whole = min(end, S - T + 1 if CAUSAL else S)
        whole = begin + max(whole - begin, 0) // BLOCK_N * BLOCK_N
    out, lse = attend_tile(
        q, p, name_p, k_head, k_strides, v_head, v_strides, names, begin, whole, end, S, scale,
        HEAD, CAUSAL, DOCUMENTS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    n_heads = tl.num_programs(0) // n_parts // n_tiles  # B * K
    row = (i * n_heads + head).to(tl.int64) * (G * T) + rows
    tl.store(PARTS + row[:, None] * HEAD + cols[None, :], out, mask=exist)
    tl.store(LSE + row, lse, mask=rows < G * T)


@triton.jit(do_not_specialize=["H", "T", "n_parts"])
def merge_kernel(
    PARTS, PART_LSE, OUT, LSE, out_strides, H, T, n_parts,
    HEAD: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = sum of 2^(lse_i - lse) out_i, with 2^lse = sum of 2^lse_i: one query a program."""
    row, n_rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    i, cols = tl.arange(0, BLOCK_PARTS), tl.arange(0, BLOCK_D)
    part_lse = tl.load(PART_LSE + i * n_rows + row, mask=i < n_parts, other=float("-inf"))
    m = tl.max(part_lse, 0)
    share = tl.exp2(part_lse - tl.where(m == float("-inf"), 0.0, m))  # (BLOCK_PARTS)
    pointers = PARTS + (i[:, None] * n_rows + row) * HEAD + cols[None, :]
    exist = (i < n_parts)[:, None] & (cols < HEAD)[None, :]
    out = tl.sum(tl.load(pointers, mask=exist, other=0.0) * share[:, None], 0)
    total = tl.sum(share, 0)
    total = tl.where(total == 0.0, 1.0, total)
    b, h, t = row // T // H, row // T % H, row % T
    pointers = head_of(OUT, out_strides, b, h) + t * out_strides[2] + cols * out_strides[3]
    tl.store(pointers, (out / total).to(OUT.dtype.element_ty), mask=cols < HEAD)
    tl.store(LSE + row, m + tl.log2(total))


# Backward. With delta = sum over Dh of dOUT * OUT, the derivative of the softmax:
#
#     dV = P^T dOUT      dS = P * (dOUT V^T - delta)      dQ = dS K * scale      dK = dS^T Q * scale
#
# dQ adds up over keys, dK and dV over queries, so there is one kernel for each: nobody adds to
# what another program adds to, and the result has the same bits every time.


@triton.jit(do_not_specialize=["H", "T"])
def delta_kernel(
    OUT, dOUT, DELTA, out_strides, dout_strides, H, T,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(T, BLOCK_M)
    row, head = tl.program_id(0) % n_tiles * BLOCK_M, tl.program_id(0) // n_tiles
    b, h = head // H, head % H
    out = read_tile(OUT, out_strides, b, h, row, T, BLOCK_M, BLOCK_D, HEAD)
    dout = read_tile(dOUT, dout_strides, b, h, row, T, BLOCK_M, BLOCK_D, HEAD)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    t = row + tl.arange(0, BLOCK_M)
    tl.store(DELTA + head.to(tl.int64) * T + t, delta, mask=t < T)


@triton.jit
def add_dq(
    dq, q, dout, lse, delta, p, name_p, k_head, k_strides, v_head, v_strides, names, begin, end,
    S, scale, HEAD: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Tiles of keys in [begin, end) go into dQ (without its factor) of a tile of queries."""
    for n in tl.range(begin, end, BLOCK_N):
        pointers, exist = tile_of(k_head, k_strides, n, S, BLOCK_N, BLOCK_D, HEAD)
        k = tl.load(pointers, mask=exist, other=0.0)
        pointers, exist = tile_of(v_head, v_strides, n, S, BLOCK_N, BLOCK_D, HEAD)
        v = tl.load(pointers, mask=exist, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        P = tl.exp2(scores * scale - lse[:, None])
        if MASKED:
            s = n + tl.arange(0, BLOCK_N)
            name_s = tl.load(names + s, mask=s < S, other=-1) if DOCUMENTS else s
            P = tl.where(sees(p, name_p, s, name_s, S, CAUSAL, DOCUMENTS), P, 0.0)
        dP = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        dS = P * (dP - delta[:, None])
        dq = tl.dot(dS.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=SIZES)
def backward_queries_kernel(
    Q, K, V, dOUT, dQ, LSE, DELTA, DOCS, q_strides, k_strides, v_strides, dout_strides,
    dq_strides, H, G, T, S, scale, natural_scale,
    HEAD: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(T, BLOCK_M)
    row = (n_tiles - 1 - tl.program_id(0) % n_tiles) * BLOCK_M
    b, h = tl.program_id(0) // n_tiles // H, tl.program_id(0) // n_tiles % H
    k_head, v_head = head_of(K, k_strides, b, h // G), head_of(V, v_strides, b, h // G)
    q = read_tile(Q, q_strides, b, h, row, T, BLOCK_M, BLOCK_D, HEAD)
    dout = read_tile(dOUT, dout_strides, b, h, row, T, BLOCK_M, BLOCK_D, HEAD)
    t = row + tl.arange(0, BLOCK_M)
    per_query = (b * H + h).to(tl.int64) * T + t
    lse = tl.load(LSE + per_query, mask=t < T, other=0.0)
    delta = tl.load(DELTA + per_query, mask=t < T, other=0.0)
    p = t + S - T
    names = DOCS + b.to(tl.int64) * 2 * S if DOCUMENTS else DOCS
    name_p = names_of(names, p, S) if DOCUMENTS else p
    begin, whole, end = key_range(row, p, name_p, T, S, BLOCK_M, BLOCK_N, CAUSAL, DOCUMENTS)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if not DOCUMENTS:
        dq = add_dq(
            dq, q, dout, lse, delta, p, name_p, k_head, k_strides, v_head, v_strides, names,
            begin, whole, S, scale, HEAD, CAUSAL, DOCUMENTS, False, PRECISION, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    dq = add_dq(
        dq, q, dout, lse, delta, p, name_p, k_head, k_strides, v_head, v_strides, names,
        whole, end, S, scale, HEAD, CAUSAL, DOCUMENTS, True, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    write_tile(dQ, dq_strides, b, h, row, T, dq * natural_scale, HEAD)


@triton.jit
def add_dk_dv(
    dk, dv, k, v, s, name_s, q_head, q_strides, dout_head, dout_strides, LSE, DELTA, names,
    begin, end, T, S, scale,
    HEAD: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Tiles of queries in [begin, end) go into dK (without its factor) and dV of a tile of keys.

    Everything is transposed, float[keys, queries]: so P and dS stay in registers for the products.
    When causal every tile is compared, the whole ones too: a second loop costs more registers than
    there are.
    """
    for row in tl.range(begin, end, BLOCK_M):
        pointers, exist = tile_of(q_head, q_strides, row, T, BLOCK_M, BLOCK_D, HEAD)
        q = tl.load(pointers, mask=exist, other=0.0)
        pointers, exist = tile_of(dout_head, dout_strides, row, T, BLOCK_M, BLOCK_D, HEAD)
        dout = tl.load(pointers, mask=exist, other=0.0)
        t = row + tl.arange(0, BLOCK_M)
        lse = tl.load(LSE + t, mask=t < T, other=float("inf"))  # no query there: P is 0
        delta = tl.load(DELTA + t, mask=t < T, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
        P = tl.exp2(scores * scale - lse[None, :])
        if CAUSAL:
            p = t + S - T
            name_p = names_of(names, p, S) if DOCUMENTS else p
            visible = sees(p, name_p, s, name_s, S, CAUSAL, DOCUMENTS)
            P = tl.where(tl.trans(visible), P, 0.0)
        dv = tl.dot(P.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dP = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        dS = P * (dP - delta[None, :])
        dk = tl.dot(dS.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def backward_keys_kernel(
    Q, K, V, dOUT, dK, dV, LSE, DELTA, DOCS, q_strides, k_strides, v_strides, dout_strides,
    dk_strides, dv_strides, H, G, T, S, scale, natural_scale,
    HEAD: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(S, BLOCK_N)
    n, head = tl.program_id(0) % n_tiles * BLOCK_N, tl.program_id(0) // n_tiles
    b, kv = head // (H // G), head % (H // G)
    k = read_tile(K, k_strides, b, kv, n, S, BLOCK_N, BLOCK_D, HEAD)
    v = read_tile(V, v_strides, b, kv, n, S, BLOCK_N, BLOCK_D, HEAD)
    s = n + tl.arange(0, BLOCK_N)
    names = DOCS + b.to(tl.int64) * 2 * S if DOCUMENTS else DOCS
    name_s = s
    begin, end = 0, T  # queries that need these keys
    if CAUSAL:
        begin = max(n + T - S, 0) // BLOCK_M * BLOCK_M
    if DOCUMENTS:
        name_s = tl.load(names + s, mask=s < S, other=-1)
        last = tl.max(tl.load(names + S + s, mask=s < S, other=-1))
        end = min(last + 1 + T - S, T)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for g in range(G):  # the query heads that share this key-value head
        h = kv * G + g
        q_head, dout_head = head_of(Q, q_strides, b, h), head_of(dOUT, dout_strides, b, h)
        per_query = (b * H + h).to(tl.int64) * T
        dk, dv = add_dk_dv(
            dk, dv, k, v, s, name_s, q_head, q_strides, dout_head, dout_strides, LSE + per_query,
            DELTA + per_query, names, begin, end, T, S, scale,
            HEAD, CAUSAL, DOCUMENTS, PRECISION, BLOCK_M, BLOCK_D,
        )  # fmt: skip
    write_tile(dK, dk_strides, b, kv, n, S, dk * natural_scale, HEAD)
    write_tile(dV, dv_strides, b, kv, n, S, dv, HEAD)


# The launches. Sizes of tiles are a trade: larger ones read less memory a product, until a program
# needs more registers than there are (255 a thread) or more shared memory (227 KB a program).

# kernel, width of a head -> BLOCK_M queries, BLOCK_N keys, warps, loads in flight
TILES = {  # on Hopper, and on Ampere, whose products need more registers
    ("forward", 64): ((128, 64, 8, 3), (128, 64, 8, 3)),
    ("forward", 128): ((128, 128, 8, 2), (64, 32, 4, 3)),
    ("forward", 256): ((128, 64, 8, 2), (64, 32, 8, 2)),
    ("forward, documents", 64): ((128, 64, 8, 3), (128, 32, 8, 3)),
    ("forward, documents", 128): ((128, 64, 8, 3), (64, 32, 8, 3)),
    ("forward, documents", 256): ((128, 32, 8, 2), (64, 32, 8, 2)),
    ("split", 64): ((16, 128, 4, 3), (16, 128, 4, 3)),
    ("split", 128): ((16, 64, 4, 3), (16, 64, 4, 3)),
    ("split", 256): ((16, 32, 8, 3), (16, 32, 4, 3)),
    ("backward_queries", 64): ((128, 64, 8, 3), (64, 64, 8, 3)),
    ("backward_queries", 128): ((128, 64, 8, 2), (64, 64, 8, 2)),
    ("backward_queries", 256): ((64, 32, 8, 2), (64, 32, 8, 2)),
    ("backward_keys", 64): ((32, 128, 8, 3), (32, 128, 8, 3)),
    ("backward_keys", 128): ((32, 128, 8, 2), (32, 64, 8, 2)),
    ("backward_keys", 256): ((16, 64, 8, 2), (16, 64, 8, 1)),
}


def generation(q):
    """8 for Ampere, 9 for Hopper: the first number of a GPU's compute capability."""
    return min(max(torch.cuda.get_device_capability(q.device)[0], 8), 9)


def tiles(kernel, q):
    """How a kernel is cut for heads like those of q: its constants and launch options."""
    head = q.shape[-1]
    block_d = max(triton.next_power_of_2(head), 64)
    if INTERPRET:
        m, n, warps, stages = 16, 32, 1, 1  # small, so that short sequences have many tiles
    elif q.dtype == torch.float32:
        m, n, warps, stages = 16, 16 if block_d == 256 else 32, block_d // 16, 1
    else:
        m, n, warps, stages = TILES[kernel, block_d][0 if generation(q) == 9 else 1]
    return dict(
        HEAD=head,
        PRECISION="ieee",  # of products of float32: nothing is rounded to tf32
        BLOCK_M=m,
        BLOCK_N=n,
        BLOCK_D=block_d,
        num_warps=warps,
        num_stages=stages,
    )


def check(q, k, v, causal, documents, scale):
    """The scale, or ValueError with one sentence for what the kernels cannot do."""
    (B, H, T, head), S = q.shape, k.shape[2]
    if k.shape != v.shape or (k.shape[0], k.shape[3]) != (B, head) or H % k.shape[1]:
        raise ValueError(
            "expected q [B, H, T, Dh], k and v [B, K, S, Dh] with H a multiple of K, got "
            f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if head % 16 or not 32 <= head <= 256:
        raise ValueError(
            f"heads are {head} wide, the kernel takes multiples of 16 from 32 to 256: use sdpa"
        )
    if documents is not None and (not causal or documents.shape != (B, 2, S) or T > S):
        raise ValueError(
            f"documents need causal=True, T <= S and the int32[{B}, 2, {S}] of kernels.documents; "
            f"got causal={causal}, T = {T}, {list(documents.shape)}"
        )
    if scale is not None and scale <= 0:
        raise ValueError(f"expected a scale above 0, got {scale}")
    return head**-0.5 if scale is None else scale


def like_rows(x):
    """An empty [B, H, T, Dh] that lies in memory as [B, T, H, Dh]: what o_proj reads next."""
    B, H, T, head = x.shape
    return x.new_empty(B, T, H, head).transpose(1, 2)


def n_parts(q, k):
    """Into how many parts decoding cuts the keys: two programs for every multiprocessor."""
    (B, H, T, _), (K, S) = q.shape, k.shape[1:3]
    if H // K * T > 64:  # four tiles of rows: no decoding
        return 1
    n_processors = 132
    if q.is_cuda:
        n_processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    wanted = triton.cdiv(2 * n_processors, max(B * K, 1))
    return max(1, min(wanted, S // (32 if INTERPRET else 256), 64))


@torch.library.custom_op("llava::attention", mutates_args=())
def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out float[B, H, T, Dh] and lse float32[B, H, T] (in powers of two)."""
    if INTERPRET and q.dtype == torch.bfloat16:  # which numpy does not have
        out, lse = forward(q.float(), k.float(), v.float(), documents, causal, scale)
        return out.to(q.dtype), lse
    (B, H, T, head), (K, S) = q.shape, k.shape[1:3]
    out, lse = like_rows(q), q.new_empty(B, H, T, dtype=torch.float32)
    mask = dict(CAUSAL=causal, DOCUMENTS=documents is not None)
    strides = q.stride(), k.stride(), v.stride()
    scale, parts = scale * LOG2_E, n_parts(q, k)
    with torch.cuda.device_of(q):
        if parts == 1:
            cut = tiles("forward" if documents is None else "forward, documents", q)
            forward_kernel[(B * H * triton.cdiv(T, cut["BLOCK_M"]),)](
                q, k, v, out, lse, documents, *strides, out.stride(), H, H // K, T, S, scale,
                **mask, **cut,
            )  # fmt: skip
            return out, lse
        cut = tiles("split", q)
        part = triton.cdiv(triton.cdiv(S, parts), cut["BLOCK_N"]) * cut["BLOCK_N"]
        part_outs = lse.new_empty(parts, B, H, T, head)
        part_lse = lse.new_empty(parts, B, H, T)
        split_kernel[(B * K * triton.cdiv(H // K * T, cut["BLOCK_M"]) * parts,)](
            q, k, v, part_outs, part_lse, documents, *strides, H, H // K, T, S, parts, part, scale,
            **mask, **cut,
        )  # fmt: skip
        merge_kernel[(B * H * T,)](
            part_outs, part_lse, out, lse, out.stride(), H, T, parts, HEAD=head,
            BLOCK_PARTS=triton.next_power_of_2(parts), BLOCK_D=cut["BLOCK_D"],
        )  # fmt: skip
    return out, lse


@forward.register_fake
def _(q, k, v, documents, causal, scale):
    return like_rows(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("llava::attention_backward", mutates_args=())
def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    documents: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ, dK, dV, of the shapes of q, k, v."""
    if INTERPRET and q.dtype == torch.bfloat16:
        tensors = (x.float() for x in (dout, q, k, v, out))
        grads = backward(*tensors, lse, documents, causal, scale)
        return tuple(grad.to(q.dtype) for grad in grads)
    (B, H, T, head), (K, S) = q.shape, k.shape[1:3]
    delta = torch.empty_like(lse)
    dq, dk, dv = like_rows(q), like_rows(k), like_rows(v)
    tensors = q.stride(), k.stride(), v.stride(), dout.stride()
    sizes = H, H // K, T, S, scale * LOG2_E, scale
    mask = dict(CAUSAL=causal, DOCUMENTS=documents is not None)
    with torch.cuda.device_of(q):
        cut = tiles("backward_queries", q)
        n_programs = B * H * triton.cdiv(T, cut["BLOCK_M"])
        delta_kernel[(n_programs,)](
            out, dout, delta, out.stride(), dout.stride(), H, T,
            HEAD=head, BLOCK_M=cut["BLOCK_M"], BLOCK_D=cut["BLOCK_D"],
        )  # fmt: skip
        backward_queries_kernel[(n_programs,)](
            q, k, v, dout, dq, lse, delta, documents, *tensors, dq.stride(), *sizes, **mask, **cut
        )
        cut = tiles("backward_keys", q)
        backward_keys_kernel[(B * K * triton.cdiv(S, cut["BLOCK_N"]),)](
            q, k, v, dout, dk, dv, lse, delta, documents, *tensors, dk.stride(), dv.stride(),
            *sizes, **mask, **cut,
        )  # fmt: skip
    return dq, dk, dv


@backward.register_fake
def _(dout, q, k, v, out, lse, documents, causal, scale):
    return like_rows(q), like_rows(k), like_rows(v)


def save(ctx, inputs, output):
    q, k, v, documents, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, documents)


def gradients(ctx, dout, dlse):
    dq, dk, dv = backward(dout, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return dq, dk, dv, None, None, None


forward.register_autograd(gradients, setup_context=save)


def attention(q, k, v, causal=False, documents=None, scale=None):
    """softmax(q k^T * scale) v without the scores in memory: float[B, H, T, Dh], as q is.

    q:         [B, H, T, Dh]; k, v: [B, K, S, Dh], K a divisor of H; bfloat16, float16 or float32,
               with any strides
    causal:    query t, at position t + S - T, sees no key after that position
    documents: int32[B, 2, S] of `kernels.documents`: who sees whom in packed or padded rows
    scale:     Dh^-0.5 if not given

    A query that sees no key gives zeros. Raises ValueError for other widths, types and shapes.
    """
    scale = check(q, k, v, causal, documents, scale)
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise ValueError(
            "expected q, k, v of one type, bfloat16, float16 or float32; "
            f"got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not (q.is_cuda or INTERPRET):
        raise ValueError(
            f"the attention kernel runs on a CUDA GPU, the tensors are on {q.device}: use sdpa, "
            "or set TRITON_INTERPRET=1 to test it"
        )
    return forward(q, k, v, documents, causal, scale)[0]
