"""Which samples go together: the order of an epoch, as a pure function of its arguments.

    length      neighbours of similar length in a batch: little padding
    modality    as LLaVA-1.5: a batch has either pictures in every sample or in none
    packed      rows of one length, each filled with as many whole samples as fit

Nothing is remembered from step to step: batch k of epoch e follows from the seed, the lengths and
the numbers e and k. So a run is continued by counting, with any number of workers, and with any
number of processes, among which `deal` shares out each batch. No sample is left out of an epoch.

Read next: data.py collates what is chosen here; train.py asks for it.
"""

import bisect
from collections import defaultdict

import numpy as np
import torch

KINDS = ("length", "modality", "packed")
POOL = 4096  # samples, or groups about one picture, among which rows are filled


def generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def shuffled(items: list, random: torch.Generator) -> list:
    return [items[i] for i in torch.randperm(len(items), generator=random).tolist()]


def cut(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def by_length(lengths, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Records are shuffled, sorted within stretches of 16 batches, and the batches shuffled.

    The last batch may be smaller than the others.
    """
    random = generator(seed, epoch)
    order = torch.randperm(len(lengths), generator=random).tolist()
    batches = []
    for part in cut(order, 16 * batch_size):
        batches += cut(sorted(part, key=lambda i: lengths[i]), batch_size)
    whole = [batch for batch in batches if len(batch) == batch_size]
    return shuffled(whole, random) + [batch for batch in batches if len(batch) < batch_size]


def by_modality(lengths, pictures, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """LLaVA-1.5's `group_by_modality_length`: records with pictures, and those without, apart.

    Each kind is shuffled and cut into batches; the last of either, whole or not, go to the end of
    the epoch, the others are shuffled. Within a batch the longest come first. (There, the inner
    shuffles take the global random state, so that no two runs agree.)
    """
    random = generator(seed, epoch)
    batches, tail = [], []
    for kind in (True, False):
        order = shuffled([i for i, p in enumerate(pictures) if bool(p) == kind], random)
        parts = [sorted(part, key=lambda i: -lengths[i]) for part in cut(order, batch_size)]
        batches += parts[:-1]
        tail += parts[-1] if parts else []
    return shuffled(batches, random) + cut(tail, batch_size)


def packed(lengths, pictures, row_length: int, n_rows: int, seed: int, epoch: int):
    """Batches of `n_rows` rows of at most `row_length` tokens: lists of tuples of samples.

    lengths:  tokens of each sample, those of its pictures included
    pictures: equal numbers for samples about the same picture, 0 for none; such samples share a
              row where they fit, so that the picture is read once

    Best fit decreasing, among 4,096 samples at a time: the longest first, each into the fullest row
    that has room. Raises ValueError for a sample longer than a row.
    """
    if len(lengths) and max(lengths) > row_length:
        i = int(np.argmax(lengths))
        raise ValueError(f"sample {i} has {lengths[i]} tokens, a row {row_length}")
    random = generator(seed, epoch)
    together = defaultdict(list)
    for i, picture in enumerate(pictures):
        together[int(picture) or ~i].append(i)
    items = []
    for samples in together.values():
        fits = total(tuple(samples), lengths) <= row_length
        items += [tuple(samples)] if fits else [(i,) for i in samples]
    rows = []
    for pool in cut(shuffled(items, random), POOL):
        rows += fill(pool, lengths, row_length)
    return cut(shuffled(rows, random), n_rows)


def fill(items, lengths, row_length: int) -> list[tuple[int, ...]]:
    """Items, tuples of samples -> rows, each the samples of the items in it."""
    sizes = {item: total(item, lengths) for item in items}
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room left, row), sorted
    for item in sorted(items, key=lambda item: -sizes[item]):
        place = bisect.bisect_left(open_rows, (sizes[item], -1))
        if place == len(open_rows):
            room, row = row_length, len(rows)
            rows.append([])
        else:
            room, row = open_rows.pop(place)
        rows[row] += item
        bisect.insort(open_rows, (room - sizes[item], row))
    return [tuple(row) for row in rows]


def deal(batch: list, lengths, world: int) -> list[list]:
    """Share a batch out among `world` processes: equal numbers, and sums as equal as can be.

    Longest first, each to the process with the least so far that has room, as in LLaVA-1.5.
    """
    if world == 1:
        return [batch]
    size = {item: total(item, lengths) for item in batch}
    most = -(-len(batch) // world)
    hands, sums = [[] for _ in range(world)], [0] * world
    for item in sorted(batch, key=lambda item: -size[item]):
        rank = min((r for r in range(world) if len(hands[r]) < most), key=lambda r: sums[r])
        hands[rank].append(item)
        sums[rank] += size[item]
    return hands


def total(item: int | tuple[int, ...], lengths) -> int:
    """Tokens of a sample, or of a row of samples."""
    return sum(int(lengths[i]) for i in (item if isinstance(item, tuple) else (item,)))


def waste(batches, lengths) -> float:
    """The share of padding if each row of a batch is as long as its longest."""
    full = used = 0
    for batch in batches:
        sums = [total(item, lengths) for item in batch]
        full, used = full + max(sums) * len(sums), used + sum(sums)
    return 1 - used / full


def like_mix665k(n: int, seed: int = 0):
    """Lengths and picture numbers as in LLaVA-1.5's mix, roughly: for trials without the data.

    6 % text alone (long, ShareGPT), 24 % long answers (LLaVA-Instruct), 70 % short answers, several
    of which share a conversation; a picture is 576 tokens, the system text 40.
    """
    random = np.random.default_rng(seed)
    kind = random.choice(3, n, p=[0.06, 0.24, 0.70])
    text = np.choose(
        kind,
        [
            random.lognormal(6.6, 0.7, n),
            random.lognormal(5.5, 0.5, n),
            random.lognormal(4.3, 0.8, n),
        ],
    )
    lengths = np.clip(40 + text + 576 * (kind > 0), 50, 2048).astype(int)
    pictures = np.where(kind == 0, 0, np.arange(1, n + 1))
    instruct = np.flatnonzero(kind == 1)
    pictures[instruct] = random.integers(1, max(2, len(instruct) // 2), len(instruct)) + n
    return lengths, pictures


def main():
    """Print how much padding each way costs on lengths like those of LLaVA-1.5's data."""
    lengths, pictures = like_mix665k(60_000)
    print(f"{len(lengths):,} samples like mix665k: {lengths.mean():.0f} tokens each on average")
    ways = {
        "length": cut(sum(by_length(lengths, 128, 0, 0), []), 16),
        "modality": cut(sum(by_modality(lengths, pictures, 128, 0, 0), []), 16),
        "packed": packed(lengths, pictures, 8192, 4, 0, 0),
    }
    for name, batches in ways.items():
        print(
            f"{name:10} {len(batches):6,} batches, {100 * waste(batches, lengths):5.2f} % padding"
        )
    rows = [row for batch in ways["packed"] for row in batch]
    seen = sum(len({pictures[i] for i in row} - {0}) for row in rows)
    print(f"packed together: {(pictures > 0).sum():,} samples with pictures read {seen:,} pictures")


if __name__ == "__main__":
    import argparse

    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    main()
