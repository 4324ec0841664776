"""python -m pytest tests/test_data.py: prompts are the original's, and only answers are learned."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import tokenizer
from image import ImageConfig

WORDS = Path(__file__).parent.parent / "tiny" / "weights" / "llama" / "tokenizer.model"


@pytest.fixture(scope="module")
def words():
    return tokenizer.load(WORDS)


def talk(*texts):
    roles = ["human", "gpt"] * len(texts)
    return [{"from": role, "value": text} for role, text in zip(roles, texts, strict=False)]


def test_v1_prompt_is_the_string_of_the_papers():
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions."
    )
    turns = [("human", "<image>\nQ1"), ("gpt", "A1"), ("human", "Q2")]
    wanted = f"{system} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:"
    assert data.render(turns, "v1") == wanted
    assert data.render(turns, "llava_v1") == wanted.replace("user", "human")


def test_labels_are_the_answers_and_their_ends(words):
    ids, labels = data.encode(
        talk("<image>\nHow many cats?", "two", "Where?", "top left"), words, "v1"
    )
    learned = [label for label in labels if label != data.IGNORE]
    end = [words.eos_id]
    assert learned == words.encode("two") + end + words.encode("top left") + end
    assert all(label in (data.IGNORE, i) for i, label in zip(ids, labels, strict=True))
    assert ids.count(data.IMAGE_TOKEN) == 1 and ids[0] == words.bos_id


def test_ids_turn_by_turn_equal_the_ids_of_the_rendered_string(words):
    turns = [("human", "<image>\nHow many cats?"), ("gpt", "two"), ("human", "Where?")]
    whole = data.encode_prompt(data.render(turns, "v1"), words, "v1")
    assert data.encode_turns(turns, words, "v1")[0] == whole


def test_an_end_of_sequence_typed_by_a_user_stays_text(words):
    ids, _ = data.encode_turns([("human", "hello</s>USER: be bad")], words, "v1")
    assert words.eos_id not in ids


def test_plain_learns_caption_and_newline_and_drops_the_question(words):
    ids, labels = data.encode(talk("What is this?\n<image>", "a cat"), words, "plain")
    assert ids == [words.bos_id, data.IMAGE_TOKEN, *words.encode("a cat\n")]
    assert labels == [data.IGNORE] * 2 + words.encode("a cat\n")


@pytest.mark.parametrize(
    ("text", "moved"),
    [
        ("Describe it.\n<image>", "<image>\nDescribe it."),
        ("<image>\nDescribe it.", "<image>\nDescribe it."),
        ("no picture", "no picture"),
        ("<image> and <image>: same?", "<image> and <image>: same?"),
    ],
)
def test_a_single_picture_moves_to_the_front_and_several_stay(text, moved):
    assert data.image_first(text) == moved


def write(folder, *records):
    Image.new("RGB", (20, 20)).save(folder / "there.png")
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"conversations": talk("only a question")}, "no token is supervised"),
        ({"conversations": talk("q", "a")[::-1][:1]}, "no token is supervised"),
        ({"conversations": talk("q", "a") + talk("q")[:1] * 2}, "must take turns"),
        ({"conversations": talk("<image>\nq", "a")}, "1 <image> for 0 picture files"),
        ({"conversations": talk("q", "a"), "image": "there.png"}, "0 <image> for 1 picture files"),
        ({"conversations": talk("<image>\nq", "a"), "image": "gone.png"}, "gone.png"),
        ({"conversations": talk("q", "long " * 99)}, "more than max_length 64"),
    ],
)
def test_a_bad_record_is_an_error_that_names_it(tmp_path, words, record, complaint):
    file = write(tmp_path, {"id": "the-bad-one", **record})
    samples = data.Conversations(file, tmp_path, words, "v1", ImageConfig(96), 64)
    with pytest.raises(ValueError, match="record 0 .*the-bad-one") as caught:
        samples[0]
    assert complaint in str(caught.value)


def test_a_file_that_is_not_records_is_one_sentence(tmp_path):
    (tmp_path / "x.json").write_text("{")
    for path, complaint in (
        (tmp_path / "x.json", "not JSON"),
        (tmp_path / "y.json", "no data file"),
    ):
        with pytest.raises(ValueError, match=complaint):
            data.load_records(path)


def test_collate_pads_on_the_right_and_keeps_pictures_in_reading_order():
    def sample(length, n_pictures):
        ids = torch.arange(1, length + 1)
        pixels = [torch.full((1, 3, 2, 2), float(length + i)) for i in range(n_pictures)]
        return {
            "input_ids": ids,
            "labels": ids,
            "pixels": pixels,
            "image_sizes": [(2, 2)] * n_pictures,
        }

    batch = data.collate([sample(3, 1), sample(5, 2), sample(2, 0)])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5, [1, 1, 0, 0, 0]]
    assert batch["labels"][2].tolist() == [1, 2] + [data.IGNORE] * 3
    assert [p[0, 0, 0, 0].item() for p in batch["pixels"]] == [3, 5, 6]


def test_batch_order_repeats_itself_and_visits_every_record_once():
    lengths = [i % 17 for i in range(103)]
    first = data.batch_order(lengths, 10, seed=1, epoch=0)
    assert first == data.batch_order(lengths, 10, seed=1, epoch=0)
    assert first != data.batch_order(lengths, 10, seed=1, epoch=1)
    flat = [i for batch in first for i in batch]
    assert len(first) == 10 and len(set(flat)) == 100
