"""Academic data sets -> records in the official JSON, as LLaVA-1.5 mixes them into its training.

    python converters.py vqa      --file questions.json --answers annotations.json --out vqa.json
    python converters.py gqa      --file train_questions.json --images gqa/images/{}.jpg --out ...

A question about a picture is often answered in a word, which alone would teach the model to be
curt. LLaVA-1.5 (arXiv 2310.03744, section 3.2) therefore says in the question what form the answer
should have, and the model learns to give that form when it is asked for. The questions about one
picture become one conversation; then the form is asked for once, in the first.

A box is [left, top, right, bottom], from 0 to 1, of the picture *after* it was padded to a square,
because that is what the model sees (`--aspect crop` for the picture itself).

`--images` says where a picture lies: {} stands for its number or name ({:012} for COCO's twelve
digits). Each line of a file of your own may be {"image", "question", "answer"}, or for multiple
choice {..., "choices": [...], "answer": number of the right one}: `qa`.
"""

import argparse
import json
import random
import sys
from collections import defaultdict
from pathlib import Path

import image

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."
DESCRIBE = "Please provide a short description for this region: {}"
LOCATE = "Please provide the bounding box coordinate of the region this sentence describes: {}"
# For stage 1 of LLaVA v1, which asks for each caption; v1.5 shows the picture without a question.
BRIEF = (
    "Say in a few words what the image shows.",
    "What is in the picture? Keep it short.",
    "Sum up the picture in one sentence.",
    "Give a brief account of this image.",
    "Describe the photo in short.",
    "Tell me concisely what can be seen here.",
    "Write one short line about this picture.",
    "What does this image show, briefly?",
    "Give the gist of the picture.",
    "Name the main thing to be seen in the image.",
    "In brief: what is this a picture of?",
)
LETTERS = "ABCDEFGHIJ"


def turns_of(pairs, prompt: str = "") -> list[dict]:
    """Turns of [(question, answer)]; the picture and the form of answers stand in the first."""
    turns = []
    for i, (question, answer) in enumerate(pairs):
        parts = ["<image>", question, prompt] if i == 0 else [question]
        turns.append({"from": "human", "value": "\n".join(filter(None, parts))})
        turns.append({"from": "gpt", "value": str(answer)})
    return turns


def merged(items, prompt: str, limit: int = 0) -> list[dict]:
    """One record for each picture of [(picture, question, answer)], in the order of the pictures.

    limit: most questions in a conversation; 0: all. More make further records of the same picture.
    """
    by_picture = defaultdict(list)
    for picture, question, answer in items:
        by_picture[picture].append((question, answer))
    records = []
    for picture, pairs in by_picture.items():
        for start in range(0, len(pairs), limit or len(pairs)):
            part = pairs[start : start + limit] if limit else pairs
            name = f"{Path(picture).stem}-{start}" if start else Path(picture).stem
            records.append({"id": name, "image": picture, "conversations": turns_of(part, prompt)})
    return records


def choice(question: str, choices, answer: int, shift: int = 0) -> tuple[str, str]:
    """A question with lettered options, turned round by `shift`, and the right one's letter."""
    order = [(i + shift) % len(choices) for i in range(len(choices))]
    lines = [f"{LETTERS[place]}. {choices[i]}" for place, i in enumerate(order)]
    return "\n".join([question, *lines]), LETTERS[order.index(answer)]


def box_text(box, size, aspect: str = "pad") -> str:
    """(left, top, right, bottom) in pixels of a picture of (width, height) -> "[0.10, ...]"."""
    (width, height), offset = size, (0, 0)
    if aspect == "pad":
        side = max(size)
        offset, (width, height) = ((side - width) // 2, (side - height) // 2), (side, side)
    shares = [(value + offset[i % 2]) / (width, height)[i % 2] for i, value in enumerate(box)]
    return "[" + ", ".join(f"{min(max(share, 0), 1):.2f}" for share in shares) + "]"


# ---- one function for each form of file; args are the command line's -----------------------


def vqa(args) -> list[dict]:
    """VQAv2 and OK-VQA: a file of questions and a file of annotations."""
    answers = {a["question_id"]: a for a in read(args.answers)["annotations"]}
    items = []
    for q in read(args.file)["questions"]:
        found = answers[q["question_id"]]
        answer = found.get("multiple_choice_answer") or most_frequent(found["answers"])
        items.append((args.images.format(q["image_id"]), q["question"], answer))
    return merged(items, SHORT, args.limit)


def most_frequent(answers) -> str:
    """Of ten people's answers the one given most often; of equals the first."""
    texts = [a["answer"] if isinstance(a, dict) else a for a in answers]
    return max(texts, key=texts.count)


def gqa(args) -> list[dict]:
    """GQA: {number: {"imageId", "question", "answer"}}."""
    items = [
        (args.images.format(q["imageId"]), q["question"], q["answer"])
        for q in read(args.file).values()
    ]
    return merged(items, SHORT, args.limit)


def ocr_vqa(args) -> list[dict]:
    """OCR-VQA: {number: {"questions", "answers", "split"}}, of which split 1 is for training."""
    items = [
        (args.images.format(number), question, answer)
        for number, book in read(args.file).items()
        if book.get("split", 1) == 1
        for question, answer in zip(book["questions"], book["answers"], strict=True)
    ]
    return merged(items, SHORT, args.limit)


def aokvqa(args) -> list[dict]:
    """A-OKVQA: each question as often as it has choices, turned round by one each time."""
    rounds = defaultdict(list)  # the copies of a question go to conversations of their own
    for q in read(args.file):
        for shift in range(len(q["choices"])):
            asked = choice(q["question"], q["choices"], q["correct_choice_idx"], shift)
            rounds[shift].append((args.images.format(q["image_id"]), *asked))
    return [record for items in rounds.values() for record in merged(items, LETTER, args.limit)]


def textcaps(args) -> list[dict]:
    """TextCaps: {"data": [{"image_id", "caption_str"}]}; one of a picture's captions, by chance."""
    captions = defaultdict(list)
    for item in read(args.file)["data"]:
        captions[item["image_id"]] += item.get("reference_strs") or [item["caption_str"]]
    return [
        {
            "id": str(number),
            "image": args.images.format(number),
            "conversations": turns_of([(CAPTION, random.Random(f"{args.seed}{number}").choice(c))]),
        }
        for number, c in captions.items()
    ]


def captions(args) -> list[dict]:
    """Stage 1: a list or lines of {"image", "caption"}; --brief asks for it, as v1 does."""
    records = []
    for i, item in enumerate(read(args.file)):
        ask = random.Random(f"{args.seed}{i}").choice(BRIEF) if args.brief else ""
        picture = args.images.format(item["image"])
        turns = turns_of([(ask, item["caption"])])
        records.append({"id": item.get("id", str(i)), "image": picture, "conversations": turns})
    return records


def regions(args) -> list[dict]:
    """Visual Genome's regions, or RefCOCO's as lines {"image", "box", "phrase"}: in pixels.

    Asked by chance for the description of a box, or for the box that fits a description; with
    --direction always for one of them.
    """
    items, sizes = [], {}
    for region in flat_regions(read(args.file)):
        picture = args.images.format(region["image"])
        if picture not in sizes:
            sizes[picture] = image.size_of(Path(args.root, picture))
        box = box_text(region["box"], sizes[picture], args.aspect)
        chance = random.Random(f"{args.seed}{len(items)}").random() < 0.5
        describe = {"describe": True, "locate": False}.get(args.direction, chance)
        phrase = region["phrase"].strip()
        ask = DESCRIBE.format(box) if describe else LOCATE.format(phrase)
        items.append((picture, ask, phrase if describe else box))
    return merged(items, "", args.limit)


def flat_regions(content):
    for item in content:
        for region in item.get("regions", [item]):
            if "box" not in region:  # Visual Genome
                x, y, w, h = (region[key] for key in ("x", "y", "width", "height"))
                region = region | {"box": (x, y, x + w, y + h), "image": region["image_id"]}
            yield region


def scienceqa(args) -> list[dict]:
    """ScienceQA: problems.json and (--answers) pid_splits.json, as QCM-LEA (v1) or CQM-A (v1.5)."""
    problems, records = read(args.file), []
    for number in read(args.answers)[args.split]:
        problem = problems[number]
        options = " ".join(f"({LETTERS[i]}) {c}" for i, c in enumerate(problem["choices"]))
        question, context = problem["question"], problem["hint"].strip() or "N/A"
        if args.answer_form == "QCM-LEA":
            asked = f"{question}\nContext: {context}\nOptions: {options}"
            because = f"{problem['lecture']} {problem['solution']} "
        else:
            asked = f"Context: {context}\nQuestion: {question}\nOptions: {options}"
            because = ""
        answer = f"{because}The answer is {LETTERS[problem['answer']]}.".replace("  ", " ").strip()
        asked, record = asked.replace("  ", " ").strip(), {"id": number}
        if problem["image"]:
            record["image"] = args.images.format(f"{number}/{problem['image']}")
            asked += "\n<image>"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        records.append(record | {"conversations": turns})
    return records


def qa(args) -> list[dict]:
    """Your own: a list or lines of {"image", "question", "answer"}; see above."""
    short, letter = [], []
    for item in read(args.file):
        picture = args.images.format(item["image"])
        if "choices" in item:
            asked = choice(item["question"], item["choices"], item["answer"])
            letter.append((picture, *asked))
        else:
            short.append((picture, item["question"], item["answer"]))
    return merged(short, SHORT, args.limit) + merged(letter, LETTER, args.limit)


FORMS = {
    f.__name__: f for f in (vqa, gqa, ocr_vqa, aokvqa, textcaps, captions, regions, scienceqa, qa)
}


def read(path):
    """JSON, or JSON lines."""
    if path is None:
        raise ValueError("this form has two files: add --answers FILE")
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    try:
        return json.loads(text)
    except ValueError:
        try:
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise ValueError(f"{path} is neither JSON nor JSON lines: {error}") from None


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    forms = "; ".join(f"{name}: {f.__doc__.partition(':')[0]}" for name, f in FORMS.items())
    add("form", choices=FORMS, help=forms)
    add("--file", required=True, help="the questions")
    add("--answers", help="a second file: answers of vqa, splits of scienceqa")
    add("--out", required=True, help="JSON file to write")
    add("--images", default="{}", help="where a picture lies; {} is its number or name")
    add("--root", default=".", help="regions: folder that these paths start from")
    add("--limit", type=int, default=0, help="most questions in a conversation; 0: all")
    add("--brief", action="store_true", help="captions: ask for them, as in stage 1 of v1")
    add("--direction", choices=("both", "describe", "locate"), default="both", help="regions")
    add("--aspect", choices=("pad", "crop"), default="pad", help="regions: what boxes refer to")
    add("--split", default="train", help="scienceqa")
    add("--form-of-answers", dest="answer_form", choices=("QCM-LEA", "CQM-A"), default="QCM-LEA")
    add("--seed", type=int, default=0, help="of what is left to chance")
    args = parser.parse_args()
    try:
        records = FORMS[args.form](args)
    except ValueError as error:
        parser.exit(2, f"converters.py: {error}\n")
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        parser.exit(
            2,
            f"converters.py: {args.file} is not of the form {args.form!r} "
            f"({type(error).__name__}: {error}); see --help\n",
        )
    Path(args.out).write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n")
    n_turns = sum(len(record["conversations"]) for record in records) // 2
    print(f"{len(records):,} records with {n_turns:,} questions", file=sys.stderr)


if __name__ == "__main__":
    main()
