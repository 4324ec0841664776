"""python -m pytest tests/test_tiles.py: attention in tiles and written out is attention."""

import pytest
import torch

import attention
from llama import visible_keys

MASKS = {
    "one document": [[1] * 600, [1] * 600],
    "left padding": [[0] * 300 + [1] * 300, [1] * 600],
    "packed": [[1] * 250 + [2] * 7 + [3] * 343, [1] * 599 + [0]],
    "new tokens after a cache": [[1] * 900, [0] * 100 + [1] * 800],
}


def exact(q, k, v, visible):
    """In float64, head by head."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    return scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("scores", [1, 2**20, 2**40], ids=["a head", "some heads", "all heads"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
def test_tiles_give_attention_and_its_gradients(mask, kv_heads, scores, dtype, bound, monkeypatch):
    monkeypatch.setattr(attention, "SCORES", scores)
    torch.manual_seed(0)
    visible = visible_keys(torch.tensor(mask), 600)  # (B, T, S)
    sizes = ((4, 600), (kv_heads, visible.shape[2]), (kv_heads, visible.shape[2]))
    inputs = [torch.randn(2, *size, 16).to(dtype).requires_grad_() for size in sizes]
    direction = torch.randn(2, 4, 600, 16)
    found, expected = (
        [out, *torch.autograd.grad((out * direction).sum(), inputs)]
        for out in (
            attention.attend(*inputs, attention.query_tiles(visible)),
            exact(*inputs, visible),
        )
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= bound * theirs.abs().max()


def test_a_tile_between_documents_reads_its_own_document_only():
    tiles = attention.query_tiles(
        visible_keys(torch.arange(4)[None].repeat_interleave(512, 1), 2048)
    )
    assert [(q.start, k.start, k.stop) for q, k, _ in tiles] == [
        (start, start // 512 * 512, start + 256) for start in range(0, 2048, 256)
    ]
