"""Who computes: our Triton kernels on the GPUs they were measured on, else torch.

attention.py asks `takes` and calls `attend`, quantize.py asks `multiplies` and calls `product`. The
kernels are in kernels/attention.py and kernels/rounded.py, imported when they are first needed:
everything else works without triton.
"""

import importlib.util

import torch
import torch.nn.functional as F

BACKENDS = ("auto", "kernel", "sdpa")
HELP = "by our Triton kernels or torch; auto: the kernels on GPUs on which they were measured"
FEW_ROWS = 16  # rows that are multiplied by a rounded matrix as it is
backend = "auto"  # for both kinds of kernel; the other two force one or the other
# Compute capabilities of GPUs on which the tests of the kernels passed and benchmarks/attention.py
# and rounded.py found them no slower than torch. They compile for 8.0 and 9.0, and ran on neither.
MEASURED_ON: set[tuple[int, int]] = set()


def fused(x, head_dim: int) -> bool:
    """Is the kernel to compute the attention of activations x, with heads of this width?

    By itself only in bfloat16 and float16: in float32 it is exact and slow.
    """
    if backend not in BACKENDS:
        raise ValueError(f"kernels.backend is {backend!r}, none of {', '.join(BACKENDS)}")
    return backend == "kernel" or (
        backend == "auto"
        and has_kernel(x.device)
        and compute_dtype(x) in (torch.bfloat16, torch.float16)
        and head_dim % 16 == 0
        and 32 <= head_dim <= 256
    )


def has_kernel(device) -> bool:
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) in MEASURED_ON
        and importlib.util.find_spec("triton") is not None
    )


# What torch.compiler.assume_constant_result sets; that would import the compiler, and triton.
has_kernel._dynamo_marked_constant = True


def multiplies(rows) -> bool:
    """Is the kernel to multiply these rows by a rounded matrix? If few; not float32 by itself."""
    chosen = backend == "auto" and has_kernel(rows.device) and rows.dtype != torch.float32
    return len(rows) <= FEW_ROWS and (chosen or backend == "kernel")


def product(rows, q, scale, mid, bits: int):
    """float[M, D] times a matrix as `quantize.quantize` makes it: float[M, N]."""
    try:
        from kernels.rounded import product as kernel
    except ImportError as error:
        raise ValueError("the kernels need triton: install it, or use sdpa") from error
    return kernel(rows, q, scale, mid, bits)


def compute_dtype(x):
    """The type x is computed in: its own, or autocast's where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def takes(q, documents) -> bool:
    """Does the kernel compute this, and not attention.py? Masks are made for one or the other."""
    return fused(q, q.shape[-1]) if documents is None else isinstance(documents, torch.Tensor)


def attend(q, k, v, documents=None, causal: bool = False):
    """The kernel's attention of q [B, H, T, Dh] over k, v [B, K, S, Dh]: float[B, H, T, Dh].

    A query sees every key, or with `causal` those not after it; see below for `documents`.
    """
    try:
        from kernels.attention import attention as kernel
    except ImportError as error:
        raise ValueError("the attention kernel needs triton: install it, or use sdpa") from error
    q, k, v = (x.to(compute_dtype(x)) for x in (q, k, v))  # as SDPA does by itself
    return kernel(q, k, v, causal, documents)


def documents(mask):
    """Who sees whom without a dense mask: int[B, S] -> int32[B, 2, S], and positions int[B, S].

    `mask` is that of `llama.visible_keys`: 0 for padding, else the number of the document. A query
    sees the keys that are not after it and are of the same document. Every document is named after
    the place of its first token, so a name also tells where its keys begin; beside it stands the
    place of its last token. Padding has no name: it sees nobody.

        mask      0  0  1  1  1  2  2        one row; its second document is two tokens long
        name     -1 -1  2  2  2  5  5
        last     -1 -1  4  4  4  6  6
        position  0  1  0  1  2  0  1        how many of its document came before
    """
    order = mask.argsort(dim=1, stable=True)  # (B, S), places, document after document
    in_order, places = mask.gather(1, order), torch.arange(mask.shape[1], device=mask.device)
    is_first = F.pad(in_order[:, 1:] != in_order[:, :-1], (1, 0), value=True)
    is_last = is_first.roll(-1, dims=1)
    begin = (places * is_first).cummax(1).values  # of the document, in this order
    end = places.where(is_last, mask.shape[1] - 1).flip(1).cummin(1).values.flip(1)
    both = torch.stack([order.gather(1, begin), order.gather(1, end)], 1)  # (B, 2, S)
    both = both.masked_fill(in_order[:, None] == 0, -1).to(torch.int32)
    both = torch.empty_like(both).scatter_(2, order[:, None].expand_as(both), both)
    return both, torch.empty_like(order).scatter_(1, order, places - begin)
