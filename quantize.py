"""Weights in 8 or 4 bits: a token reads a half or a quarter of the bytes, and 7B fits a laptop.

Only what is read at every token shrinks: the decoder's matrices. Embeddings, norms, the tower and
all arithmetic stay as they are ("weight-only"). A weight becomes a small whole number q:

    int8    w = q * scale             one scale per row (output channel), q in -127 .. 127
    int4    w = (q - 8) * scale + mid  a scale and a middle per 128 weights of a row, q in 0 .. 15

Both simply round to the nearest number, without any data to calibrate on (LLM.int8(), arXiv
2208.07339, section 2, has the arithmetic). The head, which names the next token, keeps 8 bits.
Rounding 7B to int4 takes most of a minute; `checkpoint.py convert --quantize int4` does it once.

On a CPU torch's own kernels read these weights, on a GPU kernels/rounded.py where it is chosen
(kernels/__init__.py). Elsewhere, and for many rows, a matrix is spelled out before each product,
which saves memory and no time.
benchmarks/generate.json has what the rounding costs, and fast.py arranges the rest for a CPU.
"""

import re

import torch
import torch.nn as nn
import torch.nn.functional as F

import checkpoint
import kernels

GROUP = 128  # weights that share a scale in int4; 64 or 32 where a row is no multiple
HEAD_BITS = 8
CHUNK = 2**19  # weights that are rounded or laid out at a time: they fit the CPU's cache
MATRICES = r"language_model\.(lm_head|layers\.\d+\..*_proj)\.weight"
KERNELS = {8: ["_weight_int8pack_mm"]}
KERNELS[4] = ["_weight_int4pack_mm_for_cpu", "_convert_weight_to_int4pack_for_cpu"]


def quantize(weight, bits: int):
    """float[F, D] -> q int8[F, D] or uint8[F, D/2], scale and mid float[F, groups of D].

    Two numbers of 4 bits share a byte, the even one in the lower half.
    """
    parts = [quantize_rows(rows, bits) for rows in chunks(weight)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def chunks(matrix):
    """A few rows at a time; 64, or multiples of it, as torch's kernels store them together."""
    if matrix.is_meta:
        return [matrix]
    return matrix.split(max(64, CHUNK // matrix.shape[1] // 64 * 64))


def quantize_rows(weight, bits: int):
    n_out, n_in = weight.shape
    group = n_in if bits == 8 else group_size(n_in)
    groups = weight.float().view(n_out, -1, group)
    if bits == 8:
        scale = groups.abs().amax(-1) / 127
        mid = torch.zeros_like(scale)
    else:
        low, high = groups.aminmax(dim=-1)
        scale = (high - low) / 15
        mid = low + 8 * scale
    # Rounded first as they will be stored, so that q makes up for it.
    scale, mid = scale.clamp(min=1e-9).bfloat16(), mid.bfloat16()
    q = ((groups - mid.float()[..., None]) / scale.float()[..., None]).round_()
    if bits == 8:
        return q.clamp_(-127, 127).to(torch.int8).view(n_out, n_in), scale, mid
    q = q.add_(8).clamp_(0, 15).to(torch.uint8).view(n_out, n_in)
    return q[:, ::2] | q[:, 1::2] << 4, scale, mid


def dequantize(q, scale, mid, bits: int, dtype):
    """The inverse of `quantize`, but for the rounding: -> [F, D]."""
    if bits == 4:
        q = halves(q).to(torch.int8) - 8
    groups = q.view(*scale.shape, -1).to(dtype)
    return (groups * scale.to(dtype)[..., None] + mid.to(dtype)[..., None]).flatten(1)


def halves(q):
    """uint8[F, D/2] -> uint8[F, D], 0 to 15: the two numbers of each byte, side by side."""
    return torch.stack([q & 15, q >> 4], dim=-1).flatten(1)


def group_size(n_in: int) -> int:
    """How many weights share a scale in int4; 0 where no group fits into a row."""
    return next((g for g in (GROUP, GROUP // 2, GROUP // 4) if n_in % g == 0), 0)


class QuantizedLinear(nn.Module):
    """A linear layer without bias, its weight quantised: float[..., D] -> float[..., F].

    Of a weight on the meta device, the place for rounded ones that are stored.
    """

    def __init__(self, weight, bits: int):
        super().__init__()
        self.bits = bits if bits == 8 or group_size(weight.shape[1]) else 8
        self.out_features, self.in_features = weight.shape
        self.keep(*quantize(weight.detach(), self.bits), stored=weight.is_meta)

    def keep(self, q, scale, mid, stored=False):
        self.packed = False
        for name, tensor in {"q": q, "scale": scale, "mid": mid}.items():
            self.register_buffer(name, tensor, persistent=stored)

    @classmethod
    def joined(cls, layers) -> "QuantizedLinear":
        """One layer that gives the outputs of several side by side, packed where that is possible.

        Empties the layers: their memory is needed.
        """
        first = layers[0]
        first.out_features = sum(layer.out_features for layer in layers)
        first.keep(*(torch.cat([getattr(x, n) for x in layers]) for n in ("q", "scale", "mid")))
        for layer in layers[1:]:
            layer.keep(None, None, None)
        first.pack()
        return first

    def pack(self):
        """Lay the weights out for torch's kernels, private functions (seen in 2.13)."""
        here = all(hasattr(torch.ops.aten, name) for name in KERNELS[self.bits])
        # They read 16 numbers at a time, and beyond the end of a row that is no multiple.
        fits = self.out_features % 16 == 0 and self.in_features % 32 == 0
        self.packed = here and fits and self.q.device.type == "cpu"
        if self.packed and self.bits == 4:
            convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu
            self.q = torch.cat([convert(halves(q).int(), 1) for q in chunks(self.q)])
            self.scale = torch.stack([self.scale, self.mid], -1).transpose(0, 1).contiguous()
            self.mid = None

    def forward(self, x, plus=None):
        rows = x.reshape(-1, self.in_features)
        if self.packed and self.bits == 4:
            group = self.in_features // len(self.scale)
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(
                rows.bfloat16(), self.q, group, self.scale
            )  # in float32 these kernels are five times slower
        elif not self.packed and kernels.multiplies(rows):
            y = kernels.product(rows, self.q, self.scale, self.mid, self.bits)
        elif self.packed and len(rows) <= kernels.FEW_ROWS:
            y = torch.ops.aten._weight_int8pack_mm(rows.bfloat16(), self.q, self.scale[:, 0])
        elif self.bits == 8:
            y = F.linear(rows, self.q.to(x.dtype)) * self.scale[:, 0].to(x.dtype)
        else:
            y = F.linear(rows, dequantize(self.q, self.scale, self.mid, 4, x.dtype))
        y = y.to(x.dtype).view(*x.shape[:-1], -1)
        return y if plus is None else y + plus


def taker(bits: int):
    """For `checkpoint.build`: a function that puts the decoder's matrices in place, quantised."""

    def take(module, name: str, tensor) -> bool:
        if not re.fullmatch(MATRICES, name):
            return False
        module.set_submodule(name.removesuffix(".weight"), rounded(name, tensor, bits))
        return True

    return take


def rounded(name: str, weight, bits: int) -> QuantizedLinear:
    return QuantizedLinear(weight, HEAD_BITS if "lm_head" in name else bits)


def make_room(model, bits: int):
    """Put QuantizedLinear in the place of the decoder's matrices."""
    for name, weight in list(model.named_parameters()):
        taker(bits)(model, name, weight)


def for_file(tensors: dict, bits: int) -> dict:
    """{our name: tensor or Stored} with q, scale and mid in the place of the decoder's matrices."""
    found = {}
    for name, stored in checkpoint.watched(tensors.items()):
        if re.fullmatch(MATRICES, name):
            layer = rounded(name, stored.read(), bits)
            name = name.removesuffix("weight")
            found |= {name + part: tensor for part, tensor in layer.named_buffers()}
        else:
            found[name] = stored
    return found


def main():
    """Print what rounding does to a matrix of normal random numbers."""
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    for bits in (8, 4):
        q, scale, mid = quantize(weight, bits)
        n_bytes = sum(t.numel() * t.element_size() for t in (q, scale, mid))
        error = (dequantize(q, scale, mid, bits, torch.float32) - weight).norm() / weight.norm()
        print(f"int{bits}  {8 * n_bytes / weight.numel():5.2f} bits a weight, off by {error:.1%}")


if __name__ == "__main__":
    import argparse

    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    main()
