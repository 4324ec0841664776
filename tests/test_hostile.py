"""Hostile and damaged checkpoints end in one clear error: nothing runs, nothing crashes.

Run: pytest tests/test_hostile.py                  (offline; 2,000 mutated files)
     FUZZ_CASES=100000 pytest tests/test_hostile.py -k fuzz
Proves: pickles that would run code, packed archives, lying headers, links and paths out of the
folder, absurd configs, missing and cut shards are refused in a sentence, with bounded memory.
"""

import json
import os
import pickle
import random
import resource
import shutil
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import original
import pytest
import torch
from test_layouts import (
    TINY,
    VISION,
    openai_names,
    randomised,
    script,
    write_base,
    write_lora,
    write_meta,
)

from checkpoint import Checkpoint, CheckpointError, convert
from llama import LLaMA, LLaMAConfig
from llava import LLaVA
from vit import ViT

WITNESS = Path("/tmp/llava-hostile-witness")


class Bomb:
    """Unpickled by a careless loader, this leaves a file behind."""

    def __reduce__(self):
        return os.system, (f"touch {WITNESS}",)


@pytest.fixture(autouse=True)
def no_witness():
    WITNESS.unlink(missing_ok=True)
    yield
    assert not WITNESS.exists(), "code of a checkpoint was run"


@pytest.fixture
def v15(tmp_path):
    return original.write("v1.5", tmp_path)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, v15):
    file = v15 / "pytorch_model-00001-of-00002.bin"
    torch.save(torch.load(file) | {"x": Bomb()}, file)
    with pytest.raises(CheckpointError, match="not a dictionary of tensors"):
        LLaVA.from_pretrained(v15)


def test_a_raw_pickle_and_the_old_format_are_refused(v15):
    file = v15 / "pytorch_model-00001-of-00002.bin"
    file.write_bytes(pickle.dumps({"x": Bomb()}))
    with pytest.raises(CheckpointError, match="neither safetensors nor a zip"):
        LLaVA.from_pretrained(v15)
    torch.save({"x": torch.zeros(2)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="neither safetensors nor a zip"):
        LLaVA.from_pretrained(v15)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_archive_that_would_run_code_is_refused(tmp_path):
    file, evil = tmp_path / "ViT.pt", tmp_path / "evil.pt"
    script(openai_names(randomised(ViT(VISION)).state_dict()), file)
    with zipfile.ZipFile(file) as good, zipfile.ZipFile(evil, "w") as bad:
        for entry in good.infolist():
            content = good.read(entry)
            if entry.filename.endswith("/data.pkl"):
                content = pickle.dumps(Bomb(), protocol=2)
            bad.writestr(zipfile.ZipInfo(entry.filename), content)
    with pytest.raises(CheckpointError, match="it calls posix.system"):
        ViT.from_pretrained(evil)


def test_a_packed_archive_is_refused_before_it_is_unpacked(tmp_path, v15):
    file = v15 / "pytorch_model-00001-of-00002.bin"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**8))
    assert file.stat().st_size < 10**6
    with pytest.raises(CheckpointError, match="packed zip"):
        LLaVA.from_pretrained(v15)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {},
        {"x": 3},
        {3: torch.zeros(1)},
        {"x": torch.zeros(1).expand(10**6, 10**6)},
        {"x": torch.zeros(2, 3).t()},
        {"x": torch.zeros(2, 2).to_sparse()},
        {"x": torch.zeros(10**9, device="meta")},
    ],
    ids=str,
)
def test_a_file_with_anything_but_plain_tensors_is_refused(v15, content):
    torch.save(content, v15 / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(CheckpointError):
        LLaVA.from_pretrained(v15)


def safetensors(header: dict, n_bytes: int) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(n_bytes)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        safetensors({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}, 8),
        safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, 16),
        safetensors({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 8]}}, 8),
        safetensors({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, 8),
        safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 4),
        safetensors(
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            },
            12,
        ),
    ],
    ids="empty short long list shape hole oversize dtype cut overlap".split(),
)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="model.safetensors"):
        LLaMA.from_pretrained(tmp_path)


def test_links_out_of_the_folder_are_refused_but_for_the_hubs_blobs(tmp_path):
    folder = original.write("v1.6", tmp_path)
    file = folder / "model-00001-of-00002.safetensors"
    secret = tmp_path / "elsewhere" / "secret.safetensors"
    secret.parent.mkdir()
    file.rename(secret)
    file.symlink_to(secret)
    with pytest.raises(CheckpointError, match="link to .*secret.safetensors, out of its folder"):
        LLaVA.from_pretrained(folder)
    home = tmp_path / "models--a--b"
    (home / "blobs").mkdir(parents=True)
    file.unlink()
    secret.rename(home / "blobs" / "1234")
    shutil.move(folder, home / "snapshots" / "abc")
    (home / "snapshots" / "abc" / file.name).symlink_to(home / "blobs" / "1234")
    LLaVA.from_pretrained(home / "snapshots" / "abc")


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": 10**15},
        {"vocab_size": 2**40},
        {"num_attention_heads": -1},
        {"num_attention_heads": 7},
        {"num_key_value_heads": 3},
        {"hidden_size": "4096"},
        {"rope_theta": float("nan")},
        {"rms_norm_eps": 0},
        {"image_grid_pinpoints": [[56, 10**9]]},
        {"image_grid_pinpoints": "(1x1),...,(6x6)"},
        {"image_grid_pinpoints": []},
        {"mm_projector_type": "mlp999999999x_gelu"},
        {"mm_projector_type": "resampler"},
        {"mm_vision_select_layer": 10**9},
        {"model_type": {"a": 1}},
    ],
    ids=str,
)
def test_an_absurd_config_is_refused(tmp_path, change):
    folder = original.write("v1.6", tmp_path)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError):
        LLaVA.from_pretrained(folder)(torch.tensor([[1, 2]]))


def test_deep_and_huge_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[" * 10**6)
    with pytest.raises(CheckpointError, match="is not JSON"):
        Checkpoint(tmp_path)
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(2**27)
    with pytest.raises(CheckpointError, match="at most"):
        Checkpoint(tmp_path)


# ---- fuzz -----------------------------------------------------------------------------------


def small_files(folder: Path) -> list[tuple[Path, Callable]]:
    """(file to damage, a function that loads it with the rest): each kind of file there is."""
    loaders = {}
    for kind in ("v1.5", "v1.6"):
        out = original.write(kind, folder)
        loaders[out] = partial(LLaVA.from_pretrained, out)
        shutil.copy(TINY / "llama" / "tokenizer.model", out)
        convert(out, folder / f"{kind}-hf")
        loaders[folder / f"{kind}-hf"] = partial(LLaVA.from_pretrained, folder / f"{kind}-hf")
    lora, base = folder / "lora", write_base(folder / "base")
    shutil.copytree(folder / "v1.5", lora)
    write_lora(lora)
    loaders[lora] = partial(LLaVA.from_pretrained, lora, base=base)
    config = LLaMAConfig(
        vocab_size=16, dim=16, mlp_dim=16, n_layers=1, n_heads=2, n_kv_heads=1, max_positions=4096
    )
    write_meta(randomised(LLaMA(config)), folder / "meta", 2, 2)
    loaders[folder / "meta"] = partial(LLaMA.from_pretrained, folder / "meta")
    (folder / "clip").mkdir()
    file = folder / "clip" / "ViT.pt"
    script(openai_names(randomised(ViT(VISION)).state_dict()), file)
    loaders[file.parent] = partial(ViT.from_pretrained, file)
    return [(file, load) for path, load in loaders.items() for file in sorted(path.iterdir())]


def damage(content: bytes, chance: random.Random) -> bytes:
    """Flip, drop, repeat or insert a few bytes, mostly where headers are: at the two ends."""
    content = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        ends = (min(len(content), 2000), min(len(content), 200), len(content))
        place = chance.randrange(max(1, chance.choice(ends)))
        if chance.random() < 0.4:
            place = max(0, len(content) - 1 - place)
        which = chance.randrange(5)
        if which < 2 and content:
            content[place] = chance.choice((0, 255, chance.randrange(256)))
        elif which == 2:
            del content[place : place + chance.choice((1, 4, 100))]
        elif which == 3:
            content[place:place] = content[place : place + chance.choice((1, 8, 64))]
        else:
            content[place:place] = chance.randbytes(chance.choice((1, 2, 8)))
    return bytes(content)


@pytest.mark.filterwarnings("ignore")
def test_fuzz_damaged_files_load_or_raise_a_value_error(tmp_path):
    cases = int(os.environ.get("FUZZ_CASES", 2000))
    files, chance = small_files(tmp_path), random.Random(int(os.environ.get("FUZZ_SEED", 0)))
    refused, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in range(cases):
        file, load = files[case % len(files)]
        good = file.read_bytes()
        file.write_bytes(damage(good, chance))
        try:
            load()
        except ValueError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"case {case}, {file.name}: {error!r}") from error
        finally:
            file.write_bytes(good)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{cases} damaged files, {refused} refused, memory grew by {grown:.0f} MiB")
    assert refused > cases / 2 and grown < 500
