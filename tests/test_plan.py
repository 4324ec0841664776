"""python -m pytest tests/test_plan.py: what the plan counts is what a small run does."""

import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

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


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_activations_are_those_that_torch_keeps(recompute, dtype):
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
