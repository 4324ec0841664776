"""The same model with its weights laid out for a CPU: the same answers, sooner.

llama.py and vit.py are written to be read, and a CPU runs them at half the speed it could. Nothing
is computed differently here but for the order of a sum; what changes is how the weights lie:

    packed     A token reads every weight once, so its time is bytes / bandwidth, provided that a
               matrix lies in memory in the order in which the product walks through it. oneDNN, the
               library behind torch's products on CPUs, reorders on demand: here once, on load.
    joined     q, k and v read the same input: one matrix below the other, one product. So do the
               MLP's gate and up.
    folded     Bias, activation and residual are worked in while a result is in the cache, by the
               product itself (oneDNN's "post-ops").
    attention  Of one query, the heads that share a key head become the rows of one product. Where
               none share, torch's kernel takes two or three times as long as plain products in
               float32. (Many queries are attention.py's.)

`prepare` is the one call. A prepared model only answers: it is neither trained nor saved. Read
llama.py and vit.py first; each class here has its twin there, and tests/test_fast.py compares them.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

import checkpoint
import kernels
from attention import attend
from llama import KVCache, LLaMA, LLaMAConfig, rope_tables
from quantize import HEAD_BITS, QuantizedLinear
from vit import ViT, ViTConfig


def can_pack(dtype) -> bool:
    """Are oneDNN's packed products here? They are private to torch (seen in 2.13)."""
    names = "_reorder_linear_weight", "_linear_pointwise"
    if not torch.backends.mkldnn.is_available():
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    # Intel's own library is faster in float32 on Intel's CPUs, and half as fast on AMD's. Of the
    # two machines that this was measured on, the Intel one has AMX.
    return dtype == torch.float32 and not torch.cpu._is_amx_tile_supported()


def multiplies_bfloat16() -> bool:
    """Has this CPU products of bfloat16 (AVX512-BF16, AMX)? Then they take half of float32's time.

    Where it has not, bfloat16 halves the memory and nothing else.
    """
    cpu = torch.cpu
    return cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()


class Product(nn.Module):
    """x W^T + b with W packed: float[..., D] -> float[..., F]; then SiLU, or a residual added.

    linears: nn.Linear of the same input (or a table); their outputs stand side by side
    rows:    how many rows x has as a rule; the packed order depends on it. (That for one row takes
             a quarter longer in float32, also for one row.)
    """

    def __init__(self, *linears, rows: int = 64):
        super().__init__()
        weights = [x.weight.data for x in linears]
        biases = [getattr(x, "bias", None) for x in linears]
        self.bias = None if biases[0] is None else torch.cat(biases).detach()
        self.packed = weights[0].device.type == "cpu" and can_pack(weights[0].dtype)
        if self.packed:
            weight = torch.cat(weights) if len(weights) > 1 else weights[0]
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        else:
            self.weight = torch.cat(weights)  # a copy in any case: they may lie in a file

    def forward(self, x, silu: bool = False, plus=None):
        if not self.packed:
            x = F.linear(x, self.weight, self.bias)
            x = F.silu(x) if silu else x
            return x if plus is None else x + plus
        product = torch.ops.mkldnn._linear_pointwise
        if plus is not None:
            return product.binary(x, plus, self.weight, self.bias, "add")
        return product(x, self.weight, self.bias, "swish" if silu else "none", [], "")


def product(*linears):
    """One layer that does the work of several, in the form that their weights are in."""
    if isinstance(linears[0], QuantizedLinear):
        return QuantizedLinear.joined(linears)
    return Product(*linears)


class DecoderBlock(nn.Module):
    """llama.Block with four products for seven."""

    def __init__(self, block, config: LLaMAConfig):
        super().__init__()
        attention, mlp = block.self_attn, block.mlp
        self.config, self.layer = config, attention.layer
        self.norm_1 = block.input_layernorm.weight
        self.norm_2 = block.post_attention_layernorm.weight
        self.qkv = product(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o = product(attention.o_proj)
        self.gate_up = product(mlp.gate_proj, mlp.up_proj)
        self.down = product(mlp.down_proj)

    def forward(self, x, rope, tiles, cache):
        x = self.o(self.attention(self.norm(x, self.norm_1), rope, tiles, cache), plus=x)
        gate, up = self.gate_up(self.norm(x, self.norm_2)).chunk(2, -1)
        return self.down(F.silu(gate).mul_(up), plus=x)

    def norm(self, x, weight):
        return F.rms_norm(x, weight.shape, weight, self.config.norm_eps)

    def attention(self, x, rope, tiles, cache):
        (B, T, _), c = x.shape, self.config
        heads = self.qkv(x).view(B, T, -1, c.head_dim).transpose(1, 2)  # (B, H+2K, T, Dh)
        qk, v = heads.split([c.n_heads + c.n_kv_heads, c.n_kv_heads], dim=1)
        # llama.apply_rope; the sines carry the sign of the half that is turned in.
        qk = torch.addcmul(qk * rope[0], qk.roll(c.head_dim // 2, -1), rope[1])
        q, k = qk.split([c.n_heads, c.n_kv_heads], dim=1)
        if cache is not None:
            past = cache.length
            keys, values = cache.update(self.layer, k, v)  # (B, K, S, Dh)
            if past:  # else the prompt's own, which need not be in the type of the cache
                k, v = keys, values
        if T == 1 and x.device.type == "cpu" and not kernels.takes(q, tiles):
            mask = tiles and tiles[0][2]  # (B, 1, 1, S)
            if c.n_heads == c.n_kv_heads:
                scores = q.float() @ k.float().transpose(2, 3) * c.head_dim**-0.5  # (B, H, 1, S)
                scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
                y = scores.softmax(-1) @ v.float()
            else:  # the queries of a key head are the rows of one product
                q = q.reshape(B, c.n_kv_heads, -1, c.head_dim).to(k.dtype)  # (B, K, H/K, Dh)
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            y = attend(q, k.to(q.dtype), v.to(q.dtype), tiles, causal=True)
            y = y.transpose(1, 2)  # (B, T, H, Dh)
        return y.reshape(B, T, -1).to(x.dtype)  # (B, T, H * Dh)


class Decoder(LLaMA):
    """llama.LLaMA, made from one; the same arguments, the same logits."""

    def __init__(self, llama: LLaMA):
        nn.Module.__init__(self)
        llama.requires_grad_(False)
        self.config, self.norm, self.embed_tokens = llama.config, llama.norm, llama.embed_tokens
        self.layers = llama.layers
        replace_blocks(self, DecoderBlock)
        if not self.config.tied_embeddings:
            self.out = product(llama.lm_head)
        elif isinstance(self.layers[0].down, QuantizedLinear):
            self.out = QuantizedLinear(self.embed_tokens.weight, HEAD_BITS)
            self.out.pack()
        else:  # in memory twice: as it is to look words up, packed to name the next
            self.out = Product(self.embed_tokens)

    def hidden(self, token_ids=None, embeds=None, mask=None, cache=None):
        """As in LLaMA."""
        x = self.embed_tokens(token_ids) if embeds is None else embeds
        tiles, positions = self.who_sees_whom(x, mask, cache)
        cos, sin = rope_tables(positions, self.config, x.dtype)  # (B, 1, T, Dh)
        sin = torch.cat([-sin[..., : sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2 :]], -1)
        for block in self.layers:
            x = block(x, (cos, sin), tiles, cache)
        if cache is not None:
            cache.length += x.shape[1]
        return self.layers[0].norm(x, self.norm.weight)

    def head(self, hidden):
        """Logits over the vocabulary: float[..., D] -> float[..., V]."""
        return self.out(hidden)


class TowerBlock(nn.Module):
    """vit.Block with four products for six."""

    def __init__(self, block, config: ViTConfig):
        super().__init__()
        attention, rows = block.self_attn, config.n_patches + 1
        self.n_heads = config.n_heads
        self.norm_1, self.norm_2 = block.layer_norm1, block.layer_norm2
        self.qkv = Product(attention.q_proj, attention.k_proj, attention.v_proj, rows=rows)
        self.out = Product(attention.out_proj, rows=rows)
        self.quick = config.activation == "quick_gelu"
        fc1, fc2 = block.mlp.fc1, block.mlp.fc2
        if self.quick:  # quick_gelu(x) = silu(1.702 x) / 1.702: into the layers on either side
            for scaled in (self.norm_2.weight, self.norm_2.bias, fc1.bias):
                scaled.data *= 1.702
            fc2.weight.data = fc2.weight.data / 1.702
        self.fc1, self.fc2 = Product(fc1, rows=rows), Product(fc2, rows=rows)

    def forward(self, x):
        B, N, D = x.shape
        heads = self.qkv(self.norm_1(x)).view(B, N, 3, self.n_heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # 3 x (B, H, N, Dh)
        x = self.out(attend(q, k, v).transpose(1, 2).reshape(B, N, D), plus=x)
        y = self.fc1(self.norm_2(x), silu=self.quick)
        return self.fc2(y if self.quick else F.gelu(y), plus=x)


class Tower(ViT):
    """vit.ViT, made from one; the same arguments, the same features."""

    def __init__(self, vit: ViT):
        nn.Module.__init__(self)
        vit.requires_grad_(False)
        self.config, self.embeddings = vit.config, vit.embeddings
        self.pre_layernorm, self.post_layernorm = vit.pre_layernorm, vit.post_layernorm
        self.layers = vit.layers
        replace_blocks(self, TowerBlock)


def replace_blocks(part, twin: type):
    """Lay the blocks out one by one, so that the old ones are freed."""

    def n_bytes(i):
        return sum(t.nbytes for t in (*part.layers[i].parameters(), *part.layers[i].buffers()))

    for i in checkpoint.watched(range(len(part.layers)), "laying out", n_bytes):
        part.layers[i] = twin(part.layers[i], part.config)


def prepare(model):
    """Rearrange a LLaVA on a CPU in place, block by block: memory peaks at one block more.

    On another device nothing but a quantised decoder is touched.
    """
    on_cpu = model.projector[0].weight.device.type == "cpu"
    if on_cpu:
        model.vision_tower = Tower(model.vision_tower)
    if on_cpu or isinstance(model.language_model.layers[0].mlp.down_proj, QuantizedLinear):
        model.language_model = Decoder(model.language_model)
    return model


def main():
    """Print a small decoder's time for a token, as llama.py has it and laid out."""
    import copy
    import time

    config = LLaMAConfig(1000, dim=512, mlp_dim=1376, n_layers=8, n_heads=8, n_kv_heads=4)
    tokens = torch.arange(100)[None]
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            plain = LLaMA(config).eval().to(dtype)
            said = []
            for model in (plain, Decoder(copy.deepcopy(plain))):
                cache = KVCache(config, 1, 200, dtype, "cpu")
                logits = model(tokens, cache=cache)
                started = time.perf_counter()
                for _ in range(50):
                    model(tokens[:, :1], cache=cache)
                said.append((1e3 * (time.perf_counter() - started) / 50, logits))
            (slow, logits), (quick, same) = said
            error = (logits - same).abs().max() / logits.abs().max()
            print(f"{dtype}: {slow:.1f} ms a token, laid out {quick:.1f}, logits {error:.0e}")


if __name__ == "__main__":
    import argparse

    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    main()
