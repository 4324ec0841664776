"""python -m pytest tests/test_attention.py: the attention kernels compute attention.

Without a GPU Triton's interpreter runs them (conftest.py), in tiles of 16 queries and 32 keys, so
that short sequences take several; on a GPU the same tests run at full sizes. What is right is the
plain formula in float64; the kernels may be off by twice what the formula in the same type is.
"""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint as checkpointed

pytest.importorskip("triton", reason="triton is for Linux")
import data
import generate
import image
import kernels
from attention import attend
from kernels import attention as file
from kernels.attention import attention, attention_plain
from llama import KVCache, LLaMA, LLaMAConfig, visible_keys
from llava import LLaVA
from vit import ViT, ViTConfig

ROOT = Path(__file__).parent.parent
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(kernels, "backend", "kernel")


def packed(*lengths, first=1):
    """Numbers of documents of these lengths: packed(2, 0, 1) is 1 1 3."""
    numbers = torch.arange(first, first + len(lengths))
    return numbers.repeat_interleave(torch.tensor(lengths))[None].to(DEVICE)


def make(B, H, K, T, S, head, dtype=torch.float32):
    """q, k, v as the models have them: [B, length, heads, head] in memory, heads before length."""
    shapes = (B, T, H, head), (B, S, K, head), (B, S, K, head)
    return [
        torch.randn(s, device=DEVICE).to(dtype).transpose(1, 2).requires_grad_() for s in shapes
    ]


def results(compute, tensors, dout, **options):
    """Output and the three gradients."""
    out = compute(*tensors, **options)
    return [out, *torch.autograd.grad(out, tensors, dout.to(out.dtype))]


def assert_right(tensors, **options):
    """Output and gradients are as near to float64's as twice the plain formula's."""
    dout = torch.randn(tensors[0].shape, device=DEVICE).to(tensors[0].dtype)
    ours = results(attention, tensors, dout, **options)
    plain = results(attention_plain, tensors, dout, **options)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    exact = results(attention_plain, doubles, dout, **options)
    # Both errors have a floor. A score is known to its last bit, and P to the same bits times ln 2;
    # and where all terms cancel, as in dK of a single key, the plain formula has no error at all,
    # but a sum of terms of about 20 in another order has 2e-6.
    q, k, _ = (t.detach() for t in tensors)
    longest = [x.float().norm(dim=-1).max() if x.numel() else 0 for x in (q, k)]
    largest = longest[0] * longest[1] * q.shape[-1] ** -0.5  # no score is above this
    floor = torch.finfo(torch.float32).eps * (64 + 4 * largest)
    for name, our, other, right in zip(["out", "dq", "dk", "dv"], ours, plain, exact, strict=True):
        assert our.dtype == tensors[0].dtype and our.shape == right.shape
        if right.numel():
            error, allowed = (our - right).abs().max(), 2 * (other - right).abs().max()
            allowed += floor * right.abs().max().clamp(min=1)
            assert error <= allowed, f"{name}: {error:.1e} off, {allowed:.1e} allowed"


# name: (B, H, K, T, S, head), the same on a GPU, causal, documents (numbers for one row, or None)
CASES = {
    "vit": ((1, 2, 2, 37, 37, 64), (2, 16, 16, 577, 577, 64), False, None),
    "vit 224": ((2, 1, 1, 33, 33, 64), (8, 16, 16, 257, 257, 64), False, None),
    "prefill": ((1, 2, 2, 45, 45, 128), (1, 8, 8, 2001, 2001, 128), True, None),
    "grouped heads": ((1, 4, 2, 45, 45, 64), (2, 9, 3, 1000, 1000, 64), True, None),
    "prefix cache": ((1, 2, 1, 19, 70, 64), (2, 8, 2, 300, 1999, 128), True, None),
    "one token": ((1, 2, 1, 1, 1, 64), (3, 8, 2, 1, 1, 128), True, None),
    "one key": ((1, 2, 1, 21, 1, 64), (3, 8, 2, 500, 1, 128), False, None),
    "no key": ((1, 1, 1, 3, 0, 64), (1, 2, 2, 3, 0, 64), False, None),
    "more queries than keys": ((1, 2, 1, 40, 11, 64), (2, 4, 2, 700, 300, 64), True, None),
    "packed": ((1, 2, 1, 70, 70, 64), (2, 8, 8, 4096, 4096, 128), True, (3, 30, 0, 1, 36)),
    "left padding": ((1, 2, 2, 50, 50, 64), (2, 8, 2, 999, 999, 128), True, (-20, 30)),
    "padding only": ((1, 1, 1, 20, 20, 64), (1, 8, 2, 400, 400, 128), True, (-20,)),
    "packed, prefix": ((1, 2, 1, 30, 70, 64), (1, 8, 2, 800, 2000, 128), True, (-5, 20, 45)),
    "decode": ((1, 2, 2, 1, 150, 64), (2, 32, 32, 1, 5000, 128), True, None),
    "decode, grouped": ((1, 4, 1, 1, 135, 64), (1, 32, 8, 1, 16001, 128), True, None),
    "decode, padded": ((1, 2, 1, 1, 150, 64), (4, 8, 2, 1, 3000, 128), True, (-70, 80)),
    "decode 7 tokens": ((1, 3, 1, 7, 100, 64), (1, 8, 2, 7, 1000, 128), True, None),
    "head 32": ((1, 2, 1, 20, 20, 32), (2, 4, 4, 300, 300, 32), True, None),
    "head 48": ((1, 1, 1, 20, 40, 48), (2, 4, 4, 300, 500, 48), False, None),
    "head 80": ((1, 1, 1, 20, 90, 80), (2, 16, 16, 257, 257, 80), True, None),
    "head 256": ((1, 1, 1, 20, 40, 256), (1, 8, 1, 500, 700, 256), True, None),
}


def case(name, dtype):
    small, full, causal, lengths = CASES[name]
    sizes = full if GPU else small
    documents = None
    if lengths:  # stretched to this row; a negative length is padding, which has number 0
        stretch = sizes[4] // sum(map(abs, lengths))
        lengths = [stretch * n for n in lengths]
        numbers = packed(*map(abs, lengths))[0]
        numbers = numbers[None] * (numbers != 1) if lengths[0] < 0 else numbers[None]
        numbers = torch.nn.functional.pad(numbers, (0, sizes[4] - numbers.shape[1]), value=99)
        documents = kernels.documents(numbers.expand(sizes[0], -1))[0]
    return make(*sizes, dtype), dict(causal=causal, documents=documents)


# The interpreter's tiles are the same in every type: all cases in float32, some in the others.
GRID = [(n, t) for n in CASES for t in TYPES if GPU or t == torch.float32 or n in ("vit", "decode")]
GRID += [("packed", torch.bfloat16), ("grouped heads", torch.bfloat16)] * (not GPU)


@pytest.mark.parametrize("name, dtype", GRID, ids=str)
def test_output_and_gradients_are_right(name, dtype):
    tensors, options = case(name, dtype)
    assert_right(tensors, **options)


def test_the_worked_example():
    # In tiles of two keys, by hand, as at the head of the file.
    m, total, acc = -math.inf, 0.0, 0.0
    for scores, v in (((0, 1), (10, 20)), ((2, 3), (30, 40))):
        m_old, m = m, max(m, *scores)
        P = [2.0 ** (score - m) for score in scores]
        total = total * 2.0 ** (m_old - m) + sum(P)
        acc = acc * 2.0 ** (m_old - m) + P[0] * v[0] + P[1] * v[1]
        assert (m, total, acc) == ((1, 1.5, 25.0) if m == 1 else (3, 1.875, 61.25))
    # The same by the formula and by the kernels: in one tile, and among tiles of keys far below.
    for n_far in (0, 70):
        q, k, v = (torch.zeros(1, 1, n, 32, device=DEVICE) for n in (1, 4 + n_far, 4 + n_far))
        q[..., 0] = 1
        k[0, 0, :, 0] = torch.tensor([0, 1, *n_far * [-200], 2, 3])
        v[0, 0, :, 0] = torch.tensor([10, 20, *n_far * [9], 30, 40])
        for compute in (attention, attention_plain):
            out = compute(q, k, v, scale=math.log(2))[0, 0, 0, 0]
            torch.testing.assert_close(out.item(), acc / total)


def test_keys_in_parts_give_what_the_keys_give_together(monkeypatch):
    (q, k, v), options = case("decode, grouped", torch.float32)
    assert file.n_parts(q, k) > 1
    together = {}
    for n in (1, 2, 3, 64):
        monkeypatch.setattr(file, "n_parts", lambda q, k, n=n: n)
        together[n] = attention(q, k, v, **options)
        torch.testing.assert_close(together[n], together[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-4, 1e2, 1e4])
def test_tiny_and_huge_logits(size):
    for dtype in TYPES if size < 1e4 else (torch.float32, torch.bfloat16):  # beyond float16
        q, k, v = make(1, 1, 1, 20, 40, 32, dtype)
        assert_right([(q * size).detach().requires_grad_(), k, v])


def test_a_query_that_sees_nothing_gives_zeros_and_zero_gradients():
    for name in ("no key", "more queries than keys", "left padding", "padding only"):
        tensors, options = case(name, torch.float32)
        out, dq, dk, dv = results(attention, tensors, torch.ones_like(tensors[0]), **options)
        T, S = out.shape[2], tensors[1].shape[2]
        p = torch.arange(S - T, S, device=DEVICE)
        blind = p < 0 if options["documents"] is None else options["documents"][0, 0, -T:] < 0
        blind = blind | (S == 0)
        assert blind.any() and not out[:, :, blind].any() and not dq[:, :, blind].any()
        assert all(x.isfinite().all() for x in (out, dq, dk, dv))


@pytest.mark.parametrize("name", ["prefill", "vit", "packed", "decode, padded"])
def test_nan_reaches_the_queries_that_see_it_and_no_others(name):
    tensors, options = case(name, torch.float32)
    S, T = tensors[1].shape[2], tensors[0].shape[2]
    for which in range(3):
        changed = [t.detach().clone() for t in tensors]
        place = changed[which].shape[2] * 2 // 3  # in the middle of a tile, of a document too
        changed[which][:, 0, place, 5] = float("nan")
        expected = torch.zeros(T, dtype=torch.bool, device=DEVICE)
        if which == 0:
            expected[place] = True
        else:
            names, p = options["documents"], torch.arange(S - T, S, device=DEVICE)
            expected |= (p >= place) | (not options["causal"])
            if names is not None:
                expected &= names[0, 0, -T:] == names[0, 0, place]
        bad = attention(*changed, **options).isnan()[0, 0]  # (T, Dh)
        assert (bad.any(-1) == expected).all() and (bad[:, 5] == expected).all()


def test_any_strides():
    B, T, H, head = 2, 40, 2, 32
    joint = torch.randn(B, T, 3, H, head, device=DEVICE)  # as one projection for q, k and v gives
    upright = torch.randn(B, H, head, T, device=DEVICE).transpose(2, 3)
    every_other = torch.randn(B, H, T, 2 * head, device=DEVICE)[..., ::2]
    cache = torch.randn(3, B, H, 100, head, device=DEVICE)[1, :, :, 7 : 7 + T]
    expanded = torch.randn(B, 1, 1, head, device=DEVICE).expand(B, H, T, head)
    unaligned = torch.randn(B * H * T * head + 1, device=DEVICE)[1:].view(B, H, T, head)
    for q, k, v in [
        joint.permute(2, 0, 3, 1, 4),
        (every_other, upright, cache),
        (expanded, unaligned, expanded),
    ]:
        assert_right([t.detach().requires_grad_() for t in (q, k, v)], causal=True)


def test_offsets_beyond_32_bits():
    # Heads 2^31 elements apart: memory that is reserved, but for the two ends never touched.
    q, k, v = make(1, 2, 2, 5, 5, 32, torch.float16)
    far = torch.empty(2**31 + 5 * 32, dtype=torch.float16, device=DEVICE)
    far = far.as_strided((1, 2, 5, 32), (0, 2**31, 32, 1))
    assert (far.copy_(k.detach()) == k).all()
    right = attention(q, k, v)
    torch.testing.assert_close(attention(q, far, v), right, atol=0, rtol=0)
    far.copy_(v.detach())
    torch.testing.assert_close(attention(q, k, far), right, atol=0, rtol=0)


def test_gradients_have_the_same_bits_every_time():
    tensors, options = case("left padding", torch.float16)
    dout = torch.randn_like(tensors[0])
    once, again = (results(attention, tensors, dout, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


# Who sees whom


def test_documents_are_the_rule_of_visible_keys():
    masks = torch.randint(0, 4, (20, 17))  # documents with holes and padding anywhere
    masks[:5] = masks[:5].sort(1).values
    documents, positions = kernels.documents(masks)
    name, last = documents.unbind(1)
    visible = visible_keys(masks, 17)
    assert (positions == visible.sum(-1) - 1).all()
    seen = (name[:, :, None] == name[:, None]).tril()
    has_name = masks != 0
    assert (seen == visible)[has_name].all() and ((name >= 0) == has_name).all()
    places = torch.arange(17)
    assert (((places <= last[..., None]) & (places >= name[..., None])) >= visible)[has_name].all()
    q, k, v = (torch.randn(20, 1, 17, 32) for _ in range(3))
    ours = attention_plain(q, k, v, True, documents)[:, 0]
    sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v, visible[:, None])[:, 0]
    torch.testing.assert_close(ours[has_name], sdpa[has_name])


def test_documents_with_holes_are_right_too():
    numbers = torch.tensor([[0, 1, 2, 1, 0, 2, 2, 1] * 8], device=DEVICE)
    tensors = make(1, 2, 1, 50, 64, 32)
    assert_right(tensors, causal=True, documents=kernels.documents(numbers)[0])


# What it has to work under


def test_torch_knows_the_operator():
    for name in ("head 32", "packed, prefix") if GPU else ("head 32",):
        (q, k, v), options = case(name, torch.float32)
        arguments = (q, k, v, options["documents"], options["causal"], 0.125)
        torch.library.opcheck(file.forward, arguments)


@pytest.mark.parametrize("backend", ["kernel", "auto"])
def test_compiled_with_gradients(backend, monkeypatch):
    monkeypatch.setattr(kernels, "backend", backend)
    tensors, options = case("head 32", torch.float32)
    dout = torch.randn_like(tensors[0])

    def layer(q, k, v):
        return attend(q * 2, k, v, causal=True) + 1

    expected = results(layer, tensors, dout)
    compiler = "inductor" if GPU else "aot_eager"
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=compiler)
    for ours, right in zip(results(compiled, tensors, dout), expected, strict=True):
        torch.testing.assert_close(ours, right)


def test_recomputed_in_backward():
    tensors, options = case("left padding", torch.float32)
    dout = torch.randn_like(tensors[0])
    expected = results(attention, tensors, dout, **options)

    def again(*tensors):
        return checkpointed(attention, *tensors, **options, use_reentrant=False)

    for ours, right in zip(results(again, tensors, dout), expected, strict=True):
        assert torch.equal(ours, right)


def test_inference_mode_and_autocast():
    (q, k, v), options = case("vit", torch.float32)
    expected = attention(q, k, v, **options)
    with torch.inference_mode():
        assert torch.equal(attention(q.detach(), k.detach(), v.detach(), **options), expected)
    with torch.autocast(DEVICE, torch.bfloat16):  # as with SDPA, whatever the types were
        out = kernels.attend(q, k, v.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v: (q[..., :40], k[..., :40], v[..., :40]), "heads are 40 wide"),
        (lambda q, k, v: (q, k.half(), v), "of one type"),
        (lambda q, k, v: (q.double(), k.double(), v.double()), "of one type"),
        (lambda q, k, v: (q, k[:, :, :-1], v), "K a divisor of H|multiple of K"),
        (lambda q, k, v: (q[:, :3], k, v), "multiple of K"),
    ],
)
def test_what_it_cannot_do_is_said_in_a_sentence(change, message):
    q, k, v = make(1, 4, 2, 5, 5, 64)
    with pytest.raises(ValueError, match=message):
        attention(*change(q, k, v))


def test_without_gpu_and_interpreter_it_is_said_what_to_do(monkeypatch):
    monkeypatch.setattr(file, "INTERPRET", False)
    with pytest.raises(ValueError, match="runs on a CUDA GPU, the tensors are on cpu: use sdpa"):
        attention(*(x.cpu() for x in make(1, 1, 1, 2, 2, 32)))


# In the models


LLAMA = LLaMAConfig(
    vocab_size=100, dim=64, mlp_dim=96, n_layers=2, n_heads=2, n_kv_heads=1, max_positions=256
)


def excited(model):
    """Weights large enough that attention is far from uniform."""
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model.eval().to(DEVICE)


def both(monkeypatch, compute):
    """What a model computes with SDPA and with the kernels."""
    found = []
    for backend in ("sdpa", "kernel"):
        monkeypatch.setattr(kernels, "backend", backend)
        found.append(compute())
    return found


def test_vit_has_the_same_features(monkeypatch):
    vit = excited(ViT(ViTConfig(image_size=84, dim=64, mlp_dim=96, n_layers=2, n_heads=2)))
    pixels = torch.randn(2, 3, 84, 84, device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(*both(monkeypatch, lambda: vit(pixels)), atol=1e-5, rtol=1e-4)


def test_llama_has_the_same_logits_padded_packed_and_cached(monkeypatch):
    llama = excited(LLaMA(LLAMA))
    ids = torch.randint(1, 100, (2, 40), device=DEVICE)
    mask = torch.cat([packed(13, 27), packed(13, 27, first=0)])  # packed; padded on the left

    def cached(mask):
        cache = KVCache(LLAMA, 2, 40, torch.float32, DEVICE)
        steps = [slice(0, 25), slice(25, 39), slice(39, 40)]
        masks = [mask if mask is None else mask[:, : step.stop] for step in steps]
        zipped = zip(steps, masks, strict=True)
        return torch.cat([llama(ids[:, s], mask=m, cache=cache) for s, m in zipped], dim=1)

    with torch.no_grad():
        for compute in (lambda: llama(ids, mask=mask), lambda: cached(mask), lambda: cached(None)):
            sdpa, ours = both(monkeypatch, compute)
            seen = mask != 0  # what padding says is nobody's business
            torch.testing.assert_close(ours[seen], sdpa[seen], atol=1e-4, rtol=1e-4)


def test_a_training_step_has_the_same_gradients_recomputed_and_under_fsdp(monkeypatch, tmp_path):
    ids, mask = torch.randint(1, 100, (1, 24), device=DEVICE), packed(9, 15)

    def gradients(sharded, recompute):
        torch.manual_seed(0)
        llama = excited(LLaMA(LLAMA)).train()
        llama.recompute = recompute
        if sharded:
            for module in (*llama.layers, llama):
                fully_shard(module)
        llama(ids, mask=mask).square().mean().backward()
        grads = {name: p.grad for name, p in llama.named_parameters()}
        return {n: g.full_tensor() if sharded else g for n, g in grads.items()}

    monkeypatch.setattr(kernels, "backend", "sdpa")
    expected = gradients(False, "none")
    monkeypatch.setattr(kernels, "backend", "kernel")
    store = f"file://{tmp_path}/store"
    dist.init_process_group("nccl" if GPU else "gloo", init_method=store, rank=0, world_size=1)
    try:
        found = [gradients(True, "full"), gradients(False, "selective")]
    finally:
        dist.destroy_process_group()
    for name, right in expected.items():
        for grads in found:
            torch.testing.assert_close(grads[name], right, atol=1e-5, rtol=1e-4)


def test_the_tiny_model_answers_with_the_same_tokens(monkeypatch):
    model = LLaVA.from_pretrained(ROOT / "tiny" / "weights" / "llava", device=DEVICE)
    prompt = data.render([("human", "<image>\nWhat is at the top left?")], model.template)
    picture = image.load(ROOT / "examples" / "stickers.jpg")

    if not GPU:  # the interpreter takes as long for a large tile as for a small one
        cut = file.tiles
        large = dict(BLOCK_M=128, BLOCK_N=128)
        monkeypatch.setattr(file, "tiles", lambda kernel, q: cut(kernel, q) | large)

    def answer():
        return generate.generate(model, [prompt], [[picture]], max_new_tokens=3)

    sdpa, ours = both(monkeypatch, answer)
    assert ours == sdpa and len(ours[0]) == 3


def test_in_bfloat16_logits_differ_no_more_than_rounding_does(monkeypatch):
    llama = excited(LLaMA(LLAMA))
    ids = torch.randint(1, 100, (1, 50), device=DEVICE)
    with torch.no_grad():
        monkeypatch.setattr(kernels, "backend", "sdpa")
        exact = llama.double()(ids)
        llama.bfloat16()
        sdpa, ours = both(monkeypatch, lambda: llama(ids))
    assert (ours - exact).abs().max() <= 2 * (sdpa - exact).abs().max()


def test_importing_the_models_imports_no_triton_and_they_work_without_it():
    code = """
import sys, torch
import llama, vit
assert "triton" not in sys.modules
sys.modules["triton"] = None  # as if it were not installed
vit.main()
llama.main()
sys.argv = ["generate.py", "--image", "examples/stickers.jpg", "--attention", "kernel"]
import generate
generate.main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "LLaMA-2-7B has" in done.stdout, done.stderr
    assert done.stderr.endswith("needs triton: install it, or use sdpa\n")
