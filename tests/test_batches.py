"""python -m pytest tests/test_batches.py: no sample is lost, and packing changes no loss."""

import json
from dataclasses import replace

import pytest
import torch

import batches
import data
import image
from image import ImageConfig
from llama import LLaMAConfig
from llava import LLaVA, LLaVAConfig
from vit import ViTConfig

LENGTHS, PICTURES = batches.like_mix665k(1003)


def plan(kind: str, epoch: int = 0, lengths=LENGTHS, pictures=PICTURES):
    if kind == "packed":
        return batches.packed(lengths, pictures, 4096, 8, 1, epoch)
    if kind == "modality":
        return batches.by_modality(lengths, pictures, 16, 1, epoch)
    return batches.by_length(lengths, 16, 1, epoch)


def samples_of(batch):
    return [i for item in batch for i in (item if isinstance(item, tuple) else (item,))]


@pytest.mark.parametrize("kind", batches.KINDS)
def test_an_epoch_visits_every_sample_once_and_repeats_itself(kind):
    first = plan(kind)
    assert sorted(i for batch in first for i in samples_of(batch)) == list(range(1003))
    assert first == plan(kind) and first != plan(kind, epoch=1)


@pytest.mark.parametrize("kind", batches.KINDS)
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_a_batch_is_shared_out_evenly_whatever_the_number_of_processes(kind, world):
    for batch in plan(kind):
        hands = batches.deal(batch, LENGTHS, world)
        assert sorted(map(str, sum(hands, []))) == sorted(map(str, batch))
        counts = [len(hand) for hand in hands]
        assert max(counts) - min(counts) <= 1
        sums = [sum(batches.total(item, LENGTHS) for item in hand) for hand in hands]
        longest = max(batches.total(item, LENGTHS) for item in batch)
        if len(batch) % world == 0:
            assert max(sums) - min(sums) <= longest


def test_batches_are_of_one_modality_as_in_llava_15():
    """All but the last ones; and every kind's batches are spread over the epoch."""
    found = plan("modality")
    kinds = [{bool(PICTURES[i]) for i in batch} for batch in found]
    n_mixed = sum(len(kind) == 2 for kind in kinds)
    assert n_mixed <= 2 and all(len(kind) == 1 for kind in kinds[:-2])
    text = [i for i, kind in enumerate(kinds) if kind == {False}]
    assert len(text) == pytest.approx((PICTURES == 0).sum() / 16, abs=2)
    assert text[0] < len(found) / 3 and text[-1] > len(found) * 2 / 3


def test_rows_are_full_and_hold_whole_samples():
    found = plan("packed")
    assert all(batches.total(row, LENGTHS) <= 4096 for batch in found for row in batch)
    assert all(len(batch) == 8 for batch in found[:-1])
    lengths, pictures = batches.like_mix665k(20_000)
    rows = batches.packed(lengths, pictures, 8192, 4, 0, 0)
    grouped = batches.cut(sum(batches.by_modality(lengths, pictures, 128, 0, 0), []), 16)
    assert batches.waste(rows, lengths) < 0.03 < batches.waste(grouped, lengths)


def test_samples_about_one_picture_share_a_row_where_they_fit():
    lengths, pictures = [100] * 9 + [90], [5, 0, 5, 7, 0, 5, 7, 0, 0, 0]
    rows = [row for batch in batches.packed(lengths, pictures, 300, 2, 0, 0) for row in batch]
    assert any({0, 2, 5} <= set(row) for row in rows) and any({3, 6} <= set(row) for row in rows)
    rows = [row for batch in batches.packed(lengths, pictures, 200, 2, 0, 0) for row in batch]
    assert sorted(sum(rows, ())) == list(range(10))


def test_a_sample_longer_than_a_row_is_named():
    with pytest.raises(ValueError, match="sample 1 has 500 tokens, a row 300"):
        batches.packed([100, 500], [0, 0], 300, 2, 0, 0)


# ---- the same loss and gradients, however samples are put together --------------------------


class Letters:
    bos_id, eos_id, image_frame = 1, 2, ()

    def encode_with_starts(self, text, control):
        return [3 + ord(c) % 90 for c in text], range(len(text))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LLaVAConfig(
        vision=ViTConfig(image_size=28, dim=64, mlp_dim=96, n_layers=2, n_heads=4),
        text=LLaMAConfig(vocab_size=100, dim=32, mlp_dim=64, n_layers=2, n_heads=4, n_kv_heads=2),
        image=ImageConfig(image_size=28),
    )
    model = LLaVA(config)
    model.vision_tower.requires_grad_(False)
    return model.train()


@pytest.fixture(scope="module")
def conversations(tmp_path_factory, model):
    folder, rows = tmp_path_factory.mktemp("packed"), []
    for n in range(3):
        image.sawtooth(40 + 9 * n, 50).save(folder / f"{n}.png")
    for i in range(14):
        turns = [("human", f"What is {i}?" * (1 + i % 3)), ("gpt", "It is so." * (1 + i % 4))]
        turns = turns * (1 + i % 2)
        record = {"id": str(i)}
        if i % 4:
            record["image"] = f"{i % 3}.png"
            turns[0] = ("human", "<image>\n" + turns[0][1])
        record["conversations"] = [{"from": role, "value": text} for role, text in turns]
        rows.append(record)
    (folder / "data.json").write_text(json.dumps(rows))
    return data.Conversations(
        folder / "data.json",
        folder,
        Letters(),
        "v1",
        model.config.image,
        n_visual=model.config.n_visual,
    )


def gradients(model, rows):
    """Loss of each row's samples, and the gradients of all their supervised tokens' sum."""
    model.zero_grad()
    loss = sum(model.loss(**data.collate([row]), reduction="sum") for row in rows)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def test_packed_rows_give_the_loss_and_gradients_of_one_sample_at_a_time(model, conversations):
    lengths = conversations.lengths()
    pictures = conversations.records.pictures
    (rows,) = batches.packed(lengths, pictures, 900, 99, 0, 0)
    assert max(map(len, rows)) > 2
    one, grads_one = gradients(model, [conversations[i] for row in rows for i in row])
    many, grads = gradients(model, [conversations[row] for row in rows])
    assert torch.allclose(one, many, rtol=1e-5)
    for name, grad in grads.items():
        scale = grads_one[name].abs().max()
        assert (grad - grads_one[name]).abs().max() <= 1e-5 * scale, name
    for row in rows:  # and each sample's own loss
        packed_row = data.collate([conversations[row]])
        alone = [model.loss(**data.collate([conversations[i]]), reduction="sum") for i in row]
        together = model.loss(**packed_row, reduction="sum")
        assert torch.allclose(sum(alone), together, rtol=1e-5)


def test_a_shared_picture_goes_through_the_tower_once(model, conversations, monkeypatch):
    row = tuple(i for i in range(14) if conversations.records[i].get("image") == "1.png")
    batch = data.collate([conversations[row]])
    assert len(batch["pixels"]) == len(row) > 1
    seen, tower = [], model.vision_tower.forward
    monkeypatch.setattr(
        model.vision_tower, "forward", lambda tiles, *a: seen.append(len(tiles)) or tower(tiles, *a)
    )
    model.loss(**batch)
    assert seen == [1]


def test_lengths_count_visual_words_as_the_model_makes_them(model, conversations):
    for config in (
        model.config,
        replace(
            model.config,
            image=ImageConfig(28, "anyres", grid_pinpoints=((28, 56), (56, 28), (56, 56))),
        ),
    ):
        torch.manual_seed(0)
        llava = LLaVA(config)
        for size in ((28, 28), (50, 30), (31, 97), (200, 170), (640, 427)):
            pixels = [image.to_pixels(image.sawtooth(*size), config.image)]
            with torch.no_grad():
                (words,) = llava.encode_images(pixels, [size])
            assert len(words) == config.n_visual(size)
    lengths = conversations.lengths()
    for i in range(14):
        batch = data.collate([conversations[i]])
        assert model.embed(**batch)[0].shape[1] == lengths[i]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 3])
def test_an_interrupted_epoch_goes_on_with_the_same_batches(conversations, workers, stop):
    lengths, pictures = conversations.lengths(), conversations.records.pictures

    def run(start, workers):
        order = batches.packed(lengths, pictures, 400, 2, 7, 0)[start:]
        loader = torch.utils.data.DataLoader(
            conversations, batch_sampler=order, collate_fn=data.collate, num_workers=workers
        )
        return [batch["input_ids"].tolist() for batch in loader]

    whole = run(0, 0)
    assert len(whole) > stop + 1
    assert run(0, workers)[:stop] + run(stop, workers) == whole
