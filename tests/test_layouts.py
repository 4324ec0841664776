"""Every official layout gives the same tensors, and transformers reads what `convert` writes.

Run: pytest tests/test_layouts.py  (offline; needs transformers)
Proves: OpenAI's CLIP files (TorchScript and plain), Meta's shards, deltas, LoRAs, projectors and
LLaVA-NeXT folders arrive as the weights they were made from; converted, each is loaded by
transformers without a missing or unexpected tensor and computes the same.
"""

import importlib
import json
import re
import shutil
import subprocess
import sys
import types
from dataclasses import asdict, replace
from pathlib import Path

import original
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import checkpoint
import data
import image
import tokenizer
from checkpoint import Checkpoint, CheckpointError
from generate import generate
from llama import LLaMA, LLaMAConfig
from llava import LLaVA
from vit import ViT, ViTConfig

TINY = Path(__file__).parents[1] / "tiny" / "weights"

VISION = ViTConfig(image_size=28, patch_size=14, dim=64, mlp_dim=96, n_layers=3, n_heads=1)
TEXT = LLaMAConfig(
    vocab_size=48, dim=32, mlp_dim=64, n_layers=2, n_heads=8, n_kv_heads=4, max_positions=4096
)


def randomised(module):
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return module.eval()


def assert_same(ours: dict, theirs: dict):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


# ---- OpenAI's CLIP --------------------------------------------------------------------------


def openai_names(state: dict) -> dict:
    """Our tower in OpenAI's words, with a text half and the rest that their files hold."""
    out = {}
    for name, tensor in state.items():
        for ours, theirs in (
            ("embeddings.patch_embedding", "conv1"),
            ("embeddings.class_embedding", "class_embedding"),
            ("embeddings.position_embedding.weight", "positional_embedding"),
            ("pre_layernorm", "ln_pre"),
            ("post_layernorm", "ln_post"),
            ("layers", "transformer.resblocks"),
            ("self_attn.out_proj", "attn.out_proj"),
            ("layer_norm", "ln_"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
        ):
            name = name.replace(ours, theirs)
        if ".self_attn." not in name:
            out[f"visual.{name}"] = tensor
    for i in range(VISION.n_layers):
        for kind in ("weight", "bias"):
            parts = [state[f"layers.{i}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            out[f"visual.transformer.resblocks.{i}.attn.in_proj_{kind}"] = torch.cat(parts)
    out["visual.proj"] = torch.zeros(64, 8)
    out["transformer.resblocks.0.attn.in_proj_weight"] = torch.zeros(24, 8)
    out |= {"token_embedding.weight": torch.zeros(9, 8), "positional_embedding": torch.zeros(7, 8)}
    out |= {"ln_final.weight": torch.zeros(8), "text_projection": torch.zeros(8, 8)}
    return out | {"logit_scale": torch.zeros(()), "input_resolution": torch.tensor(28)}


def script(tensors: dict, file: Path):
    """The tensors as parameters of a tree of modules, saved as a TorchScript archive."""

    class Branch(torch.nn.Module):
        def forward(self, x: int) -> int:
            return x

    root = Branch()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        branch = root
        for step in path:
            if step not in branch._modules:
                branch.add_module(step, Branch())
            branch = getattr(branch, step)
        branch.register_buffer(leaf, tensor)
    torch.jit.save(torch.jit.script(root), file)


@pytest.mark.parametrize("form", ["script", "plain"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_openais_clip_files_load(tmp_path, form):
    vit, file = randomised(ViT(VISION)), tmp_path / "ViT-L-14.pt"
    tensors = openai_names(vit.state_dict())
    script(tensors, file) if form == "script" else torch.save(tensors, file)
    loaded = ViT.from_pretrained(file)
    assert loaded.config == VISION
    assert_same(loaded.state_dict(), vit.state_dict())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_openais_half_precision_survives(tmp_path):
    vit, file = randomised(ViT(VISION)).half(), tmp_path / "ViT.pt"
    script(openai_names(vit.state_dict()), file)
    loaded = ViT.from_pretrained(file)
    assert next(loaded.parameters()).dtype == torch.float16
    assert_same(loaded.state_dict(), vit.state_dict())


def test_a_tensor_missing_in_openais_file_is_named(tmp_path):
    tensors = openai_names(randomised(ViT(VISION)).state_dict())
    name = "visual.transformer.resblocks.0.attn.in_proj_weight"
    del tensors[name]
    torch.save(tensors, tmp_path / "ViT.pt")
    with pytest.raises(CheckpointError, match=re.escape(f"3 missing: {name}")):
        ViT.from_pretrained(tmp_path / "ViT.pt")


def test_features_are_those_of_openais_code():
    """clip.pt: a small CLIP built, traced and saved by openai-clip (tests/record_clip.py)."""
    here = Path(__file__).parent
    vit, record = (
        ViT.from_pretrained(here / "clip.pt", torch.float32),
        torch.load(here / "clip-features.pt"),
    )
    assert asdict(vit.config) == record["config"]
    with torch.no_grad():
        features = vit(record["pixels"], -2, keep_class=True)
        pooled = vit.pool(record["pixels"])
    for got, expected in ((features, record["features"]), (pooled, record["pooled"])):
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


# ---- Meta's LLaMA ---------------------------------------------------------------------------


def interleaved(weight, n_heads: int):
    """Rows (i, i + Dh/2) of each head -> (2i, 2i + 1), the inverse of what loading does."""
    half = weight.shape[0] // n_heads // 2
    return weight.view(n_heads, 2, half, -1).transpose(1, 2).reshape(weight.shape)


META_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
}


def write_meta(llama: LLaMA, folder: Path, n_shards: int, version: int):
    config = llama.config
    params = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads}
    params |= {"norm_eps": config.norm_eps, "vocab_size": -1, "multiple_of": 256}
    if config.n_kv_heads != config.n_heads:
        params["n_kv_heads"] = config.n_kv_heads
    if version == 3:
        params |= {"rope_theta": 500000.0, "vocab_size": config.vocab_size}
    shards = [{"rope.freqs": torch.zeros(2)} for _ in range(n_shards)]
    for ours, tensor in llama.state_dict().items():
        name = ours
        for mine, theirs in META_NAMES.items():
            name = name.replace(mine, theirs)
        if ".wq." in name or ".wk." in name:
            heads = config.n_heads if ".wq." in name else config.n_kv_heads
            tensor = interleaved(tensor, heads)
        cut = 1 if any(x in name for x in (".wo.", ".w2.")) else 0
        if "tok_embeddings" in name:
            cut = 0 if version == 3 else 1
        parts = [tensor] * n_shards if "norm" in name else tensor.chunk(n_shards, cut)
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.clone()
    folder.mkdir(exist_ok=True)
    for i, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{i:02}.pth")
    (folder / "params.json").write_text(json.dumps(params))


@pytest.mark.parametrize("n_shards", [1, 2, 4])
@pytest.mark.parametrize("version", [1, 2, 3])
def test_metas_shards_load(tmp_path, n_shards, version):
    eps, theta = {1: 1e-6, 2: 1e-5, 3: 1e-5}[version], {1: 1e4, 2: 1e4, 3: 5e5}[version]
    positions = {1: 2048, 2: 4096, 3: 8192}[version]
    heads = 8 if version == 1 else 4
    config = replace(
        TEXT, norm_eps=eps, rope_theta=theta, n_kv_heads=heads, max_positions=positions
    )
    llama = randomised(LLaMA(config))
    write_meta(llama, tmp_path, n_shards, version)
    loaded = LLaMA.from_pretrained(tmp_path)
    assert loaded.config == config
    assert_same(loaded.state_dict(), llama.state_dict())


@pytest.fixture(scope="module")
def meta_code():
    """Meta's own model, on one process: fairscale's parallel layers are then ordinary ones."""
    llama_models = pytest.importorskip("llama_models")

    class Linear(torch.nn.Linear):
        def __init__(self, n_in, n_out, bias=False, **_):
            super().__init__(n_in, n_out, bias)

    class Embedding(torch.nn.Embedding):
        def __init__(self, n, dim, **_):
            super().__init__(n, dim)

    stem = "fairscale.nn.model_parallel"
    names = ("fairscale", "fairscale.nn", stem, f"{stem}.initialize", f"{stem}.layers")
    stubs = {name: types.ModuleType(name) for name in names}
    stubs[stem].initialize = stubs[f"{stem}.initialize"]
    stubs[stem].initialize.get_model_parallel_world_size = lambda: 1
    layers = stubs[f"{stem}.layers"]
    layers.ColumnParallelLinear = layers.RowParallelLinear = Linear
    layers.VocabParallelEmbedding = Embedding
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stubs.items():
            patch.setitem(sys.modules, name, module)
        yield importlib.import_module(f"{llama_models.__name__}.llama3.model")


@pytest.mark.parametrize("n_shards", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"n_kv_heads": 4, "rope_theta": 500000.0},
        {"rope_theta": 10000.0, "norm_eps": 1e-6},
        {"n_kv_heads": 2, "rope_theta": 500000.0, "use_scaled_rope": True},
    ],
    ids=["llama 3", "llama 1", "llama 3.1"],
)
def test_metas_files_compute_what_metas_code_computes(tmp_path, meta_code, options, n_shards):
    params = {"dim": 64, "n_layers": 2, "n_heads": 8, "vocab_size": 48, "multiple_of": 16}
    params |= options
    arguments = meta_code.ModelArgs(**params, max_seq_len=64, max_batch_size=1)
    theirs = randomised(meta_code.Transformer(arguments))
    shards = [{} for _ in range(n_shards)]
    for name, tensor in theirs.state_dict().items():
        cut = 1 if any(x in name for x in (".wo.", ".w2.")) else 0
        parts = [tensor] * n_shards if "norm" in name else tensor.chunk(n_shards, cut)
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.clone()
    for i, shard in enumerate(shards):
        torch.save(shard, tmp_path / f"consolidated.{i:02}.pth")
    (tmp_path / "params.json").write_text(json.dumps(params))
    ids = torch.randint(0, 48, (1, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = theirs(ids, 0), LLaMA.from_pretrained(tmp_path)(ids)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_missing_shard_of_metas_is_named(tmp_path):
    write_meta(randomised(LLaMA(TEXT)), tmp_path, 4, 2)
    (tmp_path / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match="lacks some of consolidated.00.pth"):
        LLaMA.from_pretrained(tmp_path)


def test_the_longer_context_of_llama_31_equals_transformers(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=48,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            rope_parameters={"rope_theta": 1e4, **scaling},
            max_position_embeddings=512,
        )
    )
    randomised(theirs).save_pretrained(tmp_path)
    ours = LLaMA.from_pretrained(tmp_path)
    assert ours.config.rope_scaling == (8.0, 1.0, 4.0, 64.0)
    ids = torch.randint(0, 48, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = theirs(ids).logits, ours(ids)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    checkpoint.save(tmp_path / "again", "language_model", ours.state_dict(), asdict(ours.config))
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, expected)


# ---- with a base ----------------------------------------------------------------------------


@pytest.fixture
def v15(tmp_path):
    return original.write("v1.5", tmp_path)


def write_base(folder: Path):
    """The language model alone, as its own folder."""
    folder.mkdir()
    config = original.config_of("v1.5", folder, 56) | {"model_type": "llama"}
    config = {key: value for key, value in config.items() if not key.startswith("mm_")}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(original.decoder_tensors(original.HEADS), folder / "model.safetensors")
    return folder


def test_a_delta_is_added_to_its_base(tmp_path, v15):
    whole, base = LLaVA.from_pretrained(v15), write_base(tmp_path / "base")
    stored = load_file(base / "model.safetensors")
    short = {k: v[:-3] if "lm_head" in k or "embed" in k else v for k, v in stored.items()}
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": original.VOCAB - 3}))
    save_file({k: v.contiguous() for k, v in short.items()}, base / "model.safetensors")
    for file in sorted(v15.glob("*.bin")):
        part = torch.load(file)
        for name in part.keys() & short:
            part[name][tuple(map(slice, short[name].shape))] -= short[name]
        torch.save(part, file)
    loaded = LLaVA.from_pretrained(v15, base=base)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=1e-6)


def test_a_lone_projector_joins_its_base(tmp_path, v15):
    whole, base = LLaVA.from_pretrained(v15), write_base(tmp_path / "base")
    for file in v15.glob("pytorch_model*"):
        file.unlink()
    torch.save(original.projector_tensors("v1.5"), v15 / "mm_projector.bin")
    with pytest.raises(CheckpointError, match="mm_projector.bin.*--model-base"):
        LLaVA.from_pretrained(v15)
    assert_same(LLaVA.from_pretrained(v15, base=base).state_dict(), whole.state_dict())


def write_lora(folder: Path) -> tuple[dict, dict]:
    """Make a LoRA of a whole LLaVA's folder: its tensors, and the weights that they change."""
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    tensors, changed = {}, {}
    for name, weight in original.decoder_tensors(original.HEADS).items():
        if "_proj" in name:
            a = original.tensor(name + "A", 4, weight.shape[1])
            b = original.tensor(name + "B", weight.shape[0], 4)
            stem = f"base_model.model.{name.removesuffix('weight')}"
            tensors |= {f"{stem}lora_A.weight": a, f"{stem}lora_B.weight": b}
            changed[name.replace("model.", "language_model.", 1)] = weight + 8 / 4 * (b @ a)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"r": 4, "lora_alpha": 8, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    extra = {f"base_model.model.{k}": v for k, v in original.projector_tensors("v1.5").items()}
    torch.save(extra, folder / "non_lora_trainables.bin")
    return tensors, changed


def test_a_lora_is_merged_into_its_base(tmp_path, v15):
    whole, base = LLaVA.from_pretrained(v15).state_dict(), write_base(tmp_path / "base")
    tensors, changed = write_lora(v15)
    expected = whole | changed
    loaded = LLaVA.from_pretrained(v15, base=base).state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-6, atol=1e-6)
    tensors.popitem()
    save_file(tensors, v15 / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="lacks A, B or its base"):
        LLaVA.from_pretrained(v15, base=base)


def test_the_tower_can_be_replaced_and_must_fit(tmp_path, v15):
    other = tmp_path / "other"
    original.write_tower(other, 56)
    file = other / "pytorch_model.bin"
    torch.save({k: v + 1 for k, v in torch.load(file).items()}, file)
    plain, replaced = (LLaVA.from_pretrained(v15, vision_tower=t) for t in (None, other))
    for name, tensor in replaced.state_dict().items():
        before = plain.state_dict()[name]
        assert torch.equal(tensor, before + 1 if name.startswith("vision_tower") else before)


def test_an_absent_tower_says_how_to_get_it(tmp_path, v15, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    config = json.loads((v15 / "config.json").read_text())
    config["mm_vision_tower"] = "openai/clip-vit-large-patch14-336"
    (v15 / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="hf download openai/clip-vit-large-patch14-336"):
        LLaVA.from_pretrained(v15)
    home = tmp_path / "cache" / "models--openai--clip-vit-large-patch14-336"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    original.write_tower(home / "snapshots" / "abc", 56)
    assert LLaVA.from_pretrained(v15).config.vision.image_size == 56


# ---- LLaVA-NeXT of transformers, and converting ---------------------------------------------


def llava_next():
    grids = [[56, 28], [28, 56], [56, 56]]
    vision = transformers.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=1,
        image_size=28,
        patch_size=14,
    )
    text = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    config = transformers.LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=47,
        image_grid_pinpoints=grids,
        image_seq_length=4,
    )
    return randomised(transformers.LlavaNextForConditionalGeneration(config))


@pytest.mark.parametrize("size", [(100, 60), (40, 90), (90, 90), (300, 200), (25, 77)])
def test_llava_next_of_transformers_computes_the_same(tmp_path, size):
    theirs = llava_next()
    theirs.save_pretrained(tmp_path)
    ours = LLaVA.from_pretrained(tmp_path)
    picture = image.sawtooth(*size)
    pixels = image.to_pixels(picture, ours.config.image)
    ids = [1, 5, -200, 7, 3]
    with torch.no_grad():
        got = ours(torch.tensor([ids]), [pixels], [size])
        n = got.shape[1] - 4
        expected = theirs(
            input_ids=torch.tensor([[1, 5] + [47] * n + [7, 3]]),
            pixel_values=pixels[None],
            image_sizes=torch.tensor([size[::-1]]),
        ).logits
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


def command(*arguments, folder=None):
    return subprocess.run(
        [sys.executable, "checkpoint.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )


@pytest.mark.parametrize("kind", original.KINDS)
def test_a_converted_llava_is_the_same_and_transformers_loads_it(tmp_path, kind):
    folder, out = original.write(kind, tmp_path), tmp_path / "out"
    checkpoint.convert(folder, out)
    before, after = LLaVA.from_pretrained(folder), LLaVA.from_pretrained(out)
    assert_same(before.state_dict(), after.state_dict())
    assert before.config == replace(after.config, image=before.config.image)
    name = f"Llava{'Next' * kind.startswith('v1.6')}ForConditionalGeneration"
    _, info = getattr(transformers, name).from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_clip_and_meta_convert(tmp_path):
    vit, file = randomised(ViT(VISION)), tmp_path / "ViT.pt"
    script(openai_names(vit.state_dict()), file)
    checkpoint.convert(file, tmp_path / "clip")
    assert_same(ViT.from_pretrained(tmp_path / "clip").state_dict(), vit.state_dict())
    llama = randomised(LLaMA(TEXT))
    write_meta(llama, tmp_path / "meta", 2, 2)
    checkpoint.convert(tmp_path / "meta", tmp_path / "hf", dtype=torch.bfloat16)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        expected = llama.to(torch.bfloat16).float()(ids)
        assert (theirs(ids).logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_command_inspects_converts_and_compares(tmp_path):
    folder = original.write("v1.6", tmp_path)
    shown = command("inspect", folder)
    assert "family      llava" in shown.stdout and "anyres" in shown.stdout, shown.stderr
    done = command("convert", folder, tmp_path / "out", "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    table = command("compare", folder)
    rows = [line.split() for line in table.stdout.splitlines()[1:]]
    assert len(rows) >= 6, table.stdout + table.stderr
    assert all(float(row[-1]) < 1e-5 for row in rows), table.stdout
    assert command("convert", folder, folder).returncode == 2


def test_a_text_stop_ends_the_answer_of_v0(tmp_path):
    """v0 ends answers with "###", which is no token of its own."""
    model = LLaVA.from_pretrained(original.write("v1", tmp_path))

    class Words:
        bos_id, eos_id, vocab_size = 1, 2, original.VOCAB

        def decode(self, ids):
            return "".join("#" if i % 2 else "a" for i in ids)

    model.tokenizer, model.template = Words(), "v1"
    free = generate(model, [[1, 5, 6, 7]], [None], 40)[0]
    model.template = "llava_v0"
    cut = generate(model, [[1, 5, 6, 7]], [None], 40)[0]
    text = Words().decode(free)
    expected = text.find("###") + 2 if "###" in text else len(free)
    assert cut == free[:expected]


def test_the_first_models_frame_their_pictures(tmp_path):
    """mm_use_im_start_end: <im_start> and <im_end>, tokens of their own, around each picture."""
    folder = original.write("v1", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mm_use_im_start_end": True}))
    shutil.copy(TINY / "llama" / "tokenizer.model", folder)
    n = tokenizer.load(folder).vocab_size
    (folder / "added_tokens.json").write_text(json.dumps({"<im_start>": n, "<im_end>": n + 1}))
    checkpoint.convert(folder, tmp_path / "out")
    for path in (folder, tmp_path / "out"):
        model = LLaVA.from_pretrained(path)
        ids = data.encode_prompt("<image>\nWhat?", model.tokenizer)
        assert ids[1:4] == [n, data.IMAGE_TOKEN, n + 1]


def test_means_and_deviations_are_those_beside_the_tower(tmp_path):
    folder = original.write("v1.5", tmp_path)
    file = tmp_path / "tower" / "preprocessor_config.json"
    other = json.loads(file.read_text()) | {"image_mean": [0.5, 0.4, 0.3]}
    file.write_text(json.dumps(other))
    assert LLaVA.from_pretrained(folder).config.image.mean == (0.5, 0.4, 0.3)


def test_a_family_is_never_told_from_a_name(tmp_path):
    folder = original.write("v1.5", tmp_path)
    renamed = folder.rename(tmp_path / "llava-v1.6-mistral-lora-delta")
    assert Checkpoint(renamed).llava_config()["image"]["aspect"] == "pad"
