"""config.json of every official layout <-> the fields of our config classes.

Tables say what a key is called here and what its absence means; a few rules do what tables cannot.
What a config asks for and this code does not do is refused: loaded anyway, it would only give
other numbers. `hf_config` reads the same tables from right to left.

No weight file is opened. Read next: checkpoint.py, which asks.
"""

import json
import math
from pathlib import Path

import torch

from weightfile import CheckpointError

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
IDS = {"bos_token_id", "eos_token_id", "pad_token_id", "image_token_index"}
NOTES = "llava_from_scratch"  # key of config.json for what transformers has no word for
# No real model is larger; a config that claims more would fill the memory before it is refused.
MAX_JSON = 2**26  # bytes
LIMITS = {"n_layers": 1000, "max_positions": 2**24}
LIMIT = 2**20  # of any other size
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Config:
    """One config.json or params.json, opened; its family is told by what is in it.

    clip          CLIPVisionModel, or the vision half of CLIPModel        holds a vision_tower
    llama         LlamaForCausalLM, MistralForCausalLM (Vicuna, Yi, ...)  holds a language_model
    meta          params.json beside consolidated.*.pth                   holds a language_model
    llava-hf      LlavaForConditionalGeneration, LlavaNext...             holds both and a projector
    llava         liuhaotian/llava-...: v1, v1.5, v1.6

    Everything here raises CheckpointError for what is not implemented.
    """

    def __init__(self, folder: Path):
        meta = (folder / "params.json").is_file()
        self.file = folder / ("params.json" if meta else "config.json")
        self.content = read_json(self.file)
        kind = self.content.get("model_type")
        parts = {"text_config", "vision_config"}
        sections = {key for key, value in self.content.items() if isinstance(value, dict)}
        if meta:
            self.family = "meta"
        elif kind == "clip_vision_model" or kind == "clip" and "vision_config" in sections:
            self.family = "clip"
        elif kind in ("llama", "mistral"):
            self.family = "llama"
        elif kind in ("llava", "llava_next") and parts <= sections:
            self.family = "llava-hf"
        elif kind in ("llava", "llava_llama", "llava_mistral") and not parts & self.content.keys():
            self.family = "llava"
        else:
            known = "clip, clip_vision_model, llama, mistral, llava, llava_next, llava_llama"
            raise self.refusal("model_type", kind, f"{known} or llava_mistral")

    def get(self, key: str, default=None):
        return self.content.get(key, default)

    def vision(self) -> dict | None:
        """The fields of ViTConfig; None where the tower is a checkpoint of its own."""
        if self.family not in ("clip", "llava-hf"):
            return None
        section = self.get("vision_config", self.content)
        self.check(section, "vision")
        return self.translate(section, VISION)

    def text(self) -> dict:
        """The fields of LLaMAConfig."""
        section = self.get("text_config", self.content)
        section = self.choose(section, "model_type", DECODERS, "llama") | section
        self.check(section, "text")
        rope = self.rope(section)
        section["rope_theta"] = rope.get("rope_theta", section.get("rope_theta"))
        # transformers 4 looks for this key in text_config, 5 beside it as well.
        tied = section.get("tie_word_embeddings") or self.get("tie_word_embeddings")
        fields = self.translate(section | {"tie_word_embeddings": tied}, TEXT)
        fields["n_kv_heads"] = fields["n_kv_heads"] or fields["n_heads"]
        fields["rope_scaling"] = self.rope_scaling(rope)
        window = section.get("sliding_window")
        if window is not None:
            if type(window) is not int or window < 1:
                raise self.refusal("sliding_window", window, "null or a number above 0")
            # Here each token sees all before it. Up to the window's length that is the same.
            fields["max_positions"] = min(fields["max_positions"], window)
        return fields

    def meta(self, shapes: dict) -> dict:
        """The fields of LLaMAConfig: params.json has few of them, the others are in the shapes."""
        vocab_size, _ = sizes(shapes, "tok_embeddings.weight", 2, self.file)
        mlp_dim, _ = sizes(shapes, "layers.0.feed_forward.w1.weight", 2, self.file)
        fields = self.translate(self.content | {"vocab_size": vocab_size, "mlp_dim": mlp_dim}, META)
        fields["n_kv_heads"] = fields["n_kv_heads"] or fields["n_heads"]
        # The file does not say for how many positions: LLaMA 1, 2 and 3 differ in these.
        old = fields["norm_eps"] < 1e-5
        fields["max_positions"] = 2048 if old else 4096 if fields["rope_theta"] == 1e4 else 8192
        fields["tied_embeddings"] = False  # Meta stores the table twice
        if self.get("use_scaled_rope"):
            fields |= {"rope_scaling": LLAMA31, "max_positions": 131072}
        return fields

    def llava(self, vision: dict, text: dict) -> dict:
        """The fields of LLaVAConfig, with those of its parts as dictionaries inside.

        The llava-hf layout has no words for padding and for conversation templates. They are
        LLaVA-1.5's own, "pad" and "v1", unless `save` left a note in config.json. Absent keys of
        the original layout mean what the original code takes them to mean.
        """
        notes = self.notes()
        kind, template = self.get("model_type"), "v1"
        if self.family == "llava":
            layer_key, class_key = "mm_vision_select_layer", "mm_vision_select_feature"
            aspect = self.get("image_aspect_ratio")
            aspect = aspect if aspect in ("pad", "anyres") else "crop"
            projector = self.get("mm_projector_type", "linear")
            if aspect == "anyres":
                self.only("mm_patch_merge_type", "spatial_unpad", "flat")
            strategy = "patch"
        else:
            self.check(self.content, "llava")
            layer_key, class_key = "vision_feature_layer", "vision_feature_select_strategy"
            aspect = "anyres" if kind == "llava_next" else "pad"
            projector = self.choose(self.content, "projector_hidden_act", PROJECTORS, "gelu")
            if aspect == "anyres":
                self.only("use_image_newline_parameter", True, True)
            strategy = "default"
        mistral = "mistral" in (kind, self.get("text_config", {}).get("model_type"))
        if kind == "llava_mistral" or mistral and aspect == "anyres":
            template = "mistral_instruct"
        elif text["vocab_size"] // 1000 == 64:  # Yi: 64,000 tokens, or 64,064 with padding
            template = "chatml_direct"
        elif text["vocab_size"] // 1000 == 128:  # LLaMA 3: 128,256 or 128,320
            template = "llava_llama_3"
        image = {"image_size": vision["image_size"], "aspect": aspect}
        if aspect == "anyres":
            # transformers calls these pairs (height, width). The numbers are the original's, where
            # they are (width, height), and read as such they give the original's choice of grid.
            image["grid_pinpoints"] = self.get("image_grid_pinpoints")
        layer = self.get(layer_key, -2)
        if type(layer) is not int:
            raise self.refusal(layer_key, layer, "a single number")
        return {
            "vision": vision,
            "text": text,
            "image": image | notes.get("image", {}),
            "projector": projector,
            "vision_layer": layer,
            "keep_class": self.choose(self.content, class_key, KEEP_CLASS, strategy),
            "template": notes.get("template", template),
            "image_start_end": notes.get("image_start_end", bool(self.get("mm_use_im_start_end"))),
            "weight_bits": notes.get("weight_bits"),
        }

    def notes(self) -> dict:
        """What `save` wrote down for itself."""
        notes = self.get(NOTES, {})
        fields = {"image_size", "aspect", "mean", "std", "grid_pinpoints"}
        image = notes.get("image", {}) if isinstance(notes, dict) else None
        proper = isinstance(image, dict) and image.keys() <= fields
        proper = proper and isinstance(notes.get("template", ""), str)
        proper = proper and isinstance(notes.get("image_start_end", False), bool)
        if not proper or notes.get("weight_bits") not in (None, 8, 4):
            expected = "{image: {...}, template: ..., image_start_end: ..., weight_bits: 8 or 4}"
            raise self.refusal(NOTES, notes, expected)
        return notes

    def token_ids(self) -> dict:
        """The ids that transformers keeps in a config; ours come with the tokenizer."""
        both = self.get("text_config", {}) | self.content
        return {key: both[key] for key in sorted(IDS & both.keys())}

    def only(self, key: str, value, default):
        if self.get(key, default) != value:
            raise self.refusal(key, self.get(key, default), value)

    def check(self, section: dict, part: str):
        for key, value in ONLY[part].items():
            if section.get(key) not in (None, value):
                raise self.refusal(key, section[key], value)

    def choose(self, section: dict, key: str, table: dict, default: str):
        value = section.get(key, default)
        if value not in list(table):
            raise self.refusal(key, value, " or ".join(table))
        return table[value]

    def rope(self, section: dict) -> dict:
        # transformers 4 has rope_theta and rope_scaling; 5 puts both into rope_parameters.
        sources = [section.get(key) or {} for key in ("rope_parameters", "rope_scaling")]
        if not all(isinstance(source, dict) for source in sources):
            raise self.refusal("rope_scaling", sources, "{...}")
        rope = sources[0] | sources[1]
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise self.refusal("rope_type of RoPE", kind, "default or llama3")
        if rope.get("partial_rotary_factor", 1) != 1:
            value = rope["partial_rotary_factor"]
            raise self.refusal("partial_rotary_factor of RoPE", value, 1)
        return rope | {"rope_type": kind}

    def rope_scaling(self, rope: dict) -> tuple:
        if rope["rope_type"] == "default":
            return ()
        values = tuple(rope.get(key) for key in ROPE_SCALING)
        if not all(type(v) in (int, float) and 0 < v < 2**24 for v in values):
            raise self.refusal("rope_scaling", rope, f"with {', '.join(ROPE_SCALING)} above 0")
        return tuple(map(float, values))

    def translate(self, section: dict, table: dict) -> dict:
        fields = {}
        for key, (ours, default) in table.items():
            value, kind = section.get(key), type(default)
            if value is None:
                value = default
            elif type(value) not in (kind, int if kind is float else kind):
                raise self.refusal(key, value, f"a value of type {kind.__name__}")
            elif kind in (int, float) and not value > 0:
                raise self.refusal(key, value, "a number above 0")
            elif kind is int and value > LIMITS.get(ours, LIMIT):
                limit = LIMITS.get(ours, LIMIT)
                raise self.refusal(key, value, f"a number up to {limit:,}")
            fields[ours] = kind(value)
        return fields

    def refusal(self, key: str, value, expected) -> CheckpointError:
        value = repr(value) if len(repr(value)) < 200 else repr(value)[:200] + "..."
        return CheckpointError(f"{self.file}: {key} is {value}; only {expected!s} is implemented")


def vision_from_shapes(shapes: dict, path: Path) -> dict:
    """The fields of ViTConfig from {our name: shape}; OpenAI's heads are all 64 wide."""
    start = "vision_tower."
    dim, _, patch, _ = sizes(shapes, start + "embeddings.patch_embedding.weight", 4, path)
    positions, _ = sizes(shapes, start + "embeddings.position_embedding.weight", 2, path)
    mlp_dim, _ = sizes(shapes, start + "layers.0.mlp.fc1.weight", 2, path)
    layers = {name.split(".")[2] for name in shapes if name.startswith(start + "layers.")}
    return {
        "image_size": math.isqrt(max(0, positions - 1)) * patch,
        "patch_size": patch,
        "dim": dim,
        "mlp_dim": mlp_dim,
        "n_layers": len(layers),
        "n_heads": max(1, dim // 64),
        "norm_eps": 1e-5,
        "activation": "quick_gelu",
    }


def sizes(shapes: dict, name: str, n_dims: int, path: Path) -> list[int]:
    shape = shapes.get(name, [])
    if len(shape) != n_dims or not all(0 < n <= LIMIT for n in shape):
        raise CheckpointError(f"{path}: expected a {n_dims}-d {name}, got {shape or 'none'}")
    return shape


def read_json(file: Path) -> dict:
    if not file.is_file():
        raise CheckpointError(f"{file.parent} has no {file.name}; is the download complete?")
    if file.stat().st_size > MAX_JSON:
        raise CheckpointError(
            f"{file} has {file.stat().st_size:,} bytes; at most {MAX_JSON:,} are read"
        )
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}; expected {{...}}")
    return content


def hf_config(kind: str, config: dict, dtype: torch.dtype, token_ids: dict) -> dict:
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
        content |= token_ids
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
            "vision_config": hf_config("vision_tower", vision, dtype, {}),
            "text_config": hf_config("language_model", text, dtype, token_ids),
            "projector_hidden_act": acts[config["projector"]],
            "vision_feature_layer": config["vision_layer"],
            "vision_feature_select_strategy": "full" if config["keep_class"] else "default",
            "image_seq_length": n_patches + config["keep_class"],
            "image_token_index": 0,
            "tie_word_embeddings": text["tied_embeddings"],
            **ONLY["llava"],
            NOTES: {key: config[key] for key in ("image", "template", "image_start_end")},
            **token_ids,
        }
        if anyres:
            content["image_grid_pinpoints"] = config["image"]["grid_pinpoints"]
            content["use_image_newline_parameter"] = True
        if config["weight_bits"]:
            content[NOTES]["weight_bits"] = config["weight_bits"]
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
    """Print what a config.json of transformers calls the fields of a small LLaMA."""
    for key, (ours, default) in TEXT.items():
        print(f"{key:24} {ours:16} {default} where the key is absent")


if __name__ == "__main__":
    import argparse

    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    main()
