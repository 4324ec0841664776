"""What a training run will take, before anything is paid for: memory, arithmetic, hours, traffic.

    python train.py --config llava-1.5-13b --stage 2 --plan --gpus 8 --gpu h100-80

Nothing is loaded: the model is made on the meta device, where tensors have shapes and no numbers.
Counted are, for each GPU,

    weights that learn     float32, with gradients and AdamW's two moments: 16 bytes each, in shards
    weights that do not    2 bytes each; a frozen tower whole on every GPU, all else in shards
    gathered blocks        two at a time (one computes, the next arrives), bfloat16
    activations            what backward needs of each block, see `activation_bytes`

and model FLOPs: of the forward pass and twice that for what learns, once for what is frozen above
something that learns. Recomputed blocks cost time, but count nothing. Hours follow from a stated
MFU, the share of the GPUs' peak that is model FLOPs.
"""

from dataclasses import dataclass, replace

import torch

import checkpoint
from data import IGNORE
from image import ImageConfig
from llama import LLaMAConfig
from llava import LOSS_CHUNK, LLaVA, LLaVAConfig
from recipes import CLIP_224, Recipe
from vit import ViTConfig

VICUNA_13B = LLaMAConfig(dim=5120, mlp_dim=13824, n_layers=40, n_heads=40, n_kv_heads=40)
MISTRAL = LLaMAConfig(mlp_dim=14336, n_kv_heads=8, rope_theta=1e6, max_positions=32768)
YI = LLaMAConfig(64000, 7168, 20480, 60, 56, 8, rope_theta=5e6)
KNOWN = {  # the language models of the recipes
    "lmsys/vicuna-7b-v1.3": LLaMAConfig(norm_eps=1e-6, max_positions=2048),
    "lmsys/vicuna-13b-v1.3": replace(VICUNA_13B, norm_eps=1e-6, max_positions=2048),
    "lmsys/vicuna-7b-v1.5": LLaMAConfig(),
    "lmsys/vicuna-13b-v1.5": VICUNA_13B,
    "mistralai/Mistral-7B-Instruct-v0.2": MISTRAL,
    "NousResearch/Nous-Hermes-2-Yi-34B": YI,
}
GPUS = {  # GB of memory, and dense bf16 TFLOP/s at the maker's word
    "a100-40": (40, 312),
    "a100-80": (80, 312),
    "h100-80": (80, 989),
    "h200-141": (141, 989),
    "l40s-48": (48, 362),
    "4090-24": (24, 165),
}
# Samples, and mean tokens without the picture's: (stage, epochs' data). Measured or as published.
SAMPLES = {1: (558_128, 30), 2: (665_298, 200)}
OFFICIAL_HOURS = {  # on 8 A100, of the papers and the original's README
    ("llava-1.5-7b", 1): 3.5,
    ("llava-1.5-7b", 2): 10,
    ("llava-1.5-13b", 1): 5.5,
    ("llava-1.5-13b", 2): 20,
}
RUNTIME_GB = 1.5  # CUDA, NCCL, fragments


@dataclass(frozen=True)
class Sizes:
    """Parameters by part, and by whether they learn."""

    tower: int
    projector: int
    llm: int
    learning: int  # of all
    block: int  # of one block of the language model
    lora: int = 0


def config_of(recipe: Recipe, stage: int, stage1: Recipe) -> LLaVAConfig:
    """The model's config, from its folder if there is one, else from what is known of its name."""
    name, tower = recipe.model or stage1.model, recipe.vision_tower or stage1.vision_tower
    projector = stage1.projector if stage == 2 else recipe.projector
    if name in KNOWN:
        vision = ViTConfig(image_size=224 if tower == CLIP_224 else 336)
        pictures = ImageConfig(vision.image_size, recipe.aspect)
        return LLaVAConfig(vision, KNOWN[name], pictures, projector)
    source = checkpoint.Checkpoint(name)
    if source.part == "llava":
        return LLaVA.read_config(source)
    vision = ViTConfig(**checkpoint.Checkpoint(tower).vision_config())
    text = LLaMAConfig(**source.text_config())
    return LLaVAConfig(vision, text, ImageConfig(vision.image_size, recipe.aspect), projector)


def sizes_of(config: LLaVAConfig, recipe: Recipe) -> Sizes:
    with torch.device("meta"), checkpoint.NoInit():
        model = LLaVA(config)
    n = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    block = sum(p.numel() for p in model.language_model.layers[0].parameters())
    lora = 0
    if recipe.lora_rank:
        layers = [m for m in model.language_model.layers.modules() if hasattr(m, "in_features")]
        lora = sum(recipe.lora_rank * (m.in_features + m.out_features) for m in layers)
    learning = n["projector"] + (n["vision_tower"] if recipe.tower_lr else 0)
    learning += lora or (n["language_model"] if recipe.train_llm else 0)
    return Sizes(n["vision_tower"], n["projector"], n["language_model"], learning, block, lora)


def peak_flops(device_name: str) -> float | None:
    """bf16 FLOP/s of a GPU by the name that CUDA gives it; None if it is not in the table."""
    for kind, (_, tflops) in GPUS.items():
        if kind.partition("-")[0].upper() in device_name.upper():
            return 1e12 * tflops
    return None


def batch_flops(config: LLaVAConfig, recipe: Recipe, batch: dict) -> float:
    """Model FLOPs of training on a micro-batch, as `data.collate` makes it."""
    mask, sizes = batch["attention_mask"], batch["image_sizes"]
    samples = int(mask.amax(1).sum())  # the samples of a row are numbered from 1
    words = int((mask != 0).sum()) + sum(config.n_visual(size) - 1 for size in sizes)
    learned = int((batch["labels"] != IGNORE).sum())
    # Packed conversations about one picture hold the same tensor: it is looked at once.
    views = sum({id(tiles): len(tiles) for tiles in batch["pixels"]}.values())
    return samples * step_flops(config, recipe, *(n / samples for n in (words, learned, views)))


def activation_bytes(text: LLaMAConfig, recompute: str, width: int = 2) -> int:
    """Bytes that one block keeps of one token for backward; `width`: of a number.

    none        norms: the float32 input, the rounded one, the output, twice;  q k v, attention's
                output (twice: as computed, and in rows);  gate, silu(gate), up and their product
    selective   the input, and the outputs of the seven matrix products
    full        the input
    """
    d, f = text.dim, text.mlp_dim
    q, kv = text.n_heads * text.head_dim, text.n_kv_heads * text.head_dim
    if recompute == "full":
        return width * d
    if recompute == "selective":
        return width * (d + q + 2 * kv + 2 * d + 2 * f)
    norms = 2 * (4 + 2 * width) * d
    return norms + width * (2 * q + 2 * kv) + width * 4 * f + 4 * text.n_heads


def forward_flops(config: LLaVAConfig, tokens: float, learned: float, views: float) -> dict:
    """FLOPs of the forward pass of one sample, by part; a multiplication and an addition are two.

    tokens: of the sequence;  learned: supervised ones, whose logits are computed;  views: pictures
    """
    text, vision = config.text, config.vision
    q, kv = text.n_heads * text.head_dim, text.n_kv_heads * text.head_dim
    per_token = text.dim * (2 * q + 2 * kv) + 3 * text.dim * text.mlp_dim
    causal = 2 * tokens**2 * q  # half of the scores and of their use
    llm = text.n_layers * (2 * per_token * tokens + causal)
    n = (vision.image_size // vision.patch_size) ** 2 + 1
    d, layers = vision.dim, config.vision_layer % (vision.n_layers + 1)
    per_patch = 4 * d * d + 2 * d * vision.mlp_dim
    tower = layers * (2 * per_patch * n + 4 * n * n * d)
    tower += 2 * (n - 1) * 3 * vision.patch_size**2 * d
    widths = [vision.dim] + [text.dim] * (2 if config.projector != "linear" else 1)
    projector = sum(2 * a * b for a, b in zip(widths, widths[1:], strict=False)) * (n - 1)
    return {
        "tower": tower * views,
        "projector": projector * views,
        "llm": llm,
        "head": 2 * text.dim * text.vocab_size * learned,
    }


def step_flops(config: LLaVAConfig, recipe: Recipe, tokens, learned, views) -> float:
    """Model FLOPs of training on one sample."""
    flops = forward_flops(config, tokens, learned, views)
    full = recipe.train_llm and not recipe.lora_rank
    # Backward: one pass for what lies below, one more for the weights themselves if they learn.
    passes = {"tower": 3 if recipe.tower_lr else 1, "projector": 3, "llm": 3 if full else 2}
    passes["head"] = passes["llm"]
    return sum(flops[part] * passes[part] for part in flops)


def memory_gb(config, recipe: Recipe, sizes: Sizes, shard: int, tokens: float) -> dict[str, float]:
    """GB of one GPU by kind; `tokens`: of one micro-batch."""
    frozen = sizes.tower + sizes.projector + sizes.llm + sizes.lora - sizes.learning
    whole = 0 if recipe.tower_lr else sizes.tower
    root = sizes.projector + 2 * config.text.vocab_size * config.text.dim
    copies = 2 * sizes.learning  # of one process alone: what learns, once more in bfloat16
    per_token = config.text.n_layers * activation_bytes(config.text, recipe.recompute)
    logits = 3 * 4 * min(LOSS_CHUNK, 0.4 * tokens) * config.text.vocab_size
    block = activation_bytes(config.text, "none") * tokens if recipe.recompute != "none" else 0
    return {
        "weights, gradients, moments": 16 * sizes.learning / shard / 1e9,
        "frozen weights": 2 * (whole + (frozen - whole) / shard) / 1e9,
        "gathered": (2 * 2 * sizes.block + (2 + 4) * root if shard > 1 else copies) / 1e9,
        "activations": per_token * tokens / 1e9,
        "logits, or a block again": max(logits, block) / 1e9,
        "runtime": RUNTIME_GB,
    }


def traffic_gb(sizes: Sizes, recipe: Recipe, gpus: int, shard: int) -> tuple[float, float]:
    """GB that each GPU sends in a step: among those of a shard, and between copies (HSDP)."""
    sharded = sizes.llm + sizes.projector + sizes.lora + (sizes.tower if recipe.tower_lr else 0)
    share = (shard - 1) / shard
    inside = share * (2 * 2 * sharded + 4 * sizes.learning)  # gathered twice, gradients once
    between = 2 * 4 * sizes.learning / shard if gpus > shard else 0
    return inside / 1e9, between / 1e9


def on_each(
    config, recipe: Recipe, sizes: Sizes, gpus: int, tokens: float
) -> tuple[int, int, dict]:
    """Of one of so many GPUs: samples at a time, those that share a copy, GB of memory by kind."""
    shard = min(gpus, recipe.shard or gpus)
    micro = recipe.micro_batch or max(1, recipe.batch // gpus)
    return micro, shard, memory_gb(config, recipe, sizes, shard, micro * tokens)


def expected(config, recipe: Recipe, processes: int, words: float) -> str:
    """One line before a run: `words` are those of a mean sample, or tokens of a packed row."""
    tokens = words
    if recipe.batching != "packed":
        tokens = 1.3 * words + config.n_visual((640, 480))  # a word is about 1.3 tokens
    _, _, kinds = on_each(config, recipe, sizes_of(config, recipe), processes, tokens)
    total = sum(kinds.values())
    return f"about {recipe.batch * tokens:,.0f} tokens a step; {total:.1f} GB on a GPU (plan.py)"


def show(name: str, recipe: Recipe, stage: int, stage1: Recipe, args):
    """Print the plan."""
    config = config_of(recipe, stage, stage1)
    sizes = sizes_of(config, recipe)
    memory, peak = GPUS[args.gpu]
    n_samples, n_text = SAMPLES[stage]
    n_samples = args.samples or n_samples
    words = config.n_visual((640, 480))
    tokens = args.tokens or words + n_text
    views = 5 if recipe.aspect == "anyres" else 1
    flops = step_flops(config, recipe, tokens, 0.4 * n_text, views)
    steps = -(-n_samples // recipe.batch) * recipe.epochs
    total = flops * n_samples * recipe.epochs
    print(f"{name}, stage {stage}: {recipe.model or stage1.model}")
    for part in ("tower", "projector", "llm"):
        print(f"  {part:10} {getattr(sizes, part):15,} parameters")
    print(f"  {'learning':10} {sizes.learning:15,}")
    print(f"{n_samples:,} samples of {tokens:,.0f} tokens x {recipe.epochs:g} epochs, ", end="")
    print(f"{steps:,.0f} steps of {recipe.batch}")
    step = flops * recipe.batch
    print(f"{flops / 1e12:.1f} TFLOP a sample, {step / 1e15:.2f} PFLOP a step, ", end="")
    print(f"{total / 1e18:.1f} EFLOP in all")
    if hours := OFFICIAL_HOURS.get((name, stage)):
        mfu = total / (8 * 312e12 * hours * 3600)
        print(f"the original took {hours} h on 8 A100, an MFU of {mfu:.0%}")
    micro, _, kinds = on_each(config, recipe, sizes, args.gpus, tokens)
    print(f"\nmemory of one of {args.gpus} {args.gpu}, {micro} samples at a time, ", end="")
    print(f"--recompute {recipe.recompute}:")
    for kind, gb in kinds.items():
        print(f"  {kind:28} {gb:8.1f} GB")
    fits = sum(kinds.values()) <= memory
    print(f"  {'in all':28} {sum(kinds.values()):8.1f} GB of {memory}: ", end="")
    print("fits" if fits else "does not fit; try --micro-batch, --recompute full, more GPUs")
    print(f"\nat an MFU of {args.mfu:.0%} of {peak} TFLOP/s:")
    print("   GPUs   hours  GPU-hours  memory GB  sent in a step: in a shard, between copies")
    for gpus in sorted({1, 8, 32, 128, 1024, args.gpus}):
        _, shard, kinds = on_each(config, recipe, sizes, gpus, tokens)
        gb = sum(kinds.values())
        hours = total / (gpus * peak * 1e12 * args.mfu) / 3600
        inside, between = traffic_gb(sizes, recipe, gpus, shard)
        note = "" if gb <= memory else "  too much"
        idle = "  more GPUs than samples in a batch" if gpus > recipe.batch else ""
        print(
            f"{gpus:7,} {hours:7.1f} {hours * gpus:10.0f} {gb:10.1f}  {inside:6.1f} GB "
            f"{between:6.1f} GB{note}{idle}"
        )


def main():
    print("python train.py --config NAME --stage 1|2 --plan --gpus N --gpu KIND")


if __name__ == "__main__":
    import argparse

    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    main()
