"""python -m pytest tests/test_rounded.py: the kernel for rounded weights against the formula.

Without a GPU Triton's interpreter runs it (conftest.py). Its result is held to float64 arithmetic
on the weights spelled out; the error is that of float32 sums and of the type of the result.
"""

import pytest
import torch

pytest.importorskip("triton", reason="triton is for Linux")
import fast
import kernels
import quantize
from generate import TINY
from kernels import rounded
from llama import KVCache, LLaMA, LLaMAConfig
from llava import LLaVA
from quantize import QuantizedLinear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def spelled_out(layer) -> torch.Tensor:
    return quantize.dequantize(layer.q, layer.scale, layer.mid, layer.bits, torch.float64)


@pytest.fixture
def chosen(monkeypatch):
    monkeypatch.setattr(kernels, "backend", "kernel")


# One and several parts of a sum, shapes that are no multiple of a tile; groups of 128, 64, 32.
@pytest.mark.parametrize("shape", [(64, 1024), (48, 192), (33, 96), (200, 512), (20, 72)], ids=str)
@pytest.mark.parametrize("n_rows", [1, 5, 16])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_product_is_that_of_the_weights_spelled_out(bits, n_rows, shape, chosen):
    torch.manual_seed(0)
    layer = QuantizedLinear(torch.randn(shape), bits).to(DEVICE)
    x = torch.randn(n_rows, shape[1], device=DEVICE)
    expected = x.double() @ spelled_out(layer).T
    assert (layer(x) - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_in_each_type_the_result_is_off_by_its_rounding_only(bits, dtype, chosen):
    torch.manual_seed(0)
    layer = QuantizedLinear(torch.randn(128, 256), bits).to(DEVICE)
    x, plus = (torch.randn(2, 3, n, device=DEVICE, dtype=dtype) for n in (256, 128))
    expected = x.double() @ spelled_out(layer).T
    assert layer(x).dtype == dtype and layer(x, plus=plus).shape == (2, 3, 128)
    assert (layer(x) - expected).abs().max() <= ROUNDING[dtype] * expected.abs().max()


@pytest.mark.parametrize("bits", [8, 4])
@torch.inference_mode()
def test_a_whole_model_gives_the_same_logits_with_and_without_the_kernel(bits, chosen, monkeypatch):
    model = LLaVA.from_pretrained(TINY, dtype=torch.float32, device=DEVICE, quantize=bits)
    ids = torch.tensor([[1, 40, 41, 42, 43]], device=DEVICE)
    logits = model(ids)
    monkeypatch.setattr(kernels, "backend", "sdpa")
    expected = model(ids)
    assert 0 < (logits - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.inference_mode()
def test_the_arranged_decoder_decodes_padded_rows_with_the_kernels_too(monkeypatch):
    torch.manual_seed(0)
    config = LLaMAConfig(96, dim=128, mlp_dim=160, n_layers=2, n_heads=4, n_kv_heads=4)
    plain = LLaMA(config).to(DEVICE)
    ids = torch.tensor([[1, 5, 9, 7], [1, 4, 8, 2]], device=DEVICE)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]], device=DEVICE)
    expected = plain(ids, mask=mask)[:, -1]
    decoder = fast.Decoder(plain)
    monkeypatch.setattr(kernels, "backend", "kernel")
    cache = KVCache(config, 2, 4, torch.float32, DEVICE)
    decoder(ids[:, :3], mask=mask[:, :3], cache=cache)
    logits = decoder(ids[:, 3:], mask=mask, cache=cache)[:, -1]
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_many_rows_are_left_to_the_ordinary_product(chosen, monkeypatch):
    layer = QuantizedLinear(torch.randn(64, 128), 4).to(DEVICE)
    monkeypatch.setattr(rounded, "product", lambda *_: pytest.fail("called"))
    x = torch.randn(kernels.FEW_ROWS + 1, 128, device=DEVICE)
    assert layer(x).shape == (len(x), 64)


def test_without_gpu_and_interpreter_it_is_said_what_to_do(chosen, monkeypatch):
    monkeypatch.setattr(rounded, "INTERPRET", False)
    layer = QuantizedLinear(torch.randn(64, 128), 4)
    with pytest.raises(ValueError, match="runs on a CUDA GPU"):
        layer(torch.randn(1, 128))
