"""Weights on disk: every official layout <-> the names used here, strict both ways.

A checkpoint is a folder of one of the families of `configs.Config`, or a file ViT-L-14.pt of
OpenAI's CLIP ("openai-clip"). What lies in it tells the family, never what it is called. Up to
LLaVA-1.5 the tower of the original layout is a checkpoint of its own; with a base, a folder of it
may be a delta, a LoRA or a projector alone.

layouts.py translates the names, configs.py the configs; `save` reads their tables from right to
left. No model file is imported; `build` is told how to make the module. weightfile.py opens the
files. Read next: `from_pretrained` in vit.py, llama.py and llava.py, a few lines each.
"""

import argparse
import json
import math
import os
import re
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from functools import cached_property, reduce
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

import layouts
import tokenizer
from configs import DTYPES, Config, hf_config, hf_preprocessor, read_json, vision_from_shapes
from layouts import NAMES, stored_name, translated
from weightfile import (
    CheckpointError,
    Stored,
    added,
    lora_merged,
    open_weights,
    split_half,
    thirds,
)


class Checkpoint:
    """A checkpoint, opened: its configs are read, its tensors stay on disk until asked for.

    path:         a folder, a CLIP file, or a Hugging Face id that was downloaded
    base:         the checkpoint that a delta, a LoRA or a lone projector belongs to
    vision_tower: a CLIP checkpoint that takes the place of the tower
    """

    def __init__(self, path, base=None, vision_tower=None):
        self.path = locate(path)
        self.base = Checkpoint(base) if base else None
        self._vision_tower = vision_tower
        if self.path.is_file():
            self.family, self.config = "openai-clip", None
            if "visual.conv1.weight" not in self.tensors:
                raise CheckpointError(f"{path} is no CLIP of OpenAI's; other models are folders")
        else:
            self.config = Config(self.path)
            self.family = self.config.family
        if self.base and self.family != "llava":
            raise CheckpointError(f"{path} is a {self.family} model, which takes no base")

    @property
    def part(self) -> str:
        """What it holds: "vision_tower" | "language_model" | "llava"."""
        return layouts.PARTS.get(self.family, "llava")

    @property
    def weight_bits(self) -> int | None:
        """To how many bits the decoder's matrices are rounded, if they are."""
        return self.config.notes().get("weight_bits") if self.config else None

    # The fields of the config classes. What is not implemented raises CheckpointError.

    def vision_config(self) -> dict:
        """The fields of ViTConfig."""
        if self.part == "language_model":
            raise CheckpointError(f"{self.path} is a language model: it has no vision tower")
        own = self.config.vision() if self.config else None
        if self.tower is None:
            if own:
                return own
            shapes = {ours: stored.shape for ours, stored in self._own_names()[0].items()}
            return vision_from_shapes(shapes, self.path)
        given = self.tower.vision_config()
        if own not in (None, given):
            raise CheckpointError(
                f"the tower in {self.tower.path} is {given}, but {self.path} was trained with {own}"
            )
        return given

    def text_config(self) -> dict:
        """The fields of LLaMAConfig."""
        if self.part == "vision_tower":
            raise CheckpointError(f"{self.path} is a CLIP model: it has no language model")
        if self.family == "meta":
            return self.config.meta({name: stored.shape for name, stored in self.tensors.items()})
        return self.config.text()

    def llava_config(self) -> dict:
        """The fields of LLaVAConfig, with those of its parts as dictionaries inside."""
        if self.part != "llava":
            raise CheckpointError(f"{self.path} holds a {self.family} model, not a whole LLaVA")
        fields = self.config.llava(self.vision_config(), self.text_config())
        # Channel means and deviations: this folder's, else the tower's, else CLIP's.
        folders = [self.path, self.tower.path] if self.tower else [self.path]
        files = [folder / "preprocessor_config.json" for folder in folders]
        file = next((file for file in files if file.is_file()), None)
        image = read_json(file) if file else {}
        keys = {"image_mean": "mean", "image_std": "std"}
        image = {ours: image[key] for key, ours in keys.items() if key in image}
        return fields | {"image": image | fields["image"]}

    # What the weight files hold.

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """All stored tensors by their stored names. Of the files, only the headers are read."""
        found: dict[str, list[Stored]] = {}
        for file in self._weight_files():
            parts = open_weights(file)
            if self.family != "meta" and (twice := sorted(parts.keys() & found)):
                raise CheckpointError(f"{file} repeats tensors of another file: {listing(twice)}")
            for name, part in parts.items():
                found.setdefault(name, []).append(part)
        if self.family != "meta":
            return {name: part for name, (part,) in found.items()}
        return {name: self._join(shards) for name, shards in found.items()}

    def _weight_files(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        if self.family == "meta":
            files = sorted(self.path.glob("consolidated.*.pth"))
            if [file.name for file in files] != [
                f"consolidated.{i:02}.pth" for i in range(len(files))
            ]:
                raise CheckpointError(f"{self.path} lacks some of consolidated.00.pth, 01, 02, ...")
            if not files:
                raise CheckpointError(f"{self.path} has params.json, but no consolidated.00.pth")
            return [self._inside(file) for file in files]
        names = ["model.safetensors", "pytorch_model.bin"]
        names = ["rounded.safetensors"] if self.weight_bits else names
        for name in names:
            if (self.path / name).is_file():
                return [self._inside(self.path / name)]
            if (self.path / f"{name}.index.json").is_file():
                return self._indexed(self.path / f"{name}.index.json")
        extra = [self.path / name for name in layouts.EXTRAS]
        extra = [self._inside(file) for file in extra if file.is_file()]
        if extra and not self.base:
            raise CheckpointError(
                f"{self.path} holds only {listing([f.name for f in extra])}, which add to another "
                "checkpoint: name that as the base (--model-base)"
            )
        if not extra:
            raise CheckpointError(
                f"{self.path} has no {' or '.join(names)}, and no index of several; other formats "
                "are not read"
            )
        return extra

    def _indexed(self, index: Path) -> list[Path]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} has no weight_map; expected tensor -> file name")
        files = [self.path / str(name) for name in sorted({str(v) for v in weight_map.values()})]
        for file in files:
            if file.parent != self.path or not re.fullmatch(
                r"[\w.-]+\.(safetensors|bin)", file.name
            ):
                raise CheckpointError(
                    f"{index} names {file}; expected *.safetensors or *.bin beside it"
                )
            if not file.is_file():
                raise CheckpointError(f"{file} is missing, {index.name} names it; fetch it again")
        return [self._inside(file) for file in files]

    def _inside(self, file: Path) -> Path:
        """The file, if it is no link out of the folder (but for the hub cache's own blobs)."""
        home, real = self.path.resolve(), file.resolve()
        if real.parent not in (home, home.parent.parent / "blobs"):
            raise CheckpointError(f"{file} is a link to {real}, out of its folder; copy it instead")
        return file

    def _join(self, shards: list[Stored]) -> Stored:
        """One tensor of Meta's from its shards: cut for tensor parallelism, or the same in each."""
        first, n_files = shards[0], len(self._weight_files())
        if len(shards) != n_files:
            raise CheckpointError(
                f"{self.path}: {first.name} is in {len(shards)} of {n_files} files"
            )
        if n_files == 1:
            return first
        dims = [
            dim for dim, pattern in layouts.SHARDED.items() if re.fullmatch(pattern, first.name)
        ]
        if first.name == "tok_embeddings.weight":  # cut by columns in LLaMA 1 and 2, by rows in 3
            dims = [int(first.shape[-1:] != [self.config.get("dim")])]
        if not dims:
            return first
        (dim,) = dims
        if len(first.shape) != 2 or any(
            s.dtype != first.dtype or s.shape != first.shape for s in shards
        ):
            raise CheckpointError(
                f"{self.path}: the shards of {first.name} differ in shape or type"
            )
        shape = [n * n_files if i == dim else n for i, n in enumerate(first.shape)]
        return first._replace(
            shape=shape, read=lambda: torch.cat([shard.read() for shard in shards], dim)
        )

    def check_copies(self, prefix: str):
        """Raise CheckpointError if a tensor left out as a copy is none."""
        names = self._own_names()[0]
        for ours, (why, same) in self.copies.items():
            if ours.startswith(prefix) and ours in names:
                if not torch.equal(names[ours].read().float(), same().float()):
                    raise CheckpointError(f"{self.path}: {names[ours].name} is not {why}")

    def sort_names(self) -> tuple[dict, dict, list]:
        """{our name: Stored}, {stored name: why it is left out}, [unexpected stored names]."""
        names, omitted, unexpected = self._own_names()
        if self.base:
            base, _, more = self.base.sort_names()
            names, unexpected = self._on_base(names, base), unexpected + more
        if self.tower:
            tower, _, more = self.tower.sort_names()
            unexpected = unexpected + more
            for ours in [ours for ours in names if ours.startswith("vision_tower.")]:
                omitted[names.pop(ours).name] = f"replaced by the tower in {self.tower.path}"
            names |= tower
        for ours, (why, _) in self.copies.items():
            if ours in names:
                omitted[names.pop(ours).name] = why
        return names, omitted, unexpected

    def _own_names(self) -> tuple[dict, dict, list]:
        names, omitted, unexpected = {}, {}, []
        reasons = layouts.OPENAI_OMITTED if self.family == "openai-clip" else layouts.OMITTED
        for name, stored in self.tensors.items():
            if why := [why for pattern, why in reasons if re.match(pattern, name)]:
                omitted[name] = why[0]
                continue
            for ours, piece in self._pieces(name, stored):
                if ours is None or ours in names:  # not in the table, or stored under two names
                    unexpected.append(name)
                else:
                    names[ours] = piece
        return names, omitted, unexpected

    def _pieces(self, name: str, stored: Stored) -> list[tuple[str | None, Stored]]:
        """What one stored tensor is here: one tensor, as a rule under another name."""
        if self.base:  # peft puts these in front
            name = re.sub(r"^base_model\.(model\.)?", "", name)
        ours = translated(name, NAMES[self.family])
        if ours and ".qkv_proj." in ours:
            return list(zip((ours.replace("qkv", x) for x in "qkv"), thirds(stored), strict=True))
        if self.family == "meta" and ours and re.search(r"\.[qk]_proj\.", ours):
            config = self.text_config()
            stored = split_half(stored, config["n_heads" if ".q_proj." in ours else "n_kv_heads"])
        return [(ours, stored)]

    def _on_base(self, names: dict, base: dict) -> dict:
        """A LoRA, a lone projector or a delta, put onto the base."""
        loras = {ours.partition(".lora_")[0] + ".weight" for ours in names if ".lora_" in ours}
        if loras:
            scale = self._lora_scale()
            plain = {ours: stored for ours, stored in names.items() if ".lora_" not in ours}
            merged = {}
            for ours in loras:
                a, b = (names.get(ours.replace("weight", f"lora_{x}.weight")) for x in "AB")
                if a is None or b is None or ours not in base:
                    raise CheckpointError(f"{self.path}: the LoRA of {ours} lacks A, B or its base")
                merged[ours] = lora_merged(base[ours], a, b, scale)
            return base | merged | plain
        if "language_model.embed_tokens.weight" not in names:
            return base | names
        return {
            ours: added(stored, base[ours]) if ours in base else stored
            for ours, stored in names.items()
        }

    def _lora_scale(self) -> float:
        config = read_json(self.path / "adapter_config.json")
        for key, value in layouts.LORA_ONLY.items():
            if config.get(key, value) != value and config.get(key):
                raise CheckpointError(f"{self.path}: {key} of the LoRA is {config[key]!r}")
        r, alpha = config.get("r"), config.get("lora_alpha")
        if not all(type(v) in (int, float) and v > 0 for v in (r, alpha)):
            raise CheckpointError(f"{self.path}: the LoRA has r {r!r} and lora_alpha {alpha!r}")
        return alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r

    @cached_property
    def tower(self) -> "Checkpoint | None":
        """The CLIP checkpoint that the tower comes from, if it is not in this one."""
        name = self._vision_tower
        if name is None and self.family == "llava":
            if any(ours.startswith("vision_tower.") for ours in self._own_names()[0]):
                return None
            name = self.config.get("mm_vision_tower", self.config.get("vision_tower"))
            if not isinstance(name, str):
                raise CheckpointError(
                    f"{self.path} names no mm_vision_tower: add --vision-tower DIR"
                )
        if name is None:
            return None
        try:
            return Checkpoint(name)
        except CheckpointError as error:
            raise CheckpointError(f"the vision tower of {self.path}: {error}") from None

    @cached_property
    def copies(self) -> dict:
        """Tensors that say nothing new: {our name: (why, a function that gives the same)}."""
        found = {}
        if self.part != "vision_tower" and self.text_config()["tied_embeddings"]:
            if table := self._own_names()[0].get("language_model.embed_tokens.weight"):
                why = "tied: the embedding table again"
                found["language_model.lm_head.weight"] = why, table.read
        if self.family == "llava-hf" and self.llava_config()["projector"] == "linear":
            why, dim = "the identity: the layout has two layers", self.text_config()["dim"]
            found["projector.2.weight"] = why, lambda: torch.eye(dim)
            found["projector.2.bias"] = why, lambda: torch.zeros(dim)
        return found


def locate(path) -> Path:
    """A path as it is, or the folder of a Hugging Face id such as llava-hf/llava-1.5-7b-hf."""
    if Path(path).exists():
        return Path(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or ".." in str(path):
        raise CheckpointError(f"there is no {path}; expected a folder of weights")
    cache = os.environ.get("HF_HUB_CACHE") or Path(
        os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface", "hub"
    )
    home = Path(cache, "models--" + str(path).replace("/", "--"))
    main = home / "refs" / "main"
    if main.is_file() and (home / "snapshots" / main.read_text().strip()).is_dir():
        return home / "snapshots" / main.read_text().strip()
    command = f"hf download {path} --local-dir {Path(path).name}"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise CheckpointError(
            f"there is no folder {path}, nor is it in {cache}; get it with: "
            f"pip install huggingface_hub && {command}"
        ) from None
    print(f"downloading {path} from huggingface.co", file=sys.stderr)
    try:
        return Path(snapshot_download(str(path), ignore_patterns=["*.msgpack", "*.h5", "*.ot"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"there is no folder {path}, and it could not be downloaded "
            f"({type(error).__name__}); try: {command}"
        ) from None


def listing(names: list[str], limit: int = 7) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


class NoInit(TorchFunctionMode):
    """Skip torch.nn.init: on the meta device it fills nothing, but imports for a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


LARGE = r"\b(layers\..*|lm_head)\.weight$"  # of the matrices, what fast.prepare copies


def build(make, source: Checkpoint, part: str, dtype=None, device=None, take=None, mapped=False):
    """Make a module and fill it from a checkpoint, strictly; returned in eval mode.

    make:   a function without arguments that returns the module; it runs on the meta device, so
            no memory is taken and nothing is initialised
    part:   "vision_tower" | "language_model" | "llava", what the module is
    dtype:  None: the smallest type that holds every stored value of the part exactly
    take:   take(module, name, tensor) puts a tensor in place in another form, or returns False
    mapped: matrices of the layers and the head are left in the file, which must not change: for
            fast.prepare, which makes its own copies

    Each tensor is copied once, to where it stays: memory peaks at the model and little more.
    Raises CheckpointError naming the missing, unexpected and misshapen tensors together.
    """
    module, names = match(make, source, part)
    dtype = dtype or reduce(torch.promote_types, (stored.dtype for stored in names.values()))
    state = {}
    is_read = take or not mapped or any(stored.dtype != dtype for stored in names.values())
    for ours, stored in watched(names.items()) if is_read else names.items():
        stays = mapped and len(stored.shape) == 2 and re.search(LARGE, ours)
        to = stored.dtype if ours.endswith(layouts.ROUNDED) else dtype
        tensor = stored.read().to(device or "cpu", to, copy=not stays)
        if take is None or not take(module, ours, tensor):
            state[ours] = tensor
    module.load_state_dict(state, assign=True)
    return module.eval()


def match(make, source: Checkpoint, part: str) -> tuple[torch.nn.Module, dict[str, Stored]]:
    """The module on the meta device and its stored tensors by its own names; see `build`."""
    with torch.device("meta"), NoInit():
        module = make()
    prefix = "" if part == "llava" else f"{part}."
    places = {prefix + name: place for name, place in module.state_dict().items()}
    wanted = {ours: list(place.shape) for ours, place in places.items()}
    names, _, unexpected = source.sort_names()
    names = {ours: stored for ours, stored in names.items() if ours.startswith(prefix)}
    missing = [
        f"{stored_name(source.family, ours)} {shape}"
        for ours, shape in wanted.items()
        if ours not in names
    ]
    unexpected += [stored.name for ours, stored in names.items() if ours not in wanted]
    misshapen = []
    for ours in wanted.keys() & names:
        stored = names[ours]
        if stored.shape != wanted[ours] or not fits(stored.dtype, places[ours].dtype):
            found = f"got {stored.dtype} {stored.shape}".replace("torch.", "")
            misshapen.append(f"{stored.name} (expected {wanted[ours]}, {found})")
    if missing or unexpected or misshapen:
        raise CheckpointError(
            f"{source.path} holds other tensors than its config.json describes; "
            f"{len(missing)} missing: {listing(missing) or 'none'}; "
            f"{len(unexpected)} unexpected: {listing(unexpected) or 'none'}; "
            f"{len(misshapen)} misshapen: {listing(sorted(misshapen)) or 'none'}"
        )
    source.check_copies(prefix)
    return module, {ours.removeprefix(prefix): stored for ours, stored in names.items()}


def fits(stored: torch.dtype | str, wanted: torch.dtype) -> bool:
    """Any float is a weight; the numbers of a rounded matrix are of one type."""
    if isinstance(stored, str):
        return False
    return stored == wanted or stored.is_floating_point and wanted.is_floating_point


def watched(items, doing="reading", n_bytes=lambda item: item[1].n_bytes):
    """The items, with a line of progress for whoever waits for gigabytes."""
    sizes = [n_bytes(item) for item in items]
    total, done = sum(sizes), 0
    started = shown = time.time()
    for item, size in zip(items, sizes, strict=True):
        yield item
        done += size
        if total >= 1e9 and (time.time() - shown > 1 or done == total):
            shown = time.time()
            rate = done / (shown - started)
            end = "\n" if done == total else ""
            line = f"{doing} {done / 1e9:.1f} of {total / 1e9:.1f} GB, {rate / 1e9:.1f} GB/s"
            print(f"\r{line}, {(total - done) / rate:.0f} s left ", end=end, file=sys.stderr)


def save(
    path, kind, state_dict, config, tokenizer=None, dtype=None, token_ids=None, shard_bytes=5e9
):
    """Write a folder that `Checkpoint` reads back bit for bit and that transformers loads.

    kind:           "vision_tower" | "language_model" | "llava"
    state_dict:     any mapping of our names to tensors, or to Stored ones (read shard by shard)
    config:         dataclasses.asdict of the matching config
    tokenizer:      the path of its file, or several; copied
    dtype:          what to store; None: each tensor as it is
    token_ids:      what only transformers reads, see `Config.token_ids`. It puts a picture where
                    image_token_index stands, which no text should contain; without one, that is
                    0, LLaMA's <unk>. (Here it is always -200.)
    shard_bytes:    more than this is split into several files with an index

    All files are written in the subfolder .saving first, then moved, config.json last: a killed
    run leaves nothing half written under a real name. Weights saved earlier are replaced.
    """
    folder, work = Path(path), Path(path, ".saving")
    shutil.rmtree(work, ignore_errors=True)  # of a killed run
    work.mkdir(parents=True)
    if kind == "llava" and config["projector"] == "linear":
        bias = in_memory(state_dict["projector.0.bias"])
        identity = {"projector.2.weight": torch.eye(len(bias)).to(bias)}
        state_dict = {**state_dict, **identity, "projector.2.bias": torch.zeros_like(bias)}
    stem = "rounded" if config.get("weight_bits") else "model"
    dtype = write_weights(work, stem, kind, state_dict, dtype, shard_bytes)
    contents = {"config.json": hf_config(kind, config, dtype, token_ids or {})}
    if kind == "llava":
        contents["preprocessor_config.json"] = hf_preprocessor(config["image"])
    for name, content in contents.items():
        (work / name).write_text(json.dumps(content, indent=2) + "\n")
    for file in [tokenizer] if isinstance(tokenizer, str | Path) else tokenizer or []:
        shutil.copyfile(file, work / Path(file).name)
    files = sorted(work.iterdir(), key=lambda file: file.name == "config.json")
    for old in folder.iterdir():
        if re.fullmatch(r"(model|rounded)(-\d+-of-\d+)?\.safetensors(\.index\.json)?", old.name):
            if not (work / old.name).exists():
                old.unlink()
    for file in files:
        file.chmod((work / "config.json").stat().st_mode)  # safetensors lets only the owner read
        os.replace(file, folder / file.name)
    work.rmdir()


def write_weights(
    folder: Path, stem: str, kind: str, state_dict, dtype, shard_bytes: float
) -> torch.dtype:
    """Write STEM.safetensors, or shards and their index; returns the tensors' common type."""
    prefix = "" if kind == "llava" else f"{kind}."
    shards, sizes = [{}], [0]
    for name, tensor in state_dict.items():
        size = torch.Size(tensor.shape).numel() * written(name, tensor.dtype, dtype).itemsize
        if shards[-1] and sizes[-1] + size > shard_bytes:
            shards.append({})
            sizes.append(0)
        shards[-1][stored_name(layouts.KINDS[kind], prefix + name)] = tensor
        sizes[-1] += size
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        many = f"-{i:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = f"{stem}{many}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        tensors = {name: in_memory(tensor).detach() for name, tensor in shard.items()}
        for name, tensor in tensors.items():
            tensors[name] = tensor.to("cpu", written(name, tensor.dtype, dtype)).contiguous()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        if len(shards) > 1:
            print(f"wrote shard {i} of {len(shards)}", file=sys.stderr)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return dtype or reduce(torch.promote_types, (tensor.dtype for tensor in state_dict.values()))


def written(name: str, stored: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    return stored if asked is None or name.endswith(layouts.ROUNDED) else asked


def in_memory(tensor) -> torch.Tensor:
    return tensor.read() if isinstance(tensor, Stored) else tensor


def convert(path, out, base=None, vision_tower=None, dtype=None, quantize=None):
    """Write any checkpoint in the layout of transformers; tensors pass through one shard at a time.

    dtype:    None: each tensor as it is stored
    quantize: 8 or 4: the decoder's matrices as quantize.py has them, which only `LLaVA` reads
    """
    import quantize as quantized
    from llama import LLaMA, LLaMAConfig  # a tool, at the end of the imports' one direction
    from llava import LLaVA
    from vit import ViT, ViTConfig

    source = Checkpoint(path, base, vision_tower)
    if Path(out).exists() and source.path.resolve() == Path(out).resolve():
        raise CheckpointError(f"{out} is the checkpoint itself; give another folder")
    if source.part == "vision_tower":
        model, config = ViT, ViTConfig(**source.vision_config())
    elif source.part == "language_model":
        model, config = LLaMA, LLaMAConfig(**source.text_config())
    else:
        model, config = LLaVA, LLaVA.read_config(source)
    _, names = match(lambda: model(config), source, source.part)
    if quantize:
        if source.part != "llava" or config.weight_bits:
            what = "rounded already" if source.part == "llava" else f"a lone {source.part}"
            raise CheckpointError(f"{path} is {what}; --quantize takes a whole LLaVA")
        config = replace(config, weight_bits=quantize)
        names = quantized.for_file(names, quantize)
    folders = ([source.base.path] if base else []) + [source.path]
    files = {file.name: file for folder in folders for file in tokenizer.files(folder)}
    ids = source.config.token_ids() if source.config else {}
    save(out, source.part, names, asdict(config), list(files.values()), dtype, ids)


def inspect(path, base=None, vision_tower=None):
    """Print what a checkpoint holds, and what of it is left out."""
    source = Checkpoint(path, base, vision_tower)
    show = {"vision_tower": source.vision_config, "language_model": source.text_config}
    print(f"family      {source.family}")
    for key, value in show.get(source.part, source.llava_config)().items():
        print(f"{key:11} {value}")
    for dtype, n in Counter(str(t.dtype) for t in source.tensors.values()).items():
        print(f"tensors     {n} of type {dtype.removeprefix('torch.')}")
    n_bytes = sum(file.stat().st_size for file in {t.file for t in source.tensors.values()})
    print(f"bytes       {n_bytes:,}")
    _, omitted, unexpected = source.sort_names()
    for why, n in Counter(omitted.values()).items():
        print(f"left out    {n}: {why}")
    if unexpected:
        print(f"unexpected  {len(unexpected)}: {listing(unexpected)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    texts = {
        "inspect": "print what a checkpoint holds",
        "convert": "write it in the layout of transformers (llava-hf)",
        "compare": "ours against transformers, layer by layer",
    }
    for name, text in texts.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("folder", help="checkpoint: a folder, a CLIP file or a downloaded id")
        if name == "convert":
            command.add_argument("out", help="folder to write")
            command.add_argument("--dtype", choices=DTYPES, help="default: as stored")
            text = "round the decoder's weights, for generate.py only"
            command.add_argument("--quantize", choices=("int8", "int4"), help=text)
        command.add_argument("--model-base", help="what a delta, LoRA or lone projector belongs to")
        command.add_argument("--vision-tower", help="CLIP checkpoint to use as the tower")
    args = parser.parse_args()
    extra = args.model_base, args.vision_tower
    try:
        if args.command == "inspect":
            inspect(args.folder, *extra)
        elif args.command == "convert":
            bits = {"int8": 8, "int4": 4}.get(args.quantize)
            convert(args.folder, args.out, *extra, DTYPES.get(args.dtype), bits)
        else:
            from compare import compare

            compare(args.folder, *extra)
    except ValueError as error:
        print(f"checkpoint.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
