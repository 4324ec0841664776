"""The bridge: patch features -> the space of the language model's word embeddings.

LLaVA v1 (arXiv 2304.08485, section 4.1) uses one matrix, "linear": stage 1 learns nothing else,
and that is enough for the language model to read pictures. LLaVA-1.5 (arXiv 2310.03744, section
3.3) replaces it by a two-layer MLP, "mlp2x_gelu", and gains on every benchmark. GELU here is the
exact one (erf), and every layer has a bias, as in the released weights.

The projector does not mix patches: N features go in, N "visual words" come out.

Read next: llama.py, which reads them.
"""

import re

import torch
import torch.nn as nn


def build_projector(kind: str, in_dim: int, out_dim: int) -> nn.Sequential:
    """Build "linear" or "mlpNx_gelu": float[..., in_dim] -> float[..., out_dim].

    Linear layers stand at the even places (0, 2, ...) of the Sequential, the places at which the
    official checkpoints number them. Raises ValueError for any other kind.
    """
    if kind == "linear":
        depth = 1
    elif match := re.fullmatch(r"mlp([1-9]\d?)x_gelu", str(kind)):
        depth = int(match[1])
    else:
        raise ValueError(f"projector {kind!r} is neither 'linear' nor 'mlpNx_gelu' (N = 1, 2, ...)")
    layers = [nn.Linear(in_dim, out_dim)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(out_dim, out_dim)]
    return nn.Sequential(*layers)


def main():
    """Print the shapes and sizes of the official projectors."""
    features = torch.randn(1, 576, 1024)
    print(f"patch features {list(features.shape)}  (B, N, D of the ViT)")
    for kind in ("linear", "mlp2x_gelu"):
        projector = build_projector(kind, 1024, 4096)
        n_parameters = sum(p.numel() for p in projector.parameters())
        words = projector(features)
        print(f"{kind:10} -> {list(words.shape)}  (B, N, D of the LLM), {n_parameters:,} weights")


if __name__ == "__main__":
    import argparse

    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    main()
