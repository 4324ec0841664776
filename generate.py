"""A picture and a question -> an answer.

    python generate.py --image examples/stickers.jpg --prompt "How many animals are there?"

The prompt is read once ("prefill": pictures encoded, everything through the decoder, keys and
values kept), then one token at a time is chosen and fed back. A row ends at its end-of-sequence.
Greedy by default; with a temperature, logits are divided by it first, and then the smallest set of
tokens whose probability reaches top-p is sampled from.

Without --model it uses the small model of this repository. stdout holds the answer and nothing
else; remarks go to stderr; a mistake in the input is one sentence there and exit code 2.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

import data
import fast
import image
import templates
from configs import DTYPES
from data import IMAGE_TAG, IMAGE_TOKEN
from llama import KVCache
from llava import LLaVA

TINY = Path(__file__).parent / "tiny" / "weights" / "llava"
TINY_KNOWS = (
    "tiny model: it knows 1 to 4 stickers of 48 kinds on coloured paper and nothing else, and errs "
    "about them (the README has its scores); --model takes a real one"
)
STOP_TOKENS = 8  # a stop text is looked for among this many tokens


def choose(logits, temperature: float, top_p: float, generator=None):
    """Next token of each row: float[B, V] -> int[B]. Temperature 0 takes the most likely one."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        probs, order = probs.sort(dim=-1, descending=True)
        # A token stays while the tokens before it have not reached top_p; the first always stays.
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)
        place = torch.multinomial(probs, 1, generator=generator)
        return order.gather(-1, place)[:, 0]
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def encode(model, prompt) -> list[int]:
    """A rendered prompt, or ids as they are, -> ids with IMAGE_TOKEN for each `<image>`."""
    if not isinstance(prompt, str):
        return list(prompt)
    return data.encode_prompt(prompt, model.tokenizer, model.template)


@torch.inference_mode()
def stream(model, prompts, images, max_new_tokens, temperature=0.0, top_p=1.0, seed=None):
    """Yield the next token of every row, list[int | None]; None once a row has ended.

    prompts: rendered strings (`data.render`) or lists of token ids
    images:  for each prompt a list of PIL pictures (or one picture, or None)

    End-of-sequence is not yielded. Raises ValueError when pictures and `<image>` do not match or a
    prompt leaves no room in the context.
    """
    device = model.language_model.embed_tokens.weight.device
    rows = [torch.tensor(encode(model, prompt)) for prompt in prompts]
    images = [[] if i is None else [i] if hasattr(i, "size") else list(i) for i in images]
    for i, (row, pictures) in enumerate(zip(rows, images, strict=True)):
        n_tags = int((row == IMAGE_TOKEN).sum())
        if n_tags != len(pictures):
            raise ValueError(
                f"prompt {i} has {n_tags} <image> for {len(pictures)} pictures: one for each"
            )
    pixels = [image.to_pixels(p, model.config.image) for pictures in images for p in pictures]
    mask = [torch.ones_like(row) for row in rows]
    ids, mask = (torch.nn.utils.rnn.pad_sequence(r, batch_first=True) for r in (rows, mask))
    sizes = [p.size for pictures in images for p in pictures]
    embeds, _, mask = model.embed(
        ids.to(device), pixels, None, mask.to(device), sizes, pad_left=True
    )
    length, limit = embeds.shape[1], model.config.text.max_positions
    if length >= limit:
        raise ValueError(f"the prompt is {length} tokens long, the model's context is {limit}")
    steps = min(max_new_tokens, limit - length)
    llama, (stop_ids, stop_text) = model.language_model, data.stops(model.template, model.tokenizer)
    n_words = model.tokenizer.vocab_size  # some checkpoints pad the vocabulary to a round number
    stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    said: list[list[int]] = [[] for _ in rows]
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    cache = KVCache(llama.config, len(rows), length + steps, embeds.dtype, device)
    ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
    hidden = llama.hidden(embeds=embeds, mask=mask, cache=cache)
    for step in range(steps):
        logits = llama.head(hidden[:, -1])[:, :n_words]  # (B, V)
        token = choose(logits, temperature, top_p, generator)  # (B)
        ended = ended | torch.isin(token, stop_ids)
        if stop_text:  # the template of v0 ends answers with "###", which is no token
            for i, t in enumerate(token.tolist()):
                said[i] = [*said[i][-STOP_TOKENS:], t]
                ended[i] |= stop_text in model.tokenizer.decode(said[i])
        if ended.all():
            return
        done = ended.tolist()
        yield [None if end else t for t, end in zip(token.tolist(), done, strict=True)]
        if step + 1 < steps:
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            hidden = llama.hidden(token[:, None], mask=mask, cache=cache)


def generate(model, prompts, images, max_new_tokens, temperature=0.0, top_p=1.0, seed=None):
    """Answers as token ids, list of list[int], without end-of-sequence; see `stream`."""
    answers: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(model, prompts, images, max_new_tokens, temperature, top_p, seed):
        for answer, token in zip(answers, tokens, strict=True):
            if token is not None:
                answer.append(token)
    return answers


def answer(model, turns, pictures, args, out=None) -> dict:
    """Answer the last of `turns`; text goes to `out` as it comes. -> what --json prints."""
    started = time.perf_counter()
    ids, _ = data.encode_turns(turns, model.tokenizer, model.template)
    token_ids, shown, first = [], "", None
    tokens = stream(
        model, [ids], [pictures], args.max_new_tokens, args.temperature, args.top_p, args.seed
    )
    _, stop_text = data.stops(model.template, model.tokenizer)
    for (token,) in tokens:
        first = first or time.perf_counter()
        token_ids.append(token)
        text = model.tokenizer.decode(token_ids).lstrip().rstrip(stop_text or "")
        if out and not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character waits
            print(text[len(shown) :], end="", flush=True, file=out)
            shown = text
    ended = time.perf_counter()
    text = model.tokenizer.decode(token_ids).strip().rstrip(stop_text or "")
    if out:
        print(file=out)
    return {
        "answer": text,
        "token_ids": token_ids,
        "prompt": data.render(turns, model.template),
        "timings": {
            "first_token_s": round((first or ended) - started, 4),
            "total_s": round(ended - started, 4),
            "tokens_per_s": round(len(token_ids) / (ended - started), 2),
        },
    }


def question(prompt: str, n_pictures: int) -> str:
    """Put a tag for each picture before the prompt, unless it has tags; then they must match."""
    n_tags = prompt.count(IMAGE_TAG)
    if n_tags == 0:
        return f"{IMAGE_TAG}\n" * n_pictures + prompt
    if n_tags != n_pictures:
        raise ValueError(f"the prompt has {n_tags} <image> for {n_pictures} --image: one for each")
    return prompt


def chat(model, pictures, args):
    """Ask again and again until the input ends; the pictures belong to the first question."""
    turns = []
    while True:
        print("you: ", end="", flush=True, file=sys.stderr)
        line = sys.stdin.readline()
        if not line:
            return
        turns.append(("human", line.strip() if turns else question(line.strip(), len(pictures))))
        turns.append(("gpt", answer(model, turns, pictures, args, sys.stdout)["answer"]))


def load(args) -> LLaVA:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    path = args.model or TINY
    if args.model is None:
        print(TINY_KNOWS, file=sys.stderr)
    # On a CPU half precision is emulated or slow for most models: float32 unless asked otherwise.
    # (The kernels for quantised weights take bfloat16.)
    usual = torch.float32 if args.quantize is None else torch.bfloat16
    dtype = DTYPES[args.dtype] if args.dtype else usual if device == "cpu" else None
    bits = {None: None, "int8": 8, "int4": 4}[args.quantize]
    model = LLaVA.from_pretrained(path, args.vision_tower, dtype, device, args.model_base, bits)
    fast.prepare(model)
    if model.tokenizer is None:
        raise ValueError(f"{path} has no tokenizer: expected tokenizer.model or tokenizer.json")
    if args.template:
        templates.template_named(args.template)
        model.template = args.template
    if args.model is not None:
        if dtype == torch.float32 and not args.dtype and fast.multiplies_bfloat16():
            print("float32; with --dtype bf16 this CPU is about twice as fast", file=sys.stderr)
        print(f"conversation template: {model.template} (--template)", file=sys.stderr)
    return model


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = flags.add_argument
    add("--image", action="append", default=[], metavar="FILE", help="picture; may be repeated")
    add("--prompt", default="Describe the picture in detail.", help="the question")
    add("--model", metavar="DIR", help="checkpoint: a folder, or a Hugging Face id; else tiny")
    add("--model-base", metavar="DIR", help="what a delta, LoRA or lone projector belongs to")
    add("--vision-tower", metavar="DIR", help="CLIP folder to use instead of the checkpoint's own")
    add("--template", help=f"conversation template: {', '.join(templates.TEMPLATES)}")
    add("--chat", action="store_true", help="keep asking; questions come from stdin")
    add("--json", action="store_true", help="print answer, token ids, prompt and timings as JSON")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="longest answer")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from this much probability")
    add("--seed", type=int, metavar="N", help="of the sampling")
    add("--dtype", choices=DTYPES, help="default: fp32 on a CPU, else as stored")
    add("--quantize", choices=("int8", "int4"), help="round the decoder's weights: less memory")
    add("--device", choices=("cpu", "cuda", "mps"), help="default: cuda if there is one")
    return flags


def check(args):
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {args.max_new_tokens}; it must be at least 1")
    if args.temperature < 0:
        raise ValueError(f"--temperature is {args.temperature}; it must be 0 or more")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p is {args.top_p}; it must be above 0 and at most 1")


def main():
    args = parser().parse_args()
    try:
        check(args)
        warn = lambda text: print(text, file=sys.stderr)  # noqa: E731
        pictures = [image.load(path, warn=warn) for path in args.image]
        model = load(args)
        if args.chat:
            return chat(model, pictures, args)
        turns = [("human", question(args.prompt, len(pictures)))]
        result = answer(model, turns, pictures, args, None if args.json else sys.stdout)
        if args.json:
            print(json.dumps(result, ensure_ascii=False))
    except ValueError as error:
        print(f"generate.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
