"""Logits -> the next token: greedy, sampled, or the best of several beams.

Greedy takes the most likely token. Sampling changes the distribution first, in this order (that of
transformers), and then draws from what is left:

    repetition penalty   logits of tokens already there move down (CTRL, arXiv 1909.05858, 4.1)
    temperature          logits are divided by it: below 1 bolder, above 1 wilder
    top-k                the k most likely tokens stay
    top-p                the fewest tokens whose probability reaches p stay (arXiv 1904.09751, 3.1)
    min-p                tokens less than p times as likely as the likeliest go (arXiv 2407.01082)

Beam search keeps the `beams` most likely beginnings instead of one. Nothing here knows a model or
text: logits come in, token ids go out. Read next: generate.py, which feeds them back.
"""

import argparse
from dataclasses import dataclass, field, fields

import torch


def option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen; each field is a flag of generate.py and a keyword of `generate`."""

    temperature: float = option(0.0, "0 is greedy: the most likely token, always")
    top_p: float = option(1.0, "sample from the likeliest tokens that make up this probability")
    top_k: int = option(0, "sample from this many tokens; 0: from all")
    min_p: float = option(0.0, "sample from tokens at least this times as likely as the likeliest")
    repetition_penalty: float = option(1.0, "above 1: what was said becomes less likely")
    seed: int | None = option(None, "row i of a batch draws with seed + i, alone or together")
    beams: int = option(1, "beam search: the likeliest of so many beginnings kept")
    answers: int = option(1, "so many answers to each prompt")
    lookup: int = option(0, "guess so many tokens from what was said; greedy, one row")
    stop: tuple[str, ...] = option((), "text that ends an answer and is left out; may be repeated")

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        for name, fits, wanted in (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("beams", self.beams >= 1, "at least 1"),
            ("lookup", self.lookup >= 0, "0 or more"),
            ("answers", self.answers >= 1, "at least 1"),
            ("stop", all(self.stop), "a text of at least one letter"),
        ):
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {wanted}")
        changed = self.temperature > 0 or self.repetition_penalty != 1
        if self.beams > 1 and changed:
            raise ValueError("beams are greedy: leave out temperature and repetition_penalty")
        if self.lookup and (changed or self.beams > 1):
            raise ValueError("lookup is greedy: leave out temperature, repetition_penalty, beams")
        if self.beams > 1 and self.answers > self.beams:
            raise ValueError(f"answers is {self.answers}; {self.beams} beams give at most as many")
        if self.beams == 1 and self.answers > 1 and self.temperature == 0:
            raise ValueError("answers would all be the same: choose a temperature, or beams")

    @staticmethod
    def add_flags(group: argparse._ArgumentGroup):
        """One flag for each field; `from_flags` reads them."""
        for f in fields(Decoding):
            how = {"type": f.type, "metavar": "N" if f.type is int else "X"}
            if f.name == "seed":
                how = {"type": int, "metavar": "N"}
            if f.name == "stop":
                how = {"action": "append", "metavar": "TEXT"}
            group.add_argument(
                f"--{f.name.replace('_', '-')}", default=None, help=f.metadata["help"], **how
            )

    @staticmethod
    def from_flags(args) -> "Decoding":
        given = {f.name: getattr(args, f.name) for f in fields(Decoding)}
        try:
            return Decoding(**{name: v for name, v in given.items() if v is not None})
        except ValueError as error:
            name = str(error).partition(" ")[0]  # the messages above begin with a field's name
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(str(error).replace(name, flag, 1)) from None


def penalise(logits, seen, penalty: float):
    """Make tokens in bool[B, V] less likely: positive logits / penalty, negative ones * penalty."""
    changed = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, changed, logits)


def keep_top_k(logits, k: int):
    """All but the k largest become -inf: float[B, V]."""
    smallest = logits.topk(min(k, logits.shape[-1])).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits, p: float):
    """All but the likeliest tokens, up to where their probability reaches p, become -inf."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probs = ordered.softmax(-1)
    # A token stays while the tokens before it have not reached p; the first always stays.
    ordered = ordered.masked_fill(probs.cumsum(-1) - probs >= p, -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def keep_min_p(logits, p: float):
    """Tokens less than p times as likely as the likeliest become -inf."""
    probs = logits.softmax(-1)
    return logits.masked_fill(probs < p * probs.amax(-1, keepdim=True), -torch.inf)


def choose(logits, how: Decoding, generators=None, seen=None):
    """Next token of each row: float[B, V] -> int[B].

    generators: a torch.Generator for each row, so that no row changes what another one draws
    seen:       bool[B, V], tokens of prompt and answer so far, for the repetition penalty
    """
    if how.repetition_penalty != 1:
        logits = penalise(logits, seen, how.repetition_penalty)
    if how.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / how.temperature  # at most 0: never inf
    if how.top_k:
        logits = keep_top_k(logits, how.top_k)
    if how.top_p < 1:
        logits = keep_top_p(logits, how.top_p)
    if how.min_p:
        logits = keep_min_p(logits, how.min_p)
    rows = zip(logits.softmax(-1), generators or [None] * len(logits), strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in rows])


class Chooser:
    """`choose`, with what it has to remember of each row: its generator, and the tokens seen."""

    def __init__(self, how: Decoding, prompts, vocab_size: int, device, numbers):
        """prompts: ids of each row's prompt; those below 0 stand for pictures.

        numbers: row i draws with the seed how.seed + numbers[i]
        """
        self.how, self.generators, self.seen = how, None, None
        if how.seed is not None:
            seeds = [how.seed + number for number in numbers]
            self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        if how.repetition_penalty != 1:
            self.seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
            for row, ids in zip(self.seen, prompts, strict=True):
                row[torch.tensor([i for i in ids if 0 <= i < vocab_size], device=device)] = True

    def __call__(self, logits):
        """float[B, V] -> tokens int[B], and the log-probability float[B] the model gave each."""
        tokens = choose(logits, self.how, self.generators, self.seen)[:, None]  # (B, 1)
        if self.seen is not None:
            self.seen.scatter_(1, tokens, True)
        logprobs = logits.float().log_softmax(-1).gather(1, tokens)
        return tokens[:, 0], logprobs[:, 0]

    def select(self, rows: list[int]):
        """Go on with these rows only."""
        if self.generators is not None:
            self.generators = [self.generators[i] for i in rows]
        if self.seen is not None:
            self.seen = self.seen[rows]


def look_up(ids, n_ahead: int, n_same: int = 2) -> list[int]:
    """A guess at how ids go on: as they did the last time that the last n_same of them stood there.

    Prompt lookup, a draft without a draft model (speculative decoding, arXiv 2211.17192): a copy of
    the prompt or a list is guessed right, and a wrong guess costs little. At most n_ahead ids, none
    of a picture; [] if it never stood there.
    """
    key = ids[-n_same:]
    for i in range(len(ids) - n_same - 1, -1, -1):
        if ids[i : i + n_same] == key:
            guess = ids[i + n_same : i + n_same + n_ahead]
            return guess[: next((k for k, token in enumerate(guess) if token < 0), None)]
    return []


def beam_search(logits, advance, ends, n_beams: int, max_new_tokens: int, is_stop=None):
    """The best endings that are found by keeping the n_beams likeliest beginnings at each step.

    logits:   float[1, V] after the prompt
    advance:  a function (tokens, parents) -> float[n, V]: beam parents[i] goes on with tokens[i]
    ends:     ids that end an answer; is_stop(ids): does a text end it?

    Returns at most n_beams (score, ids, logprobs, ended), the best first; `ended` is "end", "stop"
    or "length". A score is the mean log-probability of the tokens, the end included. Steps and
    scores are those of transformers' num_beams (length_penalty 1, early_stopping False).
    """
    beams, finished = [((), ())], []  # (ids, logprobs) of each
    totals = torch.zeros(1, device=logits.device)
    for length in range(1, max_new_tokens + 1):
        scores = totals[:, None] + logits.float().log_softmax(-1)  # (n, V)
        # Enough candidates that n_beams of them go on even if all others are ends.
        n_candidates = min(max(2, 1 + len(ends)) * n_beams, scores.numel())
        best, places = scores.flatten().topk(n_candidates)
        candidates = zip(best.tolist(), places.tolist(), strict=True)
        before, going = totals.tolist(), []
        for rank, (score, place) in enumerate(candidates):
            parent, token = divmod(place, scores.shape[1])
            ids, logprobs = beams[parent]
            ids, logprobs = (*ids, token), (*logprobs, score - before[parent])
            ended = "end" if token in ends else "stop" if is_stop and is_stop(ids) else None
            if ended or length == max_new_tokens:
                if rank < n_beams:
                    finished.append((score / length, ids, logprobs, ended or "length"))
            elif len(going) < n_beams:
                going.append((score, parent, ids, logprobs))
        finished = sorted(finished, key=lambda beam: -beam[0])[:n_beams]
        # Were the best beam to end now, would it be among them?
        if not going or len(finished) == n_beams and going[0][0] / length <= finished[-1][0]:
            break
        totals = torch.tensor([score for score, *_ in going], device=logits.device)
        beams = [(ids, logprobs) for _, _, ids, logprobs in going]
        logits = advance([ids[-1] for ids, _ in beams], [parent for _, parent, *_ in going])
    return finished


def main():
    """Show what each knob leaves of a small distribution."""
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]])
    seen = torch.tensor([[True, False, False, False, False]])
    for name, changed in (
        ("as it is", logits),
        ("repetition penalty 2", penalise(logits, seen, 2)),
        ("temperature 0.5", logits / 0.5),
        ("top-k 2", keep_top_k(logits, 2)),
        ("top-p 0.9", keep_top_p(logits, 0.9)),
        ("min-p 0.1", keep_min_p(logits, 0.1)),
    ):
        print(f"{name:21} {' '.join(f'{p:6.1%}' for p in changed.softmax(-1)[0].tolist())}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    main()
