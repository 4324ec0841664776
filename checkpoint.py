"""Weights on disk: official layouts <-> the names used here, strict both ways.

A checkpoint is a folder: config.json has the sizes, *.safetensors the tensors. Three families are
read, told apart by what config.json says and never by the name of a folder:

    clip       CLIPVisionModel, or the vision half of CLIPModel     holds a vision_tower
    llama      LlamaForCausalLM, MistralForCausalLM                 holds a language_model
    llava-hf   LlavaForConditionalGeneration                        holds both, and a projector

NAMES is the whole translation, and `save` reads the same table from right to left. What a config
asks for and this code does not do is refused: loaded anyway, it would only give other numbers.

No model file is imported; `build` is told how to make the module. Read next: `from_pretrained` in
vit.py, llama.py and llava.py, a few lines each.
"""

import argparse
import json
import os
import re
import shutil
import sys
from collections import Counter
from functools import cached_property, reduce
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

# How a stored name starts -> how ours starts; the first row that fits counts. "(a|b)" stands where
# versions of transformers differ: both are read, the first is written, and every version reads it.
CLIP = (
    ("(vision_model.|)encoder.layers.", "vision_tower.layers."),
    ("(vision_model.|)pre_layrnorm.", "vision_tower.pre_layernorm."),  # the typo is theirs
    ("(vision_model.|)embeddings.", "vision_tower.embeddings."),
    ("(vision_model.|)post_layernorm.", "vision_tower.post_layernorm."),
)
NAMES = {
    "clip": CLIP,
    "llama": (("lm_head.", "language_model.lm_head."), ("model.", "language_model.")),
    "llava-hf": (
        *((f"(|model.)vision_tower.{stored}", ours) for stored, ours in CLIP),
        ("(|model.)multi_modal_projector.linear_1.", "projector.0."),
        ("(|model.)multi_modal_projector.linear_2.", "projector.2."),  # place 1 is the GELU
        ("(language_model.|)lm_head.", "language_model.lm_head."),
        ("(language_model.model.|model.language_model.)", "language_model."),
    ),
}
# Stored tensors that are left out, and why. Checkpoint.copies adds those that depend on the config.
OMITTED = (
    (r"text_(model|projection)\.", "CLIP's text half; LLaVA has its own language model"),
    (
        r"visual_projection\.|logit_scale$",
        "compares pictures with captions, which LLaVA never does",
    ),
    (r"(.*\.)?embeddings\.position_ids$", "the numbers 0, 1, 2, ..."),
    (r".*\.rotary_emb\.inv_freq$", "follows from rope_theta"),
)
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
MISTRAL = {"intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": 4096}
MISTRAL |= {"max_position_embeddings": 131072}
DECODERS = {"llama": {}, "mistral": MISTRAL}  # model_type -> what it assumes instead
# Options of which this code knows one value only.
ONLY = {
    "vision": {"model_type": "clip_vision_model", "num_channels": 3},
    "text": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    "llava": {"multimodal_projector_bias": True},
}
PROJECTORS = {"gelu": "mlp2x_gelu", "linear": "linear"}  # projector_hidden_act -> our kind
KEEP_CLASS = {"default": False, "full": True}  # vision_feature_select_strategy -> keep_class
NOTES = "llava_from_scratch"  # key of config.json for what transformers has no word for
KINDS = {"vision_tower": "clip", "language_model": "llama", "llava": "llava-hf"}
# What a weight can be, in the words of safetensors; quantised formats are not among them.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says what was expected and what is there."""


class Stored(NamedTuple):
    """Where a tensor lies and what it is, before a byte of it is read."""

    file: Path
    shape: list[int]
    dtype: str  # a key of DTYPES, or something that is no weight


class Checkpoint:
    """A folder, opened: the config is read, the tensors stay on disk until `read` asks for one."""

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{path} is not a folder; expected one with a config.json in it")
        self.config = read_json(self.path / "config.json")
        kind = self.config.get("model_type")
        sections = {key for key, value in self.config.items() if isinstance(value, dict)}
        if kind == "clip_vision_model" or kind == "clip" and "vision_config" in sections:
            self.family = "clip"
        elif kind in list(DECODERS):
            self.family = "llama"
        elif kind == "llava" and {"text_config", "vision_config"} <= sections:
            self.family = "llava-hf"
        else:
            known = "clip, clip_vision_model, llama, mistral, or llava with its two sub-configs"
            raise self._refusal("model_type", kind, known)

    # What config.json says, in our words. What is not implemented raises CheckpointError.

    def vision_config(self) -> dict:
        """The fields of ViTConfig."""
        if self.family == "llama":
            raise CheckpointError(f"{self.path} is a language model: it has no vision tower")
        section = self.config.get("vision_config", self.config)
        self._check(section, "vision")
        return self._translate(section, VISION)

    def text_config(self) -> dict:
        """The fields of LLaMAConfig."""
        if self.family == "clip":
            raise CheckpointError(f"{self.path} is a CLIP model: it has no language model")
        section = self.config.get("text_config", self.config)
        section = self._choose(section, "model_type", DECODERS, "llama") | section
        self._check(section, "text")
        section["rope_theta"] = self._rope_theta(section)
        # transformers 4 looks for this key in text_config, 5 beside it as well.
        tied = section.get("tie_word_embeddings") or self.config.get("tie_word_embeddings")
        fields = self._translate(section | {"tie_word_embeddings": tied}, TEXT)
        fields["n_kv_heads"] = fields["n_kv_heads"] or fields["n_heads"]
        window = section.get("sliding_window")
        if window is not None and window < fields["max_positions"]:
            raise self._refusal("sliding_window", window, "null (each token sees all before it)")
        return fields

    def llava_config(self) -> dict:
        """The fields of LLaVAConfig, with those of its parts as dictionaries inside.

        The layout has no words for padding and for conversation templates. They are LLaVA-1.5's
        own, "pad" and "v1", unless `save` left a note in config.json.
        """
        if self.family != "llava-hf":
            raise CheckpointError(f"{self.path} holds a {self.family} model, not a whole LLaVA")
        config, notes, vision = self.config, self.config.get(NOTES, {}), self.vision_config()
        self._check(config, "llava")
        layer, strategy = config.get("vision_feature_layer", -2), "vision_feature_select_strategy"
        if type(layer) is not int:
            raise self._refusal("vision_feature_layer", layer, "a single number")
        return {
            "vision": vision,
            "text": self.text_config(),
            "image": {"image_size": vision["image_size"], "aspect": "pad"} | notes.get("image", {}),
            "projector": self._choose(config, "projector_hidden_act", PROJECTORS, "gelu"),
            "vision_layer": layer,
            "keep_class": self._choose(config, strategy, KEEP_CLASS, "default"),
            "template": notes.get("template", "v1"),
        }

    def _check(self, section: dict, part: str):
        for key, value in ONLY[part].items():
            if section.get(key) not in (None, value):
                raise self._refusal(key, section[key], value)

    def _choose(self, section: dict, key: str, table: dict, default: str):
        value = section.get(key, default)
        if value not in list(table):
            raise self._refusal(key, value, " or ".join(table))
        return table[value]

    def _rope_theta(self, section: dict):
        # transformers 4 has rope_theta and rope_scaling; 5 puts both into rope_parameters.
        rope = (section.get("rope_parameters") or {}) | (section.get("rope_scaling") or {})
        plain = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}
        for key, value in plain.items():
            if rope.get(key, value) != value:
                raise self._refusal(f"{key} of RoPE", rope[key], value)
        return rope.get("rope_theta", section.get("rope_theta"))

    def _translate(self, section: dict, table: dict) -> dict:
        fields = {}
        for key, (ours, default) in table.items():
            value, kind = section.get(key), type(default)
            if value is None:
                value = default
            elif type(value) not in (kind, int if kind is float else kind):
                raise self._refusal(key, value, f"a value of type {kind.__name__}")
            elif kind in (int, float) and not value > 0:
                raise self._refusal(key, value, "a number above 0")
            fields[ours] = kind(value)
        return fields

    def _refusal(self, key: str, value, expected) -> CheckpointError:
        file = self.path / "config.json"
        return CheckpointError(f"{file}: {key} is {value!r}; only {expected!s} is implemented")

    # What the weight files hold.

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """All stored tensors by their stored names. Of the files, only the headers are read."""
        tensors = {}
        for file in self._weight_files():
            try:
                with safe_open(file, "pt") as opened:
                    parts = {name: opened.get_slice(name) for name in opened.keys()}
            except SafetensorError as error:
                raise CheckpointError(
                    f"{file} ({file.stat().st_size:,} bytes) is no safetensors file, or cut short "
                    f"({error}); fetch it again"
                ) from None
            if twice := sorted(parts.keys() & tensors):
                raise CheckpointError(f"{file} repeats tensors of another file: {listing(twice)}")
            for name, part in parts.items():
                tensors[name] = Stored(file, part.get_shape(), part.get_dtype())
        return tensors

    def _weight_files(self) -> list[Path]:
        single = self.path / "model.safetensors"
        index = self.path / "model.safetensors.index.json"
        if single.is_file():
            return [single]
        if not index.is_file():
            raise CheckpointError(
                f"{self.path} has no {single.name} and no {index.name}; other formats are not read"
            )
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} has no weight_map; expected tensor -> file name")
        files = [self.path / str(name) for name in sorted({str(v) for v in weight_map.values()})]
        for file in files:
            if file.parent != self.path or not re.fullmatch(r"[\w.-]+\.safetensors", file.name):
                raise CheckpointError(f"{index} names {file}; expected *.safetensors beside it")
            if not file.is_file():
                raise CheckpointError(f"{file} is missing, {index.name} names it; fetch it again")
        return files

    def read(self, name: str) -> torch.Tensor:
        """One tensor by its stored name, mapped from the file.

        The file is opened anew each time: the pages of a mapping that stays open count as memory
        of this process, which would then seem to hold the model twice.
        """
        with safe_open(self.tensors[name].file, "pt") as opened:
            return opened.get_tensor(name)

    def sort_names(self) -> tuple[dict, dict, list]:
        """Stored names, sorted: {our name: stored}, {stored but left out: why}, [unexpected]."""
        names, omitted, unexpected = {}, {}, []
        for stored in self.tensors:
            ours = our_name(self.family, stored)
            reasons = [why for pattern, why in OMITTED if re.match(pattern, stored)]
            if reasons or ours in self.copies:
                omitted[stored] = reasons[0] if reasons else self.copies[ours][0]
            elif ours is None or ours in names:  # not in the table, or stored under two names
                unexpected.append(stored)
            else:
                names[ours] = stored
        return names, omitted, unexpected

    @cached_property
    def copies(self) -> dict:
        """Tensors that say nothing new: {our name: (why, a function that gives the same)}."""
        found = {}
        if self.family != "clip" and self.text_config()["tied_embeddings"]:
            found["language_model.lm_head.weight"] = (
                "tied: the embedding table again",
                lambda: self.read(self.sort_names()[0]["language_model.embed_tokens.weight"]),
            )
        if self.family == "llava-hf" and self.llava_config()["projector"] == "linear":
            why, dim = "the identity: the layout has two layers", self.text_config()["dim"]
            found["projector.2.weight"] = why, lambda: torch.eye(dim)
            found["projector.2.bias"] = why, lambda: torch.zeros(dim)
        return found


def our_name(family: str, stored: str) -> str | None:
    """What a stored tensor is called here, or None if its family has no such tensor."""
    for pattern, ours in NAMES[family]:
        if match := re.match(pattern.replace(".", r"\."), stored):
            return ours + stored[match.end() :]
    return None


def stored_name(family: str, name: str) -> str:
    """The same table from right to left: what our tensor is called in a file."""
    for pattern, ours in NAMES[family]:
        if name.startswith(ours):
            return re.sub(r"\(([^|]*)\|[^)]*\)", r"\1", pattern) + name[len(ours) :]
    raise CheckpointError(f"the {family} layout has no place for a tensor called {name!r}")


def read_json(file: Path) -> dict:
    if not file.is_file():
        raise CheckpointError(f"{file.parent} has no {file.name}; is the download complete?")
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}; expected {{...}}")
    return content


def listing(names: list[str], limit: int = 7) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


class NoInit(TorchFunctionMode):
    """Skip torch.nn.init: on the meta device it fills nothing, but imports for a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def build(make, source: Checkpoint, part: str, dtype=None, device=None) -> torch.nn.Module:
    """Make a module and fill it from a checkpoint, strictly; returned in eval mode.

    make:   a function without arguments that returns the module; it runs on the meta device, so
            no memory is taken and nothing is initialised
    part:   "vision_tower" | "language_model" | "llava", what the module is
    dtype:  None: the smallest type that holds every stored value of the part exactly

    Each tensor is copied once, to where it stays: memory peaks at the model and one tensor more.
    Raises CheckpointError naming the missing, unexpected and misshapen tensors together.
    """
    with torch.device("meta"), NoInit():
        module = make()
    prefix = "" if part == "llava" else f"{part}."
    wanted = {prefix + name: list(t.shape) for name, t in module.state_dict().items()}
    names, omitted, unexpected = source.sort_names()
    names = {ours: stored for ours, stored in names.items() if ours.startswith(prefix)}
    missing = [
        f"{stored_name(source.family, ours)} {shape}"
        for ours, shape in wanted.items()
        if ours not in names
    ]
    unexpected += [stored for ours, stored in names.items() if ours not in wanted]
    misshapen = []
    for ours in wanted.keys() & names:
        _, shape, kind = source.tensors[names[ours]]
        if shape != wanted[ours] or kind not in DTYPES:
            misshapen.append(f"{names[ours]} (expected {wanted[ours]}, got {kind} {shape})")
    if missing or unexpected or misshapen:
        raise CheckpointError(
            f"{source.path} holds other tensors than its config.json describes; "
            f"{len(missing)} missing: {listing(missing) or 'none'}; "
            f"{len(unexpected)} unexpected: {listing(unexpected) or 'none'}; "
            f"{len(misshapen)} misshapen: {listing(sorted(misshapen)) or 'none'}"
        )
    for stored in omitted:
        ours = our_name(source.family, stored) or ""
        if ours in source.copies and ours.startswith(prefix):
            why, same = source.copies[ours]
            if not torch.equal(source.read(stored).float(), same().float()):
                raise CheckpointError(f"{source.path}: {stored} is not {why}")
    dtype = dtype or reduce(
        torch.promote_types, (DTYPES[source.tensors[stored].dtype] for stored in names.values())
    )
    state = {
        ours.removeprefix(prefix): source.read(stored).to(device or "cpu", dtype, copy=True)
        for ours, stored in names.items()
    }
    module.load_state_dict(state, assign=True)
    return module.eval()


def save(
    path, kind, state_dict, config, tokenizer=None, dtype=None, image_token_id=0, shard_bytes=5e9
):
    """Write a folder that `Checkpoint` reads back bit for bit and that transformers loads.

    kind:           "vision_tower" | "language_model" | "llava"
    state_dict:     any mapping of our names to tensors
    config:         dataclasses.asdict of the matching config
    tokenizer:      the path of its file, or several; copied
    dtype:          what to store; None: each tensor as it is
    image_token_id: transformers puts a picture where this id stands, so it should be one that no
                    text contains; 0 is <unk> in LLaMA's vocabulary. (Here it is always -200.)
    shard_bytes:    more than this is split into several files with an index

    All files are written in the subfolder .saving first, then moved, config.json last: a killed
    run leaves nothing half written under a real name. Weights saved earlier are replaced.
    """
    folder, work = Path(path), Path(path, ".saving")
    shutil.rmtree(work, ignore_errors=True)  # of a killed run
    work.mkdir(parents=True)
    if kind == "llava" and config["projector"] == "linear":
        bias = state_dict["projector.0.bias"]
        identity = {"projector.2.weight": torch.eye(len(bias)).to(bias)}
        state_dict = {**state_dict, **identity, "projector.2.bias": torch.zeros_like(bias)}
    dtype = write_weights(work, kind, state_dict, dtype, shard_bytes)
    contents = {"config.json": hf_config(kind, config, dtype, image_token_id)}
    if kind == "llava":
        contents["preprocessor_config.json"] = hf_preprocessor(config["image"])
    for name, content in contents.items():
        (work / name).write_text(json.dumps(content, indent=2) + "\n")
    for file in [tokenizer] if isinstance(tokenizer, str | Path) else tokenizer or []:
        shutil.copyfile(file, work / Path(file).name)
    files = sorted(work.iterdir(), key=lambda file: file.name == "config.json")
    for old in folder.iterdir():
        if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", old.name):
            if not (work / old.name).exists():
                old.unlink()
    for file in files:
        file.chmod((work / "config.json").stat().st_mode)  # safetensors lets only the owner read
        os.replace(file, folder / file.name)
    work.rmdir()


def write_weights(folder: Path, kind: str, state_dict, dtype, shard_bytes: float) -> torch.dtype:
    """Write model.safetensors, or shards and their index; returns the tensors' common type."""
    prefix = "" if kind == "llava" else f"{kind}."
    shards, sizes = [{}], [0]
    for name, tensor in state_dict.items():
        size = tensor.numel() * (dtype or tensor.dtype).itemsize
        if shards[-1] and sizes[-1] + size > shard_bytes:
            shards.append({})
            sizes.append(0)
        shards[-1][stored_name(KINDS[kind], prefix + name)] = tensor
        sizes[-1] += size
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        many = f"-{i:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        weight_map |= dict.fromkeys(shard, f"model{many}.safetensors")
        shard = {
            name: tensor.detach().to(device="cpu", dtype=dtype).contiguous()
            for name, tensor in shard.items()
        }
        save_file(shard, folder / f"model{many}.safetensors", metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return dtype or reduce(torch.promote_types, (tensor.dtype for tensor in state_dict.values()))


def hf_config(kind: str, config: dict, dtype: torch.dtype, image_token_id: int) -> dict:
    """Our config in transformers' words, with every size spelled out; versions 4 and 5 read it."""
    if kind == "vision_tower":
        content = {"architectures": ["CLIPVisionModel"], **ONLY["vision"]}
        content |= {key: config[ours] for key, (ours, _) in VISION.items()}
    elif kind == "language_model":
        content = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **ONLY["text"]}
        content |= {key: config[ours] for key, (ours, _) in TEXT.items()}
    else:
        vision, text = config["vision"], config["text"]
        acts = {kind: act for act, kind in PROJECTORS.items()}
        if config["projector"] not in acts:
            raise CheckpointError(f"llava-hf has no place for projector {config['projector']!r}")
        n_patches = (vision["image_size"] // vision["patch_size"]) ** 2
        content = {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
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
    return content | {"torch_dtype": str(dtype).removeprefix("torch.")}


def hf_preprocessor(image: dict) -> dict:
    """What transformers' image processor needs to know. It can only crop, where LLaVA-1.5 pads."""
    size = image["image_size"]
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "resample": 3,  # bicubic
        "image_mean": image["mean"],
        "image_std": image["std"],
    }


def inspect(path):
    """Print what a folder holds, and what of it is left out."""
    source = Checkpoint(path)
    parts = {"clip": source.vision_config, "llama": source.text_config}
    print(f"family      {source.family}")
    for key, value in parts.get(source.family, source.llava_config)().items():
        print(f"{key:11} {value}")
    for dtype, n in Counter(t.dtype for t in source.tensors.values()).items():
        print(f"tensors     {n} of type {dtype}")
    n_bytes = sum(file.stat().st_size for file in {t.file for t in source.tensors.values()})
    print(f"bytes       {n_bytes:,}")
    _, omitted, unexpected = source.sort_names()
    for why, n in Counter(omitted.values()).items():
        print(f"left out    {n}: {why}")
    if unexpected:
        print(f"unexpected  {len(unexpected)}: {listing(unexpected)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("inspect", help="print what a checkpoint folder holds")
    command.add_argument("folder", help="a folder with config.json and *.safetensors")
    args = parser.parse_args()
    try:
        inspect(args.folder)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
