"""A picture and a question -> an answer.

    python generate.py --image examples/stickers.jpg --prompt "What is at the top left?"

From Python, `generate` answers a list of prompts with their pictures, and `stream` does it token by
token; `load`, `answer` and the flags are the command line's. The loop that reads and speaks is in
answers.py, how a token is chosen in decoding.py; --chat is chat.py, and --prompts bulk.py.

Without --model it uses the small model of this repository. stdout holds the answer and nothing
else; remarks go to stderr; a mistake in the input is one sentence there and exit code 2.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

# Memory in pages of 2 MB where Linux has them: a model is in place sooner. torch asks for this when
# it first makes a tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import checkpoint
import data
import fast
import image
import kernels
import templates
from answers import GREEDY, decode
from configs import DTYPES
from data import IMAGE_TAG
from decoding import Decoding
from llava import LLaVA

TINY = Path(__file__).parent / "tiny" / "weights" / "llava"
TINY_KNOWS = (
    "tiny model: it knows 1 to 4 stickers of 48 kinds on coloured paper and nothing else, and errs "
    "about them (the README has its scores); --model takes a real one"
)


def stream(model, prompts, images, max_new_tokens, temperature=0.0, top_p=1.0, seed=None, **more):
    """Yield the next token of every row, list[int | None]; None once a row has ended.

    See `decode` for prompts and images; `more`: the other fields of decoding.Decoding. What ends a
    row, an end-of-sequence or the token that completes a stop text, is not yielded.
    """
    how = Decoding(temperature, top_p, seed=seed, **more)
    if how.beams > 1:
        raise ValueError("beams cannot be streamed: the answer is known at the end; use generate")
    for step, answers in enumerate(decode(model, prompts, images, max_new_tokens, how)):
        tokens = [answer.ids[step] if len(answer.ids) > step else None for answer in answers]
        if any(token is not None for token in tokens):
            yield tokens


def generate(model, prompts, images, max_new_tokens, temperature=0.0, top_p=1.0, seed=None, **more):
    """Answers as token ids, list of list[int], without what ended them; see `stream`."""
    how = Decoding(temperature, top_p, seed=seed, **more)
    *_, answers = decode(model, prompts, images, max_new_tokens, how)
    return [answer.ids for answer in answers]


# ---- the command line -----------------------------------------------------------------------


def say(text: str, end: str = "\n"):
    """A remark, on stderr; dim where that is a terminal with colours (https://no-color.org)."""
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
        text = f"\033[2m{text}\033[0m"
    print(text, end=end, file=sys.stderr, flush=True)


def answer(model, turns, pictures, max_new_tokens, how=GREEDY, out=None, memory=None) -> dict:
    """Answer the last of `turns`; a single one goes to `out` as it comes. -> what --json prints.

    In a conversation (`memory`) Ctrl-C ends the answer, and what was said until then stays.
    """
    started, first, shown = time.perf_counter(), None, ""
    ids, _ = data.encode_turns(turns, model.tokenizer, model.template)
    answers = []
    try:
        for answers in decode(model, [ids], [pictures], max_new_tokens, how, memory):
            first = first or time.perf_counter()
            text = answers[0].settled
            if out and len(answers) == 1:
                print(text[len(shown) :], end="", flush=True, file=out)
                shown = text
    except KeyboardInterrupt:
        if memory is None:
            raise
        pass
    ended = time.perf_counter()
    found = [
        {"answer": a.settled, "token_ids": a.ids, "logprobs": rounded(a)}
        | {"ended": a.ended or "interrupted"}
        for a in answers
    ] or [{"answer": "", "token_ids": [], "logprobs": [], "ended": "interrupted"}]
    if out:  # of an interrupted answer the end may still be held back
        rest = [found[0]["answer"][len(shown) :], *(one["answer"] for one in found[1:])]
        print("\n\n".join(rest), file=out, flush=True)
    n_tokens = sum(len(one["token_ids"]) for one in found)
    result = found[0] | {
        "prompt": data.render(turns, model.template),
        "timings": {
            "first_token_s": round((first or ended) - started, 4),
            "total_s": round(ended - started, 4),
            "tokens_per_s": round(n_tokens / (ended - started), 2),
        },
    }
    return result | ({"answers": found} if len(found) > 1 else {})


def rounded(answer) -> list[float]:
    """The natural logarithms of the probabilities that the model gave to the ids."""
    return [round(logprob, 5) for logprob in answer.logprobs[: len(answer.ids)]]


def proper_text(text: str):
    """Raises ValueError for what a terminal or JSON can write and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text has bytes that are no UTF-8; write it anew") from None


def question(prompt: str, n_pictures: int) -> str:
    """Put a tag for each picture before the prompt, unless it has tags; then they must match."""
    proper_text(prompt)
    n_tags = prompt.count(IMAGE_TAG)
    if n_tags == 0:
        return f"{IMAGE_TAG}\n" * n_pictures + prompt
    if n_tags != n_pictures:
        raise ValueError(f"the prompt has {n_tags} <image> for {n_pictures} --image: one for each")
    return prompt


def place(device: str | None, dtype: str | None, quantize=None) -> tuple[str, torch.dtype]:
    """Where the model runs and in which type: what was asked for, or the best that is there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device and not there[device]:
        raise ValueError(f"--device is {device}, which is not there; leave it out, or take cpu")
    device = device or next(name for name, is_there in there.items() if is_there)
    if dtype:
        return device, DTYPES[dtype]
    if device == "cpu":  # half precision is emulated or slow there for most models
        return device, torch.bfloat16 if quantize else torch.float32  # what quantize.py's take
    if device == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = torch.backends.mps.is_macos_or_newer(14, 0)
    return device, torch.bfloat16 if has_bf16 else torch.float16


def load(args) -> LLaVA:
    """The model that the flags of `add_model_flags` name; stderr says what was chosen."""
    kernels.backend, path = args.attention, args.model or TINY
    stored = checkpoint.Checkpoint(path, args.model_base).weight_bits
    bits = {"int8": 8, "int4": 4}.get(args.quantize, stored)
    device, dtype = place(args.device, args.dtype, bits)
    prepared = args.attention != "kernel"
    model = LLaVA.from_pretrained(
        path,
        args.vision_tower,
        dtype,
        device,
        args.model_base,
        bits,
        mapped=prepared and device == "cpu",
    )
    if prepared:
        fast.prepare(model)
    if model.tokenizer is None:
        raise ValueError(f"{path} has no tokenizer: expected tokenizer.model or tokenizer.json")
    if args.template:
        templates.template_named(args.template)
        model.template = args.template
    about = f"conversation template: {model.template} (--template)" if args.model else TINY_KNOWS
    say(f"{about}; on {device} in {next(name for name in DTYPES if DTYPES[name] == dtype)}")
    if args.model and not args.dtype and dtype == torch.float32 and fast.multiplies_bfloat16():
        say("this CPU is about twice as fast with --dtype bf16")
    return model


def add_model_flags(flags, several: bool = False):
    add = flags.add_argument_group("the model").add_argument
    how = {"action": "append"} if several else {}
    add("--model", metavar="DIR", help="checkpoint: folder or Hugging Face id; else tiny", **how)
    add("--model-base", metavar="DIR", help="what a delta, LoRA or lone projector belongs to")
    add("--vision-tower", metavar="DIR", help="CLIP folder to use instead of the checkpoint's own")
    add("--template", help=f"conversation template: {', '.join(templates.TEMPLATES)}")
    add("--dtype", choices=DTYPES, help="default: fp32 on a CPU, else bf16, or fp16 without it")
    add("--quantize", choices=("int8", "int4"), help="round the decoder's weights: less memory")
    add("--device", choices=("cpu", "cuda", "mps"), help="default: cuda, else mps, else cpu")
    add("--attention", choices=kernels.BACKENDS, default="auto", help=kernels.HELP)


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = flags.add_argument_group("the question").add_argument
    add(
        "--image",
        nargs="+",
        action="append",
        default=[],
        metavar="FILE",
        help='a picture; several, a folder or "a*.jpg": the question is asked about each; '
        "--image repeated: pictures of one question",
    )
    add("--prompt", default="Describe the picture in detail.", help="the question")
    add("--chat", action="store_true", help="keep asking; questions come from stdin")
    add("--json", action="store_true", help="print ids, log-probabilities and timings too")
    add = flags.add_argument_group("many questions").add_argument
    add("--prompts", metavar="FILE.jsonl", help='lines {"image": ..., "prompt": ...}')
    add("--image-folder", default=".", metavar="DIR", help="where the pictures of --prompts lie")
    add("--out", metavar="FILE.jsonl", help="write the answers there; goes on where it stopped")
    add("--batch", type=int, default=8, metavar="N", help="questions answered together")
    add_model_flags(flags)
    group = flags.add_argument_group("the answer")
    group.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="default: 512")
    Decoding.add_flags(group)
    return flags


def ask(args):
    """What the command line does once its flags are known."""
    import bulk
    import chat

    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {args.max_new_tokens}; it must be at least 1")
    how = Decoding.from_flags(args)
    if args.prompts or args.out or bulk.names_several(args.image):
        return bulk.run(args, how)
    pictures = [image.load(path, warn=say) for (path,) in args.image]
    model = load(args)
    if args.chat:
        return chat.run(model, [path for (path,) in args.image], pictures, args, how)
    turns = [("human", question(args.prompt, len(pictures)))]
    out = None if args.json else sys.stdout
    result = answer(model, turns, pictures, args.max_new_tokens, how, out)
    if args.json:
        print(json.dumps(result, ensure_ascii=False))
    if result["ended"] in ("length", "context"):
        limit = "--max-new-tokens" if result["ended"] == "length" else "the model's context"
        say(f"the answer was cut: {limit} allows no more")


def main():
    try:
        code = ask(parser().parse_args())
        sys.stdout.flush()
        sys.exit(code)
    except ValueError as error:
        print(f"generate.py: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print("generate.py: the device's memory is full; try a smaller --batch", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read stdout has closed it, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


if __name__ == "__main__":
    sys.modules["generate"] = sys.modules["__main__"]  # chat.py and bulk.py need it: load it once
    main()
