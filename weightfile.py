"""A file of weights -> its tensors by name, each read when it is asked for. Nothing in it is run.

    *.safetensors       a header with names, types and shapes, then the bytes
    *.bin *.pth *.pt    torch.save: a zip of one pickle (names, shapes) and an entry per storage
    ViT-L-14.pt         TorchScript: the same zip, with a program in it that stays unread

A pickle is a program too: loaded carelessly, it may call anything. torch.load(weights_only=True)
allows what tensors need and nothing else, and there is no other way in here. For TorchScript, which
it refuses, `ScriptUnpickler` allows even less.

A file is only believed as far as its size goes: whoever claims more bytes than there are, packed or
shared ones, gets a CheckpointError, as does anything damaged. Read next: checkpoint.py.
"""

import argparse
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

MAX_PICKLE = 2**28  # bytes of names and shapes; LLaMA-70B has 0.1 MB
MAX_MAPPED = {"safetensors": 2**25, "torch": 2**29}  # bytes; see `reader`
# What a weight can be, in the words of safetensors. Whole numbers are those of quantize.py only.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I8": torch.int8, "U8": torch.uint8}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says what was expected and what is there."""


class Stored(NamedTuple):
    """A tensor on disk: what it is, before a byte of it is read, and how to read it."""

    file: Path
    name: str  # as the file calls it
    shape: list[int]
    dtype: torch.dtype | str  # a str if it is nothing that a weight can be
    read: Callable[[], torch.Tensor]

    @property
    def n_bytes(self) -> int:
        return torch.Size(self.shape).numel() * getattr(self.dtype, "itemsize", 0)


def open_weights(file: Path) -> dict[str, Stored]:
    """The tensors of one file by name; of safetensors and zips, only headers are read.

    Raises CheckpointError for what is no such file, is damaged, or contains anything but tensors.
    """
    with open(file, "rb") as opened:
        start = opened.read(4)
    if start == b"PK\3\4":
        return open_zip(file)
    if file.suffix != ".safetensors":
        raise damaged(file, "neither safetensors nor a zip made by torch.save since version 1.6")
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
    except SafetensorError as error:
        raise damaged(file, f"no safetensors file, or cut short ({error})") from None

    read = reader(None, lambda: safe_open(file, "pt").get_tensor, MAX_MAPPED["safetensors"])
    return {
        name: Stored(
            file,
            name,
            part.get_shape(),
            DTYPES.get(part.get_dtype(), part.get_dtype()),
            partial(read, name),
        )
        for name, part in slices.items()
    }


def reader(get: Callable | None, mapped: Callable, limit: int) -> Callable[[str], torch.Tensor]:
    """Tensors of a file by name, mapped: no byte is read before it is used.

    get:    gives its tensors, if it is mapped already
    mapped: maps it and returns a function that does
    limit:  bytes handed out before the file is mapped anew. Pages that were read count as memory of
            this process for as long as their mapping is used, so a mapping should not be all.
    """
    left = limit if get else 0

    def read(name):
        nonlocal get, left
        if left <= 0:
            get, left = mapped(), limit
        tensor = get(name)
        left -= tensor.nbytes
        return tensor

    return read


def damaged(file: Path, what) -> CheckpointError:
    size = f"{file.stat().st_size:,} bytes"
    return CheckpointError(f"{file} ({size}) is {what}; fetch it again")


# ---- tensors made of stored ones: shapes at once, values when they are read ------------------


def thirds(stored: Stored) -> list[Stored]:
    """Queries, keys and values of one matrix or bias that holds all three, one below the other."""
    if not stored.shape or stored.shape[0] % 3:
        raise CheckpointError(f"{stored.file}: {stored.name} {stored.shape} is not three in one")
    n = stored.shape[0] // 3

    def reader(i):
        return lambda: stored.read()[i * n : (i + 1) * n]

    return [stored._replace(shape=[n, *stored.shape[1:]], read=reader(i)) for i in range(3)]


def split_half(stored: Stored, n_heads: int) -> Stored:
    """Rows of a query or key matrix of Meta's, from RoPE on pairs (2i, 2i + 1) to (i, i + Dh/2)."""

    def read():
        weight = stored.read()  # (H Dh, D)
        pairs = weight.view(n_heads, -1, 2, weight.shape[1])  # (H, Dh/2, 2, D)
        return pairs.transpose(1, 2).reshape(weight.shape)

    if len(stored.shape) != 2 or stored.shape[0] % (2 * n_heads):
        raise CheckpointError(f"{stored.file}: {stored.name} {stored.shape} is not {n_heads} heads")
    return stored._replace(read=read)


def added(delta: Stored, base: Stored) -> Stored:
    """A delta put onto its base, in its own type; rows that the base has not are as they are."""

    def read():
        weight, old = delta.read().clone(), base.read()
        weight[tuple(map(slice, old.shape))] += old.to(weight.dtype)
        return weight

    if len(delta.shape) != len(base.shape) or any(
        d < b for d, b in zip(delta.shape, base.shape, strict=True)
    ):
        raise CheckpointError(
            f"{delta.name} is {delta.shape}, its base {base.shape}: another base?"
        )
    return delta._replace(read=read)


def lora_merged(base: Stored, a: Stored, b: Stored, scale: float) -> Stored:
    """W + scale B A, rounded as peft rounds it: the update to the type of W, and then the sum."""

    def read():
        weight = base.read()
        update = b.read().float() @ a.read().float() * scale
        return weight + update.to(weight.dtype)

    if [b.shape[0], a.shape[-1], a.shape[0]] != [*base.shape, b.shape[-1]]:
        raise CheckpointError(f"the LoRA of {base.name} {base.shape} is {b.shape} times {a.shape}")
    return base._replace(read=read)


# ---- zips -----------------------------------------------------------------------------------


def open_zip(file: Path) -> dict[str, Stored]:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, OSError) as error:
        raise damaged(file, f"a broken zip, or cut short ({error})") from None
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise damaged(file, "a zip without data.pkl, so not made by torch.save")
    root = pickles[0].removesuffix("data.pkl")
    is_script = root + "constants.pkl" in entries
    if is_script:  # its program may be packed; it stays unread
        wanted = (root + "data.pkl", root + "data/")
        entries = {name: entry for name, entry in entries.items() if name.startswith(wanted)}
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
        raise damaged(file, "a packed zip, where torch.save packs nothing")
    if sum(entry.file_size for entry in entries.values()) > file.stat().st_size:
        raise damaged(file, "a zip whose entries claim more bytes than it has")
    if entries[pickles[0]].file_size > MAX_PICKLE:
        raise damaged(file, f"a zip whose pickle has more than {MAX_PICKLE:,} bytes")
    if is_script:
        return open_script(file, root, entries)
    tensors = map_torch(file)
    read = reader(tensors.__getitem__, lambda: map_torch(file).__getitem__, MAX_MAPPED["torch"])
    return {
        name: Stored(file, name, list(tensor.shape), kind(tensor.dtype), partial(read, name))
        for name, tensor in tensors.items()
    }


def kind(dtype: torch.dtype) -> torch.dtype | str:
    return dtype if dtype in DTYPES.values() else str(dtype).removeprefix("torch.")


def map_torch(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of torch.save, mapped, if it holds nothing else."""
    try:
        content = torch.load(file, "cpu", mmap=True, weights_only=True)
    except Exception as error:  # a hostile pickle can provoke any of them
        reason = str(error).strip().partition("\n")[0]
        raise damaged(file, f"not a dictionary of tensors and nothing else ({reason})") from None
    if not isinstance(content, dict) or not content:
        raise damaged(file, f"a {type(content).__name__}; expected {{name: tensor}}")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            found = f"{name!r}: {type(tensor).__name__}"
            raise damaged(file, f"a dictionary with {found[:80]}; expected name: tensor")
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or not tensor.is_contiguous() or tensor.is_quantized:
            raise damaged(file, f"made of plain tensors, but for {name!r}")
    return {name: tensor.detach() for name, tensor in content.items()}


# ---- TorchScript ----------------------------------------------------------------------------


class Module:
    """Stands in for any class of the archive's program: a bag of attributes."""

    parts: dict = {}

    def __setstate__(self, state):
        self.parts = state if isinstance(state, dict) else {}


class ScriptUnpickler(pickle.Unpickler):
    """Reads the data of a TorchScript archive; every name that it does not know is an error."""

    def __init__(self, content, storage: Callable):
        super().__init__(content)
        self.storage = storage

    def find_class(self, module, name):
        if module.startswith("__torch__"):
            return Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: storage(offset, size, stride)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle":  # typed lists and dictionaries; the type says nothing new
            return lambda value, *_: value
        dtype = getattr(torch, name.removesuffix("Storage").lower(), None)
        if module == "torch" and name.endswith("Storage") and isinstance(dtype, torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it calls {module}.{name}")

    def persistent_load(self, key):
        _, dtype, entry, *_ = key
        return self.storage(dtype, entry)


def open_script(file: Path, root: str, entries: dict) -> dict[str, Stored]:
    """The parameters and buffers of a TorchScript archive, such as OpenAI's CLIP files."""

    def storage(dtype, number):
        entry = entries[f"{root}data/{number}"]

        def tensor(offset, size, stride):
            size, stride = list(size), list(stride)
            if stride != list(torch.empty(size, device="meta").stride()):
                raise pickle.UnpicklingError("a tensor is not contiguous")
            n_bytes = torch.Size(size).numel() * dtype.itemsize
            start = offset * dtype.itemsize
            if min(offset, *size, 0) < 0 or start + n_bytes > entry.file_size:
                raise pickle.UnpicklingError("a tensor reaches beyond its storage")

            def read():
                place = entry_offset(file, entry) + start
                if place + n_bytes > file.stat().st_size:
                    raise damaged(file, "a broken zip, or cut short")
                flat = np.memmap(file, np.uint8, "c", place, (n_bytes,)) if n_bytes else b""
                return torch.frombuffer(flat, dtype=dtype).view(size)

            return Stored(file, "", size, kind(dtype), read)

        return tensor

    try:
        with zipfile.ZipFile(file) as archive, archive.open(root + "data.pkl") as content:
            top = ScriptUnpickler(content, storage).load()
    except Exception as error:  # a hostile pickle can provoke any of them
        raise damaged(file, f"not a TorchScript archive as CLIP's ({error})") from None
    tensors, waiting, seen = {}, [("", top)], set()
    while waiting:  # how deep it goes, and whether in circles, is the file's choice
        prefix, value = waiting.pop()
        if isinstance(value, Stored):
            tensors[prefix[1:]] = value._replace(name=prefix[1:])
        elif isinstance(value, Module) and id(value) not in seen:
            seen.add(id(value))
            waiting += [(f"{prefix}.{name}", part) for name, part in value.parts.items()]
    return tensors


def entry_offset(file: Path, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of a zip's entry start: behind a header whose last two lengths vary."""
    with open(file, "rb") as opened:
        opened.seek(entry.header_offset)
        header = opened.read(30)
    if len(header) < 30 or not header.startswith(b"PK\3\4"):
        raise damaged(file, "a broken zip")
    return entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))


def main():
    """List the tensors of a file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, help="safetensors, .bin, .pth or .pt")
    file = parser.parse_args().file
    if file is None:
        print("python weightfile.py FILE   lists names, types and shapes of its tensors")
        return
    try:
        for name, stored in open_weights(file).items():
            dtype = str(stored.dtype).removeprefix("torch.")
            print(f"{name:60} {dtype:10} {stored.shape}")
    except (CheckpointError, OSError) as error:
        parser.exit(2, f"weightfile.py: {error}\n")


if __name__ == "__main__":
    main()
