"""python -m pytest tests/test_fast.py: the arranged model is the readable one, and how far int8 is.

fast.py and quantize.py hold to llama.py and vit.py: the same logits in float32 to 1e-5 of the
largest, the same greedy tokens, no more error in bfloat16, with torch's private kernels and without
them. Rounded weights are compared with the same weights spelled out.
"""

import copy
import json
from pathlib import Path

import pytest
import smollm2
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_smollm2 import STORY

import answers
import assemble
import checkpoint
import data
import fast
import generate as g
import image
import quantize
import recipes
import tokenizer
from llama import KVCache, LLaMA, LLaMAConfig
from llava import LLaVA
from quantize import QuantizedLinear
from vit import ViT, ViTConfig

ROOT = Path(__file__).parent.parent
STICKERS = ROOT / "examples" / "stickers.jpg"
GOLDEN = json.loads((ROOT / "examples" / "stickers.json").read_text())
SIZES = dict(vocab_size=96, dim=64, mlp_dim=160, n_layers=3, max_positions=64)
DECODERS = {
    "grouped": LLaMAConfig(n_heads=6, n_kv_heads=2, head_dim=16, **SIZES),
    "a key head each": LLaMAConfig(n_heads=4, n_kv_heads=4, **SIZES),
    "tied": LLaMAConfig(n_heads=4, n_kv_heads=2, tied_embeddings=True, **SIZES),
}


@pytest.fixture(params=["packed", "plain"])
def kernels(request, monkeypatch):
    """Both forms of every product: with torch's private operators, and as if there were none."""
    if request.param == "packed":
        if not fast.can_pack(torch.float32):
            pytest.skip("oneDNN's packed products in float32 are not for this machine")
    else:
        monkeypatch.setattr(fast, "can_pack", lambda dtype: False)
        monkeypatch.setattr(quantize, "KERNELS", {8: ["gone"], 4: ["gone"]})
    return request.param


def random_model(cls, config):
    torch.manual_seed(0)
    model = cls(config).eval()
    for name, p in model.named_parameters():
        if "norm" in name:  # ones and zeros would hide that one was forgotten
            p.data.normal_(float(name.endswith("weight")), 0.3)
    return model


def decoders(config):
    plain = random_model(LLaMA, config)
    return plain, fast.Decoder(copy.deepcopy(plain))


def off(ours, theirs) -> float:
    """The largest difference over the largest value."""
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


MASKS = {
    "none": None,
    "nothing hidden": torch.ones(2, 12, dtype=torch.long),
    "padded": torch.tensor([[0] * 5 + [1] * 7, [1] * 12]),
    "packed documents": torch.tensor([[1] * 4 + [2] * 8, [1] * 5 + [2] * 6 + [3]]),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("config", DECODERS.values(), ids=DECODERS.keys())
@torch.inference_mode()
def test_the_decoder_gives_the_logits_of_llama(config, mask, kernels):
    plain, arranged = decoders(config)
    ids = torch.randint(0, 96, (2, 12))
    assert off(arranged(ids, mask=mask), plain(ids, mask=mask)) < 1e-5


@pytest.mark.parametrize("mask", list(MASKS.values())[:3], ids=list(MASKS)[:3])
@pytest.mark.parametrize("config", DECODERS.values(), ids=DECODERS.keys())
@torch.inference_mode()
def test_a_cache_filled_in_pieces_gives_the_logits_of_one_reading(config, mask, kernels):
    plain, arranged = decoders(config)
    ids = torch.randint(0, 96, (2, 12))
    cache = KVCache(config, 2, 12, torch.float32, "cpu")
    pieces = []
    for start, end in ((0, 6), (6, 9), (9, 10), (10, 11), (11, 12)):  # a prompt, a follow-up, steps
        part = None if mask is None else mask[:, :end]
        pieces.append(arranged(ids[:, start:end], mask=part, cache=cache))
    seen = torch.ones_like(ids) if mask is None else mask  # logits of padding mean nothing
    pieces, whole = torch.cat(pieces, 1)[seen > 0], plain(ids, mask=mask)[seen > 0]
    assert off(pieces, whole) < 1e-5


def test_a_mask_of_another_length_is_refused():
    _, arranged = decoders(DECODERS["grouped"])
    with pytest.raises(ValueError, match="mask"):
        arranged(torch.zeros(1, 4, dtype=torch.long), mask=torch.ones(1, 5, dtype=torch.long))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.inference_mode()
def test_the_tower_gives_the_features_of_vit(activation, kernels):
    sizes = dict(image_size=56, dim=64, mlp_dim=128, n_layers=3, n_heads=4)
    plain = random_model(ViT, ViTConfig(activation=activation, **sizes))
    arranged, pixels = fast.Tower(copy.deepcopy(plain)), torch.randn(2, 3, 56, 56)
    for layer in (-1, -2, 0):
        assert off(arranged(pixels, layer), plain(pixels, layer)) < 1e-5
    assert off(arranged.pool(pixels), plain.pool(pixels)) < 1e-5


@torch.inference_mode()
def test_in_bfloat16_the_arranged_model_is_as_near_to_float32_as_the_plain_one():
    exact = LLaVA.from_pretrained(g.TINY, dtype=torch.float32)
    plain = LLaVA.from_pretrained(g.TINY, dtype=torch.bfloat16)
    arranged = fast.prepare(LLaVA.from_pretrained(g.TINY, dtype=torch.bfloat16))
    pixels = [image.to_pixels(image.load(STICKERS), exact.config.image)]
    prompt = data.render([("human", "<image>\n" + GOLDEN["question"])], exact.template)
    ids = torch.tensor([answers.encode(exact, prompt)])
    truth = exact(ids, pixels)
    errors = [(model(ids, pixels).float() - truth).norm() for model in (plain, arranged)]
    assert errors[1] < 1.3 * errors[0]  # measured 0.98; roundings fall differently


@torch.inference_mode()
def test_real_weights_give_the_same_logits_and_the_same_32_greedy_tokens():
    folder = smollm2.folder()
    plain = LLaMA.from_pretrained(folder, dtype=torch.float32)
    arranged = fast.Decoder(LLaMA.from_pretrained(folder, dtype=torch.float32))
    ids = torch.tensor([tokenizer.load(folder).encode(STORY)])
    assert off(arranged(ids), plain(ids)) < 1e-5
    answers = []
    for model in (plain, arranged):
        cache = KVCache(model.config, 1, 200, torch.float32, "cpu")
        tokens = [model(ids, cache=cache)[:, -1].argmax(-1)]
        for _ in range(31):
            tokens.append(model(tokens[-1][None], cache=cache)[:, -1].argmax(-1))
        answers.append([int(token) for token in tokens])
    assert answers[0] == answers[1]


def test_a_batch_of_the_bundled_model_gives_the_plain_models_answers():
    plain = LLaVA.from_pretrained(g.TINY, dtype=torch.float32)
    arranged = fast.prepare(LLaVA.from_pretrained(g.TINY, dtype=torch.float32))
    questions = [GOLDEN["question"], "What colour is the paper?"]
    prompts = [data.render([("human", f"<image>\n{q}")], plain.template) for q in questions]
    prompts.append(data.render([("human", "What is one plus two?")], plain.template))
    pictures = [image.load(STICKERS)] * 2 + [None]
    answers = [g.generate(model, prompts, pictures, 50) for model in (plain, arranged)]
    assert answers[0] == answers[1] and answers[0][0] == GOLDEN["token_ids"]


def test_a_number_is_rounded_to_the_nearest_step():
    row = torch.tensor([[-127.0, 64.4, 0.0, 12.6]]) / 1024  # the scale is 1 / 1024
    q, scale, _ = quantize.quantize(row, 8)
    assert q.tolist() == [[-127, 64, 0, 13]] and scale.item() == 1 / 1024
    row = torch.arange(32.0)[None] / 2  # 0 to 15.5, as 0 to 15 in steps of about 1
    q, scale, mid = quantize.quantize(row, 4)
    assert q.shape == (1, 16) and (q[0, 0] & 15, q[0, 15] >> 4) == (0, 15)
    assert (quantize.dequantize(q, scale, mid, 4, torch.float32) - row).abs().max() < 0.55


@pytest.mark.parametrize("bits", [8, 4])
def test_no_weight_moves_further_than_half_a_step(bits):
    weight = torch.randn(48, 256) * 10 ** torch.linspace(-3, 1, 48)[:, None]  # rows of all sizes
    q, scale, mid = quantize.quantize(weight, bits)
    error = (quantize.dequantize(q, scale, mid, bits, torch.float32) - weight).abs()
    # Half a step, and what is lost at the ends where scale and middle are rounded to bfloat16.
    assert (error.view(*scale.shape, -1) <= scale.float()[..., None] * 0.55).all()


@pytest.mark.parametrize("shape", [(64, 256), (48, 192), (32, 96), (40, 72), (20, 128)], ids=str)
@pytest.mark.parametrize("n_rows", [1, 5, 40])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_product_with_rounded_weights_is_that_of_the_weights_spelled_out(
    bits, n_rows, shape, kernels
):
    weights = [torch.randn(shape), torch.randn(shape)]
    layers = [QuantizedLinear(weight, bits) for weight in weights]
    bits = layers[0].bits  # 8 where no group fits into a row
    spelled = [
        quantize.dequantize(*quantize.quantize(w, bits), bits, torch.float32) for w in weights
    ]
    x = torch.randn(3, n_rows, shape[1]).bfloat16()
    residual = torch.randn(3, n_rows, 2 * shape[0]).bfloat16()
    expected = F.linear(x.float(), torch.cat(spelled)) + residual.float()
    joined = QuantizedLinear.joined(layers)
    assert off(joined(x, plus=residual), expected) < 0.02  # rounded to bfloat16, 2^-8, twice


@pytest.mark.parametrize(("bits", "most"), [(8, 0.03), (4, 0.3)])
@torch.inference_mode()
def test_a_quantised_llava_is_near_the_exact_one_and_smaller(bits, most, kernels):
    exact = LLaVA.from_pretrained(g.TINY, dtype=torch.float32)
    model = LLaVA.from_pretrained(g.TINY, dtype=torch.float32, quantize=bits)
    block = exact.language_model.layers[0]
    matrices = [module for module in block.modules() if isinstance(module, torch.nn.Linear)]
    n_weights = sum(module.weight.numel() for module in matrices)
    assert not any(isinstance(m, torch.nn.Linear) for m in model.language_model.modules())
    buffers = list(model.language_model.layers[0].buffers())
    n_bits = 8 * sum(tensor.numel() * tensor.element_size() for tensor in buffers)
    assert n_bits < (bits + 0.6) * n_weights
    ids = torch.tensor([answers.encode(exact, [5, 9, 30, 31, 40, 50, 60])])
    truth, rounded = exact(ids), fast.prepare(model)(ids)
    assert 1e-4 < (rounded - truth).norm() / truth.norm() < most


def test_int8_answers_as_the_exact_model_does():
    model = LLaVA.from_pretrained(g.TINY, dtype=torch.bfloat16, quantize=8)
    prompt = data.render([("human", f"<image>\n{GOLDEN['question']}")], model.template)
    ids = g.generate(fast.prepare(model), [prompt], [image.load(STICKERS)], 60)
    assert ids == [GOLDEN["token_ids"]]


@torch.inference_mode()
def test_a_model_that_was_left_in_its_file_needs_it_no_more_once_arranged(tmp_path, kernels):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("what a process has mapped is seen on Linux")
    checkpoint.convert(g.TINY, tmp_path, dtype=torch.float32)
    ids, pixels = torch.tensor([[1, 40, -200, 41]]), [torch.randn(1, 3, 96, 96)]
    expected = fast.prepare(LLaVA.from_pretrained(tmp_path))(ids, pixels)
    model = LLaVA.from_pretrained(tmp_path, mapped=True)
    assert str(tmp_path) in maps.read_text()
    assert torch.equal(fast.prepare(model)(ids, pixels), expected)
    assert str(tmp_path) not in maps.read_text()


@pytest.mark.parametrize("n_rows", [16, 256, 272, 1040])
def test_int4_rows_laid_out_in_pieces_lie_as_if_laid_out_at_once(n_rows, monkeypatch):
    weight = torch.randn(n_rows, 256)
    if not hasattr(torch.ops.aten, quantize.KERNELS[4][1]):
        pytest.skip("needs torch's int4 kernels")
    layers = [QuantizedLinear(weight, 4), QuantizedLinear(weight, 4)]
    monkeypatch.setattr(quantize, "CHUNK", 1)
    layers[0].pack()
    monkeypatch.setattr(quantize, "CHUNK", weight.numel())
    layers[1].pack()
    assert torch.equal(layers[0].q, layers[1].q)


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("bits", [8, 4])
@torch.inference_mode()
def test_stored_rounded_weights_are_those_rounded_on_load(bits, dtype, tmp_path, kernels):
    checkpoint.convert(g.TINY, tmp_path, dtype=dtype, quantize=bits)
    ids, pixels = torch.tensor([[1, 40, -200, 41]]), [torch.randn(1, 3, 96, 96)]
    models = (
        LLaVA.from_pretrained(g.TINY, dtype=torch.float32, quantize=bits),
        LLaVA.from_pretrained(tmp_path, dtype=torch.float32, mapped=True),
    )
    assert torch.equal(*(fast.prepare(model)(ids, pixels) for model in models))


def test_rounded_weights_are_for_answers_only_and_of_their_bits_only(tmp_path):
    checkpoint.convert(g.TINY, tmp_path / "int4", quantize=4)
    folder = tmp_path / "int4"
    assert not (folder / "model.safetensors").exists()  # which transformers would half load
    bits = [checkpoint.Checkpoint(path).weight_bits for path in (folder, g.TINY)]
    assert bits == [4, None]
    with pytest.raises(ValueError, match="holds weights of 4 bits, and not of 8"):
        LLaVA.from_pretrained(folder, quantize=8)
    with pytest.raises(ValueError, match="rounded already"):
        checkpoint.convert(folder, tmp_path / "twice", quantize=4)
    with pytest.raises(ValueError, match="train from the original"):
        assemble.describe(recipes.Recipe(model=str(folder)))
    checkpoint.convert(folder, tmp_path / "again")  # one layout to the other, as it is
    again, stored = (load_file(f / "rounded.safetensors") for f in (tmp_path / "again", folder))
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], stored[name]) for name in stored)


def test_whole_numbers_in_the_place_of_weights_are_refused(tmp_path):
    checkpoint.convert(g.TINY, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight"))
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"up_proj.weight \(expected .* got int8"):
        LLaVA.from_pretrained(tmp_path)
