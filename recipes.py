"""The official training runs, as named configs: what to train on what, how, and what to expect.

    python train.py --config llava-1.5-7b --stage 2 --data FILE --images DIR

A recipe is a dataclass; every field of it is a flag that overrides the config. The figures are of
the papers and the original code (LLaVA 1.2.2). All use AdamW (betas 0.9 and 0.999, eps 1e-8), no
weight decay, no clipping, a warm-up of 3 % of the steps, then a cosine to zero.

Read next: train.py.
"""

import argparse
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import batches
import kernels

TINY = Path(__file__).parent / "tiny"
DTYPES = ("bf16", "fp16", "fp32")
CHOICES = {
    "aspect": ("crop", "pad", "anyres"),
    "batching": batches.KINDS,
    "on_long": ("error", "cut"),
    "on_bad": ("error", "skip"),
    "image_order": ("first", "random"),
    "after_control": ("auto", "spaced", "joined", "stripped"),
    "dtype": ("auto", "bf16", "fp32"),
    "save_dtype": DTYPES,
    "recompute": ("none", "selective", "full"),
    "attention": kernels.BACKENDS,
}


def flag(default, text: str):
    """A field of the recipe that is a flag of the command line too."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """One training run. Every field is a flag: `--batch 64` replaces the value of the recipe."""

    # what is trained
    model: str = flag("", "LLaVA to start from, or a LLaMA (then with a new projector)")
    vision_tower: str = flag("", "CLIP to use as tower; needed with a LLaMA")
    projector: str = flag("mlp2x_gelu", "kind of a new projector: linear, mlp2x_gelu")
    train_llm: bool = flag(True, "does the language model learn? (not in stage 1)")
    tower_lr: float = flag(0.0, "highest learning rate of the tower; 0: it is frozen")
    lora_rank: int = flag(0, "learn a LoRA of this rank instead of the language model; 0: no")
    lora_alpha: float = flag(256.0, "its scale is alpha / rank")
    lora_dropout: float = flag(0.05, "share of its inputs that is dropped")
    # on what
    data: str = flag("", "JSON file in the official format")
    images: str = flag("", "folder that the records' picture paths start from")
    template: str = flag("v1", "conversation template: plain in stage 1")
    aspect: str = flag("pad", "crop, pad or anyres")
    max_length: int = flag(2048, "most tokens in a record, those of its pictures included")
    on_long: str = flag("error", "a longer record: error, or cut its last questions and answers")
    on_bad: str = flag("error", "a bad record: error, or skip it and list it in skipped.txt")
    max_bad: int = flag(100, "training stops when more records than this were skipped")
    image_order: str = flag("first", "first; random: at either end of the question, as in v1")
    after_control: str = flag("auto", "auto, or how the text after </s> is tokenised: tokenizer.py")
    # how
    epochs: float = flag(1.0, "passes over the data")
    batch: int = flag(128, "samples per optimizer step, over all processes; packed: rows")
    micro_batch: int = flag(0, "samples or rows per process and backward pass; 0: all of them")
    batching: str = flag("length", f"which samples go together: {', '.join(batches.KINDS)}")
    row_length: int = flag(8192, "tokens of a packed row")
    lr: float = flag(2e-5, "highest learning rate")
    projector_lr: float = flag(0.0, "of the projector; 0: the same")
    warmup: float = flag(0.03, "share of the steps in which the rate rises; then a cosine to zero")
    weight_decay: float = flag(0.0, "AdamW's")
    clip: float = flag(0.0, "largest gradient norm; 0: never clipped, as in the original")
    spike: float = flag(0.0, "skip a step with this many times the usual gradient norm; 0: never")
    average_batches: bool = flag(False, "mean of micro-batch means, as the original has it")
    seed: int = flag(42, "of the new projector, of dropout and of the order of the data")
    # with what
    dtype: str = flag("auto", "compute type: bf16, fp32; auto: bf16 where the hardware has it")
    recompute: str = flag("none", "what backward computes again: none, selective, full")
    attention: str = flag("auto", kernels.HELP)
    compile: bool = flag(False, "torch.compile each block")
    shard: int = flag(0, "processes that share one copy of the model (HSDP); 0: all")
    workers: int = flag(0, "processes that load and decode pictures")
    timeout: int = flag(600, "seconds that processes wait for each other before they give up")
    # what is kept
    out: str = flag("", "folder for the log, the resume states and the trained model")
    save_every: int = flag(500, "steps between two resume states")
    keep: int = flag(2, "resume states that are kept")
    save_in_background: bool = flag(True, "train on while a state is written, from a copy of it")
    save_dtype: str = flag("fp16", "type of the saved model's tensors: fp16, bf16, fp32")
    eval_data: str = flag("", "held-out JSON file, for a loss every --eval-every steps")
    eval_every: int = flag(100, "steps between two held-out losses")
    watch: str = flag("", "show the run in tensorboard or wandb too (not installed with this)")

    def __post_init__(self):
        for name in ("batch", "epochs", "save_every", "keep", "eval_every", "row_length"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be more than 0")
        for name, values in CHOICES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"--{name.replace('_', '-')} is one of {', '.join(values)}")
        if self.lora_rank and not self.train_llm:
            raise ValueError("--lora-rank wants --train-llm: a LoRA is how it learns")


CLIP_224, CLIP_336 = "openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14-336"
V1_STAGE1 = Recipe(
    model="lmsys/vicuna-7b-v1.3",
    vision_tower=CLIP_224,
    projector="linear",
    template="plain",
    aspect="crop",
    train_llm=False,
    batch=128,
    lr=2e-3,
)
V1_STAGE2 = Recipe(aspect="crop", batch=32, lr=2e-5, epochs=3, image_order="random")
V15_STAGE1 = Recipe(
    model="lmsys/vicuna-7b-v1.5",
    vision_tower=CLIP_336,
    template="plain",
    aspect="crop",
    train_llm=False,
    batch=256,
    lr=1e-3,
)
V15_STAGE2 = Recipe(batch=128, lr=2e-5, batching="modality", after_control="stripped")
V16_STAGE2 = Recipe(
    aspect="anyres", batch=128, lr=1e-5, tower_lr=2e-6, max_length=4096, batching="modality"
)


def tiny() -> dict[int, Recipe]:
    """The tiny world: two laptop cores, 2:09 and 10:20 minutes; the README has its scores."""
    common = Recipe(
        model=str(TINY / "weights" / "llama"),
        vision_tower=str(TINY / "weights" / "vit"),
        images=str(TINY / "data" / "images"),
        max_length=1024,
        clip=1.0,
    )
    stage1 = replace(
        common,
        data=str(TINY / "data" / "stage1.json"),
        out="runs/stage1",
        template="plain",
        train_llm=False,
        batch=64,
        lr=2e-3,
    )
    stage2 = replace(
        common,
        model="runs/stage1",
        vision_tower="",
        data=str(TINY / "data" / "stage2.json"),
        out="runs/stage2",
        batch=32,
        lr=1e-3,
    )
    return {1: stage1, 2: stage2}


def llava_v1_7b() -> dict[int, Recipe]:
    """LLaVA (arXiv 2304.08485) on Vicuna-7B. 8 x A100: about 4 h and 10 h (for 13B).

    Stage 1: CC-595K (LLaVA-CC3M-Pretrain-595K), stage 2: LLaVA-Instruct-158K, 3 epochs. ScienceQA
    89.84 after its own stage 2; POPE 76.3 / 72.2 / 70.1, MMBench 38.7.
    """
    return {1: V1_STAGE1, 2: V1_STAGE2}


def llava_v1_13b() -> dict[int, Recipe]:
    """LLaVA (arXiv 2304.08485) on Vicuna-13B. 8 x A100: about 4 h and 10 h.

    Data as for 7B. LLaVA-Bench (COCO) 85.1 of GPT-4's score: conversation 83.1, detail 75.3,
    reasoning 96.5; in the wild 67.3.
    """
    return {1: replace(V1_STAGE1, model="lmsys/vicuna-13b-v1.3"), 2: V1_STAGE2}


def llava_v1_scienceqa() -> dict[int, Recipe]:
    """LLaVA-13B on ScienceQA (arXiv 2304.08485, section 5.2). 8 x A100: about 4 h.

    Stage 2: llava_train_QCM-LEA.json, 12 epochs (`converters.py scienceqa` makes it). 90.92 %.
    """
    stage1 = replace(V1_STAGE1, model="lmsys/vicuna-13b-v1.3")
    return {1: stage1, 2: replace(V1_STAGE2, batch=128, epochs=12, image_order="first")}


def llava_15_7b() -> dict[int, Recipe]:
    """LLaVA-1.5 (arXiv 2310.03744) on Vicuna-7B v1.5. 8 x A100: 3.5 h and 10 h (40 GB cards).

    Stage 1: LCS-558K, stage 2: mix665k. VQAv2 78.5, GQA 62.0, VizWiz 50.0, ScienceQA 66.8, TextVQA
    58.2, POPE 85.9, MME 1510.7, MMBench 64.3.
    """
    return {1: V15_STAGE1, 2: V15_STAGE2}


def llava_15_13b() -> dict[int, Recipe]:
    """LLaVA-1.5 (arXiv 2310.03744) on Vicuna-13B v1.5. 8 x A100 (80 GB): 5.5 h and 20 h.

    Data as for 7B. VQAv2 80.0, GQA 63.3, VizWiz 53.6, ScienceQA 71.6, TextVQA 61.3, POPE 85.9,
    MME 1531.3, MMBench 67.7.
    """
    return {1: replace(V15_STAGE1, model="lmsys/vicuna-13b-v1.5"), 2: V15_STAGE2}


def llava_15_lora() -> dict[int, Recipe]:
    """LLaVA-1.5-7B with a LoRA of rank 128 in stage 2 (arXiv 2310.03744); stage 1 is the same.

    VQAv2 79.1, GQA 63.0, VizWiz 47.8, ScienceQA 68.4, TextVQA 58.2, POPE 86.4, MME 1476.9.
    """
    lora = replace(V15_STAGE2, lora_rank=128, lora_alpha=256.0, lr=2e-4, projector_lr=2e-5)
    return {1: V15_STAGE1, 2: lora}


def llava_16_vicuna_7b() -> dict[int, Recipe]:
    """LLaVA-1.6 (blog of January 2024; no paper) on Vicuna-7B v1.5. Stage 1 is LLaVA-1.5's.

    Stage 2 learns everything, the tower at 2e-6, on AnyRes pictures. The original script and the
    data (760K) were not published; rates and lengths are those of the released config and of
    LLaVA-NeXT's script. VQAv2 81.8, GQA 64.2, TextVQA 64.9, POPE 86.5, MMBench 67.4, MMMU 35.8.
    """
    return {1: V15_STAGE1, 2: V16_STAGE2}


def llava_16_vicuna_13b() -> dict[int, Recipe]:
    """LLaVA-1.6 on Vicuna-13B v1.5: see 7B. VQAv2 82.8, GQA 65.4, TextVQA 67.1, MMBench 70."""
    return {1: replace(V15_STAGE1, model="lmsys/vicuna-13b-v1.5"), 2: V16_STAGE2}


def llava_16_mistral_7b() -> dict[int, Recipe]:
    """LLaVA-1.6 on Mistral-7B-Instruct v0.2: see Vicuna-7B. VQAv2 82.2, GQA 64.8, MMBench 68.7."""
    stage1 = replace(V15_STAGE1, model="mistralai/Mistral-7B-Instruct-v0.2")
    return {1: stage1, 2: replace(V16_STAGE2, template="mistral_instruct")}


def llava_16_34b() -> dict[int, Recipe]:
    """LLaVA-1.6 on Nous-Hermes-2-Yi-34B: see Vicuna-7B. About a day on 32 A100 (the blog).

    VQAv2 83.7, GQA 67.1, TextVQA 69.5, POPE 87.7, MMBench 79.3, MMMU 51.1.
    """
    stage1 = replace(V15_STAGE1, model="NousResearch/Nous-Hermes-2-Yi-34B")
    return {1: stage1, 2: replace(V16_STAGE2, template="chatml_direct", recompute="full")}


RECIPES = {
    "tiny": tiny,
    "llava-v1-7b": llava_v1_7b,
    "llava-v1-13b": llava_v1_13b,
    "llava-v1-scienceqa": llava_v1_scienceqa,
    "llava-1.5-7b": llava_15_7b,
    "llava-1.5-13b": llava_15_13b,
    "llava-1.5-lora": llava_15_lora,
    "llava-1.6-vicuna-7b": llava_16_vicuna_7b,
    "llava-1.6-vicuna-13b": llava_16_vicuna_13b,
    "llava-1.6-mistral-7b": llava_16_mistral_7b,
    "llava-1.6-34b": llava_16_34b,
}


def add_flags(parser: argparse.ArgumentParser):
    """One flag for every field of a recipe, and --config for what they override."""
    configs = ", ".join(RECIPES)
    parser.add_argument("--config", choices=RECIPES, default="tiny", metavar="NAME", help=configs)
    for f in fields(Recipe):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        name = f"--{f.name.replace('_', '-')}"
        parser.add_argument(name, default=None, **kind, help=f.metadata["help"])


def recipe_of(args: argparse.Namespace, stage: int) -> Recipe:
    """The named config with the given flags laid over it."""
    given = {f.name: getattr(args, f.name) for f in fields(Recipe)}
    given = {name: value for name, value in given.items() if value is not None}
    return replace(RECIPES[args.config]()[stage], **given)


def main():
    """Print the configs and what each changes."""
    plain = Recipe()
    for name, make in RECIPES.items():
        print(f"{name}: {make.__doc__.strip()}")
        for stage, recipe in make().items():
            changed = [
                f"{f.name} {getattr(recipe, f.name)}"
                for f in fields(Recipe)
                if getattr(recipe, f.name) != getattr(plain, f.name)
                and f.name not in ("data", "images", "out")
            ]
            print(f"    stage {stage}: {', '.join(changed)}")
        print()


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    main()
