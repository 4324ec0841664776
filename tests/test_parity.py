"""Ours beside transformers' with the same random weights, in float32, on the CPU.

    pytest tests/test_parity.py        (half a minute, 3 GB of memory for the two full-size towers)

Each model is made by transformers, saved by it and read back by our own loader, so a test covers
the names and the config keys as well as the arithmetic. Weights are drawn large enough (`excite`)
that every norm, bias and attention pattern moves the result; with transformers' own small initial
weights attention is nearly uniform, and a wrong mask or angle would hide below the tolerance.
"""

import tempfile

import pytest
import torch

from data import IGNORE, IMAGE_TOKEN
from llama import LLaMA
from llava import LLaVA
from vit import ViT

transformers = pytest.importorskip("transformers", reason="the reference: pip install transformers")

# With the same kernels on both sides the results are the same to the bit (torch 2.13), gradients to
# 3e-7. Where a version of either side sums in another order, each sum of some 100 float32 terms
# rounds by about 1e-7 of its size, and a few layers stay below this share of the largest result.
RELATIVE = 1e-5


def assert_equal(ours, reference, relative=RELATIVE):
    assert ours.shape == reference.shape
    error, scale = (ours - reference).abs().max(), reference.abs().max()
    assert error <= relative * scale, f"differs by {error:.1e}, the largest value is {scale:.1f}"


def excite(model):
    """Draw weights as lively as trained ones: layers keep their input's size, norms stay near 1."""
    torch.manual_seed(0)
    for name, weight in model.state_dict().items():
        if weight.ndim == 1:
            weight.normal_(float("norm" in name and name.endswith("weight")), 0.2)
        elif name.endswith(("position_embedding.weight", "embed_tokens.weight")):
            weight.normal_()
        else:
            weight.normal_(std=weight[0].numel() ** -0.5)
    return model.eval()


def clip(**changes):
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4)
    sizes |= dict(image_size=56, patch_size=14) | changes
    return transformers.CLIPVisionConfig(**sizes)


def decoder(config=transformers.LlamaConfig, **changes):
    sizes = dict(vocab_size=99, hidden_size=64, intermediate_size=160, num_hidden_layers=3)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128)
    return config(**sizes | changes)


@pytest.fixture
def tower(tmp_path):
    """A small CLIP tower: the reference, ours, and two pictures."""
    reference = excite(transformers.CLIPVisionModel(clip()))
    reference.save_pretrained(tmp_path)
    return reference, ViT.from_pretrained(tmp_path).eval(), torch.randn(2, 3, 56, 56)


@pytest.mark.parametrize("layer", [-1, -2, 0])
@torch.no_grad()
def test_vit_hidden_states_equal_the_reference_with_and_without_the_class_token(tower, layer):
    reference, ours, pixels = tower
    expected = reference(pixels, output_hidden_states=True).hidden_states[layer]
    assert_equal(ours(pixels, layer, keep_class=True), expected)
    assert_equal(ours(pixels, layer), expected[:, 1:])


@torch.no_grad()
def test_vit_pooled_vector_equals_the_reference(tower):
    reference, ours, pixels = tower
    assert_equal(ours.pool(pixels), reference(pixels).pooler_output)


@pytest.mark.parametrize("change", [{"hidden_act": "gelu"}, {"layer_norm_eps": 0.1}], ids=str)
@torch.no_grad()
def test_vit_options_of_the_config_are_obeyed(change, tmp_path):
    reference = excite(transformers.CLIPVisionModel(clip(**change)))
    reference.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 56, 56)
    expected = reference(pixels).last_hidden_state
    assert_equal(ViT.from_pretrained(tmp_path)(pixels, -1, keep_class=True), expected)


@pytest.mark.parametrize("image_size", [224, 336])
@torch.no_grad()
def test_full_size_tower_equals_the_reference_at_the_layer_that_llava_uses(image_size):
    official = clip(
        image_size=image_size,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
    )
    pixels = torch.randn(1, 3, image_size, image_size)
    with tempfile.TemporaryDirectory() as folder:  # 1.2 GB, removed at once
        reference = excite(transformers.CLIPVisionModel(official))
        reference.save_pretrained(folder)
        expected = reference(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        del reference
        features = ViT.from_pretrained(folder)(pixels)
    assert features.shape == (1, (image_size // 14) ** 2, 1024)
    assert 0.5 < expected.std() < 10  # sane activations, else the tolerance would mean nothing
    # Measured 0: the same kernels in the same order. Another order of summing 1024 to 4096 terms in
    # 23 blocks may cost 1e-5 to 5e-5 on values up to 27.
    assert (features - expected).abs().max() < 1e-4


DECODERS = {
    "LLaMA-2, multi-head": decoder(),
    "grouped queries, tied head": decoder(num_key_value_heads=2, tie_word_embeddings=True),
    "one key-value head": decoder(num_key_value_heads=1),
    "multi-head, tied head": decoder(tie_word_embeddings=True),
    "theta of LLaMA-3": decoder(num_key_value_heads=2, rope_theta=500_000.0),
    "theta so small that no angle is": decoder(rope_theta=3.0),
    "norm eps 1e-6": decoder(rms_norm_eps=1e-6),
    "norm eps so large that it shows": decoder(rms_norm_eps=0.1),
    "heads wider than dim / heads": decoder(head_dim=24, num_key_value_heads=2),
    "Mistral": decoder(transformers.MistralConfig, num_key_value_heads=2, sliding_window=None),
}


@pytest.mark.parametrize("config", DECODERS.values(), ids=DECODERS.keys())
@torch.no_grad()
def test_decoder_logits_equal_the_reference(config, tmp_path):
    reference = excite(transformers.AutoModelForCausalLM.from_config(config))
    reference.save_pretrained(tmp_path)
    ids = torch.randint(99, (2, 100))
    assert_equal(LLaMA.from_pretrained(tmp_path).eval()(ids), reference(ids).logits)


def llava_pair(folder, **changes):
    """A small LLaVA, the reference and ours; in the reference id 99 stands for one feature."""
    config = transformers.LlavaConfig(
        vision_config=clip(),
        text_config=decoder(vocab_size=100, num_key_value_heads=2),
        image_token_index=99,
        **changes,
    )
    reference = excite(transformers.LlavaForConditionalGeneration(config))
    reference.save_pretrained(folder)
    return reference, LLaVA.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return llava_pair(tmp_path_factory.mktemp("llava"))


def expand(rows, pad_id=0):
    """Rows for the reference: the id 99 sixteen times for each picture, padded on the right."""
    rows = [[j for i in row for j in ([99] * 16 if i == IMAGE_TOKEN else [i])] for row in rows]
    length = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return ids, mask


PICTURE = IMAGE_TOKEN
ROWS = {
    "one picture": [[1, 5, 9, PICTURE, 7, 3, 8, 2]],
    "two pictures in one row": [[1, PICTURE, 5, 9, PICTURE, 7]],
    "two adjacent pictures, nothing else": [[PICTURE, PICTURE]],
    "text only": [[1, 5, 9, 7, 3, 8, 2]],
    "mixed batch": [[1, PICTURE, 5, PICTURE, 9], [1, 7, 7, 3, 2], [1, 4, 4, 4, PICTURE, 6]],
}


def inputs(rows):
    """Right-padded ids and mask for ours, and as many random pictures as the rows ask for."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    torch.manual_seed(1)
    n_pictures = sum(row.count(PICTURE) for row in rows)
    return ids, [torch.randn(1, 3, 56, 56) for _ in range(n_pictures)], mask


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@torch.no_grad()
def test_llava_logits_equal_the_reference(rows, llava):
    reference, ours = llava
    ids, pictures, mask = inputs(rows)
    expected_ids, expected_mask = expand(rows)
    expected = reference(
        input_ids=expected_ids,
        pixel_values=torch.cat(pictures) if pictures else None,
        attention_mask=expected_mask,
    ).logits
    logits = ours(ids, pictures, attention_mask=mask)
    assert logits.shape == expected.shape
    real = expected_mask.bool()  # what stands at padding is nobody's business
    assert_equal(logits[real], expected[real])


def test_llava_loss_and_gradients_equal_the_reference(llava):
    reference, ours = llava
    rows = ROWS["mixed batch"]
    ids, pictures, mask = inputs(rows)
    labels = ids.masked_fill((ids == PICTURE) | (mask == 0), IGNORE)
    expected_ids, expected_mask = expand(rows)
    expected_labels = expected_ids.masked_fill((expected_ids == 99) | (expected_mask == 0), IGNORE)
    expected = reference(
        input_ids=expected_ids,
        pixel_values=torch.cat(pictures),
        attention_mask=expected_mask,
        labels=expected_labels,
    ).loss
    loss = ours.loss(ids, pictures, labels=labels, attention_mask=mask)
    assert_equal(loss, expected)
    loss.backward()
    expected.backward()
    linear = reference.model.multi_modal_projector.linear_1.weight
    conv = reference.model.vision_tower.embeddings.patch_embedding.weight
    assert_equal(ours.projector[0].weight.grad, linear.grad)
    assert_equal(ours.vision_tower.embeddings.patch_embedding.weight.grad, conv.grad)


@pytest.mark.parametrize(
    ("layer", "strategy", "n"), [(-1, "default", 16), (-2, "full", 17), (1, "full", 17)]
)
@torch.no_grad()
def test_llava_takes_the_features_that_its_config_names(layer, strategy, n, tmp_path):
    reference, ours = llava_pair(
        tmp_path, vision_feature_layer=layer, vision_feature_select_strategy=strategy
    )
    ids, pictures, _ = inputs([[1, PICTURE, 7]])
    expected_ids = torch.tensor([[1] + [99] * n + [7]])
    expected = reference(input_ids=expected_ids, pixel_values=torch.cat(pictures))
    assert_equal(ours(ids, pictures), expected.logits)
