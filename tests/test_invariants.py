"""What must not change an answer: the cache, padding, neighbours in the batch, packing.

    pytest tests/test_invariants.py        (seconds; small random models, no weights needed)

Each test computes the same thing in two ways of our own. That both agree with the papers is shown
in test_parity.py; here it is shown that what is exact for one plain row stays so in every batch.
"""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import image
from data import IGNORE, IMAGE_TOKEN
from generate import generate
from image import ImageConfig
from llama import KVCache, LLaMA, LLaMAConfig
from llava import LLaVA, LLaVAConfig
from vit import ViTConfig

TEXT = LLaMAConfig(
    vocab_size=100, dim=64, mlp_dim=160, n_layers=3, n_heads=4, n_kv_heads=2, max_positions=256
)
VISION = ViTConfig(image_size=56, dim=64, mlp_dim=128, n_layers=3, n_heads=4)  # 16 patches
N = VISION.n_patches


def assert_same(ours, expected):
    # Float32 sums in two orders, on logits of about 3: rounding leaves 1e-6, a mistake 1e-1.
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def excite(model):
    """Weights large enough that attention is far from uniform, so every mask mistake shows."""
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model.eval()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def llama():
    return excite(LLaMA(TEXT))


@pytest.fixture
def llava():
    config = LLaVAConfig(vision=VISION, text=TEXT, image=ImageConfig(image_size=56))
    return excite(LLaVA(config))


def new_cache(batch, length):
    return KVCache(TEXT, batch, length, torch.float32, "cpu")


def words(n, rows=1):
    return torch.randint(1, 100, (rows, n))


def batch_of(rows, left=False):
    """Rows of ids -> ids and mask int[B, T]; padding is filled with a word, which must not tell."""
    length = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), length), 42), torch.zeros(len(rows), length).long()
    for i, row in enumerate(rows):
        place = slice(length - len(row), None) if left else slice(len(row))
        ids[i, place], mask[i, place] = torch.as_tensor(row), 1
    return ids, mask


# The decoder


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [7, 1, 1, 1, 1, 1], [1, 5, 6]], ids=str)
@torch.no_grad()
def test_reading_in_chunks_through_the_cache_equals_reading_at_once(llama, chunks):
    ids, cache = words(12, rows=2), new_cache(2, 12)
    parts = [llama(part, cache=cache) for part in ids.split(chunks, dim=1)]
    assert_same(torch.cat(parts, dim=1), llama(ids))


@torch.no_grad()
def test_no_logit_depends_on_a_later_token(llama):
    ids = words(12)
    changed = ids.clone()
    changed[0, 8:] = words(4)
    assert_same(llama(changed)[:, :8], llama(ids)[:, :8])
    assert not torch.allclose(llama(changed)[:, 8:], llama(ids)[:, 8:], atol=0.1)


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 5), (1, 1), (20, 2)])
@torch.no_grad()
def test_padding_on_any_side_changes_no_logit(llama, left, right):
    ids = words(9)
    padded = torch.cat([words(left), ids, words(right)], dim=1)
    mask = torch.tensor([[0] * left + [1] * 9 + [0] * right])
    assert_same(llama(padded, mask=mask)[:, left : left + 9], llama(ids))


@torch.no_grad()
def test_no_padded_place_holds_nan(llama):
    mask = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 0, 0, 0]])
    assert llama(words(5, rows=2), mask=mask).isfinite().all()


@torch.no_grad()
def test_rows_of_unequal_length_decode_together_as_each_alone(llama):
    rows = [words(n)[0] for n in (3, 9, 6)]
    ids, mask = batch_of(rows, left=True)
    together, cache = [], new_cache(3, 9 + 5)
    for _ in range(5):
        together.append(llama(ids, mask=mask, cache=cache)[:, -1])
        ids = together[-1].argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones(3, 1).long()], dim=1)
    for i, row in enumerate(rows):
        for logits in together:
            alone = llama(row[None])[0, -1]
            assert_same(logits[i], alone)
            row = torch.cat([row, alone.argmax()[None]])


@torch.no_grad()
def test_packed_documents_equal_each_alone(llama):
    documents = [words(n) for n in (4, 9, 1, 6)]
    mask = torch.tensor([[1] * 4 + [2] * 9 + [3] + [4] * 6 + [0] * 3])
    packed = llama(torch.cat([*documents, words(3)], dim=1), mask=mask)
    parts = packed[:, :20].split([4, 9, 1, 6], dim=1)
    for part, document in zip(parts, documents, strict=True):
        assert_same(part, llama(document))


def test_a_full_cache_and_a_mask_of_wrong_length_are_refused(llama):
    with pytest.raises(ValueError, match="the cache holds 4 tokens, 5 are needed"):
        llama(words(5), cache=new_cache(1, 4))
    with pytest.raises(ValueError, match=r"expected mask int\[1, 5\]"):
        llama(words(5), mask=torch.ones(1, 4).long())


# Pictures in the sequence

PICTURE = IMAGE_TOKEN
ROWS = {
    "picture and text-only rows": [[1, 5, PICTURE, 7, 3], [1, 8, 9], [PICTURE, 4]],
    "unequal numbers of pictures": [[PICTURE, 2, PICTURE, PICTURE], [1, 2, 3, 4, 5, 6], [PICTURE]],
    "text only": [[1, 2, 3, 4], [5, 6]],
}


def pictures_for(rows):
    """As many random pictures as each row asks for, a list per row."""
    return [[torch.randn(1, 3, 56, 56) for _ in range(row.count(PICTURE))] for row in rows]


@pytest.mark.parametrize("left", [False, True], ids=["padded right", "padded left"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@torch.no_grad()
def test_each_row_of_a_batch_equals_the_row_alone(llava, rows, left):
    pictures = pictures_for(rows)
    ids, mask = batch_of(rows, left)
    together = llava(ids, sum(pictures, []), attention_mask=mask)
    for logits, row, own in zip(together, rows, pictures, strict=True):
        alone = llava(torch.tensor([row]), own)[0]
        assert_same(logits[: len(alone)], alone)


@torch.no_grad()
def test_rows_padded_on_the_left_for_generation_equal_each_alone(llava):
    rows = ROWS["picture and text-only rows"]
    pictures = pictures_for(rows)
    ids, mask = batch_of(rows)
    embeds, _, mask = llava.embed(ids, sum(pictures, []), None, mask, pad_left=True)
    last = llava.language_model(embeds=embeds, mask=mask)[:, -1]
    for logits, row, own in zip(last, rows, pictures, strict=True):
        assert_same(logits, llava(torch.tensor([row]), own)[0, -1])


@torch.no_grad()
def test_packed_samples_with_pictures_equal_each_alone(llava):
    rows = [[1, PICTURE, 7, 3], [1, 8, 9], [PICTURE, PICTURE, 4]]
    pictures = pictures_for(rows)
    mask = torch.tensor([[i + 1 for i, row in enumerate(rows) for _ in row]])
    packed = llava(torch.tensor([sum(rows, [])]), sum(pictures, []), attention_mask=mask)
    lengths = [len(row) + (N - 1) * row.count(PICTURE) for row in rows]
    parts = packed.split(lengths, dim=1)
    for part, row, own in zip(parts, rows, pictures, strict=True):
        assert_same(part, llava(torch.tensor([row]), own))


@torch.no_grad()
def test_features_stand_where_their_picture_stood_in_reading_order(llava):
    first, second = torch.randn(2, 1, 3, 56, 56)
    ids = torch.tensor([[1, PICTURE, 7, PICTURE]])
    embeds, _, _ = llava.embed(ids, [first, second])
    assert embeds.shape[1] == 2 + 2 * N
    assert_same(embeds[0, 1 : 1 + N], llava.encode_images([first])[0])
    assert_same(embeds[0, 2 + N :], llava.encode_images([second])[0])
    assert_same(embeds[0, [0, 1 + N]], llava.language_model.embed_tokens(ids[0, [0, 2]]))


@torch.no_grad()
def test_no_label_stands_on_a_picture_or_moves_from_its_word(llava):
    ids = torch.tensor([[1, PICTURE, 7, 3], [1, 8, 9, 42]])
    labels = torch.tensor([[IGNORE, 55, 7, 3], [IGNORE, IGNORE, 9, 9]])  # 55, and 9 at padding
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    _, spliced, _ = llava.embed(ids, pictures_for([[PICTURE]])[0], labels, mask)
    assert spliced[0].tolist() == [IGNORE] * (1 + N) + [7, 3]
    assert spliced[1].tolist() == [IGNORE, IGNORE, 9] + [IGNORE] * N


@torch.no_grad()
def test_loss_is_the_mean_over_all_supervised_tokens_of_the_batch(llava):
    rows = ROWS["picture and text-only rows"]
    pictures = pictures_for(rows)
    ids, mask = batch_of(rows)
    labels = ids.masked_fill((ids == PICTURE) | (mask == 0), IGNORE)
    labels[:, 0] = IGNORE
    loss = llava.loss(ids, sum(pictures, []), labels=labels, attention_mask=mask)
    total, count = 0, 0
    for row, own in zip(rows, pictures, strict=True):
        logits = llava(torch.tensor([row]), own)[0].log_softmax(-1)
        at, place = -1, {}  # place of each word in the spliced row
        for t, token in enumerate(row):
            at += N if token == PICTURE else 1
            place[t] = at
        for t, token in enumerate(row):
            if t > 0 and token != PICTURE:
                total -= logits[place[t] - 1, token]
                count += 1
    assert_same(loss, total / count)
    summed = llava.loss(ids, sum(pictures, []), labels=labels, attention_mask=mask, reduction="sum")
    assert_same(summed / count, loss)


def test_a_frozen_tower_gets_no_gradient_and_the_projector_does(llava):
    llava.vision_tower.requires_grad_(False)
    ids = torch.tensor([[PICTURE, 7, 3]])
    llava.loss(ids, pictures_for([[PICTURE]])[0], labels=ids.clamp(min=IGNORE)).backward()
    assert all(p.grad is None for p in llava.vision_tower.parameters())
    assert all(p.grad.abs().sum() > 0 for p in llava.projector.parameters())


@pytest.mark.parametrize("n_pictures", [0, 1, 3])
def test_a_wrong_number_of_pictures_is_refused(llava, n_pictures):
    ids = torch.tensor([[1, PICTURE, 5, PICTURE]])
    with pytest.raises(ValueError, match=f"2 <image> and {n_pictures} pictures"):
        llava(ids, [torch.randn(1, 3, 56, 56)] * n_pictures)


@torch.no_grad()
def test_a_picture_tag_at_padding_asks_for_no_picture(llava):
    ids, mask = torch.tensor([[1, 5, 9, PICTURE]]), torch.tensor([[1, 1, 1, 0]])
    assert_same(llava(ids, [], attention_mask=mask), llava(ids[:, :3]))


def test_pictures_without_a_place_are_refused(llava):
    with pytest.raises(ValueError, match="0 <image> and 1 pictures"):
        llava(words(4), [torch.randn(1, 3, 56, 56)])


@pytest.mark.parametrize("shape", [(1, 3, 42, 42), (1, 1, 56, 56), (3, 56, 56)], ids=str)
def test_pictures_of_a_wrong_shape_are_refused(llava, shape):
    with pytest.raises(ValueError):
        llava(torch.tensor([[1, PICTURE]]), [torch.randn(shape)])


# Generation

PROMPTS = [[1, 5, PICTURE, 7, PICTURE], [1, 8, 9], [PICTURE, 4]]
WAVE, DISC = (draw("L").convert("RGB") for draw in (Image.linear_gradient, Image.radial_gradient))
IMAGES = [[WAVE, DISC.resize((80, 60))], [], [DISC]]


@pytest.fixture
def talker(llava):
    """A model to generate with; no token ends its answers."""
    llava.tokenizer = SimpleNamespace(eos_id=-1, vocab_size=99)
    return llava


def test_pictures_are_encoded_once_per_prompt_however_long_the_answer(talker):
    seen = []
    talker.vision_tower.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    answers = generate(talker, PROMPTS, IMAGES, max_new_tokens=8)
    assert [len(answer) for answer in answers] == [8, 8, 8]
    assert sum(seen) == 3  # pictures, in however many calls


def test_prompts_answered_together_get_the_answers_they_get_alone(talker):
    together = generate(talker, PROMPTS, IMAGES, max_new_tokens=8)
    for prompt, pictures, answer in zip(PROMPTS, IMAGES, together, strict=True):
        assert generate(talker, [prompt], [pictures], max_new_tokens=8) == [answer]


@torch.no_grad()
def test_greedy_answers_equal_reading_the_whole_text_anew_for_each_token(talker):
    for prompt, pictures in zip(PROMPTS, IMAGES, strict=True):
        pixels = [image.to_pixels(picture, talker.config.image) for picture in pictures]
        row = list(prompt)
        for _ in range(8):
            row.append(int(talker(torch.tensor([row]), pixels)[0, -1].argmax()))
        [answer] = generate(talker, [prompt], [pictures], max_new_tokens=8)
        assert answer == row[len(prompt) :]


def test_each_row_ends_at_its_own_end_of_sequence(talker):
    whole = generate(talker, PROMPTS, IMAGES, max_new_tokens=8)
    talker.tokenizer.eos_id = end = whole[0][3]
    stopped = generate(talker, PROMPTS, IMAGES, max_new_tokens=8)
    assert stopped == [row[: row.index(end)] if end in row else row for row in whole]
    assert len(stopped[0]) < 8
