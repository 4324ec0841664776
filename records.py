"""The official data files: JSON lists of hundreds of thousands of records, opened in seconds.

    LLaVA-Pretrain 558K and 595K, LLaVA-Instruct 158K and 80K, mix665k, ScienceQA ...:
    [{"id": "0017", "image": "coco/train2017/0017.jpg",
      "conversations": [{"from": "human", "value": "<image>\nWhat ..."}, {"from": "gpt", ...}]}]

or the same records one to a line. As Python objects mix665k (1 GB) would take several; so the file
is read through once, and of each record only its place, its number of words and a hash of its
picture's path are kept. A record is parsed again when it is asked for, by whoever wants it.

Read next: data.py makes ids and labels of a record, batches.py puts records together.
"""

import hashlib
import json
import re
from pathlib import Path

import numpy as np

BLOCK = 2**24  # bytes read at a time
MAX_RECORD = 2**26  # characters; a longer record is taken for a missing bracket
BETWEEN = re.compile(r"[\s,]*")


class Records:
    """A sequence of the records of an official file; see above.

    words:    int32[n], words of all turns of a record, a cheap stand-in for its tokens
    pictures: int64[n], a hash of the record's `image`; 0 for text alone

    Raises ValueError naming the file, and the record, for whatever is no such list: also for a
    download that was cut short.
    """

    def __init__(self, path):
        self.path = Path(path)
        places, words, pictures = [], [], []
        for start, end, record in scan(self.path):
            if problem := malformed(record):
                raise ValueError(f"{path}, record {len(places)}: {problem}")
            places.append((start, end))
            words.append(sum(len(turn["value"].split()) for turn in record["conversations"]))
            pictures.append(picture_key(record))
        if not places:
            raise ValueError(f"{path} has no records")
        self.places = np.array(places, np.int64)
        self.words = np.array(words, np.int32)
        self.pictures = np.array(pictures, np.int64)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict:
        start, end = map(int, self.places[index])
        with open(self.path, "rb") as file:
            file.seek(start)
            return json.loads(file.read(end - start))


def malformed(record) -> str | None:
    """What keeps a JSON value from being a record, or None."""
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        return "expected an object with a list of 'conversations'"
    for turn in record["conversations"]:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            return "expected turns of the form {'from': ..., 'value': text}"
        if not isinstance(turn.get("from"), str):
            return "a turn does not say whom it is 'from'"
    if not all(isinstance(file, str) for file in files_of(record)):
        return f"expected a path as 'image', got {record['image']!r}"
    return None


def files_of(record: dict) -> list[str]:
    """The paths of a record's pictures: `image` is one, a list of several, or absent."""
    found = record.get("image")
    return found if isinstance(found, list) else [] if found is None else [found]


def picture_key(record: dict) -> int:
    name = "\n".join(files_of(record)).encode()
    digest = hashlib.blake2b(name, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) | 1 if name else 0


def scan(path: Path):
    """Yield (first byte, last byte + 1, value) of each value in a JSON list or in JSON lines."""
    decode, text, at = json.JSONDecoder().raw_decode, "", 0  # `at`: the byte where `text` starts
    n_found, is_list, closed = 0, None, False
    try:
        file = open(path, encoding="utf-8", newline="")
    except OSError as error:
        raise ValueError(f"no data file at {path} ({error.strerror})") from None
    with file:
        while True:
            try:
                block = file.read(BLOCK)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8 text: {error}") from None
            text += block
            if is_list is None:
                start = len(text) - len(text.lstrip("\ufeff \t\r\n"))
                is_list = text[start : start + 1] == "["
                at, text = at + len(text[: start + is_list].encode()), text[start + is_list :]
            ascii_only, i = text.isascii(), 0
            while True:
                start = BETWEEN.match(text, i).end()
                if is_list and text[start : start + 1] == "]":
                    closed, i = True, len(text)
                    break
                try:
                    value, end = decode(text, start)
                except (json.JSONDecodeError, RecursionError):
                    break  # cut off by the end of the block, or broken
                if end == len(text) and block and not isinstance(value, dict):
                    break  # a number may go on in the next block
                sizes = start - i, end - start
                if not ascii_only:
                    sizes = len(text[i:start].encode()), len(text[start:end].encode())
                at, i, n_found = at + sizes[0], end, n_found + 1
                yield at, at + sizes[1], value
                at += sizes[1]
            text = text[i:]
            if closed:
                return
            if not block or len(text) > MAX_RECORD:
                break
    if text.strip() or is_list:
        what = "ends in the middle of the list" if not text.strip(", \r\n\t") else "is not JSON"
        raise ValueError(f"{path} {what} after {n_found:,} records: {text[:60]!r}; fetch it again")


def main():
    """Print what is in a file of records."""
    import argparse
    import time

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", nargs="?", help="JSON or JSON lines in the official format")
    path = parser.parse_args().file
    if path is None:
        return print("python records.py FILE   how many records, words and pictures a file has")
    started = time.time()
    try:
        records = Records(path)
    except ValueError as error:
        parser.exit(2, f"records.py: {error}\n")
    with_picture = int((records.pictures != 0).sum())
    print(f"{len(records):,} records, opened in {time.time() - started:.1f} s")
    print(f"{with_picture:,} with pictures, {len(np.unique(records.pictures)):,} different ones")
    print(f"{records.words.sum():,} words, {records.words.mean():.0f} a record")
    print(json.dumps(records[0], ensure_ascii=False)[:500])


if __name__ == "__main__":
    main()
