"""Values that were published for the real weights, wherever the real weights are on disk.

Run: LLAVA_WEIGHTS=/weights pytest tests/test_published.py     (needs up to 70 GB of memory)

LLAVA_WEIGHTS holds the checkpoints by their Hugging Face ids (/weights/meta-llama/Llama-2-7b-hf);
whatever is absent is skipped. Sources: transformers' tests/models/llama and tests/models/mistral,
and its convert_llava_next_weights_to_hf.py, whose values were asserted on the original weights.
"""

import os
from pathlib import Path

import pytest
import torch

from llama import LLaMA
from llava import LLaVA

FOLDER = os.environ.get("LLAVA_WEIGHTS")
IDS = torch.tensor([[1, 306, 4658, 278, 6593, 310, 2834, 338]])


def weights(name: str) -> Path:
    if not FOLDER:
        pytest.skip("LLAVA_WEIGHTS is not set: the real weights are not here")
    if not Path(FOLDER, name).is_dir():
        pytest.skip(f"{FOLDER} has no {name}")
    return Path(FOLDER, name)


# id, compute type, mean over the vocabulary at each position, first logits of the first position
DECODERS = {
    "llama-2 fp16": (
        "meta-llama/Llama-2-7b-hf",
        torch.float16,
        [-6.6544, -4.1259, -4.9840, -3.2456, 0.8261, -3.0124, 1.2971, -3.3641],
        [-12.8281, -7.4609, -0.4668, -8.0703, -7.2539, -8.0078, -6.4961, -7.7734, -7.8516],
    ),
    "llama-2 bf16": (
        "meta-llama/Llama-2-7b-hf",
        torch.bfloat16,
        [-6.5208, -4.1218, -4.9377, -3.2536, 0.8127, -2.9811, 1.2918, -3.3848],
        [-12.5625, -7.1250, -0.6289, -7.8750, -6.9688, -7.8125, -6.5000, -7.4375, -7.6562],
    ),
    "llama-2 13b": (
        "meta-llama/Llama-2-13b-hf",
        torch.float16,
        [-2.0622, -1.2794, -1.1638, -0.9788, -1.4603, -1.0238, -1.7893, -1.4411],
        [-8.1406, -8.0547, 2.7461, -1.2344, -0.1448, -1.8262, -1.0020, -1.8154, -1.6895],
    ),
    "mistral fp32": (
        "mistralai/Mistral-7B-v0.1",
        torch.float32,
        [-2.5548, -2.5737, -3.0600, -2.5906, -2.8478, -2.8118, -2.9325, -2.7694],
        [-5.8781, -5.8616, -0.1052, -4.7200, -5.8781, -5.8774, -5.8773, -5.8777, -5.8781],
    ),
}


@pytest.mark.parametrize("row", DECODERS.values(), ids=DECODERS)
@torch.no_grad()
def test_a_decoder_gives_its_published_logits(row):
    name, dtype, means, first = row
    logits = LLaMA.from_pretrained(weights(name), dtype)(IDS)[0].float()
    # Half precision differs from GPU to GPU by as much; published tolerances are 1e-2.
    atol = 1e-2 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(logits.mean(-1), torch.tensor(means), rtol=1e-2, atol=atol)
    torch.testing.assert_close(logits[0, :9], torch.tensor(first), rtol=1e-2, atol=atol)


# The first three words of the prompt stand before the picture, so no picture is needed.
LLAVA_16 = {
    "liuhaotian/llava-v1.6-mistral-7b": (
        [1, 733, 16289],
        [[-4.8555, -4.6992, -0.1996], [-10.5703, -10.7344, -2.7246], [-7.0391, -7.3672, -0.2634]],
    ),
    "liuhaotian/llava-v1.6-vicuna-7b": (
        [1, 319, 13563],
        [[1.4883, 0.9976, -0.6992], [-9.7031, -5.7031, -1.5557], [-5.1328, -5.5586, 8.8281]],
    ),
    "liuhaotian/llava-v1.6-vicuna-13b": (
        [1, 319, 13563],
        [[-0.9614, 7.3125, 0.2106], [-7.2695, -8.5469, 3.6211], [-6.3750, -8.1875, 5.4688]],
    ),
}


@pytest.mark.parametrize("name", LLAVA_16)
@torch.no_grad()
def test_llava_16_gives_its_published_logits(name):
    ids, expected = LLAVA_16[name]
    model = LLaVA.from_pretrained(weights(name), dtype=torch.float16)
    logits = model(torch.tensor([ids]))[0, :, :3].float()
    torch.testing.assert_close(logits, torch.tensor(expected), rtol=1e-2, atol=0.05)
