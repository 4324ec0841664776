"""Weights go in and out without a bit changed, and nothing that does not fit gets in.

Run: pytest tests/test_checkpoint.py  (offline; needs transformers, which is the oracle)
Proves: every tensor of small random CLIP, LLaMA and LLaVA models saved by transformers arrives
under the right name, in all spellings of the names; what `save` writes is loaded by transformers
without a missing or unexpected key and gives the same outputs; whatever is missing, renamed,
misshapen or not implemented is refused in one readable message.
"""

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import checkpoint
import configs
import image
from checkpoint import Checkpoint, CheckpointError
from llama import LLaMA, LLaMAConfig
from llava import LLaVA, LLaVAConfig
from vit import ViT, ViTConfig

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
}
CAPTIONS = {"vocab_size": 30, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
CAPTIONS |= {"num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 1}

# transformers 5 saves "vision_tower.x" and "language_model.model.x"; the other spellings are those
# of transformers 4 (what lies on the hub), and of a state_dict in memory under either version.
SPELLINGS = {
    "as transformers 5 saves": [],
    "as transformers 4 saves, and the hub has": [
        (r"^vision_tower\.", "vision_tower.vision_model."),
    ],
    "in memory, transformers 4": [
        (r"^vision_tower\.", "model.vision_tower.vision_model."),
        (r"^multi_modal_projector\.", "model.multi_modal_projector."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head\.", "lm_head."),
    ],
    "in memory, transformers 5": [
        (r"^vision_tower\.", "model.vision_tower."),
        (r"^multi_modal_projector\.", "model.multi_modal_projector."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head\.", "lm_head."),
    ],
}


def clip_vision():
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))


def clip():
    config = transformers.CLIPConfig(text_config=CAPTIONS, vision_config=VISION)
    return transformers.CLIPModel(config)


def llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT | changes))


def mistral(**changes):
    return transformers.MistralForCausalLM(transformers.MistralConfig(**TEXT | changes))


def llava(**changes):
    text = TEXT | {"tie_word_embeddings": changes.pop("tied", False)}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**text),
        image_token_index=39,
        image_seq_length=4,
        **changes,
    )
    return transformers.LlavaForConditionalGeneration(config)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomise(model):
    """Random values everywhere: transformers starts biases at 0 and norms at 1, all alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def saved(model, folder, **options):
    randomise(model).save_pretrained(folder, **options)
    return model


def our_names(part, state_dict):
    """transformers' state_dict under our names, spelled out a second time as a check on NAMES."""
    found = {}
    for name, tensor in state_dict.items():
        name = name.removeprefix("model.") if part == "llava" else name
        for old, new in (
            ("vision_model.", ""),
            ("encoder.layers.", "layers."),
            ("pre_layrnorm", "pre_layernorm"),
            ("multi_modal_projector.linear_1", "projector.0"),
            ("multi_modal_projector.linear_2", "projector.2"),
        ):
            name = name.replace(old, new)
        if part == "language_model":
            name = name.removeprefix("model.")
        if part == "llava" and name.startswith("lm_head"):
            name = f"language_model.{name}"
        found[name] = tensor
    return found


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def edit_weights(folder, change):
    """Rewrite model.safetensors with change(tensors) applied."""
    file = Path(folder) / "model.safetensors"
    tensors = load_file(file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(change(tensors) or tensors, file, metadata={"format": "pt"})


def edit_config(folder, *path, **changes):
    file = Path(folder) / "config.json"
    config = json.loads(file.read_text())
    section = config
    for key in path:
        section = section[key]
    section.update(changes)
    file.write_text(json.dumps(config))


def respell(folder, rules):
    def rename(tensors):
        for pattern, new in rules:
            tensors = {re.sub(pattern, new, name): t for name, t in tensors.items()}
        return tensors

    edit_weights(folder, rename)


# ---- reading what transformers wrote


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_a_clip_vision_folder_loads_under_both_spellings(tmp_path, prefix):
    theirs = saved(clip_vision(), tmp_path)
    respell(tmp_path, [("^", prefix)])
    vit = ViT.from_pretrained(tmp_path)
    assert_same(vit.state_dict(), our_names("vision_tower", theirs.state_dict()))
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        hidden = theirs(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(vit(pixels), hidden)


def test_the_vision_half_of_a_clip_folder_loads_and_the_rest_is_left_out(tmp_path):
    theirs = saved(clip(), tmp_path)
    positions = {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
    edit_weights(tmp_path, lambda tensors: tensors | positions)  # old versions stored them
    vit = ViT.from_pretrained(tmp_path)
    assert_same(vit.state_dict(), our_names("vision_tower", theirs.vision_model.state_dict()))
    _, omitted, unexpected = Checkpoint(tmp_path).sort_names()
    assert not unexpected
    assert {"logit_scale", "text_projection.weight", *positions} <= omitted.keys()


@pytest.mark.parametrize("make", [llama, mistral])
@pytest.mark.parametrize("shard", [None, "20KB"])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"head_dim": 10}])
def test_a_decoder_folder_loads(tmp_path, make, shard, changes):
    theirs = saved(make(**changes), tmp_path, **{"max_shard_size": shard} if shard else {})
    assert (tmp_path / "model.safetensors").exists() == (shard is None)
    ours = LLaMA.from_pretrained(tmp_path)
    expected = our_names("language_model", theirs.state_dict())
    if changes.get("tie_word_embeddings"):
        del expected["lm_head.weight"]
    assert_same(ours.state_dict(), expected)
    ids = torch.randint(0, 40, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_old_rotary_buffers_are_left_out(tmp_path):
    saved(llama(), tmp_path)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    edit_weights(tmp_path, lambda tensors: tensors | extra)
    LLaMA.from_pretrained(tmp_path)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_llava_folder_loads_in_every_spelling(tmp_path, spelling, tied):
    theirs = saved(llava(tied=tied), tmp_path)
    respell(tmp_path, SPELLINGS[spelling])
    expected = our_names("llava", theirs.state_dict())
    if tied:
        del expected["language_model.lm_head.weight"]
    assert_same(LLaVA.from_pretrained(tmp_path).state_dict(), expected)


def test_a_sharded_llava_folder_loads(tmp_path):
    theirs = saved(llava(), tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ours = LLaVA.from_pretrained(tmp_path)
    assert_same(ours.state_dict(), our_names("llava", theirs.state_dict()))


def test_a_part_of_a_llava_folder_loads_alone(tmp_path):
    saved(llava(), tmp_path)
    whole = LLaVA.from_pretrained(tmp_path)
    vit, decoder = ViT.from_pretrained(tmp_path), LLaMA.from_pretrained(tmp_path)
    assert_same(vit.state_dict(), whole.vision_tower.state_dict())
    assert_same(decoder.state_dict(), whole.language_model.state_dict())
    assert vit.config == whole.config.vision and decoder.config == whole.config.text


@pytest.mark.parametrize("where", ["text_config", "beside it"])
def test_a_tied_llava_is_recognised_where_either_version_says_so(tmp_path, where):
    saved(llava(tied=True), tmp_path)
    edit_config(tmp_path, tie_word_embeddings=where == "beside it")
    edit_config(tmp_path, "text_config", tie_word_embeddings=where == "text_config")
    assert LLaVA.from_pretrained(tmp_path).config.text.tied_embeddings


def test_a_stored_copy_of_a_tied_table_is_left_out_only_if_it_is_one(tmp_path):
    saved(llama(tie_word_embeddings=True), tmp_path)

    def store_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_weights(tmp_path, store_head)
    LLaMA.from_pretrained(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors["lm_head.weight"].__setitem__((0, 0), 9.0))
    with pytest.raises(CheckpointError, match="lm_head.weight is not tied"):
        LLaMA.from_pretrained(tmp_path)


def test_a_built_module_is_ready_to_run_and_to_train(tmp_path):
    saved(llama(), tmp_path)
    ours = LLaMA.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert not ours.training
    for name, parameter in ours.named_parameters():
        assert isinstance(parameter, torch.nn.Parameter) and parameter.requires_grad, name
        assert parameter.dtype == torch.bfloat16 and parameter.device.type == "cpu", name
    ours(torch.randint(0, 40, (1, 5))).sum().backward()


def test_a_model_does_not_change_with_the_file_it_came_from(tmp_path):
    saved(llama(), tmp_path)
    ours = LLaMA.from_pretrained(tmp_path)
    before = ours.norm.weight.clone()
    file = tmp_path / "model.safetensors"
    with open(file, "r+b") as opened:
        opened.seek(2000)
        opened.write(bytes(file.stat().st_size - 2000))
    assert torch.equal(ours.norm.weight, before)


def test_mixed_types_load_as_the_smallest_type_that_holds_all(tmp_path):
    saved(llama(), tmp_path)
    edit_weights(tmp_path, lambda tensors: {n: t.to(torch.float16) for n, t in tensors.items()})
    assert LLaMA.from_pretrained(tmp_path).norm.weight.dtype == torch.float16

    def mix(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.bfloat16)

    edit_weights(tmp_path, mix)
    assert {p.dtype for p in LLaMA.from_pretrained(tmp_path).parameters()} == {torch.float32}


# ---- refusing what does not fit


def test_all_misfits_are_named_in_one_message(tmp_path):
    saved(llava(), tmp_path)

    def spoil(tensors):
        name = "language_model.model.layers.0.mlp.up_proj.weight"
        tensors[name.replace("up_proj", "upp_proj")] = tensors.pop(name)  # renamed
        del tensors["vision_tower.pre_layrnorm.bias"]  # missing
        tensors["image_newline"] = torch.zeros(24)  # extra
        tensors["multi_modal_projector.linear_1.weight"] = torch.zeros(24, 15)  # misshapen
        tensors["language_model.model.norm.weight"] = torch.zeros(24, dtype=torch.int8)  # quantised

    edit_weights(tmp_path, spoil)
    with pytest.raises(CheckpointError) as caught:
        LLaVA.from_pretrained(tmp_path)
    message = str(caught.value)
    missing, unexpected, misshapen = message.split(";")[1:]
    assert "2 missing" in missing and "2 unexpected" in unexpected and "2 misshapen" in misshapen
    assert "layers.0.mlp.up_proj.weight [48, 24]" in missing
    assert "vision_model.pre_layrnorm.bias [16]" in missing
    assert "layers.0.mlp.upp_proj.weight" in unexpected and "image_newline" in unexpected
    assert "linear_1.weight (expected [24, 16], got float32 [24, 15])" in misshapen
    assert "model.norm.weight (expected [24], got int8 [24])" in misshapen


def drop(name):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


@pytest.mark.parametrize(
    "change, expected",
    [
        (drop("lm_head.weight"), r"1 missing: lm_head.weight \[40, 24\]; 0 unexp"),
        (lambda t: t | {"model.more": torch.ones(1)}, "0 missing: none; 1 unexpected: model.more"),
        (lambda t: t | {"more": torch.ones(1)}, "0 missing: none; 1 unexpected: more"),
        (
            lambda t: t | {"model.layers.2.mlp.up_proj.weight": torch.ones(48, 24)},
            "1 unexpected: model.layers.2.mlp.up_proj.weight; 0 mis",
        ),
        (
            lambda t: t | {"model.norm.weight": torch.ones(1, 24)},
            r"1 misshapen: model.norm.weight \(expected \[24\], got float32 \[1, 24\]\)",
        ),
    ],
)
def test_a_single_misfit_is_enough(tmp_path, change, expected):
    saved(llama(), tmp_path)
    edit_weights(tmp_path, change)
    with pytest.raises(CheckpointError, match=expected):
        LLaMA.from_pretrained(tmp_path)


def test_a_tensor_stored_under_two_spellings_is_unexpected(tmp_path):
    saved(clip_vision(), tmp_path)
    bias = {"vision_model.post_layernorm.bias": torch.zeros(16)}
    edit_weights(tmp_path, lambda tensors: tensors | bias)
    with pytest.raises(CheckpointError, match="1 unexpected: [a-z_.]*post_layernorm.bias;"):
        ViT.from_pretrained(tmp_path)


def test_a_long_list_of_misfits_is_cut(tmp_path):
    saved(llama(), tmp_path)
    respell(tmp_path, [("^", "module.")])
    with pytest.raises(CheckpointError, match="21 missing: .*, and 14 more; 21 unexpected: ") as e:
        LLaMA.from_pretrained(tmp_path)
    assert len(str(e.value)) < 2000


def test_an_unknown_tensor_counts_even_when_only_a_part_is_loaded(tmp_path):
    saved(llava(), tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors | {"q_former": torch.zeros(24)})
    with pytest.raises(CheckpointError, match="1 unexpected: q_former"):
        ViT.from_pretrained(tmp_path)


def test_a_folder_without_the_part_says_what_it_is(tmp_path):
    saved(clip(), tmp_path / "clip")
    saved(llama(), tmp_path / "llama")
    for load, name, sentence in (
        (LLaMA, "clip", "has no language model"),
        (LLaVA, "clip", "not a whole LLaVA"),
        (ViT, "llama", "has no vision tower"),
        (LLaVA, "llama", "not a whole LLaVA"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            load.from_pretrained(tmp_path / name)


def index_names(name):
    def spoil(folder):
        (folder / "model.safetensors").unlink()
        index = {"weight_map": {"lm_head.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return spoil


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(folder, length=3000):
    write("model.safetensors", (folder / "model.safetensors").read_bytes()[:length])(folder)


def repeat_in_second_shard(folder):
    tensors = load_file(folder / "model.safetensors")
    index_names("a.safetensors")(folder)
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in "ab":
        save_file(tensors, folder / f"{name}.safetensors")


@pytest.mark.parametrize(
    "spoil, expected",
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (write("config.json", b'{"model_type": "llama",'), "config.json is not JSON"),
        (write("config.json", b"\xff\xfe\x00"), "config.json is not JSON"),
        (write("config.json", b"[]"), "config.json holds a list"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (cut, r"model.safetensors \(3,000 bytes\) .* cut short"),
        (lambda folder: cut(folder, 20_000), "cut short"),
        (write("model.safetensors", b""), r"model.safetensors \(0 bytes\)"),
        (write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "43 bytes"),
        (index_names("model-00001-of-00002.safetensors"), "model-00001-of-00002.s.* is missing"),
        (index_names("../model.safetensors"), "expected .* beside it"),
        (index_names("/etc/passwd"), "expected .* beside it"),
        (index_names("sub/model.safetensors"), "expected .* beside it"),
        (index_names(".."), "expected .* beside it"),
        (index_names(None), "expected .* beside it"),
        (repeat_in_second_shard, "b.safetensors repeats tensors of another file: lm_head.weight"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_sentence(tmp_path, spoil, expected):
    saved(llama(), tmp_path)
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=expected) as caught:
        LLaMA.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}'])
def test_an_index_without_a_map_is_refused(tmp_path, content):
    saved(llama(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="has no weight_map"):
        LLaMA.from_pretrained(tmp_path)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is no .*nowhere"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="neither safetensors nor a zip"):
        Checkpoint(__file__)


# ---- config.json

# What the hub's copy says; everything else is left to the defaults of transformers' classes.
LLAVA_15_7B_HF = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.36.0.dev0",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}


def opened(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint(folder)


def test_the_hubs_short_llava_config_gives_the_full_sizes(tmp_path):
    source = opened(tmp_path, LLAVA_15_7B_HF)
    config = LLaVA.read_config(source)
    text = replace(LLaMAConfig(), vocab_size=32064)  # 32000 words, 2 added tokens, rounded up
    assert config == LLaVAConfig(vision=ViTConfig(), text=text)
    assert (text.n_layers, text.mlp_dim, text.dim, text.n_heads) == (32, 11008, 4096, 32)
    theirs = transformers.LlavaConfig(**json.loads((tmp_path / "config.json").read_text()))
    for key, (ours, _) in configs.VISION.items():
        assert getattr(config.vision, ours) == getattr(theirs.vision_config, key), key
    for key, (ours, _) in configs.TEXT.items():
        if key != "rope_theta":
            assert getattr(config.text, ours) == getattr(theirs.text_config, key), key
    assert config.text.rope_theta == theirs.text_config.rope_parameters["rope_theta"]


@pytest.mark.parametrize("kind", ["llama", "mistral", "clip_vision_model"])
def test_absent_keys_mean_what_transformers_takes_them_to_mean(tmp_path, kind):
    theirs = transformers.AutoConfig.for_model(kind)
    table = configs.TEXT
    if kind == "clip_vision_model":
        config = opened(tmp_path, {"model_type": kind}).vision_config()
        table = configs.VISION
    else:  # the class default of Mistral's window cuts the context: see below
        source = opened(tmp_path, {"model_type": kind, "sliding_window": None})
        config = asdict(LLaMAConfig(**source.text_config()))
    for key, (ours, _) in table.items():
        if key == "rope_theta":
            assert config[ours] == theirs.rope_parameters["rope_theta"]
        elif key == "head_dim":
            assert config[ours] == theirs.hidden_size // theirs.num_attention_heads
        else:
            assert config[ours] == getattr(theirs, key), key


@pytest.mark.parametrize(
    "rope, expected",
    [
        ({"rope_theta": 1e6}, 1e6),
        ({"rope_theta": 500000}, 5e5),  # JSON of transformers 4 often has a whole number
        ({"rope_theta": 1e6, "rope_scaling": None}, 1e6),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "default"}}, 1e6),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, 1e6),
        ({"rope_parameters": {"rope_type": "default"}}, 1e4),
        ({}, 1e4),
    ],
)
def test_rope_theta_is_found_where_either_version_puts_it(tmp_path, rope, expected):
    theta = opened(tmp_path, {"model_type": "llama"} | rope).text_config()["rope_theta"]
    assert theta == expected and type(theta) is float


def test_a_sliding_window_ends_the_context(tmp_path):
    source = opened(tmp_path, {"model_type": "mistral"})
    assert source.text_config()["max_positions"] == 4096
    source = opened(tmp_path, {"model_type": "mistral", "sliding_window": None})
    assert source.text_config()["max_positions"] == 131072


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only silu"),
        ({"model_type": "mistral", "sliding_window": "4096"}, "sliding_window is '4096'"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type of RoPE is 'linear'"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling is {'rope_type': 'llama3'",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type of RoPE is"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor of RoPE is"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": ["llama"]}, "model_type is"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
    ],
)
def test_a_decoder_that_would_give_other_numbers_is_refused(tmp_path, changes, expected):
    with pytest.raises(CheckpointError, match=expected):
        opened(tmp_path, {"model_type": "llama"} | changes).text_config()


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"projector_hidden_act": "gelu_new"}, "projector_hidden_act is 'gelu_new'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias is False"),
        ({"vision_feature_layer": [-2, -5]}, "vision_feature_layer is"),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy is 'cls'"),
        ({"text_config": {"model_type": "qwen2"}}, "model_type is 'qwen2'"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "'siglip_vision_model'"),
        ({"vision_config": {"num_channels": 1}}, "num_channels is 1"),
        ({"vision_config": {"image_size": [336, 336]}}, "image_size is"),
        ({"text_config": None}, "model_type is 'llava'"),
        ({"vision_config": "clip"}, "model_type is 'llava'"),
        ({"model_type": "llava_onevision"}, "model_type is 'llava_onevision'"),
    ],
)
def test_a_llava_that_would_give_other_numbers_is_refused(tmp_path, changes, expected):
    with pytest.raises(CheckpointError, match=expected):
        opened(tmp_path, LLAVA_15_7B_HF | changes).llava_config()


def test_the_class_token_is_kept_where_the_config_says_full(tmp_path):
    full = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    config = opened(tmp_path, LLAVA_15_7B_HF | full).llava_config()
    assert config["keep_class"] is True and config["vision_layer"] == -1


# ---- writing


VISION_CONFIG = ViTConfig(28, 14, 16, 32, 3, 2, norm_eps=1e-6, activation="gelu")
TEXT_CONFIG = LLaMAConfig(40, 24, 48, 2, 4, 2, norm_eps=2e-6, rope_theta=2e5, max_positions=64)
LLAVA_CONFIG = LLaVAConfig(VISION_CONFIG, TEXT_CONFIG, image.ImageConfig(28))
HF_CLASSES = {
    "vision_tower": transformers.CLIPVisionModel,
    "language_model": transformers.LlamaForCausalLM,
    "llava": transformers.LlavaForConditionalGeneration,
}
MODELS = {
    "vision_tower": (ViT, VISION_CONFIG),
    "language_model": (LLaMA, TEXT_CONFIG),
    "language_model, tied": (LLaMA, replace(TEXT_CONFIG, tied_embeddings=True)),
    "language_model, wide heads": (LLaMA, replace(TEXT_CONFIG, head_dim=10)),
    "llava": (LLaVA, LLAVA_CONFIG),
    "llava, tied": (
        LLaVA,
        replace(LLAVA_CONFIG, text=replace(TEXT_CONFIG, tied_embeddings=True)),
    ),
    "llava, class token": (LLaVA, replace(LLAVA_CONFIG, keep_class=True, vision_layer=-1)),
    "llava, linear": (LLaVA, replace(LLAVA_CONFIG, projector="linear")),
}


def save(folder, name, **options):
    make, config = MODELS[name]
    model = randomise(make(config))
    kind = name.partition(",")[0]
    checkpoint.save(folder, kind, model.state_dict(), asdict(config), **options)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_comes_back_bit_for_bit(tmp_path, name, dtype):
    model = save(tmp_path, name, dtype=dtype)
    again = type(model).from_pretrained(tmp_path)
    assert again.config == model.config
    assert_same(again.state_dict(), model.to(dtype).state_dict())
    stated = json.loads((tmp_path / "config.json").read_text())["torch_dtype"]
    assert f"torch.{stated}" == str(dtype)  # transformers 4 believes this


@pytest.mark.parametrize("shard_bytes", [5e9, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_what_is_saved(tmp_path, name, dtype, shard_bytes):
    model = save(
        tmp_path, name, dtype=dtype, token_ids={"image_token_index": 39}, shard_bytes=shard_bytes
    ).to(dtype)
    kind = name.partition(",")[0]
    theirs, info = HF_CLASSES[kind].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    theirs = theirs.eval()
    assert {p.dtype for p in theirs.parameters()} == {dtype}
    expected, ours = our_names(kind, theirs.state_dict()), model.state_dict()
    if "tied" in name:
        expected.pop("lm_head.weight", None), expected.pop("language_model.lm_head.weight", None)
    if "linear" in name:
        assert torch.equal(expected.pop("projector.2.weight"), torch.eye(24, dtype=dtype))
        assert not expected.pop("projector.2.bias").any()
    assert_same(ours, expected)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same_from_what_is_saved(tmp_path, name):
    model = save(tmp_path, name, token_ids={"image_token_index": 39})
    kind = name.partition(",")[0]
    theirs = HF_CLASSES[kind].from_pretrained(tmp_path).eval()
    pixels, ids = torch.randn(1, 3, 28, 28), torch.tensor([[1, 7, 9, 11]])
    with torch.no_grad():
        if kind == "vision_tower":
            ours, expected = model.pool(pixels), theirs(pixels).pooler_output
        elif kind == "language_model":
            ours, expected = model(ids), theirs(ids).logits
        else:
            n = theirs.config.image_seq_length
            spread = torch.tensor([[1, 7, *[39] * n, 9, 11]])
            expected = theirs(input_ids=spread, pixel_values=pixels).logits
            ours = model(torch.tensor([[1, 7, -200, 9, 11]]), [pixels])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_weights_have_the_names_that_the_hub_has(tmp_path):
    save(tmp_path, "llava")
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        names = set(opened.keys())
        assert opened.metadata() == {"format": "pt"}
    assert {
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.pre_layrnorm.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.out_proj.bias",
        "vision_tower.vision_model.post_layernorm.weight",
        "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_2.bias",
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.1.mlp.down_proj.weight",
        "language_model.model.norm.weight",
    } <= names


def test_a_second_layer_that_is_no_identity_is_not_taken_for_a_linear_projector(tmp_path):
    save(tmp_path, "llava, linear")

    def spoil(tensors):
        tensors["multi_modal_projector.linear_2.bias"][3] = 1e-3

    edit_weights(tmp_path, spoil)
    with pytest.raises(CheckpointError, match="linear_2.bias is not the identity"):
        LLaVA.from_pretrained(tmp_path)
    ViT.from_pretrained(tmp_path)  # the other parts are as good as before


def test_our_own_settings_survive(tmp_path):
    config = replace(
        LLAVA_CONFIG,
        template="llava_v0",
        image=image.ImageConfig(28, aspect="crop", mean=(0.5, 0.5, 0.5)),
    )
    model = LLaVA(config)
    checkpoint.save(tmp_path, "llava", model.state_dict(), asdict(config))
    assert LLaVA.from_pretrained(tmp_path).config == config


def test_the_preprocessing_values_are_those_of_image_py(tmp_path):
    save(tmp_path, "llava")
    values = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert values["image_mean"] == list(image.MEAN) and values["image_std"] == list(image.STD)
    assert values["size"] == {"shortest_edge": 28}
    assert values["crop_size"] == {"height": 28, "width": 28}


def test_tokenizer_files_are_copied(tmp_path):
    first, second = tmp_path / "tokenizer.model", tmp_path / "tokenizer_config.json"
    first.write_bytes(b"\n\x0e pieces"), second.write_text("{}")
    save(tmp_path / "one", "llava", tokenizer=first)
    save(tmp_path / "two", "llava", tokenizer=[str(first), second])
    assert (tmp_path / "one" / "tokenizer.model").read_bytes() == first.read_bytes()
    assert (tmp_path / "two" / "tokenizer.model").read_bytes() == first.read_bytes()
    assert (tmp_path / "two" / "tokenizer_config.json").exists()


def test_a_tensor_without_a_place_in_the_layout_is_refused(tmp_path):
    state = ViT(VISION_CONFIG).state_dict() | {"extra.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="no place for a tensor called .*extra.weight"):
        checkpoint.save(tmp_path, "vision_tower", state, asdict(VISION_CONFIG))


def test_a_projector_without_a_place_in_the_layout_is_refused(tmp_path):
    config = replace(LLAVA_CONFIG, projector="mlp3x_gelu")
    with pytest.raises(CheckpointError, match="no place for"):
        checkpoint.save(tmp_path, "llava", LLaVA(config).state_dict(), asdict(config))


def test_saving_again_with_another_number_of_files_leaves_no_stale_weights(tmp_path):
    save(tmp_path, "language_model")
    (tmp_path / "model_card.md").write_text("mine")
    for shard_bytes in (10_000, 20_000, 5e9):
        model = save(tmp_path, "language_model", shard_bytes=shard_bytes)
        assert_same(LLaMA.from_pretrained(tmp_path).state_dict(), model.state_dict())
        index = tmp_path / "model.safetensors.index.json"
        if index.exists():
            named = set(json.loads(index.read_text())["weight_map"].values())
            assert named == {file.name for file in tmp_path.glob("*.safetensors")}
            assert all((tmp_path / n).stat().st_size < shard_bytes + 2_000 for n in named)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "model_card.md",
    ]


def test_a_save_that_dies_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    model = save(tmp_path, "language_model")
    calls = []

    def full_disk(tensors, file, **options):
        calls.append(file)
        if len(calls) == 2:
            raise OSError("no space left on device")
        save_file(tensors, file, **options)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(checkpoint, "save_file", full_disk)
        save(tmp_path, "language_model", shard_bytes=10_000)
    assert_same(LLaMA.from_pretrained(tmp_path).state_dict(), model.state_dict())
    model = save(tmp_path, "language_model", shard_bytes=10_000)
    assert_same(LLaMA.from_pretrained(tmp_path).state_dict(), model.state_dict())
    assert not (tmp_path / ".saving").exists()


def test_config_json_arrives_last(tmp_path, monkeypatch):
    moved, real = [], checkpoint.os.replace
    monkeypatch.setattr(
        checkpoint.os, "replace", lambda a, b: (moved.append(Path(b).name), real(a, b))
    )
    save(tmp_path, "llava", shard_bytes=20_000)
    assert moved[-1] == "config.json" and len(moved) > 5


def test_others_may_read_the_weights_if_they_may_read_the_config(tmp_path):
    save(tmp_path, "llava")
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert len(modes) == 1


# ---- the command line


def command(*arguments):
    root = Path(checkpoint.__file__).parent
    return subprocess.run(
        [sys.executable, str(root / "checkpoint.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
    )


def test_inspect_prints_what_a_folder_holds_and_what_is_left_out(tmp_path):
    saved(clip(), tmp_path)
    result = command("inspect", tmp_path)
    assert result.returncode == 0 and not result.stderr
    assert "family      clip" in result.stdout and "patch_size  14" in result.stdout
    assert re.search(r"tensors +\d+ of type float32", result.stdout)
    assert "CLIP's text half" in result.stdout


def test_inspect_answers_a_mistake_in_one_sentence(tmp_path):
    result = command("inspect", tmp_path / "nowhere")
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.count("\n") == 1 and "there is no " in result.stderr


def test_the_command_explains_itself():
    result = command("--help")
    assert result.returncode == 0 and "inspect" in result.stdout
