"""Prompts and pictures -> answers: everything is read once, then said token by token.

The prompt is read in one go ("prefill": pictures encoded, everything through the decoder, keys and
values kept), then one token at a time is chosen (decoding.py) and fed back. A batch, and how it
shrinks as its rows end:

    .     .    .     USER  How   many  ?    ->  Two   </s>       shorter rows: padded on the left
    USER  [v1 ... vN]  What  is  that  ?    ->  A     cat  </s>
    USER  [v1 ... vN]  Of  which  kind ?    ->  Tabby </s>       a row that has ended leaves

A conversation keeps its KV cache (`Memory`): of the next prompt, which begins with everything said
before, only what is new is read.

Read next: decoding.py, how a token is chosen; generate.py, the command line around this.
"""

import torch

import data
import image
from data import IMAGE_TOKEN
from decoding import Chooser, Decoding, beam_search, look_up
from llama import KVCache

HALF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # stands for bytes whose rest is in the next token
GREEDY = Decoding()


class Answer:
    """One answer in the making.

    ids, logprobs:  what was said, without what ended it
    ended:          None, or "end" (of sequence), "stop" (a stop text), "length" (max_new_tokens),
                    "context" (it is full)
    """

    def __init__(self, model, stop: tuple[str, ...], max_new_tokens: int, room: int):
        self.tokenizer = model.tokenizer
        self.ends, text = data.stops(model.template, model.tokenizer)
        self.stops = (*stop, text) if text else stop  # v0's is "###", which is no token
        # A token has one byte or more, so a stop text lies within so many of them.
        self.tail = max((len(text.encode()) + 1 for text in self.stops), default=0)
        self.limit, self.at_limit = min((max_new_tokens, "length"), (room, "context"))
        self.said, self.logprobs, self.ended = [], [], None

    def add(self, token: int, logprob: float):
        if token in self.ends:
            self.ended = "end"
            return
        self.said.append(token)
        self.logprobs.append(logprob)
        if self.is_stop(self.said):
            self.ended = "stop"
        elif len(self.said) == self.limit:
            self.ended = self.at_limit

    def is_stop(self, ids) -> bool:
        tail = self.stops and self.tokenizer.decode(list(ids[-self.tail :]))
        return any(stop in tail for stop in self.stops)

    @property
    def ids(self) -> list[int]:
        return self.said[:-1] if self.ended == "stop" else self.said

    @property
    def text(self) -> str:
        """What was said up to a stop text, without blanks around it."""
        text = self.tokenizer.decode(self.said)
        if self.ended == "stop":
            text = text[: min((text.find(s) for s in self.stops if s in text), default=None)]
        return text.rstrip(HALF_A_CHARACTER).strip()

    @property
    def settled(self) -> str:
        """The part of the text that no later token can change: no half character, no half stop."""
        text = self.text
        if self.ended:
            return text
        for stop in self.stops:
            begun = (n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n].rstrip()))
            text = text[: len(text) - len(stop[: next(begun, 0)].rstrip())]
        return text.rstrip()


class Memory:
    """What has been read of a conversation, so that its next turn reads only what is new."""

    def __init__(self):
        self.ids, self.pictures, self.cache = [], [], None

    def common(self, ids, pictures) -> tuple[int, int]:
        """How many ids of a prompt, all but its last, and how many pictures were read before."""
        seen = iter(zip(self.pictures, pictures, strict=False))
        n = n_pictures = 0
        for old, new in zip(self.ids, ids[:-1], strict=False):
            if old != new:
                break
            if new == IMAGE_TOKEN:
                before, now = next(seen)
                if before is not now:
                    break
                n_pictures += 1
            n += 1
        return n, n_pictures

    def recall(self, model, ids, pictures) -> tuple[int, int]:
        """Forget all that is not in the prompt; `common` of the rest, which need not be read."""
        n, n_pictures = self.common(ids, pictures) if self.cache else (0, 0)
        self.ids, self.pictures = list(ids[:n]), list(pictures[:n_pictures])
        if self.cache:
            self.cache.length = measure(model, self.ids, self.pictures)
        return n, n_pictures


def encode(model, prompt) -> list[int]:
    """A rendered prompt, or ids as they are, -> ids with IMAGE_TOKEN for each `<image>`."""
    if not isinstance(prompt, str):
        return list(prompt)
    return data.encode_prompt(prompt, model.tokenizer, model.template)


def measure(model, ids, pictures) -> int:
    """The length of a prompt whose pictures are words. Raises ValueError if they do not match."""
    if ids.count(IMAGE_TOKEN) != len(pictures):
        raise ValueError(
            f"the prompt has {ids.count(IMAGE_TOKEN)} <image> for {len(pictures)} pictures: "
            "one for each"
        )
    return len(ids) + sum(model.config.n_visual(picture.size) - 1 for picture in pictures)


def room_for_answer(model, ids, pictures) -> int:
    """Tokens that the context has left after a prompt. Raises ValueError if there are none."""
    length, limit = measure(model, ids, pictures), model.config.text.max_positions
    if length >= limit:
        raise ValueError(f"the prompt is {length} tokens long, the model's context is {limit}")
    return limit - length


def read(model, rows, images, n_new: int, memory: Memory | None = None):
    """Prefill: ids and pictures of each row -> hidden states float[B, T', D], mask, KVCache.

    The cache has room for n_new tokens more. The mask int[B, T'] is None if there is no padding.
    With a `memory`, of one row, only what it does not hold yet is read, and it holds all after.
    """
    llama = model.language_model
    device, past = llama.embed_tokens.weight.device, 0
    ids, pictures = rows, images
    if memory:
        n, n_pictures = memory.recall(model, rows[0], images[0])
        ids, pictures = [rows[0][n:]], [images[0][n_pictures:]]
        past = memory.cache.length if memory.cache else 0
    ids = [torch.tensor(row) for row in ids]
    mask = [torch.ones_like(row) for row in ids]
    ids, mask = (
        torch.nn.utils.rnn.pad_sequence(r, batch_first=True).to(device) for r in (ids, mask)
    )
    pixels = [image.to_pixels(p, model.config.image) for row in pictures for p in row]
    sizes = [p.size for row in pictures for p in row]
    embeds, _, mask = model.embed(ids, pixels, None, mask, sizes, pad_left=True)
    mask = None if mask.all() else mask
    length = past + embeds.shape[1] + n_new
    cache = memory and memory.cache
    if not cache:
        cache = KVCache(llama.config, len(rows), length, embeds.dtype, device)
    elif cache.keys.shape[3] < length:
        cache.select([0], min(2 * length, llama.config.max_positions))
    hidden = llama.hidden(embeds=embeds, mask=mask, cache=cache)
    if memory:
        memory.ids, memory.pictures, memory.cache = list(rows[0]), list(images[0]), cache
    return hidden, mask, cache


@torch.inference_mode()
def decode(model, prompts, images, max_new_tokens, how=GREEDY, memory=None, numbers=None):
    """Yield, after each step, the list of all Answers; `answers` of `how` for each prompt.

    prompts: rendered strings (`data.render`) or lists of token ids
    images:  for each prompt a list of PIL pictures (or one picture, or None)
    memory:  of a conversation, whose prompt is the only one
    numbers: row i draws with how.seed + numbers[i] (default: i), whatever else is in the batch

    Raises ValueError when pictures and `<image>` do not match or a prompt leaves no room in the
    context.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    rows = [encode(model, prompt) for prompt in prompts]
    images = [[] if i is None else [i] if hasattr(i, "size") else list(i) for i in images]
    rooms = [room_for_answer(model, *row) for row in zip(rows, images, strict=True)]
    answers = [
        Answer(model, how.stop, max_new_tokens, room) for room in rooms for _ in range(how.answers)
    ]
    if how.beams > 1:
        search_beams(model, rows, images, answers, how)
        yield answers
        return
    memory = memory if how.answers == 1 else None  # it is of one row
    llama = model.language_model
    n_words = model.tokenizer.vocab_size  # some checkpoints pad the vocabulary to a round number
    hidden, mask, cache = read(model, rows, images, max(a.limit for a in answers), memory)
    logits = llama.head(hidden[:, -1])[:, :n_words]  # (B, V)
    copies = [i for i in range(len(rows)) for _ in range(how.answers)]
    numbers = [(numbers or range(len(rows)))[i] * how.answers for i in copies]
    numbers = [number + i % how.answers for i, number in enumerate(numbers)]
    chooser = Chooser(how, [rows[i] for i in copies], n_words, logits.device, numbers)
    if how.answers > 1:
        logits, mask = logits[copies], None if mask is None else mask[copies]
        cache.select(copies)
    if how.lookup and len(answers) == 1:
        for _ in look_ahead(model, rows[0], answers[0], logits, cache, chooser, memory):
            yield answers
        return
    alive = list(range(len(answers)))  # whose answers the rows of the batch are
    while alive:
        tokens, logprobs = chooser(logits)  # (B), (B)
        for i, token, logprob in zip(alive, tokens.tolist(), logprobs.tolist(), strict=True):
            answers[i].add(token, logprob)
        yield answers
        going = [place for place, i in enumerate(alive) if not answers[i].ended]
        if 0 < len(going) < len(alive):  # those that have ended leave the batch
            cache.select(going)
            chooser.select(going)
            tokens, mask = tokens[going], None if mask is None else mask[going]
        alive = [alive[place] for place in going]
        if alive:
            mask = None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            logits = llama(tokens[:, None], mask=mask, cache=cache)[:, -1, :n_words]
            if memory:
                memory.ids.append(int(tokens))


def look_ahead(model, ids, answer: Answer, logits, cache, chooser, memory):
    """The greedy answer of one row, several tokens a step where they are guessed right.

    The decoder reads the last token and a guess at the next ones (decoding.look_up) in one step,
    which costs little more than one token, and says what follows each of them:

        read   The | small  panda  is          guessed from what was said before
        says  small  panda  and    ...         "small" and "panda" were right, "is" is taken back
    """
    llama, n_words = model.language_model, model.tokenizer.vocab_size
    guess: list[int] = []
    while True:
        tokens, logprobs = chooser(logits)  # (1 + guessed), (1 + guessed)
        right = 0
        for token, logprob, guessed in zip(
            tokens.tolist(), logprobs.tolist(), [*guess, None], strict=True
        ):
            answer.add(token, logprob)
            yield
            if answer.ended or token != guessed:
                break
            right += 1
        cache.length -= len(guess) - right
        if memory:
            memory.ids += guess[:right]
        if answer.ended:
            return
        n_ahead = min(chooser.how.lookup, answer.limit - len(answer.said))
        guess = look_up([*ids, *answer.said], n_ahead)
        feed = torch.tensor([[token, *guess]], device=logits.device)
        logits = llama(feed, cache=cache)[0, :, :n_words]  # (1 + guessed, V)
        if memory:
            memory.ids.append(token)


def search_beams(model, rows, images, answers: list[Answer], how: Decoding):
    """Fill the answers, those of each prompt by a beam search of its own."""
    llama, n_words = model.language_model, model.tokenizer.vocab_size
    for ids, pictures in zip(rows, images, strict=True):
        mine, answers = answers[: how.answers], answers[how.answers :]
        hidden, _, cache = read(model, [ids], [pictures], mine[0].limit)

        def advance(tokens, parents, cache=cache):
            cache.select(parents)
            tokens = torch.tensor(tokens, device=cache.keys.device)[:, None]
            return llama(tokens, cache=cache)[:, -1, :n_words]

        logits = llama.head(hidden[:, -1])[:, :n_words]  # (1, V)
        first = mine[0]
        found = beam_search(logits, advance, first.ends, how.beams, first.limit, first.is_stop)
        for answer, (_, tokens, logprobs, ended) in zip(mine, found, strict=False):
            keep = len(tokens) - (ended == "end")
            answer.said, answer.logprobs = list(tokens[:keep]), list(logprobs[:keep])
            answer.ended = answer.at_limit if ended == "length" else ended


def main():
    """Print the steps of a small random model that answers three prompts together."""
    from types import SimpleNamespace

    from llama import LLaMAConfig
    from llava import LLaVA, LLaVAConfig

    torch.manual_seed(0)
    text = LLaMAConfig(
        vocab_size=20, dim=32, mlp_dim=64, n_layers=2, n_heads=4, n_kv_heads=4, max_positions=64
    )
    with torch.device("meta"):
        model = LLaVA(LLaVAConfig(text=text))
    model.language_model = type(model.language_model)(text).eval()
    model.tokenizer = SimpleNamespace(eos_id=3, vocab_size=20)
    how = Decoding(temperature=1, seed=0)
    for step, answers in enumerate(decode(model, [[1, 5, 7], [1, 4], [1]], [None] * 3, 12, how)):
        alive = sum(not answer.ended for answer in answers)
        print(f"step {step:2}  rows left: {alive}  {[answer.ids for answer in answers]}")
    print("each ended by", [answer.ended for answer in answers])


if __name__ == "__main__":
    import argparse

    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    main()
