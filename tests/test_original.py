"""The original LLaVA code is the oracle: same logits, tokens, pixels, grids and prompt ids.

Run: pytest tests/test_original.py  (offline; the answers were recorded by tests/record_llava.py)
Proves: small v1, v1.5 and v1.6 checkpoints in the original layouts load and compute what the
original code computes from them; pictures become the same pixels bit for bit, prompts the same ids.
"""

import functools
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
from layouts import stored_name
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


@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_and_gradients_of_a_step_are_the_originals(tmp_path, packed):
    model = LLaVA.from_pretrained(original.write("v1.5", tmp_path), dtype=torch.float32).train()
    model.vision_tower.requires_grad_(False)
    step = RECORD["step"]
    pictures = [image.sawtooth(*size) for size in step["sizes"]]
    pixels = iter([image.to_pixels(picture, model.config.image) for picture in pictures])
    samples = []
    for ids, labels in zip(step["ids"], step["labels"], strict=True):
        n = sum(i != 0 for i in ids)
        own = [next(pixels) for _ in range(ids.count(data.IMAGE_TOKEN))]
        sample = {"input_ids": torch.tensor(ids[:n]), "labels": torch.tensor(labels[:n])}
        samples.append(sample | {"pixels": own, "image_sizes": [(56, 56)] * len(own)})
    loss = model.loss(**data.collate([samples] if packed else samples))
    loss.backward()
    assert loss.item() == pytest.approx(step["loss"], rel=1e-5)
    names = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    recorded = {n.removeprefix("grad-"): LOGITS[n] for n in LOGITS.files if n.startswith("grad-")}
    assert {stored_name("llava", name) for name in names} == recorded.keys()
    for name, gradient in names.items():
        theirs = torch.from_numpy(recorded[stored_name("llava", name)])
        error = (gradient.flatten()[::10] - theirs).abs().max() / theirs.abs().max()
        assert error < 1e-5, name


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


CHATML, FRAME = ("<|im_start|>", "<|im_end|>"), ("<im_start>", "<im_end>")


def mistral_file() -> Path:
    """A real sentencepiece model of 32,000 pieces."""
    mistral_common = pytest.importorskip("mistral_common", reason="wants Python 3.11")
    return Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A function (legacy, added tokens) -> tokenizer."""
    file = mistral_file()

    @functools.cache
    def load(legacy: bool | None = True, added=CHATML):
        folder = tmp_path_factory.mktemp("words")
        (folder / "tokenizer.model").write_bytes(file.read_bytes())
        ids = {token: 32000 + i for i, token in enumerate(added)}
        (folder / "added_tokens.json").write_text(json.dumps(ids))
        if legacy is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
        return tokenizer.load(folder)

    return load


def name_of(row):
    return f"{row['template']}{'-legacy' * row['legacy']}{'-frame' * row.get('frame', False)}"


@pytest.mark.parametrize("row", RECORD["prompts"], ids=name_of)
def test_prompts_and_their_ids_are_the_originals(words, row):
    turns = [(("human", "gpt")[i % 2], text) for i, text in enumerate(row["turns"])]
    known = words(row["legacy"], FRAME if row["frame"] else CHATML)
    known.image_frame = FRAME if row["frame"] else ()
    if not row["frame"]:
        assert render(turns, row["template"]) == row["prompt"]
    ids, _ = data.encode_turns(turns, known, row["template"])
    assert ids == row["ids"]


def test_without_the_legacy_key_a_tokenizer_is_legacy(words):
    turns = [("human", "What?"), ("gpt", "A cat."), ("human", "Why?")]
    absent, legacy, new = (
        data.encode_turns(turns, words(key), "v1")[0] for key in (None, True, False)
    )
    assert absent == legacy != new


def test_yis_prompts_are_those_of_llava_16_34b(tmp_path):
    """Recorded in transformers' own test of llava-v1.6-34b: no begin-of-sequence, no extra spaces.

    Yi's file puts no space before a text; here another file is told not to.
    """
    (tmp_path / "tokenizer.model").write_bytes(mistral_file().read_bytes() + b"\x1a\x02\x18\x00")
    added = {token: 32000 + i for i, token in enumerate(CHATML)}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    known = tokenizer.load(tmp_path)
    turns = [("human", "<image>\nWhat is shown in this image?")]
    ids, _ = data.encode_turns(turns, known, "chatml_direct")
    spelled = ["<image>" if i < 0 else known.name_of(i) or known.model.id_to_piece(i) for i in ids]
    start, end = CHATML
    assert "".join(spelled).replace("<0x0A>", "\n") == (
        f"{start}system\nAnswer▁the▁questions.{end}{start}user\n<image>\nWhat▁is▁shown▁in▁this"
        f"▁image?{end}{start}assistant\n"
    )


def test_the_third_form_is_that_of_transformers_4_31(words):
    """LLaVA-1.5 was trained with it: "US" "ER" after "</s>", where there are "▁US" "ER" now."""
    known = words(False)
    known.after_control = "stripped"
    turns = [("human", "What?"), ("gpt", "A cat."), ("human", "Why?")]
    ids, _ = data.encode_turns(turns, known, "v1")
    after = ids[ids.index(2) + 1 :]
    known.after_control = "joined"
    assert [known.model.id_to_piece(i) for i in after[:3]] == ["US", "ER", ":"]


# What the original does with a record, by what stands in it: its own mistakes, see data.encode.
ODD = {
    "ASSISTANT:": "masked whole: it cuts at this string",
    "<unk>": "a control token, which padding shares; masked whole",
    "</s>": "a control token; masked whole",
    "": "an empty answer has no end; its question runs into the next",
}


@pytest.mark.parametrize("row", RECORD["training"], ids=name_of)
def test_ids_and_labels_are_the_originals(words, row):
    texts = [turn["value"] for turn in row["conversations"]]
    template, known = row["template"], words(row["legacy"])
    if "" in texts:
        with pytest.raises(ValueError, match="empty answer"):
            data.encode(row["conversations"], known, template)
        return
    ids, labels = data.encode(row["conversations"], known, template)
    learned = known.decode([label for label in labels if label != data.IGNORE])
    answers = [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"]
    if len(texts) % 2:
        answers = answers[1:]  # of a leading gpt turn
    odd = [mark for mark in ODD if mark and any(mark in text for text in texts)]
    tokens = [mark for mark in odd if mark.startswith("<")]
    if template in ("v0", "llava_v0"):
        # Its labels fit LLaMA's vocabulary only, by accident: there "###" is two tokens after a
        # line break and one at the start of a text, which makes up for counting <s> once more.
        if not tokens and len(texts) % 2 == 0:
            assert ids == row["ids"]
        said = [part for part in learned.split("###") if part.strip()]
        assert said == [f" Assistant: {answer}\n" for answer in answers]
        assert learned.count("###") == len(answers) * 2 + 1
        return
    if not tokens:
        assert ids == row["ids"]
    for answer in answers:
        assert answer.strip() in learned
    if template == "chatml_direct":
        # The original gives up on most; where it does not, the first answer's end is not learned.
        assert labels.count(known.token_id("<|im_end|>")) == len(answers)
    elif set(row["labels"]) != {data.IGNORE}:
        assert labels == row["labels"]
    else:
        assert odd


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
