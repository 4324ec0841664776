"""Record what the original LLaVA code does, as tests/llava.json and tests/llava.npz.

It wants an environment of its own (it imports under transformers 4.37.2 only):

    python -m venv llava && . llava/bin/activate
    pip install torch==2.13.0 numpy==1.26.4 pillow==13.0.0 transformers==4.37.2 \\
        sentencepiece==0.2.3 protobuf==4.25.9 accelerate==0.27.2 einops timm==0.9.16
    pip install --no-deps llava-torch==1.2.2.post1
    python tests/record_llava.py TOKENIZER      (mistral_common/data/tokenizer.model.v1)

tests/test_original.py then holds our loader, pixels, merging, prompts and greedy answers to it.
"""

import argparse
import copy
import json
import tempfile
import zlib
from pathlib import Path

import numpy as np
import original
import torch
from llava.conversation import conv_templates
from llava.mm_utils import process_images, select_best_resolution, tokenizer_image_token
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from llava.train import train
from PIL import Image
from transformers import AddedToken, CLIPImageProcessor, LlamaTokenizer

SIZES = [(80, 60), (56, 56), (41, 97), (150, 50), (30, 20), (200, 170)]
# Pictures are numbers of SIZES; -200 stands where they go.
ROWS = [
    ([1, 17, 200, -200, 5, 99, 31], [0]),
    ([1, -200, 250, 13, 7, 7], [1]),
    ([1, 40, 41, -200], [2]),
    ([1, -200, 60, -200, 61, 62], [3, 4]),
    ([1, 3, 4, 5, 6, 7, 8], []),
    ([1, 77, -200, 78, 79], [5]),
]
SAWTOOTH = [(640, 427), (300, 500), (256, 256), (336, 336), (1024, 899), (1000, 100), (97, 1)]
SAWTOOTH += [(35, 700), (671, 673), (1345, 333)]
TALKS = [
    ["<image>\nWhat is shown in this image?", None],
    ["What is it?\n<image>", None],
    ["<image>\nWhat is it?", "A cat.", "What colour is it?", None],
    ["Left <image> or right <image>?", "Left.", "And <image>", "Neither.", "Why? Éé 🐶", None],
    ["No picture at all.", None],
    ["<image><image>\nTwo of them.", " Yes\nindeed ", "  spaces  ", None],
]
# Records for training: the turns, human first unless there is an odd number of them.
RECORDS = [
    ["<image>\nWhat is it?", "A cat."],
    ["<image>\nWhat is it?", "A cat.", "What colour is it?", "It is black."],
    ["What is it?\n<image>", "A cat.", "Why?\nSay it.", "Because\n\nit is.", "Sure?", "Yes, sure."],
    ["Who are you?", "A model.", "Whose?", "Nobody's."],
    ["Skipped.", "  What?  ", "Nothing at all "],
    ["<image>", "ok", "And in Chinese?", "中文", "Again?", "É 🐶!"],
    ["Just say it.", " ok"],
    ["<image>\nWhat does the sign say?", "USER: stop ASSISTANT: go"],
    ["What is <unk>?", "A token."],
    ["Say nothing.", "", "And now?", "Something."],
    ["What ends a text?", "An end-of-sequence such as </s> does.", "Thanks.", "Welcome."],
]
TRAINED = "v0 v1 llava_v1 llava_v0 llama_2 llava_llama_2 mistral_instruct chatml_direct".split()
NAMES = "v0 v1 llava_v0 llava_v1 llama_2 llava_llama_2 mistral_instruct chatml_direct".split()


def sawtooth(width, height):
    y, x = np.mgrid[:height, :width]
    waves = np.stack([7 * x + 3 * y, 2 * x + 5 * y, x + 11 * y], axis=-1) % 256
    return Image.fromarray(waves.astype(np.uint8))


def load(kind: str, folder: Path):
    mistral = kind.endswith("mistral")
    config = (LlavaMistralConfig if mistral else LlavaConfig).from_pretrained(folder)
    make = LlavaMistralForCausalLM if mistral else LlavaLlamaForCausalLM
    model = make.from_pretrained(folder, config=config, torch_dtype=torch.float32)
    if not model.get_vision_tower().is_loaded:
        model.get_vision_tower().load_model()
    return model.eval()


@torch.inference_mode()
def record_model(kind: str, folder: Path) -> tuple[list[dict], dict]:
    model = load(kind, original.write(kind, folder))
    processor = model.get_vision_tower().image_processor
    rows, arrays = [], {}
    for i, (ids, numbers) in enumerate(ROWS):
        pictures = [sawtooth(*SIZES[n]) for n in numbers]
        pixels = process_images(pictures, processor, model.config) if pictures else None
        sizes = [picture.size for picture in pictures] or None
        inputs = torch.tensor([ids])
        args = dict(images=pixels, image_sizes=sizes)
        if pictures:
            prepared = model.prepare_inputs_labels_for_multimodal(
                inputs, None, None, None, None, pixels, sizes
            )
            logits = model(inputs_embeds=prepared[4]).logits[0]
        else:
            logits = model(inputs).logits[0]
        tokens = model.generate(inputs, do_sample=False, max_new_tokens=12, **args)[0].tolist()
        arrays[f"{kind}-{i}"] = logits[:, ::10].float().numpy()
        tokens = tokens[1:]  # <s> stands for the embeddings of the prompt
        rows.append({"ids": ids, "sizes": sizes or [], "length": len(logits), "tokens": tokens})
    return rows, arrays


# A batch to learn from: ids (0 is padding), pictures, and which ids are learned.
LEARN = {
    "ids": [
        [1, 17, 200, -200, 5, 99, 31, 2, 40, 41, 42, 2],
        [1, -200, 250, 13, 7, 7, 2, 0, 0, 0, 0, 0],
        [1, 3, 4, 5, 6, 7, 8, 9, 2, 0, 0, 0],
    ],
    "labels": [
        [-100, -100, -100, -100, -100, 99, 31, 2, -100, -100, 42, 2],
        [-100, -100, -100, -100, 7, 7, 2, -100, -100, -100, -100, -100],
        [-100, -100, -100, -100, -100, -100, 8, 9, 2, -100, -100, -100],
    ],
    "sizes": [(80, 60), (56, 56)],
}


def record_step(folder: Path) -> tuple[float, dict]:
    """The loss of one batch, and every tenth number of each gradient."""
    model = load("v1.5", original.write("v1.5", folder / "learn")).train()
    model.get_vision_tower().requires_grad_(False)
    processor = model.get_vision_tower().image_processor
    pictures = [sawtooth(*size) for size in LEARN["sizes"]]
    pixels = process_images(pictures, processor, model.config)
    pixels = torch.cat([pixels, torch.zeros_like(pixels[:1])])  # each row takes one, as in training
    ids, labels = torch.tensor(LEARN["ids"]), torch.tensor(LEARN["labels"])
    loss = model(ids, labels=labels, images=pixels, attention_mask=ids.ne(0)).loss
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), {f"grad-{n}": g.flatten()[::10].numpy() for n, g in grads.items()}


def record_pixels() -> list[dict]:
    class Config:
        image_grid_pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

    processor, found = CLIPImageProcessor.from_dict({"size": {"shortest_edge": 336}}), []
    processor = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336)
    for size in SAWTOOTH:
        for aspect in ("crop", "pad", "anyres"):
            if aspect == "crop" and max(size) > 10 * min(size):
                continue
            Config.image_aspect_ratio = aspect
            (pixels,) = process_images([sawtooth(*size)], processor, Config)
            pixels = pixels if pixels.ndim == 4 else pixels[None]
            row = {"size": size, "aspect": aspect, "shape": list(pixels.shape)}
            found.append(row | {"crc32": zlib.crc32(pixels.numpy().tobytes())})
    return found


def record_grids() -> list[list[int]]:
    """Sizes and the grid chosen, among them many near the ties."""
    grids = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    random = np.random.RandomState(0)
    sizes = random.randint(1, 1500, (400, 2)).tolist()
    sizes += [[w, h] for w in range(330, 343) for h in range(330, 343)]
    return [[*size, *select_best_resolution(size, grids)] for size in sizes]


def load_tokenizer(file: str, legacy: bool, added=()):
    tokenizer = LlamaTokenizer(file, legacy=legacy)
    tokenizer.pad_token = tokenizer.unk_token
    marks = [AddedToken(token, special=True, normalized=False) for token in added]
    tokenizer.add_tokens(marks, special_tokens=True)
    return tokenizer


CHATML, FRAME = ("<|im_start|>", "<|im_end|>"), ("<im_start>", "<im_end>")


def record_prompts(tokenizer_file: str) -> list[dict]:
    """Every template under both kinds of tokenizer; the oldest also with framed pictures."""
    cases = [(name, legacy, False) for name in NAMES for legacy in (True, False)]
    cases += [(name, legacy, True) for name in ("v0", "llava_v0", "v1") for legacy in (True, False)]
    found = []
    for name, legacy, frame in cases:
        added = FRAME if frame else CHATML if name == "chatml_direct" else ()
        tokenizer = load_tokenizer(tokenizer_file, legacy, added)
        for talk in TALKS:
            conversation = conv_templates[name].copy()
            for i, text in enumerate(talk):
                if frame and text:
                    text = text.replace("<image>", "<image>".join(FRAME))
                conversation.append_message(conversation.roles[i % 2], text)
            prompt = conversation.get_prompt()
            ids = tokenizer_image_token(prompt, tokenizer)
            row = {"template": name, "legacy": legacy, "frame": frame, "turns": talk[:-1]}
            found.append(row | {"prompt": prompt, "ids": ids})
    return found


def record_training(tokenizer_file: str) -> list[dict]:
    """Ids and labels of the original's own preprocessing; labels all -100 where it gives up."""
    found = []
    for name in (*TRAINED, "plain"):
        train.conversation_lib.default_conversation = conv_templates[name]
        for legacy in (True, False):
            added = CHATML if name == "chatml_direct" else ()
            tokenizer = load_tokenizer(tokenizer_file, legacy, added)
            for texts in RECORDS:
                speakers = ("human", "gpt") if len(texts) % 2 == 0 else ("gpt", "human")
                turns = [{"from": speakers[i % 2], "value": t} for i, t in enumerate(texts)]
                if name == "plain":
                    turns = turns[:2]
                has_image = any("<image>" in text for text in texts)
                if name == "plain" and not has_image:
                    continue
                args = argparse.Namespace(is_multimodal=True, mm_use_im_start_end=False)
                sources = [copy.deepcopy(turns)]
                if has_image:
                    sources = train.preprocess_multimodal(sources, args)
                made = train.preprocess(sources, tokenizer, has_image)
                ids, labels = (list(map(int, made[key][0])) for key in ("input_ids", "labels"))
                row = {"template": name, "legacy": legacy, "conversations": turns}
                found.append(row | {"ids": ids, "labels": labels})
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tokenizer", help="a sentencepiece model of 32,000 pieces")
    args = parser.parse_args()
    torch.set_num_threads(1)
    here, models, arrays = Path(__file__).parent, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in original.KINDS:
            models[kind], logits = record_model(kind, Path(folder))
            arrays |= logits
        loss, gradients = record_step(Path(folder))
        arrays |= gradients
    record = {
        "models": models,
        "step": LEARN | {"loss": loss},
        "pixels": record_pixels(),
        "grids": record_grids(),
        "prompts": record_prompts(args.tokenizer),
        "training": record_training(args.tokenizer),
    }
    (here / "llava.json").write_text(json.dumps(record, ensure_ascii=False) + "\n")
    np.savez_compressed(here / "llava.npz", **arrays)


if __name__ == "__main__":
    main()
