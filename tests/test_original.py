"""The original LLaVA code is the oracle: same logits, tokens, pixels, grids and prompt ids.

Run: pytest tests/test_original.py  (offline; the answers were recorded by tests/record_llava.py)
Proves: small v1, v1.5 and v1.6 checkpoints in the original layouts load and compute what the
original code computes from them; pictures become the same pixels bit for bit, prompts the same ids.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import original
import pytest
import torch

import data
import image
import tokenizer
from generate import generate
from llava import LLaVA
from templates import render

HERE = Path(__file__).parent
RECORD = json.loads((HERE / "llava.json").read_text())
LOGITS = np.load(HERE / "llava.npz")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    return {
        kind: LLaVA.from_pretrained(original.write(kind, folder), dtype=torch.float32)
        for kind in original.KINDS
    }


class Words:
    """Stands in for a tokenizer: these models answer in ids, to ids."""

    bos_id, eos_id, vocab_size = 1, 2, original.VOCAB


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("kind", original.KINDS)
def test_logits_and_greedy_tokens_are_the_originals(models, kind, number):
    model, row = models[kind], RECORD["models"][kind][number]
    pictures = [image.sawtooth(*size) for size in row["sizes"]]
    pixels = [image.to_pixels(picture, model.config.image) for picture in pictures]
    ids = torch.tensor([row["ids"]])
    with torch.no_grad():
        (logits,) = model(ids, pixels, [picture.size for picture in pictures])
    assert len(logits) == row["length"]
    recorded = torch.from_numpy(LOGITS[f"{kind}-{number}"])
    error = (logits[:, ::10] - recorded).abs().max() / recorded.abs().max()
    assert error < 1e-4
    model.tokenizer, model.template = Words(), "v1"
    (tokens,) = generate(model, [row["ids"]], [pictures], len(row["tokens"]))
    assert tokens == [token for token in row["tokens"] if token != 2]


@pytest.mark.parametrize("row", RECORD["pixels"], ids=lambda r: f"{r['size']}-{r['aspect']}")
def test_pixels_are_the_originals_bit_for_bit(row):
    config = image.ImageConfig(aspect=row["aspect"])
    pixels = image.to_pixels(image.sawtooth(*row["size"]), config)
    assert list(pixels.shape) == row["shape"]
    assert zlib.crc32(pixels.numpy().tobytes()) == row["crc32"]


def test_the_grids_chosen_are_the_originals():
    for *size, width, height in RECORD["grids"]:
        assert image.choose_grid(size, image.GRIDS) == (width, height), size


# Tokens of a picture by its size, from the original: views of 24 x 24 patches, margins cut off.
N_TOKENS = {
    (1024, 899): 2634,
    (640, 480): 2340,
    (480, 640): 2352,
    (672, 672): 2928,
    (336, 336): 1176,
    (1008, 336): 2328,
    (1920, 1080): 1948,
    (1080, 1920): 1968,
    (500, 333): 1464,
    (640, 429): 2144,
    (1000, 100): 1160,
    (100, 1000): 1224,
    (328, 205): 926,
    (376, 799): 1826,
}


@pytest.mark.parametrize("size", N_TOKENS)
def test_a_picture_becomes_as_many_tokens_as_in_the_original(models, size):
    model = models["v1.6"]
    grid = image.choose_grid(size, image.GRIDS)
    n_tiles = grid[0] * grid[1] // 336**2
    config = model.config
    views = torch.zeros(1 + n_tiles, 576, config.text.dim)
    small = [[side // 6 for side in pair] for pair in image.GRIDS]  # 56-pixel tiles
    assert [list(g) for g in config.image.grid_pinpoints] == small
    with torch.no_grad():
        merged = LLaVA.merge_tiles(at_336(model), views, size)
    assert len(merged) == N_TOKENS[size]


def at_336(model):
    """The model with LLaVA-1.6's own picture size, as far as merging looks at it."""

    class Large:
        image_newline = model.image_newline

        class config:
            image = image.ImageConfig(aspect="anyres")

    return Large


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    mistral_common = pytest.importorskip("mistral_common", reason="wants Python 3.11")
    folder = tmp_path_factory.mktemp("words")
    file = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    (folder / "tokenizer.model").write_bytes(file.read_bytes())
    added = {"<|im_start|>": 32000, "<|im_end|>": 32001}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    return tokenizer.load(folder)


@pytest.mark.parametrize("row", RECORD["prompts"], ids=lambda row: row["template"])
def test_prompts_and_their_ids_are_the_originals(words, row):
    turns = [(("human", "gpt")[i % 2], text) for i, text in enumerate(row["turns"])]
    assert render(turns, row["template"]) == row["prompt"]
    ids, _ = data.encode_turns(turns, words, row["template"])
    assert ids == row["ids"]


def test_the_ids_of_llama_3_are_those_of_llava_next():
    """Recorded from LLaVA-NeXT's template and Meta's tokenizer; there is one begin-of-text."""
    llama_models = pytest.importorskip("llama_models")
    words = tokenizer.load(Path(llama_models.__file__).parent / "llama3" / "tokenizer.model")
    turns = [("human", "<image>\nWhat is shown in this image?")]
    ids, labels = data.encode_turns(turns, words, "llava_llama_3")
    system = [
        *(2675, 527, 264, 11190, 4221, 323, 11376, 18328, 13, 1472, 527, 3025, 311, 3619, 279),
        *(9302, 2262, 430, 279, 1217, 5825, 11, 323, 7945, 279, 1217, 449, 264, 8205, 315),
        *(9256, 1701, 5933, 4221, 13),
    ]
    question = [-200, 198, 3923, 374, 6982, 304, 420, 2217, 30]
    assert ids == [
        *(128000, 128006, 9125, 128007, 271, *system, 128009),
        *(128006, 882, 128007, 271, *question, 128009),
        *(128006, 78191, 128007, 271),
    ]
    assert set(labels) == {data.IGNORE}
    answered, labels = data.encode_turns([*turns, ("gpt", "A cat.")], words, "llava_llama_3")
    learned = [label for label in labels if label != data.IGNORE]
    assert learned == [*words.encode("A cat."), 128009]
