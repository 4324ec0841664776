"""Where do two implementations part? Ours and transformers', layer by layer, on one input.

    python checkpoint.py compare DIR         one row per layer: largest value, largest difference

The same weights run in float32 through both; every row compares what has left that layer. The
first row whose difference is more than rounding names the culprit. Layouts that transformers does
not read are converted into a temporary folder first. Needs transformers (requirements-test.txt).
"""

import argparse
import re
import sys
import tempfile

import torch

import checkpoint
import image
from data import IMAGE_TOKEN
from llama import LLaMA
from llava import LLaVA
from vit import ViT

# Ours, and what transformers 4 and 5 call the same module; both in the order in which they run.
MODULES = (
    (r"(vision_tower\.|^)layers\.(\d+)", r"(.*\.|^)encoder\.layers\.(\d+)", "vision layer"),
    (r"projector", r"(.*\.)?multi_modal_projector", "projector"),
    (r"(language_model\.|^)layers\.(\d+)", r"(?!.*(vision|encoder)).*\.layers\.(\d+)", "layer"),
    (r"(language_model\.|^)norm", r"(?!.*vision).*\bnorm", "norm"),
)


def record(model, side: int, only: str) -> dict[str, torch.Tensor]:
    """Hooks that fill a dictionary {row: output} when the model runs."""
    outputs: dict[str, torch.Tensor] = {}

    def hook(row):
        def keep(module, inputs, output):
            outputs[row] = (output[0] if isinstance(output, tuple) else output).detach()

        return keep

    for name, module in model.named_modules():
        for rule in MODULES:
            if rule[2] in only and (match := re.fullmatch(rule[side], name)):
                number = match[match.lastindex] if match.lastindex else None
                numbered = number is not None and number.isdigit()
                module.register_forward_hook(hook(f"{rule[2]} {number}" if numbered else rule[2]))
    return outputs


@torch.no_grad()
def run_llava(folder: str):
    import transformers

    ours = LLaVA.from_pretrained(folder, dtype=torch.float32)
    anyres = ours.config.image.aspect == "anyres"
    kind = "LlavaNextForConditionalGeneration" if anyres else "LlavaForConditionalGeneration"
    theirs = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
    rows = ("vision layer", "projector", "layer", "norm")
    mine, others = record(ours, 0, rows), record(theirs, 1, rows)
    size = ours.config.image.image_size
    picture = image.sawtooth(2 * size - 7, size + 9)  # no two grids fit it equally well
    pixels = image.to_pixels(picture, ours.config.image)
    ids = [1, 5, 9, IMAGE_TOKEN, 7, 3, 8, 2]
    mine["logits"] = ours(torch.tensor([ids]), [pixels], [picture.size])
    n = mine["logits"].shape[1] - len(ids) + 1
    token = theirs.config.image_token_index
    theirs_ids = torch.tensor([[j for i in ids for j in ([token] * n if i < 0 else [i])]])
    inputs = {"pixel_values": pixels}
    if anyres:
        inputs = {"pixel_values": pixels[None], "image_sizes": torch.tensor([picture.size[::-1]])}
    others["logits"] = theirs(input_ids=theirs_ids, **inputs).logits
    return mine, others


@torch.no_grad()
def run_llama(folder: str):
    import transformers

    ours = LLaMA.from_pretrained(folder, torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    mine, others = (record(m, i, ("layer", "norm")) for i, m in enumerate((ours, theirs)))
    ids = torch.tensor([[1, 5, 9, 7, 3, 8, 2]])
    mine["logits"], others["logits"] = ours(ids), theirs(ids).logits
    return mine, others


@torch.no_grad()
def run_vit(folder: str):
    import transformers

    ours = ViT.from_pretrained(folder, torch.float32)
    theirs = transformers.CLIPVisionModel.from_pretrained(folder, dtype=torch.float32).eval()
    mine, others = (record(m, i, ("vision layer",)) for i, m in enumerate((ours, theirs)))
    size = ours.config.image_size
    pixels = image.to_pixels(image.sawtooth(640, 427), image.ImageConfig(size))
    mine["pooled"], others["pooled"] = ours.pool(pixels), theirs(pixels).pooler_output
    return mine, others


def compare(path, base=None, vision_tower=None):
    """Print the table. Raises ValueError if transformers is not installed."""
    try:
        import transformers
    except ImportError:
        raise ValueError("compare needs transformers: see requirements-test.txt") from None
    transformers.utils.logging.set_verbosity_error()
    source = checkpoint.Checkpoint(path, base, vision_tower)
    if source.weight_bits:
        raise ValueError(f"{path} holds rounded weights, which transformers cannot read")
    with tempfile.TemporaryDirectory() as folder:
        direct = source.family in ("clip", "llama", "llava-hf") and not vision_tower
        if not direct:
            print(f"converting into {folder}", file=sys.stderr)
            checkpoint.convert(path, folder, base, vision_tower)
        run = {"vision_tower": run_vit, "language_model": run_llama}.get(source.part, run_llava)
        mine, others = run(str(source.path) if direct else folder)
    print(f"{'':16}{'largest':>10}{'difference':>12}{'relative':>10}")
    for row, value in mine.items():
        if row in others:  # the vision layer that LLaVA does not need runs only there
            largest = others[row].abs().max().item()
            difference = (value.reshape(-1) - others[row].reshape(-1)).abs().max().item()
            print(f"{row:16}{largest:10.4g}{difference:12.2e}{difference / largest:10.2e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", help="checkpoint; see checkpoint.py compare --help")
    folder = parser.parse_args().folder
    if folder is None:
        print("python compare.py DIR   the same as: python checkpoint.py compare DIR")
        return
    try:
        compare(folder)
    except ValueError as error:
        parser.exit(2, f"compare.py: {error}\n")


if __name__ == "__main__":
    main()
