"""Make tests/clip.pt, a small CLIP as OpenAI saves its own, and what OpenAI's code sees through it.

pip install --no-deps openai-clip==1.0.1
python tests/record_clip.py
"""

import importlib.util
from pathlib import Path

import original
import torch

HERE = Path(__file__).parent
SIZE, PATCH, DIM, LAYERS = 28, 14, 64, 2


def openai_code():
    """clip/model.py by itself: the package would import torchvision and a tokenizer too."""
    folder = importlib.util.find_spec("clip").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("clip_model", Path(folder, "model.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main():
    code = openai_code()
    model = code.CLIP(8, SIZE, LAYERS, DIM, PATCH, 4, 16, 8, 1, 1).eval()
    for name, parameter in model.named_parameters():
        parameter.data = original.tensor(name, *parameter.shape).half().float()
    picture = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen = {}
    block = model.visual.transformer.resblocks[-2]
    block.register_forward_hook(lambda module, inputs, output: seen.update(features=output))
    last = model.visual.ln_post
    last.register_forward_hook(lambda module, inputs, output: seen.update(pooled=output))
    with torch.no_grad():
        model.encode_image(picture)
    # Whether a sequence comes first depends on the version of the package.
    features = seen["features"]
    features = features if features.shape[0] == 2 else features.permute(1, 0, 2)
    record = {"pixels": picture, "features": features.clone(), "pooled": seen["pooled"].clone()}
    config = {"image_size": SIZE, "patch_size": PATCH, "dim": DIM, "mlp_dim": 4 * DIM}
    config |= {"n_layers": LAYERS, "n_heads": 1, "norm_eps": 1e-5, "activation": "quick_gelu"}
    torch.save(record | {"config": config}, HERE / "clip-features.pt")
    for module in model.modules():
        module._forward_hooks.clear()
    code.convert_weights(model)
    text = torch.zeros(2, 4, dtype=torch.long)
    # Tracing in half precision, as in the released files; shapes are constants of the trace.
    torch.jit.save(
        torch.jit.trace(model, (picture.half(), text), check_trace=False), HERE / "clip.pt"
    )


if __name__ == "__main__":
    main()
