"""What every official layout calls things: tensor names and config keys <-> ours, as tables.

NAMES is the translation of tensor names, VISION, TEXT and META those of config keys; `hf_config`
reads them from right to left. Nothing here opens a file. Read next: checkpoint.py, which does.
"""

import re

import torch

from weightfile import CheckpointError

# How a stored name starts -> how ours starts; the first row that fits counts, * is a number.
# "(a|b)" stands where versions of transformers differ: both are read, the first is written, and
# every version reads it.
CLIP = (
    ("(vision_model.|)encoder.layers.", "vision_tower.layers."),
    ("(vision_model.|)pre_layrnorm.", "vision_tower.pre_layernorm."),  # the typo is theirs
    ("(vision_model.|)embeddings.", "vision_tower.embeddings."),
    ("(vision_model.|)post_layernorm.", "vision_tower.post_layernorm."),
)
LLAMA = (("lm_head.", "language_model.lm_head."), ("model.", "language_model."))
RESBLOCK, VIT_LAYER = "visual.transformer.resblocks.*.", "vision_tower.layers.*."
LAYER = "language_model.layers.*."
NAMES = {
    "clip": CLIP,
    "openai-clip": (
        (RESBLOCK + "ln_", VIT_LAYER + "layer_norm"),
        (RESBLOCK + "attn.in_proj_", VIT_LAYER + "self_attn.qkv_proj."),  # split in `pieces`
        (RESBLOCK + "attn.out_proj.", VIT_LAYER + "self_attn.out_proj."),
        (RESBLOCK + "mlp.c_fc.", VIT_LAYER + "mlp.fc1."),
        (RESBLOCK + "mlp.c_proj.", VIT_LAYER + "mlp.fc2."),
        ("visual.ln_pre.", "vision_tower.pre_layernorm."),
        ("visual.ln_post.", "vision_tower.post_layernorm."),
        ("visual.conv1.", "vision_tower.embeddings.patch_embedding."),
        ("visual.class_embedding", "vision_tower.embeddings.class_embedding"),
        ("visual.positional_embedding", "vision_tower.embeddings.position_embedding.weight"),
    ),
    "llama": LLAMA,
    "meta": (
        ("tok_embeddings.", "language_model.embed_tokens."),
        *((f"layers.*.attention.w{x}.", f"{LAYER}self_attn.{x}_proj.") for x in "qkvo"),
        ("layers.*.feed_forward.w1.", LAYER + "mlp.gate_proj."),
        ("layers.*.feed_forward.w2.", LAYER + "mlp.down_proj."),
        ("layers.*.feed_forward.w3.", LAYER + "mlp.up_proj."),
        ("layers.*.attention_norm.", LAYER + "input_layernorm."),
        ("layers.*.ffn_norm.", LAYER + "post_attention_layernorm."),
        ("norm.", "language_model.norm."),
        ("output.", "language_model.lm_head."),
    ),
    "llava-hf": (
        *((f"(|model.)vision_tower.{stored}", ours) for stored, ours in CLIP),
        ("(|model.)multi_modal_projector.linear_1.", "projector.0."),
        ("(|model.)multi_modal_projector.linear_2.", "projector.2."),  # place 1 is the GELU
        ("(|model.)image_newline", "image_newline"),
        ("(language_model.|)lm_head.", "language_model.lm_head."),
        ("(language_model.model.|model.language_model.)", "language_model."),
    ),
    "llava": (
        *((f"model.vision_tower.vision_tower.{stored}", ours) for stored, ours in CLIP),
        ("model.mm_projector.*.", "projector.*."),
        ("model.mm_projector.", "projector.0."),  # v1: a single layer, without a number
        ("model.image_newline", "image_newline"),
        *LLAMA,
    ),
}
# Stored tensors that are left out, and why. Checkpoint.copies adds those that depend on the config.
OMITTED = (
    (
        r"text_(model|projection)\.",
        "CLIP's text half; LLaVA has its own language model",
    ),
    (
        r"visual_projection\.|logit_scale$",
        "compares pictures with captions, which LLaVA never does",
    ),
    (r"(.*\.)?embeddings\.position_ids$", "the numbers 0, 1, 2, ..."),
    (r".*\.rotary_emb\.inv_freq$|rope\.freqs$", "follows from rope_theta"),
)
OPENAI_OMITTED = (
    (r"(?!visual\.)(transformer|token_embedding|positional_embedding|ln_final)", OMITTED[0][1]),
    (r"text_projection$|visual\.proj$|logit_scale$", OMITTED[1][1]),
    (r"(input_resolution|context_length|vocab_size)$", "follows from the shapes"),
)
# Along which dimension Meta's shards are cut; the embedding table is decided by its shape.
SHARDED = {
    0: r"(.*\.(wq|wk|wv|w1|w3)|output)\.weight",
    1: r".*\.(wo|w2)\.weight",
}
# Key of config.json -> our field, and the value that transformers assumes where the key is absent.
VISION = {
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 32),
    "hidden_size": ("dim", 768),
    "intermediate_size": ("mlp_dim", 3072),
    "num_hidden_layers": ("n_layers", 12),
    "num_attention_heads": ("n_heads", 12),
    "layer_norm_eps": ("norm_eps", 1e-5),
    "hidden_act": ("activation", "quick_gelu"),
}
TEXT = {
    "vocab_size": ("vocab_size", 32000),
    "hidden_size": ("dim", 4096),
    "intermediate_size": ("mlp_dim", 11008),
    "num_hidden_layers": ("n_layers", 32),
    "num_attention_heads": ("n_heads", 32),
    "num_key_value_heads": ("n_kv_heads", 0),  # 0: as many as n_heads
    "head_dim": ("head_dim", 0),  # 0: dim / n_heads
    "rms_norm_eps": ("norm_eps", 1e-6),
    "rope_theta": ("rope_theta", 10000.0),
    "max_position_embeddings": ("max_positions", 2048),
    "tie_word_embeddings": ("tied_embeddings", False),
}
META = {  # the same for params.json; vocab_size and mlp_dim come from the shapes
    "vocab_size": ("vocab_size", 32000),
    "mlp_dim": ("mlp_dim", 11008),
    "dim": ("dim", 4096),
    "n_layers": ("n_layers", 32),
    "n_heads": ("n_heads", 32),
    "n_kv_heads": ("n_kv_heads", 0),
    "norm_eps": ("norm_eps", 1e-5),
    "rope_theta": ("rope_theta", 10000.0),
}
# RoPE of LLaMA 3.1: what a config calls the four numbers, and their values in Meta's own code.
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
LLAMA31 = (8.0, 1.0, 4.0, 8192.0)
MISTRAL = {"intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": 4096}
MISTRAL |= {"max_position_embeddings": 131072}
# model_type -> what it assumes instead
DECODERS = {"llama": {}, "mistral": MISTRAL}
DECODERS |= {"llava": {}, "llava_llama": {}, "llava_mistral": MISTRAL}  # the original's, flat
# Options of which this code knows one value only.
ONLY = {
    "vision": {"model_type": "clip_vision_model", "num_channels": 3},
    "text": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    "llava": {"multimodal_projector_bias": True},
}
PROJECTORS = {"gelu": "mlp2x_gelu", "linear": "linear"}  # projector_hidden_act -> our kind
# vision_feature_select_strategy, or in the original mm_vision_select_feature -> our keep_class
KEEP_CLASS = {"default": False, "full": True, "patch": False, "cls_patch": True}
NOTES = "llava_from_scratch"  # key of config.json for what transformers has no word for
# No real model is larger; a config that claims more would fill the memory before it is refused.
MAX_JSON = 2**26  # bytes
LIMITS = {"n_layers": 1000, "max_positions": 2**24}
LIMIT = 2**20  # of any other size
# Files that add to a base: a LoRA, what was trained beside it, a projector alone.
EXTRAS = ("adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin")
EXTRAS += ("mm_projector.bin",)
LORA_ONLY = {"use_dora": False, "fan_in_fan_out": False, "bias": "none", "peft_type": "LORA"}
LORA_ONLY |= {"rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None}
STORED_AS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Which part of a LLaVA a family holds; those that are not here hold the whole.
PARTS = {"clip": "vision_tower", "openai-clip": "vision_tower"}
PARTS |= {"llama": "language_model", "meta": "language_model"}
KINDS = {"vision_tower": "clip", "language_model": "llama", "llava": "llava-hf"}


def translated(name: str, table) -> str | None:
    """A name under the first row that fits how it starts, or None. See NAMES for the rows."""
    for pattern, replacement in table:
        rule = pattern.replace(".", r"\.").replace("(", "(?:").replace("*", r"(\d+)")
        if match := re.match(rule, name):
            start = replacement
            for number in match.groups():
                start = start.replace("*", number, 1)
            return start + name[match.end() :]
    return None


def stored_name(family: str, name: str) -> str:
    """The same table from right to left: what our tensor is called in a file."""
    table = [(ours, re.sub(r"\(([^|]*)\|[^)]*\)", r"\1", theirs)) for theirs, ours in NAMES[family]]
    if (stored := translated(name, table)) is None:
        raise CheckpointError(f"the {family} layout has no place for a tensor called {name!r}")
    return stored


def hf_config(kind: str, config: dict, dtype: torch.dtype, image_token_id: int) -> dict:
    """Our config in transformers' words, with every size spelled out; versions 4 and 5 read it."""
    if kind == "vision_tower":
        content = {"architectures": ["CLIPVisionModel"], **ONLY["vision"]}
        content |= {key: config[ours] for key, (ours, _) in VISION.items()}
    elif kind == "language_model":
        content = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **ONLY["text"]}
        content |= {key: config[ours] for key, (ours, _) in TEXT.items()}
        if config["rope_scaling"]:
            numbers = dict(zip(ROPE_SCALING, config["rope_scaling"], strict=True))
            numbers[ROPE_SCALING[-1]] = int(numbers[ROPE_SCALING[-1]])
            content["rope_scaling"] = {"rope_type": "llama3", **numbers}
    else:
        vision, text = config["vision"], config["text"]
        acts = {kind: act for act, kind in PROJECTORS.items()}
        if config["projector"] not in acts:
            raise CheckpointError(f"llava-hf has no place for projector {config['projector']!r}")
        anyres = config["image"]["aspect"] == "anyres"
        n_patches = (vision["image_size"] // vision["patch_size"]) ** 2
        content = {
            "architectures": [f"Llava{'Next' * anyres}ForConditionalGeneration"],
            "model_type": "llava_next" if anyres else "llava",
            "vision_config": hf_config("vision_tower", vision, dtype, 0),
            "text_config": hf_config("language_model", text, dtype, 0),
            "projector_hidden_act": acts[config["projector"]],
            "vision_feature_layer": config["vision_layer"],
            "vision_feature_select_strategy": "full" if config["keep_class"] else "default",
            "image_seq_length": n_patches + config["keep_class"],
            "image_token_index": image_token_id,
            "tie_word_embeddings": text["tied_embeddings"],
            **ONLY["llava"],
            NOTES: {"image": config["image"], "template": config["template"]},
        }
        if anyres:
            content["image_grid_pinpoints"] = config["image"]["grid_pinpoints"]
            content["use_image_newline_parameter"] = True
    return content | {"torch_dtype": str(dtype).removeprefix("torch.")}


def hf_preprocessor(image: dict) -> dict:
    """What transformers' image processor needs to know. It can only crop, where LLaVA-1.5 pads."""
    size = image["image_size"]
    content = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "resample": 3,  # bicubic
        "image_mean": image["mean"],
        "image_std": image["std"],
    }
    if image["aspect"] == "anyres":
        content["image_processor_type"] = "LlavaNextImageProcessor"
        content["image_grid_pinpoints"] = image["grid_pinpoints"]
    return content


def main():
    """Print what each layout calls a few of our tensors."""
    names = (
        "vision_tower.layers.0.mlp.fc1.weight",
        "projector.0.weight",
        "language_model.layers.0.self_attn.q_proj.weight",
    )
    for name in names:
        print(name)
        for family, table in NAMES.items():
            if any(name.startswith(ours.partition("*")[0]) for _, ours in table):
                print(f"    {family:12} {stored_name(family, name)}")


if __name__ == "__main__":
    import argparse

    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    main()
