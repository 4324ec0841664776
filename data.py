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

import json
import re
from pathlib import Path

import torch

import image
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


def encode(conversations, tokenizer, template: str, max_length: int | None = None):
    """Official turns [{"from", "value"}] -> (input_ids, labels), two lists of equal length.

    A leading gpt turn is skipped and a single `<image>` moves to the front of its turn, as in the
    original; several tags stay where they are (there they collapse into one). Raises ValueError
    when roles do not alternate, when an answer is missing or empty, or when there are more than
    `max_length` tokens (a picture counts as one).

    Ids and labels are the original's (1.2.2), but where it goes wrong: a sample whose text contains
    "</s>", "<unk>" or " ASSISTANT: ", and nearly every sample of ChatML, is there masked whole.
    """
    turns = [(turn["from"], turn["value"]) for turn in conversations]
    if turns and turns[0][0] == "gpt":
        turns = turns[1:]
    for i, (role, text) in enumerate(turns):
        if role != ("human", "gpt")[i % 2]:
            raise ValueError(f"turn {i} is from {role!r}; human and gpt must take turns")
        if role == "gpt" and not text.strip():
            raise ValueError(f"turn {i} is an empty answer")
    turns = [(role, image_first(text) if role == "human" else text) for role, text in turns]
    if len(turns) < 2:
        raise ValueError(f"no token is supervised in its {len(turns)} turns: there is no answer")
    ids, labels = encode_pieces(training_pieces(turns, template), tokenizer)
    if max_length is not None and len(ids) > max_length:
        raise ValueError(f"it has {len(ids)} tokens, more than max_length {max_length}")
    return ids, labels


def image_first(text: str) -> str:
    """ "What is it?\\n<image>" -> "<image>\\nWhat is it?"; texts with 0 or 2+ tags stay."""
    if text.count(IMAGE_TAG) != 1:
        return text
    return f"{IMAGE_TAG}\n{text.replace(IMAGE_TAG, '').strip()}".strip()


# ---- files and batches ----------------------------------------------------------------------


def load_records(path) -> list[dict]:
    """The records of an official JSON file. Raises ValueError when it is not a list of records."""
    try:
        records = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"no data file at {path}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(records, list) or not all("conversations" in r for r in records):
        raise ValueError(f"{path} is not a list of records with 'conversations'")
    return records


class Conversations(torch.utils.data.Dataset):
    """Records of an official JSON file, each encoded and its picture loaded when asked for."""

    def __init__(self, path, images, tokenizer, template, image_config, max_length=None):
        self.path, self.images = path, Path(images)
        self.records = load_records(path)
        self.tokenizer, self.template = tokenizer, template
        self.image_config, self.max_length = image_config, max_length

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        """One sample: id, input_ids and labels int[T], pixels and image_sizes lists.

        Raises ValueError naming file and record for anything wrong with it.
        """
        record = self.records[index]
        try:
            ids, labels = encode(
                record["conversations"], self.tokenizer, self.template, self.max_length
            )
            files = [record["image"]] if "image" in record else []
            if ids.count(IMAGE_TOKEN) != len(files):
                raise ValueError(f"{ids.count(IMAGE_TOKEN)} <image> for {len(files)} picture files")
            pictures = [image.load(self.images / file) for file in files]
        except ValueError as error:
            raise ValueError(
                f"{self.path}, record {index} (id {record.get('id')}): {error}"
            ) from None
        return {
            "id": record.get("id"),
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "pixels": [image.to_pixels(picture, self.image_config) for picture in pictures],
            "image_sizes": [picture.size for picture in pictures],
        }

    def lengths(self) -> list[int]:
        """Words of each record, a cheap stand-in for its tokens."""
        return [
            sum(len(turn["value"].split()) for turn in record["conversations"])
            for record in self.records
        ]


def collate(samples) -> dict:
    """Samples -> one batch: rows padded on the right; the arguments of `LLaVA.loss`."""

    def padded(rows, value):
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    return {
        "input_ids": padded([s["input_ids"] for s in samples], 0),
        "labels": padded([s["labels"] for s in samples], IGNORE),
        "attention_mask": padded([torch.ones_like(s["input_ids"]) for s in samples], 0),
        "pixels": [pixels for s in samples for pixels in s["pixels"]],
        "image_sizes": [size for s in samples for size in s["image_sizes"]],
    }


def batch_order(lengths, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch: a pure function of its arguments, so step k can be found again.

    Records are shuffled, neighbours of similar length put together within stretches of 16 batches
    (less padding), and the batches shuffled again. The last, incomplete batch is left out.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    stretch = 16 * batch_size
    batches = []
    for start in range(0, len(order), stretch):
        part = sorted(order[start : start + stretch], key=lambda i: lengths[i])
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    batches = [batch for batch in batches if len(batch) == batch_size]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def main():
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


if __name__ == "__main__":
    import argparse

    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    main()
