"""What every official layout calls a tensor, and what we call it, as tables.

Nothing here opens a file. Read next: configs.py, the same for config.json; then checkpoint.py.
"""

import re

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
# Files that add to a base: a LoRA, what was trained beside it, a projector alone.
EXTRAS = ("adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin")
EXTRAS += ("mm_projector.bin",)
LORA_ONLY = {"use_dora": False, "fan_in_fan_out": False, "bias": "none", "peft_type": "LORA"}
LORA_ONLY |= {"rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None}
# Which part of a LLaVA a family holds; those that are not here hold the whole.
PARTS = {"clip": "vision_tower", "openai-clip": "vision_tower"}
PARTS |= {"llama": "language_model", "meta": "language_model"}
# How the names of a rounded matrix end (quantize.py); their types are never changed. They lie in
# rounded.safetensors: where transformers looks, there is nothing that it could half load.
ROUNDED = (".q", ".scale", ".mid")
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
    if family == "openai-clip":  # there the three are one tensor
        name = re.sub(r"\.[qkv]_proj\.", ".qkv_proj.", name)
    table = [(ours, re.sub(r"\(([^|]*)\|[^)]*\)", r"\1", theirs)) for theirs, ours in NAMES[family]]
    if (stored := translated(name, table)) is None:
        raise CheckpointError(f"the {family} layout has no place for a tensor called {name!r}")
    return stored


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
