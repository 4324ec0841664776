"""The voice: a LLaMA decoder turns a sequence of embeddings into next-token logits.

Papers: "LLaMA" (arXiv 2302.13971, section 2.2): pre-norm with RMSNorm, SwiGLU, rotary positions
(RoPE, arXiv 2104.09864), no biases; "Llama 2" (arXiv 2307.09288) for grouped-query attention.
One class serves LLaMA 1/2/3, Vicuna, Mistral, Yi and SmolLM2: the config decides.

RoPE here is the split-half form of the Hugging Face checkpoints: feature i turns together with
feature i + Dh/2. (Meta's own files pair 2i with 2i + 1.)

There is one rule for who sees whom, and everything follows from it: prefill, cached decoding,
padded batches and packed sequences all go through `visible_keys` below.

Read next: llava.py, which puts pictures into the sequence.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as checkpointed
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import checkpoint
import kernels
from attention import attend, query_tiles


@dataclass(frozen=True)
class LLaMAConfig:
    """Sizes of the decoder; the defaults are Vicuna-7B v1.5 (LLaMA-2-7B)."""

    vocab_size: int = 32000
    dim: int = 4096
    mlp_dim: int = 11008
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 32  # fewer than n_heads: grouped-query attention
    head_dim: int = 0  # 0 means dim / n_heads
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: tuple = ()  # of LLaMA 3.1, see scale_frequencies
    max_positions: int = 4096
    tied_embeddings: bool = False  # the output head is the embedding table itself

    def __post_init__(self):
        object.__setattr__(self, "rope_scaling", tuple(self.rope_scaling))  # JSON has lists
        if not self.head_dim:
            if self.dim % self.n_heads:
                raise ValueError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}"
            )


class RMSNorm(nn.Module):
    """x / rms(x) * weight: computed in float32, rounded, then scaled, in the original's order."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * x32.to(x.dtype)).to(x.dtype)


def visible_keys(mask, n_queries: int):
    """Who sees whom: int[B, S] -> bool[B, T, S] for the last T = n_queries of S positions.

    `mask` holds 0 for padding and the number of the document otherwise (1 in an ordinary batch).
    A query sees the keys that are not after it and carry the same number:

        mask 0 0 1 1 1    left padding      mask 1 1 1 2 2    two packed documents
           0 x . . . .                         1 x . . . .
           0 x x . . .                         1 x x . . .
           1 . . x . .                         1 x x x . .
           1 . . x x .                         2 . . . x .
           1 . . x x x                         2 . . . x x

    No row is ever empty, so softmax never divides 0 by 0. The position of a token is the number
    of keys it sees, less one; therefore padding cannot move an answer.
    """
    queries = mask[:, -n_queries:, None]  # (B, T, 1)
    return (queries == mask[:, None, :]).tril(mask.shape[1] - n_queries)  # (B, T, S)


def rope_tables(positions, config: LLaMAConfig, dtype):
    """Cosines and sines of the angles position * theta^(-2i / Dh): int[B, T] -> 2 x [B, 1, T, Dh].

    Angles are computed in float32; both halves of a head carry the same angles.
    """
    # 1 / theta^e, not theta^-e: the last bit, times position 400, would move logits by 1e-4.
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device).float()
    frequencies = 1 / config.rope_theta ** (pairs / config.head_dim)  # (Dh/2)
    if config.rope_scaling:
        frequencies = scale_frequencies(frequencies, *config.rope_scaling)
    angles = positions[..., None].float() * frequencies  # (B, T, Dh/2)
    angles = torch.cat([angles, angles], dim=-1)[:, None]  # (B, 1, T, Dh)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def scale_frequencies(frequencies, factor, low, high, old_positions):
    """LLaMA 3.1's way to 131,072 positions, trained first on `old_positions` (8,192).

    Pairs that turn more than `high` times within the old context tell neighbours apart and stay;
    those that turn less than `low` times tell how far, and slow down by `factor`; between the two
    it changes gradually.
    """
    turns = old_positions * frequencies / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * frequencies / factor + share * frequencies


def apply_rope(x, cos, sin):
    """Rotate each pair (x[i], x[i + Dh/2]) by its angle; [B, H, T, Dh] -> the same shape."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class KVCache:
    """Keys and values of all layers for the tokens read so far, in buffers of fixed length."""

    def __init__(self, config: LLaMAConfig, batch: int, max_length: int, dtype, device):
        shape = (config.n_layers, batch, config.n_kv_heads, max_length, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0  # tokens held; LLaMA.forward advances it once all layers have written

    def update(self, layer: int, keys, values):
        """Append [B, K, T, Dh] to a layer and return all it holds, [B, K, S, Dh]."""
        end = self.length + keys.shape[2]
        if end > self.keys.shape[3]:
            raise ValueError(f"the cache holds {self.keys.shape[3]} tokens, {end} are needed")
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def select(self, rows: list[int], max_length: int | None = None):
        """Keep, reorder or repeat rows of the batch; make room for max_length tokens in all.

        Rows that only leave cost no memory: the others move up in the buffers that are there.
        """
        in_place = rows == sorted(set(rows)) and max_length is None
        for name in ("keys", "values"):
            old = getattr(self, name)  # (layer, B, K, S, Dh)
            n_layers, _, n_kv_heads, length, head_dim = old.shape
            shape = (n_layers, len(rows), n_kv_heads, max_length or length, head_dim)
            new = old[:, : len(rows)] if in_place else old.new_empty(shape)
            for place, row in enumerate(rows):
                if not in_place or place != row:
                    new[:, place, :, : self.length] = old[:, row, :, : self.length]
            setattr(self, name, new)


class Attention(nn.Module):
    """Causal self-attention with rotary positions; K key-value heads serve H query heads."""

    def __init__(self, config: LLaMAConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, q_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=False)

    def forward(self, x, rope, tiles, cache):
        B, T, _ = x.shape
        q, k, v = (
            proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H or K, T, Dh)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, Dh)
        x = attend(q, k, v, tiles, causal=True)  # (B, H, T, Dh)
        return self.o_proj(x.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


class SwiGLU(nn.Module):
    def __init__(self, config: LLaMAConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.mlp_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.mlp_dim, bias=False)
        self.down_proj = nn.Linear(config.mlp_dim, config.dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LLaMAConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x, rope, tiles, cache):
        x = x + self.self_attn(self.input_layernorm(x), rope, tiles, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def recomputed(block, *inputs, everything: bool):
    """Run a block in training without keeping what is inside it: backward computes it again.

    Of an activation checkpointed block only the input stays in memory ("full"). Matrix products are
    most of the time and few of the tensors: with everything=False they are kept, the rest is not.
    """
    how = {}
    if not everything:
        products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
        how["context_fn"] = functools.partial(create_selective_checkpoint_contexts, products)
    return checkpointed(block, *inputs, use_reentrant=False, **how)


class LLaMA(nn.Module):
    """The decoder. Parameter names are Hugging Face's, less the prefix `model.`."""

    recompute = "none"  # in training, what backward computes again: none, selective, full

    def __init__(self, config: LLaMAConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        if not config.tied_embeddings:
            self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None, mapped=False) -> "LLaMA":
        """Load a Hugging Face LlamaForCausalLM folder.

        `dtype` and `device` default to the stored type and the CPU. `mapped`: leave large matrices
        in the file, for fast.Decoder to copy. Raises ValueError with every
        missing, unexpected and misshapen tensor if the folder does not fit.
        """
        source = checkpoint.Checkpoint(path)
        return checkpoint.build(
            lambda: cls(LLaMAConfig(**source.text_config())),
            source,
            "language_model",
            dtype,
            device,
            mapped=mapped,
        )

    def forward(self, token_ids=None, embeds=None, mask=None, cache=None):
        """Next-token logits: int[B, T] -> float[B, T, V]; see `hidden` for the arguments."""
        return self.head(self.hidden(token_ids, embeds, mask, cache))

    def hidden(self, token_ids=None, embeds=None, mask=None, cache: KVCache | None = None):
        """Last hidden states, normalised: int[B, T] or float[B, T, D] -> float[B, T, D].

        mask:   int[B, S], 0 padding, else the document's number; S counts the cache's tokens too.
                None: every token belongs to one document and nothing is padding.
        cache:  holds the S - T tokens before these; the T new ones are appended to it.
        """
        x = self.embed_tokens(token_ids) if embeds is None else embeds
        if torch.is_autocast_enabled(x.device.type):  # between blocks too, as under FSDP
            x = x.to(torch.get_autocast_dtype(x.device.type))
        tiles, positions = self.who_sees_whom(x, mask, cache)
        rope = rope_tables(positions, self.config, x.dtype)
        for block in self.layers:
            if self.recompute == "none" or not self.training:
                x = block(x, rope, tiles, cache)
            else:
                x = recomputed(block, x, rope, tiles, cache, everything=self.recompute == "full")
        if cache is not None:
            cache.length += x.shape[1]
        return self.norm(x)

    def who_sees_whom(self, x, mask=None, cache: KVCache | None = None):
        """The mask rule, as `attend` takes it, and positions int[B, T] of the new tokens x.

        Nothing (None) where each token sees all before it: for that there are fast kernels.
        """
        (B, T, _), n_past = x.shape, cache.length if cache is not None else 0
        fused = kernels.fused(x, self.config.head_dim)
        if mask is None and (fused or T == 1 or n_past == 0 and x.device.type != "cpu"):
            return None, torch.arange(n_past, n_past + T, device=x.device)[None]  # (1, T)
        if mask is None:
            mask = torch.ones(B, n_past + T, dtype=torch.long, device=x.device)
        if mask.shape != (B, n_past + T):
            raise ValueError(
                f"expected mask int[{B}, {n_past + T}] ({n_past} cached + {T} new tokens), "
                f"got {list(mask.shape)}"
            )
        if fused:  # the same rule in O(S) memory
            documents, positions = kernels.documents(mask)  # (B, 2, S), (B, S)
            return documents, positions[:, n_past:]
        visible = visible_keys(mask, T)  # (B, T, S)
        return query_tiles(visible), visible.sum(-1) - 1

    def head(self, hidden):
        """Logits over the vocabulary: float[..., D] -> float[..., V]."""
        table = self.embed_tokens if self.config.tied_embeddings else self.lm_head
        return F.linear(hidden, table.weight)


def main():
    """Print the shapes of a small decoder at work, with and without a cache."""
    config = LLaMAConfig(
        vocab_size=100, dim=64, mlp_dim=172, n_layers=2, n_heads=4, n_kv_heads=2, max_positions=64
    )
    llama = LLaMA(config).eval()
    token_ids = torch.randint(0, 100, (1, 7))
    with torch.no_grad():
        logits = llama(token_ids)
        print(f"token ids          {list(token_ids.shape)}        (B, T)")
        print(f"embeddings         {list(llama.embed_tokens(token_ids).shape)}    (B, T, D)")
        print(f"logits             {list(logits.shape)}   (B, T, V)")
        cache = KVCache(config, 1, 16, torch.float32, "cpu")
        llama(token_ids[:, :-1], cache=cache)
        print(f"cache after 6      {list(cache.keys[..., :6, :].shape)}  (layer, B, K, S, Dh)")
        last = llama(token_ids[:, -1:], cache=cache)
        error = (last - logits[:, -1:]).abs().max()
        print(f"7th token, cached  {list(last.shape)}   difference {error:.0e}")
    with torch.device("meta"):
        n_parameters = sum(p.numel() for p in LLaMA(LLaMAConfig()).parameters())
    print(f"LLaMA-2-7B has {n_parameters:,} parameters")


if __name__ == "__main__":
    import argparse

    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    main()
