"""LoRA: instead of a matrix W, learn a product of two thin ones beside it.

    y = W x + (alpha / r) B A x          W [out, in] stays;  A [r, in], B [out, r] learn

"LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685). LLaVA-1.5 puts one beside
every linear layer of the language model's blocks, with r = 128 and alpha = 256. B starts at zero,
so nothing changes at first. Merged, W + (alpha / r) B A, it costs nothing at inference.

Files are written as peft and the original LLaVA write them: adapter_model.safetensors and
adapter_config.json, and what learned beside it, the projector, in non_lora_trainables.bin.
Read next: train.py (`--lora-rank`); checkpoint.py reads the files (`--model-base`).
"""

import json
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

from layouts import stored_name


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank one beside it: float[..., in] -> float[..., out]."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Linear(self.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.scale, self.dropout = alpha / rank, nn.Dropout(dropout)

    def forward(self, x):
        beside = self.lora_B(self.lora_A(self.dropout(x)))
        return F.linear(x, self.weight, self.bias) + self.scale * beside


def add_lora(llama: nn.Module, rank: int, alpha: float, dropout: float = 0.0):
    """Put a LoRA beside each linear layer of the blocks, the head left out; all else is frozen."""
    llama.requires_grad_(False)
    for block in llama.layers:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, leaf = name.rpartition(".")
                lora = LoRALinear(module, rank, alpha, dropout)
                setattr(block.get_submodule(parent), leaf, lora)


def merged(state: dict, scale: float) -> dict:
    """A state dict with LoRAs -> one without: W + scale * B A, summed in float32."""
    merged_state = {}
    for name, weight in state.items():
        if ".lora_" in name:
            continue
        stem = name.removesuffix("weight")
        if f"{stem}lora_A.weight" in state:
            a, b = (state[f"{stem}lora_{x}.weight"].float() for x in "AB")
            weight = (weight.float() + scale * (b @ a)).to(weight.dtype)
        merged_state[name] = weight
    return merged_state


def save_lora(folder, state: dict, base: str, config: dict, rank: int, alpha: float, dropout=0.0):
    """Write a LoRA and the projector as peft and the original do.

    state:  a LLaVA's state dict with LoRAs
    base:   what it was trained on, a path or a Hugging Face id
    config: config.json's content, in the original layout
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    adapter, beside = {}, {}
    for name, tensor in state.items():
        if ".lora_" in name:
            stem, _, part = name.partition(".lora_")
            key = stored_name("llama", f"{stem}.weight").removesuffix("weight")
            adapter[f"base_model.model.{key}lora_{part}"] = tensor.contiguous()
        elif name.startswith(("projector.", "image_newline")):
            beside[f"base_model.model.{stored_name('llava', name)}"] = tensor
    save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    torch.save(beside, folder / "non_lora_trainables.bin")
    targets = sorted({key.split(".")[-3] for key in adapter})
    peft = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    for name, content in (("adapter_config.json", peft), ("config.json", config)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def main():
    """Print what a LoRA adds to one layer, and that it changes nothing at first."""
    torch.manual_seed(0)
    linear, x = nn.Linear(4096, 4096, bias=False), torch.randn(1, 4096)
    lora = LoRALinear(linear, 128, 256, 0.05).eval()
    n_added = sum(p.numel() for n, p in lora.named_parameters() if "lora" in n)
    print(f"W {list(linear.weight.shape)}: {linear.weight.numel():,} weights")
    shapes = list(lora.lora_A.weight.shape), list(lora.lora_B.weight.shape)
    print(f"A {shapes[0]}, B {shapes[1]}: {n_added:,} weights")
    with torch.no_grad():
        print(f"difference at first: {(lora(x) - linear(x)).abs().max():.0e}")
        lora.lora_B.weight.normal_(std=0.02)
        state = merged({f"w.{name}": p for name, p in lora.named_parameters()}, lora.scale)
        error = (lora(x) - F.linear(x, state["w.weight"])).abs().max()
        print(f"merged, difference:  {error:.0e}")


if __name__ == "__main__":
    import argparse

    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    main()
