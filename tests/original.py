"""Small LLaVA checkpoints in the original layouts, the same on every machine.

Every tensor follows from its name and shape, so the recorded answers of the original code
(tests/record_llava.py, tests/llava.json) need no weights beside them: the tests write the same
folders again. Needs torch and safetensors only, and runs with the packages of either side.
"""

import json
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file

VOCAB, DIM, MLP, LAYERS, HEADS = 300, 32, 48, 2, 4
TOWER_DIM, TOWER_MLP, TOWER_LAYERS, PATCH = 64, 96, 3, 14
KINDS = ("v1", "v1.5", "v1.6", "v1.6-mistral")


def tensor(name: str, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(shape, generator=generator)
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * values
    return values * 0.2


def tower_tensors(size: int) -> dict[str, torch.Tensor]:
    d, start = TOWER_DIM, "vision_model."
    shapes = {
        "embeddings.class_embedding": (d,),
        "embeddings.patch_embedding.weight": (d, 3, PATCH, PATCH),
        "embeddings.position_embedding.weight": ((size // PATCH) ** 2 + 1, d),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{norm}.weight": (d,), f"{norm}.bias": (d,)}
    for i in range(TOWER_LAYERS):
        layer = f"encoder.layers.{i}."
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{layer}self_attn.{part}.weight"] = (d, d)
            shapes[f"{layer}self_attn.{part}.bias"] = (d,)
        for part in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}{part}.weight": (d,), f"{layer}{part}.bias": (d,)}
        shapes |= {f"{layer}mlp.fc1.weight": (TOWER_MLP, d), f"{layer}mlp.fc1.bias": (TOWER_MLP,)}
        shapes |= {f"{layer}mlp.fc2.weight": (d, TOWER_MLP), f"{layer}mlp.fc2.bias": (d,)}
    return {start + name: tensor(start + name, *shape) for name, shape in shapes.items()}


def decoder_tensors(kv_heads: int, vocab: int = VOCAB) -> dict[str, torch.Tensor]:
    kv = DIM // HEADS * kv_heads
    shapes = {"model.embed_tokens.weight": (vocab, DIM), "model.norm.weight": (DIM,)}
    shapes["lm_head.weight"] = (vocab, DIM)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        rows = {"q_proj": DIM, "k_proj": kv, "v_proj": kv, "o_proj": DIM}
        shapes |= {f"{layer}self_attn.{part}.weight": (n, DIM) for part, n in rows.items()}
        shapes |= {f"{layer}mlp.{part}_proj.weight": (MLP, DIM) for part in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (DIM, MLP)
        shapes[f"{layer}input_layernorm.weight"] = (DIM,)
        shapes[f"{layer}post_attention_layernorm.weight"] = (DIM,)
    return {name: tensor(name, *shape) for name, shape in shapes.items()}


def projector_tensors(kind: str) -> dict[str, torch.Tensor]:
    start = "model.mm_projector."
    layers = {"": TOWER_DIM} if kind == "v1" else {"0.": TOWER_DIM, "2.": DIM}
    found = {}
    for number, width in layers.items():
        found[f"{start}{number}weight"] = tensor(f"{start}{number}weight", DIM, width)
        found[f"{start}{number}bias"] = tensor(f"{start}{number}bias", DIM)
    return found


def write_tower(folder: Path, size: int):
    """openai/clip-vit-large-patch14, small: config, pytorch_model.bin, preprocessing."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": TOWER_DIM,
        "intermediate_size": TOWER_MLP,
        "num_hidden_layers": TOWER_LAYERS,
        "num_attention_heads": TOWER_DIM // 64,
        "image_size": size,
        "patch_size": PATCH,
        "hidden_act": "quick_gelu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": size, "width": size},
        "size": {"shortest_edge": size},
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    torch.save(tower_tensors(size), folder / "pytorch_model.bin")


def config_of(kind: str, tower: Path, size: int) -> dict:
    """config.json with the keys that the official checkpoint of this kind has, and no others."""
    config = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "vocab_size": VOCAB,
        "hidden_size": DIM,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "mm_vision_tower": str(tower),
        "mm_hidden_size": TOWER_DIM,
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "use_mm_proj": True,
    }
    if kind == "v1":
        return config
    config |= {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch"}
    config |= {"mm_use_im_patch_token": False, "image_aspect_ratio": "pad"}
    if kind == "v1.5":
        return config
    config |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
    grids = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
    config["image_grid_pinpoints"] = [[size * x, size * y] for x, y in grids]
    config |= {"unfreeze_mm_vision_tower": True, "tokenizer_model_max_length": 2048}
    if kind == "v1.6-mistral":
        config |= {"architectures": ["LlavaMistralForCausalLM"], "model_type": "llava_mistral"}
        config |= {"num_key_value_heads": 2, "sliding_window": None, "rope_theta": 1e6}
    return config


def write(kind: str, folder: Path, size: int = 56) -> Path:
    """One checkpoint in the folder `kind`, beside its tower in the folder `tower`."""
    tower, out = folder / "tower", folder / kind
    if not tower.exists():
        write_tower(tower, size)
    out.mkdir(parents=True)
    config = config_of(kind, tower, size)
    (out / "config.json").write_text(json.dumps(config))
    tensors = decoder_tensors(config["num_key_value_heads"]) | projector_tensors(kind)
    if kind.startswith("v1.6"):
        inside = tower_tensors(size).items()  # trained further, so other values than the tower's
        tensors |= {f"model.vision_tower.vision_tower.{k}": v * 1.1 for k, v in inside}
        tensors["model.image_newline"] = tensor("model.image_newline", DIM)
        save = lambda part, file: save_file(part, file, metadata={"format": "pt"})  # noqa: E731
        name = "model-{}-of-00002.safetensors"
        index = "model.safetensors.index.json"
    else:
        save, name, index = (
            torch.save,
            "pytorch_model-{}-of-00002.bin",
            "pytorch_model.bin.index.json",
        )
        for i in range(LAYERS):  # a buffer that old transformers saved
            buffer = f"model.layers.{i}.self_attn.rotary_emb.inv_freq"
            tensors[buffer] = 1 / 1e4 ** (torch.arange(0, DIM // HEADS, 2) / (DIM // HEADS))
    names, weight_map = list(tensors), {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = name.format(f"{i:05}")
        save({n: tensors[n].clone() for n in part}, out / file)
        weight_map |= dict.fromkeys(part, file)
    (out / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return out
