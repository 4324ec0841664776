"""Text <-> token ids: one interface over the three tokenizer files that LLaVA's decoders come with.

    file               format                        decoders
    tokenizer.model    sentencepiece (a protobuf)    LLaMA 1/2, Vicuna, Mistral, Yi, the tiny model
    tokenizer.model    tiktoken ("base64 rank")      LLaMA 3 as Meta ships it
    tokenizer.json     byte-level BPE                LLaMA 3 and SmolLM2 from the Hugging Face hub

The first bytes of the file tell which it is. Text is always plain text here: whoever types `</s>`
gets the letters, never the control token, so a question cannot end its own turn. Control tokens
enter a prompt by id (`token_id`), and `decode` leaves them out.

One character can span several tokens: a decoded prefix may end in U+FFFD until the rest arrives,
so a stream decodes all ids so far and holds back a trailing U+FFFD. Read next: data.py.
"""

import base64
import json
import re
from pathlib import Path

# Text is first cut into words by a regular expression; bytes are merged within a word only.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# SmolLM2 sets every digit apart and cuts the rest as GPT-2 does. In one expression: a digit takes
# no space along, and blanks before a digit stay together as they do at the end of the text.
SMOLLM2 = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
)
LLAMA3_SPECIAL = {  # places after the 128,000 ordinary tokens; the rest of 256 is reserved
    "<|begin_of_text|>": 0,
    "<|end_of_text|>": 1,
    "<|start_header_id|>": 6,
    "<|end_header_id|>": 7,
    "<|eot_id|>": 9,
}


def find(path) -> Path | None:
    """The tokenizer file in a folder, or None."""
    files = (Path(path) / name for name in ("tokenizer.model", "tokenizer.json"))
    return next((file for file in files if file.is_file()), None)


def files(path) -> list[Path]:
    """All files in a folder that say something about its tokenizer, to be copied with it."""
    names = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json")
    found = (Path(path) / name for name in (*names, "special_tokens_map.json"))
    return [file for file in found if file.is_file()]


def load(path) -> "SentencePiece | ByteBPE":
    """The tokenizer in a file or folder. Raises ValueError if there is none of a known format."""
    file = find(path) if Path(path).is_dir() else Path(path)
    if file is None or not file.is_file():
        raise ValueError(f"{path} has no tokenizer: expected tokenizer.model or tokenizer.json")
    content = file.read_bytes()
    if content.startswith(b"{"):
        return read_json(content, file)
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\n", content):
        return read_tiktoken(content, file)
    return SentencePiece(content, file, added_tokens(file.parent), *habits(file.parent))


def added_tokens(folder: Path) -> dict[str, int]:
    """{token: id} of tokens that a Hugging Face folder adds to its sentencepiece model."""
    found = {}
    for name, read in (
        ("added_tokens.json", lambda content: content),
        (
            "tokenizer_config.json",
            lambda content: {
                token["content"]: int(i)
                for i, token in content.get("added_tokens_decoder", {}).items()
            },
        ),
    ):
        if (folder / name).is_file():
            try:
                found |= read(json.loads((folder / name).read_bytes()))
            except (ValueError, TypeError, AttributeError, KeyError):
                raise ValueError(f"{folder / name} is broken; fetch it again") from None
    if not all(type(i) is int and 0 <= i < 2**20 for i in found.values()):
        raise ValueError(f"{folder} adds tokens without a proper id; fetch it again")
    return found


def habits(folder: Path) -> tuple[str, bool]:
    """How to tokenise after a control token, and whether texts begin with one.

    Both are in tokenizer_config.json: `legacy` and `add_bos_token`, which are true where absent.
    """
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_bytes()) if file.is_file() else {}
    after_control = "joined" if config.get("legacy") is False else "spaced"
    return after_control, config.get("add_bos_token") is not False  # false for Yi


class SentencePiece:
    """LLaMA 1/2, Vicuna, Mistral, Yi. Each encoded text gets a leading space, as in training.

    What follows a control token, as "USER" in "</s>USER", is no new text, and transformers has
    treated it in three ways. A model answers best to the one that it was trained with:

        spaced     ▁US ER    a leading space all the same ("legacy")
        joined     USER      none: as if the text went on (transformers from 4.34 on)
        stripped   US ER     the pieces with a space, then the space cut off (4.31, LLaVA-1.5's)
    """

    image_frame = ()  # tokens around each picture: <im_start>, <im_end> in the first models

    def __init__(self, content: bytes, file, added=None, after_control="spaced", add_bos=True):
        """`added`: {token: id} that are no pieces of the model, such as <|im_start|>."""
        import sentencepiece

        self.after_control = after_control
        self.model = sentencepiece.SentencePieceProcessor()
        self.joined = sentencepiece.SentencePieceProcessor()
        try:
            self.model.LoadFromSerializedProto(content)
            # Protobuf lets later bytes overrule earlier ones: here, that no space is put in front.
            self.joined.LoadFromSerializedProto(content + b"\x1a\x02\x18\x00")
        except RuntimeError:
            raise ValueError(
                f"{file} is neither a sentencepiece model nor a tiktoken file nor JSON"
            ) from None
        n = self.model.vocab_size()
        self.added = {token: i for token, i in (added or {}).items() if i >= n}
        self.vocab_size = max([n - 1, *self.added.values()]) + 1
        ends = self.model.bos_id(), self.model.eos_id()  # -1: the model has none
        self.bos_id, self.eos_id = (i if i >= 0 else None for i in ends)
        if not add_bos:
            self.bos_id = None

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Text -> ids; see `frame` for `bos` and `eos`."""
        return frame(self, self.model.encode(text), bos, eos)

    def encode_with_starts(self, text: str, control: bool = False) -> tuple[list[int], list[int]]:
        """Text -> ids, and for each the number of the character that it starts at.

        control: does the text follow a control token?
        """
        style = self.after_control if control and text else "spaced"
        model = self.joined if style == "joined" else self.model
        found = model.encode(text, return_type="offset_mapping")
        ids, starts = found["ids"], [start for start, _ in found["offsets"]]
        if style == "stripped" and not text.startswith(" "):
            first = self.model.id_to_piece(ids[0]).removeprefix("▁")
            if first:
                ids[0] = self.model.piece_to_id(first)
            else:
                ids, starts = ids[1:], starts[1:]
        return ids, starts

    def decode(self, ids) -> str:
        """Ids -> text without control tokens. Raises ValueError for an id out of range."""
        check_range(self, ids)
        n = self.model.vocab_size()
        return self.model.decode([i for i in ids if i < n])  # skips control tokens by itself

    def token_id(self, piece: str) -> int:
        """The id of one token, such as "</s>". Raises ValueError if there is none."""
        if piece in self.added:
            return self.added[piece]
        i = self.model.piece_to_id(piece)
        if self.model.id_to_piece(i) != piece:
            raise ValueError(f"the tokenizer has no token {piece!r}")
        return i

    def name_of(self, i: int) -> str | None:
        """What a control token is called; None for an ordinary one."""
        if i >= self.model.vocab_size():
            return next((token for token, number in self.added.items() if number == i), None)
        return self.model.id_to_piece(i) if self.model.is_control(i) else None


class ByteBPE:
    """LLaMA 3, SmolLM2: UTF-8 bytes, merged pair by pair in the order in which training did."""

    image_frame = ()

    def __init__(self, pattern: str, pieces: dict, special: dict, bos_id=None, eos_id=None):
        """`pieces`: {bytes: id or None} in merge order; `special`: {name: id}."""
        import tiktoken

        ranks = {piece: rank for rank, piece in enumerate(pieces)}
        self.merger = tiktoken.Encoding(
            "", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
        self.ids = list(pieces.values())  # rank -> id; None where a byte has none and is dropped
        self.bytes = {i: piece for piece, i in pieces.items() if i is not None}
        self.special, self.bos_id, self.eos_id = special, bos_id, eos_id
        self.vocab_size = max([*self.bytes, *special.values()]) + 1

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Text -> ids; see `frame` for `bos` and `eos`."""
        ids = (self.ids[rank] for rank in self.merger.encode_ordinary(text))
        return frame(self, [i for i in ids if i is not None], bos, eos)

    def encode_with_starts(self, text: str, control: bool = False) -> tuple[list[int], list[int]]:
        """Text -> ids, and for each the number of the character that it starts in."""
        character = [i for i, c in enumerate(text) for _ in c.encode()]  # of each byte
        ids, starts, place = [], [], 0
        for rank in self.merger.encode_ordinary(text):
            if self.ids[rank] is not None:
                ids.append(self.ids[rank])
                starts.append(character[place])
            place += len(self.merger.decode_single_token_bytes(rank))
        return ids, starts

    def decode(self, ids) -> str:
        """Ids -> text without control tokens. Raises ValueError for an id out of range."""
        check_range(self, ids)
        return b"".join(self.bytes.get(i, b"") for i in ids).decode("utf-8", "replace")

    def token_id(self, piece: str) -> int:
        """The id of one control token, such as "<|eot_id|>". Raises ValueError if there is none."""
        if piece not in self.special:
            raise ValueError(f"the tokenizer has no token {piece!r}")
        return self.special[piece]

    def name_of(self, i: int) -> str | None:
        """What a control token is called; None for an ordinary one."""
        return next((token for token, number in self.special.items() if number == i), None)


def frame(tokenizer, ids: list[int], bos: bool, eos: bool) -> list[int]:
    """Put the beginning-of-sequence token first, where there is one, and end-of-sequence last."""
    if eos and tokenizer.eos_id is None:
        raise ValueError("the tokenizer names no end-of-sequence token")
    first = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
    return first + ids + ([tokenizer.eos_id] if eos else [])


def check_range(tokenizer, ids):
    for i in ids:
        if not 0 <= i < tokenizer.vocab_size:
            raise ValueError(f"token id {i} is not in 0 ... {tokenizer.vocab_size - 1}")


def read_tiktoken(content: bytes, file) -> ByteBPE:
    """Meta's LLaMA 3 file: one token a line, base64 and rank; the rank is the id."""
    lines = (line.split() for line in content.splitlines())
    try:
        pieces = {base64.b64decode(piece): int(rank) for piece, rank in lines}
    except ValueError:
        raise ValueError(f"{file} has a line that is not 'base64 rank'") from None
    n = len(pieces)
    if n != 128_000 or list(pieces.values()) != list(range(n)):
        raise ValueError(f"{file} has {n} tokens; LLaMA 3 has 128000, ranked in order")
    special = {f"<|reserved_{place}|>": n + place for place in range(256)}
    special |= {name: n + place for name, place in LLAMA3_SPECIAL.items()}
    return ByteBPE(LLAMA3, pieces, special, bos_id=n, eos_id=n + 1)


def read_json(content: bytes, file) -> ByteBPE:
    """A Hugging Face tokenizer.json; tokenizer_config.json beside it names the end token."""
    try:
        parts = json.loads(content)
    except ValueError:
        raise ValueError(f"{file} is broken: it starts like JSON and is none") from None
    pattern = find_pattern(parts)
    if pattern is None:
        raise ValueError(f"{file} is a kind of tokenizer.json other than SmolLM2's and LLaMA 3's")
    # GPT-2 writes every byte as a printable character: 188 as themselves, the rest from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(others)}
    # A merge is "a b" or ["a", "b"]; several may lead to the same token, the first one counts.
    merges = (
        m.replace(" ", "") if isinstance(m, str) else "".join(m) for m in parts["model"]["merges"]
    )
    vocab = parts["model"]["vocab"]
    special = {token["content"]: token["id"] for token in parts["added_tokens"]}
    pieces = {
        bytes(byte_of[c] for c in token): vocab.get(token)
        for token in dict.fromkeys([*byte_of, *merges])
    }
    config_file = file.with_name("tokenizer_config.json")
    config = json.loads(config_file.read_bytes()) if config_file.is_file() else {}
    eos = config.get("eos_token")
    eos = eos["content"] if isinstance(eos, dict) else eos
    return ByteBPE(pattern, pieces, special, find_bos(parts, special), special.get(eos))


def find_pattern(parts: dict) -> str | None:
    """The expression that cuts words as this file's normalizer and pre-tokenizer do, or None."""
    digits = {"type": "Digits", "individual_digits": True}
    split = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False}
    forms = {
        SMOLLM2: [digits, to_bytes | {"use_regex": True}],
        LLAMA3: [split, to_bytes | {"use_regex": False}],
    }
    steps = (parts.get("pre_tokenizer") or {}).get("pretokenizers", [])
    for pattern, form in forms.items():
        same = [wanted.items() <= step.items() for wanted, step in zip(form, steps, strict=False)]
        if not parts.get("normalizer") and len(steps) == 2 and all(same):
            return pattern
    return None


def find_bos(parts: dict, special: dict) -> int | None:
    """The token which the file's post-processor puts before a text, or None."""
    after = parts.get("post_processor") or {}
    for step in after.get("processors", [after]):
        if step.get("type") == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            return special[step["single"][0]["SpecialToken"]["id"]]
    return None


def main(path):
    """Show what a tokenizer makes of a sentence."""
    tokenizer = load(path)
    text = "What is in this picture? 2 dogs, 1 café 🐶"
    ids = tokenizer.encode(text, bos=True)
    print(f"{type(tokenizer).__name__}: {tokenizer.vocab_size:,} tokens", end=", ")
    print(f"begin {tokenizer.bos_id}, end {tokenizer.eos_id}")
    print(f"text   {text}")
    print(f"ids    {ids}")
    print(f"pieces {[tokenizer.decode([i]) for i in ids]}")
    print(f"back   {tokenizer.decode(ids)}")


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path", nargs="?", help="a tokenizer file, or a folder with one")
    args = parser.parse_args()
    if args.path:
        main(args.path)
    else:
        print("python tokenizer.py PATH   PATH: a tokenizer file, or a model folder with one")
