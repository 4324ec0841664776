"""python -m pytest tests/test_converters.py: other data sets become records that train."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import converters
import data
import tokenizer
from records import Records

ROOT = Path(__file__).parent.parent
WORDS = tokenizer.load(ROOT / "tiny" / "weights" / "llama")


def convert(folder, form, content, *more, answers=None, fails=False):
    """The records that the command line makes of a file; they all can be learned from."""
    for name, what in (("in.json", content), ("answers.json", answers)):
        text = what if isinstance(what, str) else json.dumps(what)
        (folder / name).write_text(text)
    args = ["--file", folder / "in.json", "--answers", folder / "answers.json"]
    done = subprocess.run(
        [sys.executable, "converters.py", form, *args, "--out", folder / "out.json", *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr
    if fails:
        assert done.returncode == 2
        return done.stderr
    assert done.returncode == 0, done.stderr
    found = list(Records(folder / "out.json"))
    for record in found:
        data.encode(record["conversations"], WORDS, "v1")
    return found


def said(record):
    return [turn["value"] for turn in record["conversations"]]


def test_questions_about_one_picture_become_one_conversation(tmp_path):
    questions = [
        {"question_id": i, "image_id": image, "question": f"Q{i}?"}
        for i, image in enumerate((7, 8, 7))
    ]
    answers = [{"question_id": i, "multiple_choice_answer": f"a{i}"} for i in range(2)]
    answers.append({"question_id": 2, "answers": [{"answer": a} for a in ("x", "y", "y")]})
    found = convert(
        tmp_path,
        "vqa",
        {"questions": questions},
        "--images",
        "coco/train2017/{:012}.jpg",
        answers={"annotations": answers},
    )
    assert [r["image"] for r in found] == [f"coco/train2017/{i:012}.jpg" for i in (7, 8)]
    first = f"<image>\nQ0?\n{converters.SHORT}"  # the form is asked for once
    assert said(found[0]) == [first, "a0", "Q2?", "y"]


def test_a_limit_splits_a_conversation(tmp_path):
    content = {str(i): {"imageId": "n1", "question": f"Q{i}", "answer": "a"} for i in range(5)}
    found = convert(tmp_path, "gqa", content, "--images", "gqa/images/{}.jpg", "--limit", "2")
    assert [len(r["conversations"]) for r in found] == [4, 4, 2]
    assert len({r["id"] for r in found}) == 3
    assert all("<image>" in said(r)[0] and converters.SHORT in said(r)[0] for r in found)


def test_ocr_vqa_gives_its_training_split(tmp_path):
    book = {"questions": ["Who?", "What?"], "answers": ["A", "B"], "split": 1}
    found = convert(tmp_path, "ocr_vqa", {"1": book, "2": book | {"split": 2}})
    assert [r["image"] for r in found] == ["1"] and said(found[0])[3] == "B"


def test_choices_are_turned_round_until_each_letter_was_right(tmp_path):
    content = [
        {"image_id": 3, "question": "Q?", "choices": ["u", "v", "w"], "correct_choice_idx": 1}
    ]
    found = convert(tmp_path, "aokvqa", content)
    assert [said(r)[1] for r in found] == ["B", "A", "C"]
    assert said(found[0])[0] == f"<image>\nQ?\nA. u\nB. v\nC. w\n{converters.LETTER}"
    for record in found:  # the letter names the same choice
        assert f"{said(record)[1]}. v" in said(record)[0]


def test_captions(tmp_path):
    content = '{"image": "a", "caption": "A cat."}\n{"image": "b", "caption": "A dog."}\n'
    plain = convert(tmp_path, "captions", content, "--images", "images/{}.jpg")
    assert said(plain[1]) == ["<image>", "A dog."] and plain[1]["image"] == "images/b.jpg"
    for record in plain:
        ids, labels = data.encode(record["conversations"], WORDS, "plain")
        assert ids.count(data.IMAGE_TOKEN) == 1
    brief = convert(tmp_path, "captions", content, "--brief")
    assert all(said(r)[0].removeprefix("<image>\n") in converters.BRIEF for r in brief)
    content = {"data": [{"image_id": "t", "caption_str": "One."}]}
    (found,) = convert(tmp_path, "textcaps", content)
    assert said(found) == [f"<image>\n{converters.CAPTION}", "One."]


@pytest.mark.parametrize(
    ("size", "aspect", "expected"),
    [
        ((100, 100), "pad", "[0.10, 0.20, 0.30, 0.40]"),
        ((200, 100), "pad", "[0.05, 0.35, 0.15, 0.45]"),  # 50 rows of padding above
        ((100, 200), "pad", "[0.30, 0.10, 0.40, 0.20]"),
        ((200, 100), "crop", "[0.05, 0.20, 0.15, 0.40]"),
    ],
)
def test_boxes_are_shares_of_what_the_model_sees(size, aspect, expected):
    assert converters.box_text((10, 20, 30, 40), size, aspect) == expected


def test_regions_ask_in_both_directions(tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "5.png")
    region = {"image_id": 5, "x": 10, "y": 20, "width": 20, "height": 20}
    content = [{"regions": [region | {"phrase": f"thing {i} "} for i in range(40)]}]
    more = ("--images", "{}.png", "--root", str(tmp_path))
    (found,) = convert(tmp_path, "regions", content, *more)
    box = "[0.05, 0.35, 0.15, 0.45]"
    pairs = list(zip(said(found)[::2], said(found)[1::2], strict=True))
    located = [answer == box for _, answer in pairs]
    assert 8 < sum(located) < 32
    for i, (question, answer) in enumerate(pairs):
        expected = (converters.LOCATE, f"thing {i}", box)
        if not located[i]:
            expected = (converters.DESCRIBE, box, f"thing {i}")
        assert question.endswith(expected[0].format(expected[1])) and answer == expected[2]
    content = [{"image": "5", "box": [10, 20, 30, 40], "phrase": "it"}]
    (found,) = convert(tmp_path, "regions", content, *more, "--direction", "locate")
    assert said(found) == ["<image>\n" + converters.LOCATE.format("it"), box]


PROBLEM = {
    "question": "Which is  warm?",
    "choices": ["ice", "tea"],
    "answer": 1,
    "hint": "",
    "image": "image.png",
    "lecture": "Heat.",
    "solution": "Tea is hot.",
}


@pytest.mark.parametrize(
    ("form", "asked", "answered"),
    [
        (
            "QCM-LEA",
            "Which is warm?\nContext: N/A\nOptions: (A) ice (B) tea\n<image>",
            "Heat. Tea is hot. The answer is B.",
        ),
        (
            "CQM-A",
            "Context: N/A\nQuestion: Which is warm?\nOptions: (A) ice (B) tea\n<image>",
            "The answer is B.",
        ),
    ],
)
def test_science_qa(tmp_path, form, asked, answered):
    content = {"11": PROBLEM, "12": PROBLEM | {"image": None, "hint": "Look."}}
    splits = {"train": ["11", "12"]}
    more = ("--form-of-answers", form, "--images", "train/{}")
    with_image, without = convert(tmp_path, "scienceqa", content, *more, answers=splits)
    assert with_image["image"] == "train/11/image.png"
    assert said(with_image) == [asked, answered]
    assert "image" not in without and "Context: Look." in said(without)[0]


def test_a_file_of_ones_own(tmp_path):
    lines = [
        {"image": "a.jpg", "question": "What?", "answer": "a cat"},
        {"image": "a.jpg", "question": "Which?", "choices": ["x", "y"], "answer": 1},
    ]
    short, letter = convert(tmp_path, "qa", "\n".join(map(json.dumps, lines)))
    assert said(short) == [f"<image>\nWhat?\n{converters.SHORT}", "a cat"]
    assert said(letter) == [f"<image>\nWhich?\nA. x\nB. y\n{converters.LETTER}", "B"]


@pytest.mark.parametrize("content", ["{", [{"image": "x"}], {"questions": 3}, [7]])
def test_a_file_of_another_form_is_one_sentence(tmp_path, content):
    complaint = convert(tmp_path, "qa", content, fails=True)
    assert complaint.startswith("converters.py: ") and complaint.count("\n") == 1
