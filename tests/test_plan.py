"""python -m pytest tests/test_plan.py: what the plan counts is what a small run does."""

import functools
import subprocess
import sys
import weakref
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import attention
import llava
import plan
from image import ImageConfig
from llama import LLaMA, LLaMAConfig
from llava import LLaVA, LLaVAConfig
from recipes import RECIPES, Recipe
from vit import ViTConfig

ROOT = Path(__file__).parent.parent
TEXT = LLaMAConfig(vocab_size=500, dim=128, mlp_dim=344, n_layers=3, n_heads=4, n_kv_heads=2)
CONFIG = LLaVAConfig(
    ViTConfig(image_size=56, dim=96, mlp_dim=256, n_layers=4, n_heads=3), TEXT, ImageConfig(56)
)
STAGE_1, STAGE_2 = Recipe(train_llm=False), Recipe()


@pytest.mark.parametrize("tower_lr", [0.0, 1e-5])
@pytest.mark.parametrize("recipe", [STAGE_1, STAGE_2], ids=["stage1", "stage2"])
def test_flops_are_those_that_torch_counts(recipe, tower_lr):
    recipe = replace(recipe, tower_lr=tower_lr)
    torch.manual_seed(0)
    model = LLaVA(CONFIG).train()
    model.vision_tower.requires_grad_(bool(tower_lr))
    model.language_model.requires_grad_(recipe.train_llm)
    ids = torch.randint(3, 500, (2, 60))
    ids[:, 4] = -200
    labels = torch.full_like(ids, -100)
    labels[:, 40:] = ids[:, 40:]
    pixels = [torch.randn(1, 3, 56, 56) for _ in range(2)]
    with FlopCounterMode(display=False) as counter:
        model.loss(ids, pixels, labels=labels).backward()
    planned = 2 * plan.step_flops(CONFIG, recipe, 59 + 16, 20, 1)
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Attention by torch's own kernel, which keeps no weights of attention for backward."""
    torchs = functools.partial(F.scaled_dot_product_attention, enable_gqa=True)
    monkeypatch.setattr(attention, "written_out", lambda q, k, v, mask: torchs(q, k, v, mask))


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and the most of them."""

    def __init__(self, *tensors):
        super().__init__()
        self.alive, self.now, self.most = {}, 0, 0
        for tensor in tensors:
            self.see(tensor)

    def see(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive:
            self.alive[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.gone, storage._cdata)

    def gone(self, key):
        self.now -= self.alive.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor)
        return out


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("n_rows", [2, 16])
def test_memory_is_that_of_a_whole_step(as_on_a_gpu, recompute, n_rows):
    """Forward and backward of two micro-batches and an update, one process."""
    text = replace(TEXT, vocab_size=2000, dim=256, mlp_dim=688, n_layers=6, n_kv_heads=4)
    vision = replace(CONFIG.vision, image_size=112)
    config = LLaVAConfig(vision, text, ImageConfig(112))
    model = LLaVA(config).train()
    model.vision_tower.requires_grad_(False).bfloat16()
    model.language_model.recompute = recompute
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, 1e-3, fused=True)
    ids = torch.randint(3, 2000, (n_rows, 120))
    ids[:, 4] = -200
    labels = torch.full_like(ids, -100)
    labels[:, 50:] = ids[:, 50:]
    pixels = [torch.randn(1, 3, 112, 112) for _ in range(n_rows)]

    def step():
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model.loss(ids, pixels, labels=labels)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the moments
    moments = [t for state in optimizer.state.values() for t in state.values()]
    with Peak(*model.parameters(), *moments) as peak:
        step()
    recipe = replace(STAGE_2, recompute=recompute)
    sizes = plan.sizes_of(config, recipe)
    kinds = plan.memory_gb(config, recipe, sizes, 1, n_rows * (119 + 64))
    planned = sum(kinds.values()) - plan.RUNTIME_GB
    assert 1e9 * planned == pytest.approx(peak.most, rel=0.1)


def test_the_loss_holds_the_logits_of_one_chunk_at_a_time(monkeypatch):
    """At 2,000 supervised tokens of a vocabulary of 8,000: 64 MB in float32, three times."""
    torch.manual_seed(0)
    model = LLaVA(replace(CONFIG, text=replace(TEXT, vocab_size=8000))).train()
    ids = torch.randint(3, 8000, (1, 2001))
    most, gradients = {}, {}
    for chunk in (4096, 256):
        monkeypatch.setattr(llava, "LOSS_CHUNK", chunk)
        with Peak(*model.parameters()) as peak:
            model.loss(ids, labels=ids).backward()
        most[chunk] = peak.most / 1e6
        gradients[chunk] = model.language_model.lm_head.weight.grad.clone()
        model.zero_grad()
    print(f"{most[4096]:.0f} MB at once, {most[256]:.0f} MB in chunks of 256")
    assert most[4096] - most[256] > 2 * 64 * (1 - 256 / 2000)
    assert (gradients[256] - gradients[4096]).abs().max() < 1e-6


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_activations_are_those_that_torch_keeps(as_on_a_gpu, recompute, dtype):
    torch.manual_seed(0)
    sizes = {}
    for n_layers in (2, 6):
        llama = LLaMA(replace(TEXT, n_layers=n_layers)).to(dtype).train()
        llama.recompute = recompute
        weights, kept = {p.data_ptr() for p in llama.parameters()}, {}

        def keep(tensor, weights=weights, kept=kept):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes(), tensor
            return tensor

        embeds = torch.randn(4, 100, 128, dtype=dtype, requires_grad=True)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            out = llama.hidden(embeds=embeds)
        sizes[n_layers] = sum(n for n, _ in kept.values())
        del out
    measured = (sizes[6] - sizes[2]) / 4 / 400  # of one block and token
    planned = plan.activation_bytes(TEXT, recompute, dtype.itemsize)
    if recompute == "none":
        assert planned == pytest.approx(measured, rel=0.1)
    elif recompute == "full":
        assert planned == pytest.approx(measured, rel=0.1)
    else:  # what a selective policy keeps, autograd's hooks do not see: they see the inputs
        assert measured <= planned


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "tiny"])
@pytest.mark.parametrize("stage", [1, 2])
def test_every_recipe_has_a_plan(name, stage, capsys):
    recipes = RECIPES[name]()
    args = Namespace(gpu="h100-80", gpus=8, mfu=0.4, samples=None, tokens=None)
    plan.show(name, recipes[stage], stage, recipes[1], args)
    said = capsys.readouterr().out
    assert "EFLOP in all" in said and "GPU-hours" in said


def test_the_command_prints_a_plan():
    command = "train.py --config llava-1.5-13b --stage 2 --plan --gpus 8 --gpu h100-80".split()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "learning    13,047,331,840" in done.stdout
    assert "the original took 20 h on 8 A100" in done.stdout


def test_the_sizes_are_those_of_the_official_models():
    recipe = RECIPES["llava-1.5-7b"]()[2]
    stage1 = RECIPES["llava-1.5-7b"]()[1]
    sizes = plan.sizes_of(plan.config_of(recipe, 2, stage1), recipe)
    assert (sizes.tower, sizes.projector, sizes.llm) == (303_507_456, 20_979_712, 6_738_415_616)
    recipe = RECIPES["llava-1.6-34b"]()[2]
    sizes = plan.sizes_of(plan.config_of(recipe, 2, RECIPES["llava-1.6-34b"]()[1]), recipe)
    assert (sizes.projector, sizes.llm) == (58_734_592, 34_388_917_248)
    lora = RECIPES["llava-1.5-lora"]()
    sizes = plan.sizes_of(plan.config_of(lora[2], 2, lora[1]), lora[2])
    assert sizes.lora == 32 * 128 * (4 * 2 * 4096 + 3 * (4096 + 11008))
