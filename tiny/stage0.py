"""Stage 0: what the real recipe downloads, made here. A tokenizer, a CLIP-style ViT, a small LLaMA.

    python tiny/stage0.py tokenizer    a sentencepiece model of the world's language (seconds)
    python tiny/stage0.py vit          a ViT trained contrastively against captions (CLIP, arXiv
                                       2103.00020), then probed
    python tiny/stage0.py llama        a LLaMA that answers questions about *written* scenes

The results lie in tiny/weights/, so stage 1 starts where the papers start: with an eye and a voice
that know nothing of each other. Two things had to be found out, and are measured at the end:

- A contrastive loss is content with colour and place as soon as these tell the pictures of a batch
  apart, and then never learns what the stickers show. So a batch holds groups of four pictures
  that agree in everything but the kinds. The probe reads the kind from single patch features.
- Before it is asked to see, the LLaMA must be able to answer from notes; what it can't work out
  in words it will not work out from a picture.
"""

import argparse
import io
import itertools
import json
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel  # here 0.8 of the fused one's time

sys.path.insert(0, str(Path(__file__).parent.parent))
import talk
import world

import checkpoint
import image
import tokenizer
from batches import by_length
from data import IGNORE, encode
from image import ImageConfig
from llama import LLaMA, LLaMAConfig
from templates import TEMPLATES
from vit import ViT, ViTConfig

WEIGHTS = Path(__file__).parent / "weights"
VIT = ViTConfig(image_size=96, patch_size=12, dim=192, mlp_dim=768, n_layers=6, n_heads=6)
LLAMA = LLaMAConfig(
    vocab_size=1024,
    dim=192,
    mlp_dim=512,
    n_layers=5,
    n_heads=6,
    n_kv_heads=6,
    max_positions=1024,
    tied_embeddings=True,
)
TRAIN, PROBE, TEST = 0, 1, 2  # seeds of the worlds: for training, the probe's, fresh ones
DRILLS = 20_000  # examples of pure look-up that the small LLaMA starts with


def random_of(*seed: int):
    return np.random.RandomState(list(seed))


# ---- tokenizer ------------------------------------------------------------------------------


def train_tokenizer(out: Path):
    """Byte-fallback BPE, LLaMA's own kind, on 20,000 conversations of the world.

    Places of two words are one token each: a small model looks up "top left" at one key, while
    "top", "left" and "top left" in pieces look alike to it and it never learned to tell them apart.
    """
    import sentencepiece

    def sentences():
        for i in range(20_000):
            for turn in written_conversation(TRAIN, i):
                yield from turn["value"].split("\n")
        yield from (TEMPLATES["v1"].first + "ASSISTANT:",) * 200

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(),
        model_writer=model,
        model_type="bpe",
        vocab_size=LLAMA.vocab_size,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        character_coverage=1.0,
        required_chars="".join(map(chr, range(33, 127))),
        user_defined_symbols=["▁" + p.replace(" ", "▁") for p in world.PLACES if " " in p],
        num_threads=1,
        minloglevel=2,
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.model").write_bytes(model.getvalue())


# ---- LLaMA ----------------------------------------------------------------------------------


def written_conversation(seed: int, index: int) -> list[dict]:
    """A record of any type about a scene that is given as notes instead of a picture."""
    random = random_of(seed, index, 1)
    which = random.randint(20)
    scene = world.make_scene(seed, index)
    if which == 0:
        turns = talk.knowledge(random)
    else:
        turns = talk.record(scene, random, which)
        question, answer = turns[0]
        turns[0] = (f"{talk.notes(scene, random)}\n{question}", answer)
    return [
        {"from": role, "value": text}
        for turn in turns
        for role, text in zip(("human", "gpt"), turn, strict=True)
    ]


def written_sample(seed: int, index: int, words) -> tuple[list[int], list[int]]:
    """Token ids and labels of example `index`: drills at first, then conversations and captions.

    A caption follows its notes as it will follow its picture in stage 1 (template "plain").
    """
    scene, random = world.make_scene(seed, index), random_of(seed, index, 6)
    if index < DRILLS or random.randint(5) < 2:
        return drill(random, words, in_full=index >= DRILLS)
    if random.randint(6):
        return encode(written_conversation(seed, index), words, "v1", LLAMA.max_positions)
    seen = words.encode(talk.notes(scene, random), bos=True)
    told = words.encode(talk.caption(scene, random) + "\n")
    return seen + told, [IGNORE] * len(seen) + told


def drill(random, words, in_full: bool) -> tuple[list[int], list[int]]:
    """Notes of four stickers and twelve look-ups, in shorthand ("what top left", "cat") or in full.

    Where the answer follows its key at once and four stickers compete for it, gradient descent
    finds the look-up in 500 steps, and real questions then inherit it; from real questions alone
    it was not found in thousands. (Two attention heads have to meet: one that carries each word
    to the next, one that seeks the key. Neither pays without the other.) After the shorthand
    half of the drills count instead, where ordinary questions have too few twos and threes.
    """
    counting = in_full and random.randint(2)
    places = [world.PLACES[i] for i in random.permutation(9)[:4]]
    kinds = [world.KINDS[i] for i in random.permutation(48)[:4]]
    if counting:
        kinds = [talk.pick(random, kinds[:3]) for _ in kinds]
    stickers = [
        world.place_sticker(random, kind, talk.pick(random, tuple(world.SIZES)), place)
        for kind, place in zip(kinds, places, strict=True)
    ]
    scene = world.Scene(talk.pick(random, tuple(world.PAPERS)), tuple(stickers), 0)
    ids = words.encode(talk.notes(scene, random) + "\n", bos=True)
    labels = [IGNORE] * len(ids)
    for _ in range(12):
        sticker = talk.pick(random, stickers)
        about = talk.pick(random, ("kind", "place", "size"))
        if counting:
            noun = talk.pick(random, (*world.FAMILIES, *kinds))
            question = f"How many {talk.plural(noun)} are there?"
            answer = str(talk.number_of(noun, scene))
        elif in_full and random.randint(2):
            question, answer = talk.SHORT[about](scene, random)
        else:
            word = {"kind": "what", "place": "where", "size": "how"}[about]
            question = f"{word} {sticker.place if about == 'kind' else sticker.kind}"
            answer = getattr(sticker, about)
        asked, answered = words.encode(question), words.encode(answer)
        ids += asked + answered
        labels += [IGNORE] * len(asked) + answered
    return ids, labels


def text_batches(batch: int, words, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of 16 steps: neighbours in length share a batch, so that little is padding."""
    rows = [written_sample(TRAIN, i, words) for i in range(step * batch, (step + 16) * batch)]
    order = by_length([len(ids) for ids, _ in rows], batch, TRAIN, step)
    return [padded([rows[i] for i in numbers]) for numbers in order]


def padded(rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of (ids, labels) -> int[B, T] each, padded on the right."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORE] * (length - len(labels)) for _, labels in rows])
    return ids, labels


def train_llama(out: Path, steps: int, start=None, batch: int = 32, lr: float = 1e-3):
    words = tokenizer.load(WEIGHTS / "llama")
    torch.manual_seed(0)
    config = replace(LLAMA, vocab_size=words.vocab_size)
    # The usual 0.02 is for wide models. At width 192 it makes attention start out flat, and the
    # look-ups that every question needs are then found thousands of steps later.
    llama = LLaMA(config).apply(partial(init, std=config.dim**-0.5))
    for layer in llama.layers:  # a layer starts as a small step away from its input
        layer.self_attn.o_proj.weight.data *= 0.1
        layer.mlp.down_proj.weight.data *= 0.1
    if start:
        llama = LLaMA.from_pretrained(start, torch.float32).train()
    optimizers = optimizers_of(llama, lr, steps)
    started = time.time()
    first = 200_000 // batch if start else 0  # behind the drills, in examples not seen yet
    loader = torch.utils.data.DataLoader(
        range(first, first + steps, 16),
        None,
        num_workers=1,
        collate_fn=partial(text_batches, batch, words),
    )
    for step, (ids, labels) in enumerate(
        itertools.islice(itertools.chain.from_iterable(loader), steps)
    ):
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
            hidden = llama.hidden(ids)
            target = labels[:, 1:]
            logits = llama.head(hidden[:, :-1][target != IGNORE])
        loss = F.cross_entropy(logits.float(), target[target != IGNORE])
        update(llama, optimizers, loss)
        report(step, steps, started, loss=loss.item())
        if (step + 1) % 500 == 0 or step + 1 == steps:
            checkpoint.save(
                out,
                "language_model",
                llama.state_dict(),
                asdict(config),
                tokenizer=WEIGHTS / "llama" / "tokenizer.model",
                dtype=torch.float16,
            )
            print(json.dumps(exact_answers(llama, words, 200)), flush=True)


@torch.no_grad()
def exact_answers(llama, words, n_scenes: int) -> dict[str, float]:
    """Share of exact short answers from notes, by family, on fresh scenes."""
    llama.eval()
    right: dict[str, list[bool]] = {}
    families = {**talk.SHORT, "choice": talk.choice}
    for name, ask in families.items():
        rows = []
        for i in range(n_scenes):
            scene, random = world.make_scene(TEST, i), random_of(TEST, i, 2)
            if turn := ask(scene, random):
                prompt = talk.LETTER_PROMPT if name == "choice" else talk.SHORT_PROMPT
                question = f"{talk.notes(scene, random)}\n{turn[0]}\n{prompt}"
                turns = ({"from": "human", "value": question}, {"from": "gpt", "value": turn[1]})
                rows.append(encode(turns, words, "v1"))
        ids, labels = padded(rows)
        with torch.autocast("cpu", torch.bfloat16):
            guess = llama(ids)[:, :-1].argmax(-1)
        target = labels[:, 1:]
        right[name] = ((guess == target) | (target == IGNORE)).all(1).float().mean().item()
    llama.train()
    right["all"] = sum(right.values()) / len(right)
    return {name: round(share, 4) for name, share in right.items()}


# ---- ViT ------------------------------------------------------------------------------------


class Contrast(nn.Module):
    """CLIP around a ViT: a small text tower, two projections and a temperature."""

    def __init__(self, vocab_size: int, dim: int = 128):
        super().__init__()
        self.vit = ViT(VIT)
        sizes = replace(LLAMA, vocab_size=vocab_size, n_layers=2)
        self.text = LLaMA(sizes)
        self.image_projection = nn.Linear(VIT.dim, dim, bias=False)
        self.patch_projection = nn.Linear(VIT.dim, dim, bias=False)
        self.text_projection = nn.Linear(sizes.dim, dim, bias=False)
        self.apply(partial(init, std=0.02))
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def texts(self, rows) -> torch.Tensor:
        """Unit vectors of rows of token ids, each read at its last token -> float[B, D]."""
        ids, _ = padded([(row, row) for row in rows])
        ends = torch.tensor([len(row) - 1 for row in rows])
        hidden = self.text.hidden(ids)[torch.arange(len(rows)), ends]
        return F.normalize(self.text_projection(hidden), dim=-1)

    def forward(self, pixels, captions, spots, phrases, places):
        """Loss; how often a picture finds its caption, and a spot its phrase and its place.

        spots: int[n, 4], for each the picture, the patch, its phrase and its place
        """
        scale = self.log_scale.exp().clamp(max=100)
        hidden = self.vit(pixels, -2, keep_class=True)  # (B, 1+N, D of the ViT)
        pooled = self.vit.post_layernorm(self.vit.layers[-1](hidden)[:, 0])  # = vit.pool(pixels)
        images = F.normalize(self.image_projection(pooled), dim=-1)  # (B, D)
        picture, patch, phrase, place = spots.T
        patches = hidden[:, 1:][picture, patch]  # (n, D of the ViT)
        patches = F.normalize(self.patch_projection(patches), dim=-1)  # (n, D)
        own = torch.arange(len(images))
        loss, hits = 0.0, []
        for rows, texts, right in (
            (images, captions, own),
            (patches, phrases, phrase),
            (patches, places, place),
        ):
            scores = (rows @ self.texts(texts).T).float() * scale  # (rows, texts)
            loss = loss + F.cross_entropy(scores, right)
            hits.append((scores.argmax(1) == right).float().mean())
            if texts is captions:  # a picture seeks its caption, and a caption its picture
                loss = loss + F.cross_entropy(scores.T, own)
        return loss, *hits


PHRASES = [
    *(f"a {size} {kind}" for size in world.SIZES for kind in world.KINDS),
    *(f"{paper} paper" for paper in world.PAPERS),
]


def patch_at(x: int, y: int) -> int:
    """Number of the patch under a point of the sheet."""
    side = VIT.image_size // VIT.patch_size
    column, row = (min(max(c * side // world.SHEET, 0), side - 1) for c in (x, y))
    return row * side + column


def spots_of(scene, random) -> list[tuple[int, int, int]]:
    """(patch, phrase, place) of a random patch on each sticker, and of one on bare paper."""
    found = []
    bare = talk.pick(
        random, [p for p in world.PLACES if p not in {s.place for s in scene.stickers}]
    )
    for s in scene.stickers:
        reach = world.SIZES[s.size] // 3
        x, y = (c + random.randint(-reach, reach + 1) for c in s.centre)
        found.append((patch_at(x, y), f"a {s.size} {s.kind}", s.place))
    row, column = divmod(world.PLACES.index(bare), 3)
    x, y = (int((c + random.uniform(0.25, 0.75)) * world.CELL) for c in (column, row))
    found.append((patch_at(x, y), f"{scene.paper} paper", bare))
    return [(patch, PHRASES.index(text), world.PLACES.index(place)) for patch, text, place in found]


def group(index: int) -> list[tuple[np.ndarray, str, world.Scene]]:
    """Four pictures that differ in the kinds only, with captions and scenes."""
    random = random_of(TRAIN, index, 3)
    base = world.make_scene(TRAIN, index)
    found = []
    for _ in range(4):
        stickers = []
        for s in base.stickers:
            kinds = [k for k in world.KINDS if not world.held_out(k, s.place, s.size)]
            stickers.append(replace(s, kind=talk.pick(random, kinds)))
        scene = replace(base, stickers=tuple(stickers))
        picture = np.asarray(world.draw(scene).resize((VIT.image_size, VIT.image_size), 3))
        found.append((picture, talk.caption(scene, random), scene))
    return found


def normalised(pictures) -> torch.Tensor:
    """uint8[B, 96, 96, 3] -> float[B, 3, 96, 96] as image.to_pixels makes them."""
    config = ImageConfig(image_size=96)
    pixels = torch.as_tensor(np.asarray(pictures)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (config.mean, config.std))
    return (pixels - mean) / std


def train_vit(out: Path, steps: int, groups: int, start=None, batch: int = 128, lr: float = 1e-3):
    words = tokenizer.load(WEIGHTS / "llama")
    with Pool(2) as pool:
        drawn = pool.map(group, range(groups), chunksize=64)
    drawn = [one for four in drawn for one in four]
    pictures = np.stack([picture for picture, _, _ in drawn])
    captions = [words.encode(caption, bos=True, eos=True) for _, caption, _ in drawn]
    phrases = [words.encode(text, bos=True, eos=True) for text in PHRASES]
    places = [words.encode(talk.at(place), bos=True, eos=True) for place in world.PLACES]
    print(f"{len(pictures)} pictures drawn", flush=True)
    torch.manual_seed(0)
    model = Contrast(words.vocab_size)
    if start:
        model.vit = ViT.from_pretrained(start, torch.float32).train()
    optimizers = optimizers_of(model, lr, steps)
    generator = torch.Generator().manual_seed(0)
    started = time.time()
    for step in range(steps):
        chosen = torch.randint(groups, (batch // 4,), generator=generator)
        chosen = (chosen[:, None] * 4 + torch.arange(4)).flatten().tolist()
        random = random_of(TRAIN, step, 7)
        spots = torch.tensor(
            [(i, *spot) for i, j in enumerate(chosen) for spot in spots_of(drawn[j][2], random)]
        )
        # Light and contrast vary a little, so that no feature hangs on an exact shade.
        gain, shift = torch.randn(2, batch, 3, 1, 1, generator=generator) * 0.06
        pixels = normalised(pictures[chosen]) * (1 + gain) + shift
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
            texts = [captions[i] for i in chosen]
            loss, own, phrase, place = model(pixels, texts, spots, phrases, places)
        update(model, optimizers, loss)
        hits = {"own": own.item(), "phrase": phrase.item(), "place": place.item()}
        report(step, steps, started, loss=loss.item(), **hits)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            checkpoint.save(
                out, "vision_tower", model.vit.state_dict(), asdict(VIT), dtype=torch.float16
            )
            print(json.dumps(probe(model.vit)), flush=True)


def probe(vit, n_train: int = 4000, n_test: int = 1000) -> dict[str, float]:
    """Linear probes on frozen patch features at layer -2: which kind lies on this patch, and where?

    They see the one patch under the middle of a sticker; train and test pictures are fresh.
    """

    def at_stickers(seed, count):
        config = ImageConfig(image_size=VIT.image_size)
        features, labels = [], []
        for start in range(0, count, 200):
            scenes = [world.make_scene(seed, i) for i in range(start, start + 200)]
            pixels = torch.cat([image.to_pixels(world.draw(s), config) for s in scenes])
            with torch.no_grad():
                hidden = vit(pixels, -2)  # (B, N, D)
            for scene, patches in zip(scenes, hidden, strict=True):
                for s in scene.stickers:
                    features.append(patches[patch_at(*s.centre)])
                    place = world.PLACES.index(s.place)
                    labels.append((world.KINDS.index(s.kind), place, s.size == "small"))
        return torch.stack(features), *torch.tensor(labels).T

    vit.eval()
    x, kinds, places, _ = at_stickers(PROBE, n_train)
    fresh, fresh_kinds, fresh_places, small = at_stickers(TEST, n_test)
    mean, std = x.mean(0), x.std(0)
    right = {}
    for name, n, y, target in (
        ("kind", len(world.KINDS), kinds, fresh_kinds),
        ("place", len(world.PLACES), places, fresh_places),
    ):
        linear = nn.Linear(VIT.dim, n)
        optimizer = torch.optim.AdamW(linear.parameters(), lr=0.02, weight_decay=0.02)
        for _ in range(400):
            optimizer.zero_grad()
            F.cross_entropy(linear((x - mean) / std), y).backward()
            optimizer.step()
        right[name] = (linear((fresh - mean) / std).argmax(1) == target).float()
    vit.train()
    small = small.bool()
    right |= {"small": right["kind"][small], "large": right["kind"][~small]}
    return {name: round(share.mean().item(), 4) for name, share in right.items()}


# ---- shared ---------------------------------------------------------------------------------


def init(module, std: float):
    if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
        nn.init.normal_(module.weight, std=std)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


def optimizers_of(model, lr: float, steps: int):
    """Muon for the matrices of linear layers, AdamW for the rest, each with its schedule.

    Muon makes all directions of an update equally strong, so rare ones are learned too: bare
    look-ups came in 300 steps, with AdamW in 400. 5 % warm-up, then a cosine to zero.
    """
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    matrices = [p for p in model.parameters() if id(p) in linear]
    others = [p for p in model.parameters() if id(p) not in linear]
    pair = (
        torch.optim.Muon(matrices, lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    )
    one_cycle = partial(
        torch.optim.lr_scheduler.OneCycleLR,
        max_lr=lr,
        total_steps=steps,
        pct_start=0.05,
        cycle_momentum=False,
    )
    return [(optimizer, one_cycle(optimizer)) for optimizer in pair]


def update(model, optimizers, loss):
    model.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, schedule in optimizers:
        optimizer.step()
        schedule.step()


def report(step, steps, started, **figures):
    if step % 20 == 0 or step + 1 == steps:
        rate = (time.time() - started) / (step + 1)
        row = {"step": step, **{k: round(v, 4) for k, v in figures.items()}}
        row |= {
            "seconds_per_step": round(rate, 3),
            "minutes_left": round(rate * (steps - step) / 60),
        }
        print(json.dumps(row), flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("tokenizer", "vit", "llama"))
    parser.add_argument("--steps", type=int, help="optimizer steps")
    parser.add_argument("--groups", type=int, default=12_000, help="groups of four pictures (vit)")
    parser.add_argument("--start", type=Path, help="folder of a model to go on from")
    parser.add_argument("--out", type=Path, help="folder for the result")
    args = parser.parse_args()
    if args.part == "tokenizer":
        train_tokenizer(args.out or WEIGHTS / "llama")
    elif args.part == "vit":
        train_vit(args.out or WEIGHTS / "vit", args.steps or 3000, args.groups, args.start)
    else:
        train_llama(args.out or WEIGHTS / "llama", args.steps or 4200, args.start)


if __name__ == "__main__":
    main()
