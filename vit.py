"""The eye: CLIP's vision transformer, ViT-L/14, turns pixels into one feature per patch.

Papers: "An Image is Worth 16x16 Words" (arXiv 2010.11929, section 3.1) for the architecture and
"Learning Transferable Visual Models From Natural Language Supervision" (CLIP, arXiv 2103.00020,
section 2.4) for this variant of it: a norm *before* the first block, pre-norm blocks, and the
"quick" GELU x * sigmoid(1.702 x) that the released weights were trained with.

LLaVA does not use CLIP's pooled vector. It takes the patch tokens as they leave the last block
but one (`layer=-2`), without the class token and without a final norm (LLaVA, arXiv 2304.08485,
section 4.1). So the last block never runs here unless somebody asks for it.

Read next: projector.py, which carries these features over to the language model.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import checkpoint
import kernels


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of the tower; the defaults are openai/clip-vit-large-patch14-336."""

    image_size: int = 336  # pixels per side of the square input, S
    patch_size: int = 14  # pixels per side of a patch, P
    dim: int = 1024
    mlp_dim: int = 4096
    n_layers: int = 24
    n_heads: int = 16
    norm_eps: float = 1e-5
    activation: str = "quick_gelu"  # or "gelu", the exact erf form

    def __post_init__(self):
        if min(self.image_size, self.patch_size, self.dim, self.n_heads) < 1:
            raise ValueError("image_size, patch_size, dim and n_heads are at least 1")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of {self.patch_size}")
        if self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is none of {sorted(ACTIVATIONS)}")

    @property
    def n_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class PatchEmbedding(nn.Module):
    """Cut the picture into P x P patches, project each, add a class token and positions.

    A convolution whose stride equals its kernel is exactly "one linear layer per patch".
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.patch_embedding = nn.Conv2d(
            3, config.dim, config.patch_size, stride=config.patch_size, bias=False
        )
        self.class_embedding = nn.Parameter(torch.empty(config.dim))
        nn.init.normal_(self.class_embedding, std=config.dim**-0.5)
        self.position_embedding = nn.Embedding(config.n_patches + 1, config.dim)

    def forward(self, pixels):
        x = self.patch_embedding(pixels)  # (B, D, S/P, S/P)
        x = x.flatten(2).transpose(1, 2)  # (B, N, D)
        class_token = self.class_embedding.expand(x.shape[0], 1, -1)  # (B, 1, D)
        return torch.cat([class_token, x], dim=1) + self.position_embedding.weight  # (B, 1+N, D)


class Attention(nn.Module):
    """Multi-head self-attention without a mask: every patch sees every patch."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.n_heads = config.n_heads
        self.q_proj = nn.Linear(config.dim, config.dim)
        self.k_proj = nn.Linear(config.dim, config.dim)
        self.v_proj = nn.Linear(config.dim, config.dim)
        self.out_proj = nn.Linear(config.dim, config.dim)

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = (
            proj(x).view(B, N, self.n_heads, -1).transpose(1, 2)  # (B, H, N, Dh)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = kernels.attend(q, k, v)  # our kernel on a GPU, else torch's SDPA
        return self.out_proj(x.transpose(1, 2).reshape(B, N, D))  # (B, N, D)


class MLP(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.dim, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.dim)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm: each half normalises its input and adds its output to the residual stream."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ViT(nn.Module):
    """CLIP's image tower. Parameter names are Hugging Face's, less the prefix `vision_model.`."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.embeddings = PatchEmbedding(config)
        self.pre_layernorm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.post_layernorm = nn.LayerNorm(config.dim, eps=config.norm_eps)

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None) -> "ViT":
        """Load a Hugging Face CLIPVisionModel folder, or the vision half of a CLIPModel folder.

        `dtype` and `device` default to the stored type and the CPU. Raises ValueError with every
        missing, unexpected and misshapen tensor if the folder does not fit.
        """
        source = checkpoint.Checkpoint(path)
        return checkpoint.build(
            lambda: cls(ViTConfig(**source.vision_config())), source, "vision_tower", dtype, device
        )

    def forward(self, pixels, layer: int = -2, keep_class: bool = False):
        """Patch features: float[B, 3, S, S] -> float[B, N, D].

        `layer` counts like a list of the n_layers + 1 hidden states: 0 is the input of the first
        block, -1 the output of the last, -2 (LLaVA's choice) the output of the last but one.
        With `keep_class` the class token stays in front: float[B, 1 + N, D].
        """
        x = self._run(pixels, layer)
        return x if keep_class else x[:, 1:]  # (B, N, D)

    def pool(self, pixels):
        """CLIP's picture vector, the normalised class token: float[B, 3, S, S] -> float[B, D]."""
        return self.post_layernorm(self._run(pixels, -1)[:, 0])

    def _run(self, pixels, layer: int):
        size, n_layers = self.config.image_size, self.config.n_layers
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise ValueError(
                f"expected pixels float[B, 3, {size}, {size}], got {list(pixels.shape)}; "
                "image.to_pixels makes them"
            )
        if not -n_layers - 1 <= layer <= n_layers:
            raise ValueError(f"layer {layer} does not exist: there are {n_layers} blocks")
        x = self.pre_layernorm(self.embeddings(pixels))  # (B, 1+N, D)
        for block in self.layers[: layer % (n_layers + 1)]:
            x = block(x)
        return x


def main():
    """Print the shapes of a small tower at work."""
    config = ViTConfig(image_size=56, dim=64, mlp_dim=256, n_layers=4, n_heads=4)
    vit = ViT(config)
    pixels = torch.randn(2, 3, config.image_size, config.image_size)
    print(f"pixels                      {list(pixels.shape)}   (B, 3, S, S)")
    print(f"patch embedding + class     {list(vit.embeddings(pixels).shape)}    (B, 1+N, D)")
    print(f"layer -2, class dropped     {list(vit(pixels).shape)}    (B, N, D)")
    print(f"pooled, as CLIP compares it {list(vit.pool(pixels).shape)}        (B, D)")
    with torch.device("meta"):
        n_parameters = sum(p.numel() for p in ViT(ViTConfig()).parameters())
    print(f"ViT-L/14-336 has {n_parameters:,} parameters")


if __name__ == "__main__":
    import argparse

    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    main()
