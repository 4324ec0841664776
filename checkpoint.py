"""Weights on disk: official layouts <-> the names used here, strict both ways, one tensor at a time.

A checkpoint is a folder: config.json has the sizes, *.safetensors the tensors. Three families are
read, told apart by what config.json says and never by the name of a folder:

    clip       CLIPVisionModel, or the vision half of CLIPModel     holds a vision_tower
    llama      LlamaForCausalLM, MistralForCausalLM                 holds a language_model
    llava-hf   LlavaForConditionalGeneration                        holds both, and a projector

NAMES is the whole translation, and `save` reads the same table from right to left. What a config
asks for and this code does not do is refused: loaded anyway, it would only give other numbers.

No model file is imported; `build` is told how to make the module. Read next: `from_pretrained` in
vit.py, llama.py and llava.py, each a few lines.
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
    "llama": (
        ("lm_head.", "language_model.lm_head."),
        ("model.", "language_model."),
    ),
    "llava-hf": (
        *((f"(|model.)vision_tower.{stored}", ours) for stored, ours in CLIP),
        ("(|model.)multi_modal_projector.linear_1.", "projector.0."),
        ("(|model.)multi_modal_projector.linear_2.", "projector.2."),  # place 1 is the GELU
        ("(language_model.|)lm_head.", "language_model.lm_head."),
        ("(language_model.model.|model.language_model.)", "language_model."),
    ),
}
# Stored tensors that are left out, and why; Checkpoint.redundant adds those that depend on config.
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
MISTRAL = {  # where its assumptions are others
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
DECODERS = {"llama": {}, "mistral": MISTRAL}  # model_type of a text config
# Options of which this code knows one value only.
ONLY = {
    "vision": {"model_type": "clip_vision_model", "num_channels": 3},
    "text": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    "llava": {"multimodal_projector_bias": True},
}
PROJECTORS = {"gelu": "mlp2x_gelu", "linear": "linear"}  # projector_hidden_act -> our kind
KEEP_CLASS = {"default": False, "full": True}  # vision_feature_select_strategy -> keep_class
NOTES = "llava_from_scratch"  # key of config.json for what transformers has no word for
DTYPES = {  # what a weight can be; quantised formats are not among them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says what was expected and what is there."""


class Stored(NamedTuple):
    """Where a tensor lies and what it is, before a byte of it is read."""

    file: Path
    shape: list[int]
    dtype: str  # in the words of safetensors, see DTYPES


class Checkpoint:
    """A folder, opened: the config is read, the tensors stay on disk until `read` asks for one."""

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{path} is not a folder; expected one with a config.json in it")
        self.config = read_json(self.path / "config.json")
        kind = self.config.get("model_type")
        if kind in ("clip", "clip_vision_model"):
            self.family = "clip"
        elif kind in DECODERS:
            self.family = "llama"
        elif kind == "llava" and {"text_config", "vision_config"} <= self.config.keys():
            self.family = "llava-hf"
        else:
            known = "clip, clip_vision_model, llama, mistral, llava (with text_config)"
            raise self._refusal("model_type", kind, known)

    # What config.json says, in our words. What is not implemented raises CheckpointError.

    def vision_config(self) -> dict:
        """The fields of ViTConfig."""
        if self.family == "llama":
            raise CheckpointError(f"{self.path} is a language model: it has no vision tower")
        top_level = self.config["model_type"] == "clip_vision_model"
        section = self.config if top_level else self._section("vision_config")
        self._check("vision", section)
        return self._translate(section, VISION)

    def text_config(self) -> dict:
        """The fields of LLaMAConfig."""
        if self.family == "clip":
            raise CheckpointError(f"{self.path} is a CLIP model: it has no language model")
        section = self.config if self.family == "llama" else self._section("text_config")
        section = self._choose(section, "model_type", DECODERS, "llama") | section
        self._check("text", section)
        section["rope_theta"] = self._rope_theta(section)
        # transformers 4 looks for this key in text_config, 5 beside it as well.
        tied = section.get("tie_word_embeddings") or self.config.get("tie_word_embeddings")
        fields = self._translate(section | {"tie_word_embeddings": tied}, TEXT)
        fields["n_kv_heads"] = fields["n_kv_heads"] or fields["n_heads"]
        window = section.get("sliding_window")
        if window is not None and window < fields["max_positions"]:
            raise self._refusal("sliding_window", window, "null (every token sees all before it)")
        return fields

    def llava_config(self) -> dict:
        """The fields of LLaVAConfig, with those of its parts as dictionaries inside.

        The layout has no words for padding and for conversation templates. They are LLaVA-1.5's
        own, "pad" and "v1", unless `save` left a note in config.json.
        """
        if self.family != "llava-hf":
            raise CheckpointError(f"{self.path} holds a {self.family} model, not a whole LLaVA")
        config, notes, vision = self.config, self._section(NOTES), self.vision_config()
        self._check("llava", config)
        layer = config.get("vision_feature_layer", -2)
        if type(layer) is not int:
            raise self._refusal("vision_feature_layer", layer, "one whole number")
        return {
            "vision": vision,
            "text": self.text_config(),
            "image": {"image_size": vision["image_size"], "aspect": "pad"} | notes.get("image", {}),
            "projector": self._choose(config, "projector_hidden_act", PROJECTORS, "gelu"),
            "vision_layer": layer,
            "keep_class": self._choose(
                config, "vision_feature_select_strategy", KEEP_CLASS, "default"
            ),
            "template": notes.get("template", "v1"),
        }

    def _section(self, key: str) -> dict:
        section = self.config.get(key, {})
        if not isinstance(section, dict):
            raise self._refusal(key, section, "{...}")
        return section

    def _check(self, part: str, section: dict):
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
        rope = section | rope
        plain = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}
        for key, value in plain.items():
            if rope.get(key, value) != value:
                raise self._refusal(f"{key} of RoPE", rope[key], value)
        return rope.get("rope_theta")

    def _translate(self, section: dict, table: dict) -> dict:
        fields = {}
        for key, (ours, default) in table.items():
            value = section.get(key)
            kinds = (int, float) if type(default) is float else (type(default),)
            if value is None:
                value = default
            elif type(value) not in kinds or type(value) in (int, float) and not value > 0:
                raise self._refusal(key, value, f"a {kinds[-1].__name__} above 0")
            fields[ours] = type(default)(value)
        return fields

    def _refusal(self, key: str, value, expected) -> CheckpointError:
        return CheckpointError(
            f"{self.path / 'config.json'}: {key} is {value!r}, but only {expected} is implemented"
        )

    # What the weight files hold.

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """All stored tensors by their stored names. Of the files, only the headers are read."""
        tensors = {}
        for file in self._weight_files():
            try:
                with safe_open(file, "pt") as opened:
                    slices = {name: opened.get_slice(name) for name in opened.keys()}
                    for name, part in slices.items():
                        if name in tensors:
                            raise CheckpointError(f"{name} is in {tensors[name].file} and {file}")
                        tensors[name] = Stored(file, part.get_shape(), part.get_dtype())
            except SafetensorError as error:
                raise CheckpointError(
                    f"{file} ({file.stat().st_size:,} bytes) is no safetensors file or cut short "
                    f"({error}); fetch it again"
                ) from None
        return tensors

    def _weight_files(self) -> list[Path]:
        single = self.path / "model.safetensors"
        index = self.path / "model.safetensors.index.json"
        if single.is_file():
            return [single]
        if not index.is_file():
            raise CheckpointError(
                f"{self.path} has no weights; expected {single.name} or {index.name}"
            )
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} has no weight_map; expected tensor -> file name")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if not re.fullmatch(r"[\w.-]+\.safetensors", name):
                raise CheckpointError(f"{index} names {name!r}; expected a .safetensors beside it")
            if not (self.path / name).is_file():
                raise CheckpointError(f"{self.path / name} is missing; {index.name} names it")
        return [self.path / name for name in names]

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
            if reasons or ours in self.redundant:
                omitted[stored] = reasons[0] if reasons else self.redundant[ours][0]
            elif ours is None or ours in names:  # not in the table, or stored under two names
                unexpected.append(stored)
            else:
                names[ours] = stored
        return names, omitted, unexpected

    @cached_property
    def redundant(self) -> dict:
        """What only repeats something: {our name: (why, our name of that, or None: identity)}."""
        found = {}
        if self.family != "clip" and self.text_config()["tied_embeddings"]:
            why, twin = "tied: the embedding table again", "language_model.embed_tokens.weight"
            found["language_model.lm_head.weight"] = (why, twin)
        if self.family == "llava-hf" and self.llava_config()["projector"] == "linear":
            why = "the identity: a linear projector is one layer, the layout has two"
            found["projector.2.weight"] = found["projector.2.bias"] = (why, None)
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


def build(make, source: Checkpoint, part: str, dtype=None, device=None) -> torch.nn.Module:
    """Make a module and fill it from a checkpoint, strictly; returned in eval mode.

    make:   a function without arguments that returns the module; it runs on the meta device, so
            no memory is taken and nothing is initialised
    part:   "vision_tower" | "language_model" | "llava", what the module is
    dtype:  None: the smallest type that holds every stored value of the part exactly

    Each tensor is copied once, to where it stays: memory peaks at the model and one tensor more.
    Raises CheckpointError naming the missing, unexpected and misshapen tensors together.
    """
    with torch.device("meta"):
        module = make()
    prefix = "" if part == "llava" else f"{part}."
    wanted = {prefix + name: list(t.shape) for name, t in module.state_dict().items()}
    names, omitted, unexpected = source.sort_names()
    names = {ours: stored for ours, stored in names.items() if ours.startswith(prefix)}
    problems = {"missing": [], "unexpected": unexpected, "misshapen": [], "not floating point": []}
    for ours, shape in wanted.items():
        if ours not in names:
            problems["missing"].append(f"{stored_name(source.family, ours)} {shape}")
    for ours, stored in names.items():
        found = source.tensors[stored]
        if ours not in wanted:
            problems["unexpected"].append(stored)
        elif found.shape != wanted[ours]:
            problems["misshapen"].append(f"{stored}: expected {wanted[ours]}, got {found.shape}")
        elif found.dtype not in DTYPES:
            problems["not floating point"].append(f"{stored}: {found.dtype}")
    if any(problems.values()):
        raise CheckpointError(
            f"the tensors in {source.path} are not those that its config.json describes"
            + "".join(f"\n  {len(p)} {kind}: {listing(p)}" for kind, p in problems.items() if p)
        )
    check_copies(source, names, omitted)
    dtype = dtype or reduce(
        torch.promote_types, (DTYPES[source.tensors[stored].dtype] for stored in names.values())
    )
    state = {
        ours.removeprefix(prefix): source.read(stored).to(device or "cpu", dtype, copy=True)
        for ours, stored in names.items()
    }
    module.load_state_dict(state, assign=True)
    return module.eval()


def listing(names: list[str], limit: int = 7) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def check_copies(source: Checkpoint, names: dict, omitted: dict):
    """Look whether the tensors left out as copies are copies."""
    for stored in omitted:
        why, twin = source.redundant.get(our_name(source.family, stored), ("", ""))
        if twin in names or twin is None:
            value = source.read(stored)
            identity = torch.eye(len(value)) if value.ndim == 2 else torch.zeros(len(value))
            if not torch.equal(value, source.read(names[twin]) if twin else identity.to(value)):
                raise CheckpointError(f"{source.path}: {stored} should be {why}, but it is not")


def save(
    path,
    kind: str,
    state_dict,
    config: dict,
    tokenizer=None,
    dtype=None,
    image_token_id: int = 0,
    shard_bytes: int = 5 * 10**9,
):
    """Write a folder that `Checkpoint` reads back bit for bit and that transformers loads.

    kind:           "vision_tower" | "language_model" | "llava"
    state_dict:     any mapping of our names to tensors; visited once, in order
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
    if kind == "llava" and config["projector"] == "linear":  # see Checkpoint.redundant
        bias = state_dict["projector.0.bias"]
        second = {"projector.2.weight": torch.eye(len(bias)).to(bias), "projector.2.bias": 0 * bias}
        state_dict = {**state_dict, **second}
    stored_dtype = write_weights(work, kind, state_dict, dtype, shard_bytes)
    contents = {"config.json": hf_config(kind, config, stored_dtype, image_token_id)}
    if kind == "llava":
        contents["preprocessor_config.json"] = hf_preprocessor(config["image"])
    for name, content in contents.items():
        (work / name).write_text(json.dumps(content, indent=2) + "\n")
    for file in [tokenizer] if isinstance(tokenizer, str | Path) else tokenizer or []:
        shutil.copyfile(file, work / Path(file).name)
    files = sorted(work.iterdir(), key=lambda file: file.name == "config.json")
    for file in files:
        file.chmod((work / "config.json").stat().st_mode)  # safetensors lets only the owner read
        os.replace(file, folder / file.name)
    work.rmdir()
    for file in folder.iterdir():
        old = re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", file.name)
        if old and file.name not in {new.name for new in files}:
            file.unlink()


def write_weights(folder: Path, kind: str, state_dict, dtype, shard_bytes: int) -> torch.dtype:
    """Write model.safetensors, or shards and their index; returns the common type of the tensors."""
    prefix = "" if kind == "llava" else f"{kind}."
    shards, shard, dtypes, total = [], {}, set(), 0

    def write_shard():
        file = folder / f"model-{len(shards) + 1:05}.safetensors"
        save_file(shard, file, metadata={"format": "pt"})
        shards.append((file, list(shard)))
        shard.clear()

    for name, tensor in state_dict.items():
        tensor = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_bytes:
            write_shard()
        shard[stored_name(KINDS[kind], prefix + name)] = tensor
        dtypes.add(tensor.dtype)
        total += tensor.nbytes
    write_shard()
    if len(shards) == 1:
        shards[0][0].rename(folder / "model.safetensors")
    else:
        weight_map = {}
        for file, names in shards:
            file = file.rename(folder / f"{file.stem}-of-{len(shards):05}.safetensors")
            weight_map |= dict.fromkeys(names, file.name)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return reduce(torch.promote_types, dtypes)


def hf_config(kind: str, config: dict, dtype: torch.dtype, image_token_id: int) -> dict:
    """Our config in transformers' words, every size spelled out; versions 4 and 5 read it."""
    if kind == "vision_tower":
        sizes = {key: config[ours] for key, (ours, _) in VISION.items()}
        content = {"architectures": ["CLIPVisionModel"]} | ONLY["vision"] | sizes
    elif kind == "language_model":
        sizes = {key: config[ours] for key, (ours, _) in TEXT.items()}
        content = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        content |= ONLY["text"] | sizes
    else:
        vision, text = config["vision"], config["text"]
        acts = {kind: act for act, kind in PROJECTORS.items()}
        if config["projector"] not in acts:
            raise CheckpointError(
                f"the llava-hf layout has no place for a projector {config['projector']!r}; "
                f"expected {' or '.join(acts)}"
            )
        n_patches = (vision["image_size"] // vision["patch_size"]) ** 2
        content = {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "vision_config": hf_config("vision_tower", vision, dtype, 0),
            "text_config": hf_config("language_model", text, dtype, 0),
            "projector_hidden_act": acts[config["projector"]],
            "multimodal_projector_bias": True,
            "vision_feature_layer": config["vision_layer"],
            "vision_feature_select_strategy": "full" if config["keep_class"] else "default",
            "image_seq_length": n_patches + config["keep_class"],
            "image_token_index": image_token_id,
            "tie_word_embeddings": text["tied_embeddings"],
            NOTES: {"image": config["image"], "template": config["template"]},
        }
    return content | {"torch_dtype": str(dtype).removeprefix("torch.")}


def hf_preprocessor(image: dict) -> dict:
    """What transformers' CLIPImageProcessor needs to know. It crops where LLaVA-1.5 pads."""
    size = image["image_size"]
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": image["mean"],
        "image_std": image["std"],
    }


def inspect(path):
    """Print what a folder holds, and what of it would be left out."""
    source = Checkpoint(path)
    parts = {"clip": source.vision_config, "llama": source.text_config}
    config = parts.get(source.family, source.llava_config)()
    print(f"family      {source.family}")
    for key, value in config.items():
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
