"""Many questions: what `generate.py --prompts FILE.jsonl --out FILE.jsonl` does.

    {"image": "a.jpg", "prompt": "What is this?"}   ->   {..., "answer": "A cat.", "ended": "end"}
    {"image": "b.jpg", "prompt": "What is this?"}   ->   {..., "error": "b.jpg: the picture is ..."}

A line is a question: "prompt" (or "text", as in the original's files), "image" (a path, a list of
paths, or none) and whatever else; all of it comes back with the answer, in the same order. What is
wrong with a row is written where its answer would be, and the others go on. A run that was stopped
goes on after the last whole line of --out, with the same model and options: those lie beside it in
FILE.jsonl.settings.

`--image` with several files, a folder or a pattern is the same for one question about each.
"""

import glob
import json
import sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import data
import image
from answers import decode, room_for_answer
from decoding import Decoding
from generate import load, question, rounded, say

OURS = ("answer", "answers", "ended", "error", "token_ids", "logprobs")  # keys of what is written
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")


def is_pattern(name: str) -> bool:
    return glob.has_magic(name) and not Path(name).exists()


def names_several(flags: list[list[str]]) -> bool:
    """Does one --image stand for several pictures, each with a question of its own?"""
    return any(len(f) > 1 or Path(f[0]).is_dir() or is_pattern(f[0]) for f in flags)


def pictures_in(names: list[str]) -> list[str]:
    """Files, folders and patterns -> files. Raises ValueError for one that holds no picture."""
    found = []
    for name in names:
        files = [name]
        if Path(name).is_dir():
            files = sorted(str(f) for f in Path(name).iterdir() if f.suffix.lower() in SUFFIXES)
        elif is_pattern(name):
            files = sorted(glob.glob(name, recursive=True))
        if not files:
            raise ValueError(f"{name}: no pictures there; expected {', '.join(SUFFIXES)}")
        found += files
    return found


def read_rows(path) -> list[dict]:
    """The questions in a file, one JSON object a line; a bad line is a row with its error."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ValueError(f"--prompts: cannot read {path} ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"--prompts: {path} is not UTF-8 text") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            row = None
        if not isinstance(row, dict):
            rows.append({"line": number, "bad": line[:100]})
            continue
        taken = [key for key in OURS if key in row]
        if taken:
            raise ValueError(
                f"{path}, line {number} has {taken[0]!r}, where the answer's would go: rename it"
            )
        rows.append(row)
    return rows


def prepare(model, row: dict, folder):
    """A row -> token ids and pictures. Raises ValueError for anything that is wrong with it."""
    if "bad" in row:
        raise ValueError(f"line {row['line']} is not a JSON object")
    prompt, files = row.get("prompt", row.get("text")), row.get("image") or []
    files = [files] if isinstance(files, str) else files
    if not isinstance(prompt, str):
        raise ValueError('expected "prompt", a text; got none')
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise ValueError('"image" is neither a path nor a list of paths')
    pictures = [image.load(Path(folder) / file, warn=say) for file in files]
    turns = [("human", question(prompt, len(pictures)))]
    ids, _ = data.encode_turns(turns, model.tokenizer, model.template)
    room_for_answer(model, ids, pictures)
    return ids, pictures


def answered(model, rows, folder, how: Decoding, max_new_tokens: int, batch: int, whole=False):
    """Yield each of the (number, row) with its answer, in order, `batch` at a time.

    An answer depends on the row and its number alone, not on its neighbours. whole: with ids and
    log-probabilities.
    """
    rows = iter(rows)
    while part := list(islice(rows, batch)):
        ready, found = [], {}
        for number, row in part:
            try:
                ready.append((number, *prepare(model, row, folder)))
            except ValueError as error:
                found[number] = {"error": str(error)}
        if ready:
            numbers, prompts, images = zip(*ready, strict=True)
            *_, answers = decode(model, prompts, images, max_new_tokens, how, numbers=list(numbers))
            for i, number in enumerate(numbers):
                mine = answers[i * how.answers : (i + 1) * how.answers]
                found[number] = {"answer": mine[0].text, "ended": mine[0].ended}
                if len(mine) > 1:
                    found[number]["answers"] = [one.text for one in mine]
                if whole:
                    found[number] |= {"token_ids": mine[0].ids}
                    found[number] |= {"logprobs": rounded(mine[0])}
        for number, row in part:
            yield row | found[number]


def as_line(row: dict) -> str:
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a pair of surrogates, which only JSON can write
        return json.dumps(row)
    return text


def done_before(path: Path, rows: list[dict]) -> int:
    """How many rows `path` holds already; a last line that was cut is taken off.

    Raises ValueError if they are not the first ones of these.
    """
    if not path.exists():
        return 0
    whole = n = 0
    with path.open("r+b") as file:
        for line in file:
            try:
                written = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                written = None
            if written is None:
                break
            if n >= len(rows) or {k: written.get(k) for k in rows[n]} != rows[n]:
                raise ValueError(
                    f"--out: line {n + 1} of {path} is no answer to these questions; "
                    "choose another file"
                )
            whole, n = whole + len(line), n + 1
        if file.read(1):
            raise ValueError(f"--out: line {n + 1} of {path} is broken; choose another file")
        file.truncate(whole)
    return n


def settle(path: Path, n_done: int, args, how: Decoding):
    """Write down what decides the answers, or raise ValueError if earlier ones had it otherwise."""
    names = "model model_base vision_tower template dtype quantize max_new_tokens".split()
    now = {name: getattr(args, name) for name in names} | asdict(how)
    now, file = json.dumps(now, indent=1), Path(f"{path}.settings")
    if not n_done or not file.exists():
        file.write_text(now)
        return
    now, then = json.loads(now), json.loads(file.read_text())
    other = {
        f"--{key.replace('_', '-')}": then.get(key) for key in now if now[key] != then.get(key)
    }
    if other:
        flags = (f"no {key}" if value is None else f"{key} {value}" for key, value in other.items())
        raise ValueError(
            f"--out: the {n_done} answers in {path} were given with {', '.join(flags)}; "
            "say so again, or choose another file"
        )


def run(args, how: Decoding) -> int:
    """Answer the questions of --prompts, or of several --image; exit code 1 if any had an error."""
    if args.batch < 1:
        raise ValueError(f"--batch is {args.batch}; it must be at least 1")
    if args.chat or (args.prompts and args.image):
        raise ValueError("--prompts, several pictures and --chat are three ways: choose one")
    if args.prompts:
        rows, folder = read_rows(args.prompts), args.image_folder
    elif len(args.image) == 1:
        rows = [{"image": f, "prompt": args.prompt} for f in pictures_in(args.image[0])]
        folder = "."
    else:
        raise ValueError("--out and several pictures to an --image want exactly one --image")
    path = args.out and Path(args.out)
    n_done = done_before(path, rows) if path else 0
    if n_done:
        say(f"{path} holds {n_done} of {len(rows)} answers already")
    todo = list(enumerate(rows))[n_done:]
    n_bad = 0
    if todo:
        try:
            if path:
                settle(path, n_done, args, how)
            out = path.open("a", encoding="utf-8") if path else sys.stdout
        except OSError as error:
            raise ValueError(f"--out: cannot write {path} ({error.strerror})") from None
        found = answered(load(args), todo, folder, how, args.max_new_tokens, args.batch, args.json)
        for row in data.progress(found, len(todo), "answering"):
            n_bad += "error" in row
            if path or args.prompts or args.json:
                text = as_line(row)
            else:
                text = f"{row['image']}: {row.get('answer', 'error: ' + row.get('error', ''))}"
            print(text, file=out, flush=True)
        if path:
            out.close()
    if n_bad:
        say(f'{n_bad} of {len(todo)} have no answer but an "error"')
    return 1 if n_bad else 0


if __name__ == "__main__":
    import argparse

    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    print(__doc__)
