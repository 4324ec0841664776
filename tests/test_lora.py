"""python -m pytest tests/test_lora.py: a LoRA learns, merges, and is read by peft and by us."""

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file
from test_layouts import randomised
from test_train import losses, moved, stage, stage1, start  # noqa: F401 (fixtures)

import checkpoint
import lora
from llama import LLaMA, LLaMAConfig
from llava import LLaVA

TEXT = LLaMAConfig(vocab_size=48, dim=32, mlp_dim=64, n_layers=2, n_heads=4, n_kv_heads=2)


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return randomised(LLaMA(TEXT)).eval()


def with_lora(llama, rank=4, alpha=8.0, dropout=0.0):
    lora.add_lora(llama, rank, alpha, dropout)
    for name, parameter in llama.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return llama.eval()


def test_it_starts_without_effect_and_only_it_learns(llama):
    ids = torch.randint(0, 48, (2, 9))
    before = llama(ids)
    names = dict(llama.named_parameters()).keys()
    lora.add_lora(llama, 4, 8.0)
    assert torch.equal(llama(ids), before)
    learns = {name for name, p in llama.named_parameters() if p.requires_grad}
    assert learns == dict(llama.named_parameters()).keys() - names
    layers = {name.partition(".lora_")[0].rpartition(".")[2] for name in learns}
    assert layers == {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")}
    assert "lm_head.weight" in names and not any("lm_head" in name for name in learns)


def test_merged_is_the_same_as_unmerged(llama):
    ids = torch.randint(0, 48, (2, 9))
    unmerged = with_lora(llama)(ids)
    plain = LLaMA(TEXT).eval()
    plain.load_state_dict(lora.merged(llama.state_dict(), 8.0 / 4))
    merged = plain(ids)
    assert (merged - unmerged).abs().max() <= 1e-5 * unmerged.abs().max()


def test_dropout_is_on_in_training_only(llama):
    ids = torch.randint(0, 48, (2, 9))
    with_lora(llama, dropout=0.5)
    assert torch.equal(llama(ids), llama(ids))
    llama.train()
    assert not torch.equal(llama(ids), llama(ids))


def test_peft_reads_what_we_write(llama, tmp_path):
    peft = pytest.importorskip("peft", reason="pip install peft")
    import transformers

    state = llama.state_dict()
    checkpoint.save(tmp_path / "base", "language_model", state, asdict(TEXT))
    ids = torch.randint(0, 48, (2, 9))
    ours = with_lora(llama)(ids)
    state = {f"language_model.{name}": tensor for name, tensor in llama.state_dict().items()}
    lora.save_lora(tmp_path / "lora", state, str(tmp_path / "base"), {}, 4, 8.0)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    with torch.no_grad():
        difference = (theirs(ids).logits - ours).abs().max()
    assert difference <= 1e-5 * ours.abs().max()


def test_a_lora_is_trained_saved_and_loaded_onto_its_base(start, stage1, tmp_path):  # noqa: F811
    flags = ("--model", stage1, "--lora-rank", 4, "--lora-alpha", 8, "--lr", 1e-2)
    said = stage(2, start, tmp_path, *flags, "--projector-lr", 1e-3)
    assert "language_model" in said
    before, after = (load_file(f / "model.safetensors") for f in (stage1, tmp_path))
    changed = moved(before, after)
    assert all("_proj." in name or "multi_modal_projector" in name for name in changed)
    assert any("q_proj" in name for name in changed)
    curve = losses(tmp_path)
    assert sum(curve[-5:]) < sum(curve[:5])
    adapter = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.layers.") for name in adapter)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 8
    merged = LLaVA.from_pretrained(tmp_path)
    loaded = LLaVA.from_pretrained(tmp_path / "lora", base=stage1, vision_tower=start / "vit")
    ours, theirs = merged.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-5, atol=1e-6)
