"""Look at training data before anything is paid for: `python data.py --check`, and `--show`.

Check reads every record and decodes every picture, in as many processes as asked for, and reports
what training would trip over. Show prints what the model reads, and in green what it learns.
"""

import functools
import itertools
from collections import Counter, defaultdict
from pathlib import Path

import batches
from data import IGNORE, Conversations, of_each
from records import files_of

# The response-format prompts of LLaVA-1.5 (arXiv 2310.03744, table 7), in small letters.
FORMATS = (
    "answer the question using a single word or phrase",
    "answer with the option's letter from the given choices directly",
    "provide a one-sentence caption for the provided image",
    "provide a short description for this region",
    "provide the bounding box coordinate of the region this sentence describes",
)
GREEN, PLAIN = "\033[32m", "\033[0m"
BARS = 12  # rows of the histogram


def findings(samples: Conversations, index: int) -> dict:
    """What `check` counts of a record; its pictures are decoded and thrown away."""
    record = samples.records[index]
    files, turns = files_of(record), record["conversations"]
    text = "\n".join(turn["value"] for turn in turns).lower()
    found = {
        "source": files[0].rpartition("/")[0] or "." if files else "text alone",
        "formats": [prompt for prompt in FORMATS if prompt in text],
        "led": bool(turns) and turns[0]["from"] == "gpt",
        "gif": any(is_misnamed_gif(samples.images / file) for file in files),
        "length": 0,
    }
    sample = samples[index]
    if "bad" in sample:
        return found | {"bad": sample["bad"]}
    length = len(sample["input_ids"])
    length += sum(samples.n_visual(size) - 1 for size in sample["image_sizes"])
    learned = int((sample["labels"] != IGNORE).sum())
    return found | {"length": length, "learned": learned, "cut": sample["cut"]}


def is_misnamed_gif(file: Path) -> bool:
    """Some of OCR-VQA's .jpg are GIFs. They are read as what they are, unless they move."""
    if file.suffix.lower() == ".gif" or not file.is_file():
        return False
    with open(file, "rb") as opened:
        return opened.read(4) == b"GIF8"


def check(samples: Conversations, workers: int, row_length: int) -> int:
    """Print what is in a data file; returns the number of bad records."""
    ask = functools.partial(findings, samples)
    found = of_each(ask, len(samples), workers, "checking")
    bad = [item["bad"] for item in found if "bad" in item]
    good = [item for item in found if "bad" not in item]
    for why in bad[:20]:
        print(f"bad: {why}")
    if len(bad) > 20:
        print(f"bad: ... and {len(bad) - 20:,} more")
    print(f"{len(found):,} records, {len(bad):,} bad")
    if not good:
        return len(bad)
    lengths = [item["length"] for item in good]
    cut, led = sum(item["cut"] > 0 for item in good), sum(item["led"] for item in found)
    print(f"{sum(lengths):,} tokens, {sum(item['learned'] for item in good):,} of them learned")
    print(f"{cut:,} records ({100 * cut / len(good):.2f} %) are too long and lose questions")
    print(f"{led:,} records begin with an answer, which is left out")
    print(f"{sum(item['gif'] for item in found):,} pictures are GIFs under another name")
    tables(found, good, lengths)
    pictures = samples.records.pictures[["bad" not in item for item in found]]
    row_length = max(row_length, *lengths)
    rows = sum(batches.packed(lengths, pictures, row_length, 1, 0, 0), [])
    seen = sum(len({pictures[i] for i in row} - {0}) for row in rows)
    padding = 100 * (1 - sum(lengths) / (len(rows) * row_length))
    print(f"\npacked: {len(rows):,} rows of {row_length} tokens, {padding:.1f} % padding;", end=" ")
    n_asked = int((pictures != 0).sum())
    saved = (n_asked - seen) * samples.n_visual((640, 480))
    print(f"{seen:,} pictures read for {n_asked:,} records, {saved:,} visual words saved")
    return len(bad)


def tables(found: list[dict], good: list[dict], lengths: list[int]):
    """Records by source, by response format, and by length."""
    sources = defaultdict(list)
    for item in good:
        sources[item["source"]].append(item["length"])
    print(f"\n{'source':30} {'records':>9} {'tokens':>13} {'a record':>9}")
    for source, sizes in sorted(sources.items()):
        mean = sum(sizes) / len(sizes)
        print(f"{source[-30:]:30} {len(sizes):9,} {sum(sizes):13,} {mean:9.0f}")
    print(f"\n{'response-format prompt':76} {'records':>9}")
    formats = Counter(prompt for item in found for prompt in item["formats"])
    for prompt in FORMATS:
        print(f"{prompt:76} {formats[prompt]:9,}")
    print(f"\n{'tokens':15} {'records':>9}")
    step = -(-(max(lengths) + 1) // BARS)
    counts = Counter(length // step for length in lengths)
    for i in range(max(counts) + 1):
        bar = "#" * round(40 * counts[i] / max(counts.values()))
        print(f"{i * step:6} - {(i + 1) * step - 1:6} {counts[i]:9,} {bar}".rstrip())


def show(samples: Conversations, n: int, colour: bool):
    """Print the first records: control tokens by name, a picture as [576×img], answers green.

    Without colour, what is learned stands between ⟦ and ⟧.
    """
    start, end = (GREEN, PLAIN) if colour else ("⟦", "⟧")
    for index in range(min(n, len(samples))):
        sample = samples[index]
        print(f"--- record {index}, id {samples.records[index].get('id')}")
        if "bad" in sample:
            print(f"{sample['bad']}\n")
            continue
        ids, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
        sizes = iter(sample["image_sizes"])
        tokens = list(zip(ids, (label != IGNORE for label in labels), strict=True))
        for learned, run in itertools.groupby(tokens, key=lambda token: token[1]):
            text = "".join(spelled([i for i, _ in run], samples, sizes))
            print(f"{start}{text}{end}" if learned else text, end="")
        print(f"\n{len(ids)} ids, {sum(label != IGNORE for label in labels)} learned\n")


def spelled(ids: list[int], samples: Conversations, sizes):
    """The texts of ids, leading spaces kept, control tokens and pictures by name."""
    words = samples.tokenizer
    letter = words.encode("a")  # what decode drops in front of a text, it keeps after a letter
    for name, run in itertools.groupby(ids, key=lambda i: "img" if i < 0 else words.name_of(i)):
        run = list(run)
        if name == "img":
            yield from (f"[{samples.n_visual(next(sizes))}×img]" for _ in run)
        else:
            yield words.decode([*letter, *run])[1:] if name is None else name * len(run)


def main():
    print("python data.py --check FILE, or --show FILE; see python data.py --help")


if __name__ == "__main__":
    import argparse

    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    main()
