"""Captions and boxes -> instruction data, written by a language model that never sees a picture.

LLaVA (arXiv 2304.08485, section 3): a picture is put into words, several captions and the boxes of
the things in it, and a text-only teacher is asked to write as one who is looking at it:

    conversation   questions and answers in turns               from the captions alone
    detail         one thorough description                     from captions and boxes
    reasoning      one hard question, answered step by step     from captions and boxes

    python instruct.py --type detail --captions captions_train2017.json \
        --boxes instances_train2017.json --model gpt-4o --out detail.json

The teacher is anything that speaks OpenAI's protocol (`--base-url`; key in OPENAI_API_KEY), asked
with a system text and examples from seeds/, our own. Every answer is checked and lands at once in
OUT.answers.jsonl, the good ones and the bad ones with the reason; a killed run goes on from there
and asks for nothing twice. OUT is written at the end, in the official JSON. The only thing that
leaves the machine is the text that `--dry-run` prints.
"""

import argparse
import functools
import json
import os
import random
import re
import sys
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SEEDS = Path(__file__).parent / "seeds"
TYPES = ("conversation", "detail", "reasoning")
DETAIL_QUESTIONS = (
    "Describe the picture in detail.",
    "What does this picture show? Leave nothing out.",
    "Give a thorough description of the image.",
    "Tell me everything that can be seen here.",
    "Walk me through the picture, piece by piece.",
    "Write a long and careful description of this image.",
    "What is in the photo? Please be exact and complete.",
    "Explain at length what the image shows.",
    "Describe the scene, with all things in it and where they are.",
    "How would you describe this picture to someone who cannot see it?",
    "Take a close look at the image and describe it fully.",
    "Please give me all details of this photo.",
    "What do you see? Answer with a full description.",
    "Put the whole picture into words.",
    "Describe what is going on in this image, in depth.",
    "Give an account of the image that covers every part of it.",
)
# Words that give away that the teacher was told about the picture and did not see it.
TOLD = re.compile(
    r"\b(captions?|bounding box(es)?|coordinates?|(the|these|given|provided) (sentences?|box(es)?)"
    r"|the (provided|given) (description|text|information))\b|\[?\b[01]\.\d{2,}",
    re.I,
)
SIZES = {"conversation": (1, 200), "detail": (40, 500), "reasoning": (20, 500)}  # words an answer


# ---- what the teacher is told ---------------------------------------------------------------


@functools.cache
def read_seeds(kind: str) -> list[dict]:
    """The messages before the question: system text, then examples as turns."""
    text = (SEEDS / f"{kind}.txt").read_text()
    parts = re.split(r"^## (system|context|answer)\n", text, flags=re.M)
    roles = {"system": "system", "context": "user", "answer": "assistant"}
    return [
        {"role": roles[name], "content": text.strip()}
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    ]


def read_pictures(captions: Path, boxes: Path | None, limit: int | None = None) -> list[dict]:
    """[{"id", "file", "captions", "boxes": [(category, (left, top, right, bottom))]}]

    captions: COCO's captions file (boxes: its instances file), or a folder of JSON files such as
    the tiny world's, {"captions": [...], "instances": [{"category", "bbox"}]} beside pictures
    """
    if captions.is_dir():
        files = {file.stem: file.name for file in captions.iterdir() if file.suffix != ".json"}
        found = []
        for file in sorted(captions.glob("*.json"))[:limit]:
            told = read(file)
            things = [(item["category"], item["bbox"]) for item in told.get("instances", [])]
            found.append(
                {
                    "id": file.stem,
                    "file": files.get(file.stem, file.stem),
                    "captions": told["captions"],
                    "boxes": things,
                }
            )
        return found
    content, texts, things = read(captions), defaultdict(list), defaultdict(list)
    for item in content["annotations"]:
        texts[item["image_id"]].append(item["caption"].strip())
    sizes = {item["id"]: (item["width"], item["height"]) for item in content["images"]}
    if boxes is not None:
        instances = read(boxes)
        names = {item["id"]: item["name"] for item in instances["categories"]}
        for item in instances["annotations"]:
            if item["image_id"] in sizes and not item.get("iscrowd"):
                (x, y, w, h), (width, height) = item["bbox"], sizes[item["image_id"]]
                box = (x / width, y / height, (x + w) / width, (y + h) / height)
                things[item["image_id"]].append((names[item["category_id"]], box))
    return [
        {
            "id": f"{item['id']:012}",
            "file": item["file_name"],
            "captions": texts[item["id"]],
            "boxes": things[item["id"]],
        }
        for item in content["images"]
        if texts[item["id"]]
    ][:limit]


def read(file: Path):
    try:
        return json.loads(Path(file).read_text())
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None


def context(picture: dict, kind: str) -> str:
    """The picture in words: captions, one a line; then, but for conversations, the boxes."""
    lines = list(picture["captions"])
    if kind != "conversation":
        lines.append("")
        for category, box in picture["boxes"]:
            lines.append(f"{category}: [{', '.join(f'{share:.3f}' for share in box)}]")
    return "\n".join(lines).strip()


def messages(picture: dict, kind: str) -> list[dict]:
    return [*read_seeds(kind), {"role": "user", "content": context(picture, kind)}]


# ---- what comes back ------------------------------------------------------------------------


def pairs_of(text: str, kind: str, random: random.Random) -> list[tuple[str, str]]:
    """The teacher's text -> [(question, answer)]. Raises ValueError if it has another form."""
    text = text.strip()
    if kind == "detail":
        return [(random.choice(DETAIL_QUESTIONS), text)]
    blocks = [block.strip() for block in re.split(r"^\s*={3,}\s*$", text, flags=re.M)]
    blocks = [block for block in blocks if block]
    if not blocks or len(blocks) % 2:
        raise ValueError(f"form: {len(blocks)} blocks between ===, expected pairs")
    pairs = []
    for i, block in enumerate(blocks):
        label = ("Question", "Answer")[i % 2]
        match = re.fullmatch(rf"{label}:\s*(.+)", block, re.S)
        if not match:
            raise ValueError(f"form: block {i + 1} does not begin with {label}:")
        pairs.append(match[1].strip())
    pairs = list(zip(pairs[::2], pairs[1::2], strict=True))
    if kind == "reasoning" and len(pairs) != 1:
        raise ValueError(f"form: {len(pairs)} questions, expected one")
    return pairs


def check(pairs, kind: str):
    """Raise ValueError saying why these are no good instruction data."""
    least, most = SIZES[kind]
    for question, answer in pairs:
        if told := TOLD.search(f"{question}\n{answer}"):
            raise ValueError(f"told: it mentions {told[0]!r}")
        n_words = len(answer.split())
        if not least <= n_words <= most:
            raise ValueError(f"length: an answer of {n_words} words, expected {least} to {most}")
        if len(question.split()) > 80:
            raise ValueError(f"length: a question of {len(question.split())} words")
        if "<image>" in question + answer:
            raise ValueError("form: it contains <image>")
    if len({question for question, _ in pairs}) < len(pairs):
        raise ValueError("form: a question is asked twice")


def record_of(picture: dict, pairs, images: str, random: random.Random) -> dict:
    """An official record; the picture stands before or after the first question, by chance."""
    turns = []
    for i, (question, answer) in enumerate(pairs):
        if i == 0:
            question = random.choice((f"<image>\n{question}", f"{question}\n<image>"))
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {
        "id": picture["id"],
        "image": images.format(picture["file"]),
        "conversations": turns,
    }


# ---- asking ---------------------------------------------------------------------------------


def ask_all(pictures: list[dict], args) -> int:
    """Ask about every picture that has no answer yet; returns how many requests failed."""
    try:
        import openai
    except ImportError:
        raise ValueError("instruct.py needs the openai client: pip install openai") from None
    client = openai.OpenAI(
        base_url=args.base_url,
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
        max_retries=args.retries,  # with growing pauses, or as long as the server asks for
        timeout=args.timeout,
    )
    log_file = Path(f"{args.out}.answers.jsonl")
    done = answered(log_file)
    waiting = [picture for picture in pictures if (picture["id"], args.type) not in done]
    if done:
        print(f"{len(pictures) - len(waiting):,} were answered before", file=sys.stderr)
    lock, counts, started = threading.Lock(), Counter(), time.time()
    log = open(log_file, "a")

    def ask(picture: dict):
        row = {"id": picture["id"], "type": args.type}
        try:
            reply = client.chat.completions.create(
                model=args.model,
                messages=messages(picture, args.type),
                temperature=args.temperature,
                max_tokens=args.max_tokens,
            )
            row |= judged(reply, picture, args)
        except openai.AuthenticationError as error:
            raise ValueError(f"the server refuses the key in OPENAI_API_KEY: {error}") from None
        except (openai.OpenAIError, ValueError) as error:
            row = {"failed": f"{type(error).__name__}: {error}"}
        with lock:
            counts["failed" if "failed" in row else "rejected" if "reason" in row else "good"] += 1
            counts["asked"] += row.get("tokens", [0, 0])[0]
            counts["written"] += row.get("tokens", [0, 0])[1]
            if "failed" in row:
                print(f"\n{picture['id']}: {row['failed'][:200]}", file=sys.stderr)
            else:
                print(json.dumps(row, ensure_ascii=False), file=log, flush=True)
            n = counts["good"] + counts["rejected"] + counts["failed"]
            rate = n / (time.time() - started)
            left = (len(waiting) - n) / rate
            line = f"{n:,} of {len(waiting):,}, {rate:.2f}/s, {left:.0f} s left; "
            line += ", ".join(f"{counts[key]:,} {key}" for key in ("good", "rejected", "failed"))
            line += f"; tokens: {counts['asked']:,} asked, {counts['written']:,} written"
            print(f"\r{line} ", end="\n" if n == len(waiting) else "", file=sys.stderr, flush=True)

    with log, ThreadPoolExecutor(args.jobs) as pool:
        tasks = [pool.submit(ask, picture) for picture in waiting]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return counts["failed"]


def judged(reply, picture: dict, args) -> dict:
    """A reply of the server -> {"record"} or {"reason", "text"}, and what it cost."""
    if not getattr(reply, "choices", None) or not isinstance(reply.choices[0].message.content, str):
        raise ValueError("the server answered without any text")
    chosen, usage = reply.choices[0], reply.usage
    text, chance = chosen.message.content, random.Random(f"{args.seed}{picture['id']}")
    row = {"tokens": [usage.prompt_tokens, usage.completion_tokens] if usage else [0, 0]}
    try:
        if chosen.finish_reason == "length":
            raise ValueError(f"length: cut off after {args.max_tokens} tokens")
        pairs = pairs_of(text, args.type, chance)
        check(pairs, args.type)
    except ValueError as error:
        return row | {"reason": str(error), "text": text}
    return row | {"record": record_of(picture, pairs, args.images, chance)}


def answered(log_file: Path) -> set:
    """The (id, type) that need not be asked again; a line that a kill cut short is taken off."""
    if not log_file.exists():
        return set()
    lines = log_file.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        log_file.write_bytes(b"".join(lines[:-1]))
        lines = lines[:-1]
    rows = [json.loads(line) for line in lines]
    return {(row["id"], row["type"]) for row in rows}


def write(out: Path, kind: str):
    """The records among the answers so far, in the official JSON, and a word on the others."""
    rows = [json.loads(line) for line in Path(f"{out}.answers.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["type"] == kind]
    records = sorted((row["record"] for row in rows if "record" in row), key=lambda r: r["id"])
    partial = Path(f"{out}.tmp")
    partial.write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n")
    os.replace(partial, out)
    asked, written = (sum(row["tokens"][i] for row in rows) for i in (0, 1))
    print(f"{out}: {len(records):,} records; {asked:,} tokens asked, {written:,} written")
    reasons = Counter(row["reason"].partition(":")[0] for row in rows if "reason" in row)
    for reason, n in reasons.items():
        print(f"rejected for {reason}: {n:,} (see {out}.answers.jsonl)")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--type", choices=TYPES, default="conversation", help="what to write")
    add("--captions", type=Path, required=True, help="COCO's captions JSON, or a folder, see below")
    add("--boxes", type=Path, help="COCO's instances JSON; wanted for detail and reasoning")
    add("--images", default="{}", help="path of a picture in the records; {} is its file name")
    add("--limit", type=int, help="ask about this many pictures, from the first")
    add("--out", type=Path, default=Path("instruct.json"), help="JSON file to write")
    add("--base-url", help="of the server; default: OpenAI's")
    add("--model", default="gpt-4o", help="name of the teacher on that server")
    add("--temperature", type=float, default=0.7)
    add("--max-tokens", type=int, default=1024, help="longest answer; longer ones are rejected")
    add("--jobs", type=int, default=8, help="requests at a time")
    add("--retries", type=int, default=5, help="of a request that fails, with growing pauses")
    add("--timeout", type=float, default=120, help="seconds to wait for an answer")
    add("--seed", type=int, default=0, help="of what is left to chance here")
    add(
        "--dry-run", action="store_true", help="print the messages of the first picture, ask nobody"
    )
    args = parser.parse_args()
    try:
        pictures = read_pictures(args.captions, args.boxes, args.limit)
        if not pictures:
            raise ValueError(f"{args.captions} describes no pictures")
        if args.type != "conversation" and not any(picture["boxes"] for picture in pictures):
            raise ValueError(f"--type {args.type} is written from boxes too: add --boxes FILE")
        if args.dry_run:
            for message in messages(pictures[0], args.type):
                print(f"--- {message['role']}\n{message['content']}\n")
            return
        failed = ask_all(pictures, args)
        write(args.out, args.type)
    except ValueError as error:
        parser.exit(2, f"instruct.py: {error}\n")
    except KeyError as error:
        parser.exit(2, f"instruct.py: {args.captions} or {args.boxes} lacks the key {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped; the same command goes on\n")
    if failed:
        parser.exit(1, f"{failed:,} requests failed; the same command asks them again\n")


if __name__ == "__main__":
    main()
