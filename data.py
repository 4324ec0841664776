"""Conversations -> token ids and labels -> batches: the official LLaVA JSON format, read exactly.

A record is {"id", "image" (a path, absent for text), "conversations": [{"from": "human" | "gpt",
"value"}]}, with `<image>` in the text where the picture goes (LLaVA, arXiv 2304.08485, section 3).
A template writes the turns as one string; the model learns the answers and nothing else:

    text   A chat between ... USER: <image>\\nWhat is this? ASSISTANT: A cat.</s>USER: ...
    learn  ................................................ ^^^^^^^^^^^^

Ids and labels are built together, turn by turn. (The original tokenises the whole string and then
measures substrings to find the answers again; where the two disagree it drops the sample without
an error.) Here a record that would teach nothing is an error that names it.

Read next: llava.py puts the pictures in; train.py takes the batches.
"""

import argparse
import functools
import os
import random
import re
import sys
import time
from pathlib import Path

import torch

import image
import tokenizer
from records import Records, files_of
from templates import (
    CONTROL,
    IMAGE_TAG,
    TOKENS,
    control_tokens,
    pieces,
    render,
    template_named,
    training_pieces,
)

IMAGE_TOKEN = -200  # stands in input_ids where a picture goes
IGNORE = -100  # stands in labels where nothing is learned
TINY = Path(__file__).parent / "tiny" / "weights" / "llama"
MARKS = re.compile(f"({IMAGE_TAG}|{TOKENS})")


def encode_prompt(text: str, tokenizer, template: str | None = None) -> list[int]:
    """Token ids of a text, with IMAGE_TOKEN for each `<image>`.

    Each piece between them is tokenised as a text of its own, as in the original, so with a
    sentencepiece tokenizer the piece after a picture starts with a "▁" of its own. Where a
    `template` is named, its control tokens are tokens: right for a rendered prompt. Without it
    nothing in the text can end a turn, which is what a user's own words call for.
    """
    tokens = control_tokens(template) if template else set()
    found = [(piece, False, piece in tokens) for piece in CONTROL.split(text)]
    return encode_pieces(found, tokenizer)[0]


def encode_pieces(parts, tokenizer) -> tuple[list[int], list[int]]:
    """Token ids and labels of the `pieces` of a conversation; see `encode_turns`."""
    ids = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
    labels = [IGNORE] * len(ids)
    picture = [tokenizer.token_id(token) for token in tokenizer.image_frame]
    picture.insert(1, IMAGE_TOKEN)
    run, run_labels = "", []  # text between two control tokens or pictures, and who says what
    after_control = False

    def finish_run():
        nonlocal run, run_labels
        new, starts = tokenizer.encode_with_starts(run, after_control)
        learned = [run_labels[min(start, len(run) - 1)] for start in starts]
        ids.extend(new)
        labels.extend(i if learn else IGNORE for i, learn in zip(new, learned, strict=True))
        run, run_labels = "", []

    for text, is_answer, is_template in parts:
        for piece in MARKS.split(text):
            if piece == IMAGE_TAG and not is_answer:
                new = picture
            elif is_template and CONTROL.fullmatch(piece):
                new = [control_id(piece, tokenizer)]
                if new == [tokenizer.bos_id] and ids == new and not run:
                    continue  # a template that writes its own begin-of-sequence
            else:
                run += piece
                run_labels += [is_answer] * len(piece)
                continue
            finish_run()
            ids += new
            labels += new if is_answer else [IGNORE] * len(new)
            after_control = new != [IMAGE_TOKEN]  # what follows a picture is a text of its own
    finish_run()
    return ids, labels


def stops(template: str, tokenizer) -> tuple[set[int], str | None]:
    """What ends an answer: token ids, and a text if the template's end is no token ("###")."""
    style = template_named(template)
    ids = {tokenizer.eos_id} - {None}
    if style is None:
        return ids, None
    if CONTROL.fullmatch(style.stop_token):
        return ids | {control_id(style.stop_token, tokenizer)}, None
    return ids, style.stop_token


def control_id(token: str, tokenizer) -> int:
    """The id of a control token; `<s>` and `</s>` are whatever begins and ends a sequence."""
    name = {"<s>": "bos_id", "</s>": "eos_id"}.get(token)
    own = getattr(tokenizer, name) if name else None
    return tokenizer.token_id(token) if own is None else own


def encode_turns(turns, tokenizer, template: str) -> tuple[list[int], list[int]]:
    """Token ids and labels of turns [(role, text)]; labels are IGNORE outside of the answers.

    Text up to the next control token or picture is tokenised in one go, and a token belongs to the
    answer if it starts in it: the space before an answer is part of its first word.
    """
    return encode_pieces(pieces(turns, template), tokenizer)


def encode(conversations, tokenizer, template, max_length=None, image_last=False):
    """Official turns [{"from", "value"}] -> (input_ids, labels), two lists of equal length.

    A leading gpt turn is skipped and a single `<image>` moves to the front of its turn, as in the
    original (`image_last`: in the first turn to the end, as LLaVA v1 did half of the time); several
    tags stay where they are, where there they collapse into one. Raises ValueError when roles do
    not alternate, when an answer is missing or empty, or when there are more than `max_length`
    tokens (a picture counts as one).

    Ids and labels are the original's (1.2.2), but where it goes wrong: a sample whose text contains
    "</s>", "<unk>" or " ASSISTANT: ", and nearly every sample of ChatML, is there masked whole.
    (LLaVA-NeXT's for LLaMA 3 learns the control tokens of questions too; ours those of answers.)
    """
    turns = [(turn["from"], turn["value"]) for turn in conversations]
    if turns and turns[0][0] == "gpt":
        turns = turns[1:]
    for i, (role, text) in enumerate(turns):
        if role != ("human", "gpt")[i % 2]:
            raise ValueError(f"turn {i} is from {role!r}; human and gpt must take turns")
        if role == "gpt" and not text.strip():
            raise ValueError(f"turn {i} is an empty answer")
    for i, (role, text) in enumerate(turns):
        if role == "human":
            turns[i] = role, place_image(text, last=image_last and i == 0)
    if len(turns) < 2:
        raise ValueError(f"no token is supervised in its {len(turns)} turns: there is no answer")
    ids, labels = encode_pieces(training_pieces(turns, template), tokenizer)
    if max_length is not None and len(ids) > max_length:
        raise ValueError(f"it has {len(ids)} tokens, more than max_length {max_length}")
    return ids, labels


def place_image(text: str, last: bool = False) -> str:
    """ "What is it?\n<image>" -> "<image>\nWhat is it?"; texts with 0 or 2+ tags stay."""
    if text.count(IMAGE_TAG) != 1:
        return text
    question = text.replace(IMAGE_TAG, "").strip()
    return (f"{question}\n{IMAGE_TAG}" if last else f"{IMAGE_TAG}\n{question}").strip()


# ---- samples and batches --------------------------------------------------------------------


class Conversations(torch.utils.data.Dataset):
    """Records of an official file, each encoded and its pictures loaded when asked for.

    path, images: the file (see records.py) and the folder that its picture paths start from
    n_visual:     a function, (width, height) of a picture -> how many visual words it becomes;
                  None: it counts as one
    max_length:   most tokens of a sample, those of its pictures included
    on_long:      a longer sample is an "error", or "cut" at its end by whole questions with answers
    on_bad:       a bad record is an "error", or "skip": then {"bad": why} stands for the sample
    image_order:  a single `<image>` goes "first", or as in LLaVA v1 to either end at "random"
    """

    def __init__(
        self,
        path,
        images,
        tokenizer,
        template,
        image_config,
        max_length=None,
        n_visual=None,
        on_long="error",
        on_bad="error",
        image_order="first",
        seed=0,
    ):
        self.path, self.images, self.records = path, Path(images), Records(path)
        self.tokenizer, self.template = tokenizer, template
        self.image_config, self.n_visual = image_config, n_visual or functools.partial(constant, 1)
        self.max_length, self.on_long, self.on_bad = max_length, on_long, on_bad
        self.image_order, self.seed = image_order, seed

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index: int | tuple[int, ...]):
        """One sample: id, input_ids and labels int[T], pixels and image_sizes lists, cut.

        A tuple of numbers is a packed row: the list of its samples. A picture that several of
        them have is the same tensor, so that the model can see that it is one.
        """
        opened = {}
        if isinstance(index, tuple):
            return [self.sample(i, opened) for i in index]
        return self.sample(index, opened)

    def sample(self, index: int, opened: dict) -> dict:
        """Raises ValueError naming file and record for anything wrong with it, see `on_bad`."""
        record = self.records[index]
        try:
            for file in files_of(record):
                if file not in opened:
                    picture = image.load(self.images / file, warn=refuse)
                    opened[file] = image.to_pixels(picture, self.image_config), picture.size
            pictures = [opened[file] for file in files_of(record)]
            ids, labels, n_cut = self.encode(record, index, [size for _, size in pictures])
        except ValueError as error:
            message = f"{self.path}, record {index} (id {record.get('id')}): {error}"
            if self.on_bad == "error":
                raise ValueError(message) from None
            return {"bad": message}
        return {
            "id": record.get("id"),
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "pixels": [pixels for pixels, _ in pictures],
            "image_sizes": [size for _, size in pictures],
            "cut": n_cut,
        }

    def encode(self, record: dict, index: int, sizes) -> tuple[list[int], list[int], int]:
        """Ids, labels, and how many turns were cut off for the sake of `max_length`."""
        turns, n_cut = record["conversations"], 0
        last = self.image_order == "random" and random.Random(f"{self.seed}-{index}").random() < 0.5
        while True:
            ids, labels = encode(turns, self.tokenizer, self.template, image_last=last)
            if ids.count(IMAGE_TOKEN) != len(sizes):
                n_tags = ids.count(IMAGE_TOKEN)
                raise ValueError(f"{n_tags} <image> for {len(sizes)} picture files: one for each")
            length = len(ids) + sum(self.n_visual(size) - 1 for size in sizes)
            if self.max_length is None or length <= self.max_length:
                return ids, labels, n_cut
            if self.on_long == "error" or len(turns) < 4:
                raise ValueError(f"it has {length} tokens, more than max_length {self.max_length}")
            turns, n_cut = turns[:-2], n_cut + 2

    def lengths(self, workers: int = 0) -> list[int]:
        """Tokens of each sample, for packing: every record is read and tokenised.

        A bad record has length 0 here; what is wrong with it is said when it is loaded.
        """
        return of_each(self.length, len(self), workers, "tokenising")

    def length(self, index: int) -> int:
        record = self.records[index]
        try:
            tiled = self.image_config.aspect == "anyres"  # else a picture need not be opened
            files = [self.images / file for file in files_of(record)]
            sizes = [image.size_of(file) if tiled else None for file in files]
            ids, _, _ = self.encode(record, index, sizes)
        except ValueError:
            return 0
        return len(ids) + sum(self.n_visual(size) - 1 for size in sizes)


class Calls(torch.utils.data.Dataset):
    """function(0), function(1), ... as a data set, so that a loader's workers can call it."""

    def __init__(self, function, n: int):
        self.function, self.n = function, n

    def __len__(self):
        return self.n

    def __getitem__(self, index: int):
        return self.function(index)


def of_each(function, n: int, workers: int, doing: str) -> list:
    """[function(0), ..., function(n - 1)], called in `workers` processes, with progress."""
    calls = Calls(function, n)
    loader = torch.utils.data.DataLoader(calls, 16, collate_fn=list, num_workers=workers)
    return list(progress((found for part in loader for found in part), n, doing))


def constant(n: int, size) -> int:
    return n


def refuse(text: str):
    """For training, a picture of which only the first frame would be seen is a bad one."""
    raise image.ImageError(text)


def progress(items, total: int, doing: str):
    """The items, with a line on stderr for whoever waits."""
    started = shown = time.time()
    for done, item in enumerate(items, start=1):
        yield item
        if time.time() - shown > 1 or (done == total and shown > started):
            shown = time.time()
            rate = done / (shown - started)
            line = f"{doing}: {done:,} of {total:,}, {rate:,.1f}/s, {(total - done) / rate:.0f} s"
            print(f"\r{line} left ", end="\n" if done == total else "", file=sys.stderr, flush=True)


def collate(rows) -> dict:
    """Samples, or lists of samples packed into a row -> the arguments of `LLaVA.loss`.

    Rows are padded on the right. attention_mask numbers the samples of a row 1, 2, ...; none sees
    another. If anything was lost, "lost" says so: why samples are bad, and how many turns were cut.
    """
    rows = [row if isinstance(row, list) else [row] for row in rows]
    bad = [sample["bad"] for row in rows for sample in row if "bad" in sample]
    rows = [[sample for sample in row if "bad" not in sample] for row in rows]
    cut = sum(sample.get("cut", 0) for row in rows for sample in row)
    # A process without any sample still has to take part: with one token that teaches nothing.
    rows = [row for row in rows if row] or [[NOTHING]]
    samples = [sample for row in rows for sample in row]

    def joined(part, padding=0):
        """part(number of the sample in its row, sample), int[T] -> int[B, T] of whole rows."""
        whole = [torch.cat([part(n, s) for n, s in enumerate(row, start=1)]) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=padding)

    batch = {
        "input_ids": joined(lambda n, sample: sample["input_ids"]),
        "labels": joined(lambda n, sample: sample["labels"], IGNORE),
        "attention_mask": joined(lambda n, sample: torch.full_like(sample["input_ids"], n)),
        "pixels": [pixels for sample in samples for pixels in sample["pixels"]],
        "image_sizes": [size for sample in samples for size in sample["image_sizes"]],
    }
    return batch | ({"lost": (bad, cut)} if bad or cut else {})


NOTHING = {
    "input_ids": torch.tensor([0]),
    "labels": torch.tensor([IGNORE]),
    "pixels": [],
    "image_sizes": [],
}


def trace():
    """Show what the model reads and what it learns for one small conversation."""

    class Letters:  # a tokenizer of 128 characters, so that no file is needed
        bos_id, eos_id, image_frame = 1, 2, ()

        def encode_with_starts(self, text, control):
            return [ord(c) for c in text], range(len(text))

    turns = [("human", "<image>\nWhat is this?"), ("gpt", "A cat.")]
    print(f"prompt: {render(turns[:1], 'v1')}")
    ids, labels = encode_turns(turns, Letters(), "v1")
    learned = [label for label in labels if label != IGNORE]
    print(f"ids:    {len(ids)} tokens, among them {ids.count(IMAGE_TOKEN)} picture")
    print(f"learns: {''.join(map(chr, learned[:-1]))!r} and end-of-sequence")


def main():
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = flags.add_argument
    add("--check", metavar="FILE", help="report what training would trip over, and statistics")
    add("--show", metavar="FILE", help="print what is read and what is learned")
    add("-n", type=int, default=3, help="records to show")
    add("--images", default=".", metavar="DIR", help="folder that the records' paths start from")
    add("--tokenizer", default=TINY, metavar="DIR", help="default: the tiny model's")
    add("--template", default="v1", help="conversation template; plain in stage 1")
    add("--aspect", choices=("crop", "pad"), default="pad")
    add("--image-tokens", type=int, default=576, help="visual words of a picture")
    add("--max-length", type=int, default=2048, help="most tokens, those of pictures included")
    add("--row-length", type=int, default=8192, help="tokens of a packed row")
    add("--workers", type=int, default=0, help="processes")
    args = flags.parse_args()
    if not args.check and not args.show:
        return trace()
    import datacheck

    try:
        samples = Conversations(
            args.check or args.show,
            args.images,
            tokenizer.load(args.tokenizer),
            args.template,
            image.ImageConfig(aspect=args.aspect),
            args.max_length,
            functools.partial(constant, args.image_tokens),
            on_long="cut",
            on_bad="skip",
        )
        template_named(args.template)
        if args.show:
            colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
            return datacheck.show(samples, args.n, colour)
        sys.exit(1 if datacheck.check(samples, args.workers, args.row_length) else 0)
    except ValueError as error:
        flags.exit(2, f"data.py: {error}\n")


if __name__ == "__main__":
    main()
