"""How well does a tiny model see? Exact answers on fresh pictures, family by family, as a table.

    python tiny/evaluate.py                     the bundled model: all rows, about 15 minutes
    python tiny/evaluate.py --pictures 200      the same, roughly, in one
    python tiny/evaluate.py --model runs/stage2 --rows fresh

Rows: `fresh` pictures of a new seed; `blind`, the same questions about a grey sheet, which shows
what guessing gives; `unseen`, only (kind, place, size) combinations that training never drew;
`fluent`, an art style that training never saw. Columns: the share of short answers that are exactly
right; of the stickers there, the share that detailed descriptions name; and of those they name, the
share that is not there.
"""

import argparse
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import talk
import world

import data
from generate import generate
from llava import LLaVA

HERE = Path(__file__).parent
SEED = 3  # a world of its own: not trained on, not probed with
ROWS = ("fresh", "blind", "unseen", "fluent")
FAMILIES = {**talk.SHORT, "choice": talk.choice}
GREY = Image.new("RGB", (world.SHEET, world.SHEET), (128, 128, 128))


def view(scene, row: str) -> Image.Image:
    return GREY if row == "blind" else world.draw(scene, "fluent" if row == "fluent" else "noto")


def answers(model, pictures, questions, max_new_tokens: int, batch: int = 64) -> list[str]:
    """The model's greedy answers, in batches of questions of similar length."""
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
    found = [""] * len(questions)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        prompts = [
            data.render([("human", f"<image>\n{questions[i]}")], model.template) for i in part
        ]
        ids = generate(model, prompts, [pictures[i] for i in part], max_new_tokens)
        for i, row in zip(part, ids, strict=True):
            found[i] = model.tokenizer.decode(row).strip()
    return found


def short_answers(model, scenes, row: str) -> dict[str, float]:
    """Share of exact answers for each family of questions; one question a picture and family."""
    pictures = [view(scene, row) for scene in scenes]
    shares = {}
    for number, (name, ask) in enumerate(FAMILIES.items()):
        asked = [
            (i, turn)
            for i, scene in enumerate(scenes)
            if (turn := ask(scene, np.random.RandomState([SEED, i, number])))
        ]
        prompt = talk.LETTER_PROMPT if name == "choice" else talk.SHORT_PROMPT
        questions = [f"{question}\n{prompt}" for _, (question, _) in asked]
        said = answers(model, [pictures[i] for i, _ in asked], questions, 8)
        right = [text == answer for text, (_, (_, answer)) in zip(said, asked, strict=True)]
        shares[name] = sum(right) / len(right)
    shares["mean"] = sum(shares.values()) / len(shares)
    return shares


def descriptions(model, scenes, row: str) -> dict[str, float]:
    """Stickers named out of those there, and invented out of those named."""
    pictures = [view(scene, row) for scene in scenes]
    said = answers(model, pictures, [talk.DETAIL_QUESTIONS[0]] * len(scenes), 120)
    there = named = right = 0
    for text, scene in zip(said, scenes, strict=True):
        truth = Counter(s.kind for s in scene.stickers)
        found = Counter(k for k in re.findall(r"There is an? \w+ (\w+)", text))
        there += truth.total()
        named += found.total()
        right += (truth & found).total()
    return {"named": right / there, "invented": (named - right) / max(1, named)}


def table(results: dict) -> str:
    """The results as a Markdown table, one line a row."""
    columns = list(next(iter(results.values())))
    lines = ["| pictures | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row, figures in results.items():
        lines.append(f"| {row} | " + " | ".join(f"{figures[c]:.1%}" for c in columns) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=HERE / "weights" / "llava", help="LLaVA folder")
    parser.add_argument("--pictures", type=int, default=2000, help="fresh pictures per row")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--out", type=Path, help="JSON file to write the figures to")
    args = parser.parse_args()
    model = LLaVA.from_pretrained(args.model, dtype=torch.float32)
    results, started = {}, time.time()
    for row in args.rows:
        scenes = [world.make_scene(SEED, i, row == "unseen") for i in range(args.pictures)]
        results[row] = short_answers(model, scenes, row) | descriptions(model, scenes, row)
        print(f"{row}: {time.time() - started:.0f} s", file=sys.stderr)
    print(table(results))
    if args.out:
        rounded = {r: {k: round(v, 3) for k, v in f.items()} for r, f in results.items()}
        args.out.write_text(
            json.dumps({"pictures": args.pictures, "rows": rounded}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
