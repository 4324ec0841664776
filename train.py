"""Both stages of LLaVA in one flat script, from top to bottom.

    python train.py --stage 1     teach the projector: picture -> caption, all else frozen
    python train.py --stage 2     teach projector and language model to answer questions
    torchrun --nproc-per-node 8 train.py --stage 2 ...     the same under FSDP2

Without further arguments this trains the tiny model on the tiny world (tiny/), on whatever hardware
is there. Papers: LLaVA (arXiv 2304.08485, section 4.2) and LLaVA-1.5 (arXiv 2310.03744).

The loss is the mean over the supervised tokens of the whole global batch, however these are spread
over processes and micro-batches. (The original averages each micro-batch and then averages the
averages, so that a token counts more in a batch with few of them.)
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

import batches
import checkpoint
import data
import tokenizer
from image import ImageConfig
from llama import LLaMA
from llava import LLaVA, LLaVAConfig
from vit import ViT

TINY = Path(__file__).parent / "tiny"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


CHOICES = {
    "batching": batches.KINDS,
    "on_long": ("error", "cut"),
    "on_bad": ("error", "skip"),
    "image_order": ("first", "random"),
    "after_control": ("auto", "spaced", "joined", "stripped"),
}


def flag(default, text: str):
    """A field of the recipe that is a flag of the command line too."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """One training run. Every field is a flag: `--batch 64` replaces the value of the recipe."""

    model: str = flag(
        "", "LLaVA folder to start from, or a LLaMA folder (then with a new projector)"
    )
    vision_tower: str = flag("", "CLIP folder; needed with a LLaMA folder")
    projector: str = flag("mlp2x_gelu", "kind of a new projector: linear, mlp2x_gelu")
    data: str = flag("", "JSON file in the official format")
    images: str = flag("", "folder that the records' picture paths start from")
    out: str = flag("", "folder for the log, the resume state and the trained model")
    template: str = flag("v1", "conversation template: plain in stage 1")
    aspect: str = flag("pad", "crop or pad")
    train_llm: bool = flag(True, "False: the projector alone learns (stage 1)")
    epochs: float = flag(1.0, "passes over the data")
    batch: int = flag(128, "samples per optimizer step, over all processes; packed: rows")
    micro_batch: int = flag(
        0, "samples or rows per process and backward pass; 0: as many as the batch needs"
    )
    batching: str = flag("length", f"which samples go together: {', '.join(batches.KINDS)}")
    row_length: int = flag(8192, "tokens of a packed row")
    lr: float = flag(2e-5, "highest learning rate of the language model")
    projector_lr: float = flag(0.0, "of the projector; 0: the same")
    warmup: float = flag(0.03, "share of the steps in which the rate rises; then a cosine to zero")
    weight_decay: float = flag(0.0, "AdamW's")
    clip: float = flag(0.0, "largest gradient norm; 0: never clipped, as in the original")
    max_length: int = flag(2048, "most tokens in a record, those of its pictures included")
    on_long: str = flag("error", "a longer record: error, or cut its last questions and answers")
    on_bad: str = flag("error", "a bad record: error, or skip it and list it in skipped.txt")
    max_bad: int = flag(100, "training stops when more records than this were skipped")
    image_order: str = flag("first", "first; random: at either end of the question, as in v1")
    after_control: str = flag("auto", "auto, or how the text after </s> is tokenised: tokenizer.py")
    dtype: str = flag("auto", "compute type: bf16, fp32; auto: bf16 where the hardware has it")
    workers: int = flag(0, "processes that load and decode pictures")
    seed: int = flag(42, "of the new projector and of the order of the data")
    save_every: int = flag(500, "steps between two resume states")
    save_dtype: str = flag("fp16", "type of the saved model's tensors: fp16, bf16, fp32")

    def __post_init__(self):
        for name in ("batch", "epochs", "save_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be more than 0")
        if self.dtype not in ("auto", *DTYPES) or self.save_dtype not in DTYPES:
            raise ValueError(f"--dtype and --save-dtype are among {', '.join(DTYPES)}")
        for name, values in CHOICES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"--{name.replace('_', '-')} is one of {', '.join(values)}")


TINY_WORLD = Recipe(
    model=str(TINY / "weights" / "llama"),
    vision_tower=str(TINY / "weights" / "vit"),
    images=str(TINY / "data" / "images"),
    max_length=1024,
    clip=1.0,
)
RECIPES = {
    # The tiny world: two laptop cores, minutes. Measured figures are in the README.
    "tiny": {
        1: replace(
            TINY_WORLD,
            data=str(TINY / "data" / "stage1.json"),
            out="runs/stage1",
            template="plain",
            train_llm=False,
            batch=64,
            lr=2e-3,
        ),
        2: replace(
            TINY_WORLD,
            model="runs/stage1",
            vision_tower="",
            data=str(TINY / "data" / "stage2.json"),
            out="runs/stage2",
            batch=32,
            lr=1e-3,
        ),
    },
    # LLaVA-1.5 (section 3 and appendix A; 7B and 13B alike, 8 GPUs): --model, --data, --images and
    # in stage 1 --vision-tower name the Vicuna-1.5, the data and the CLIP folder.
    "llava-1.5": {
        1: Recipe(template="plain", aspect="crop", train_llm=False, batch=256, lr=1e-3),
        2: Recipe(batch=128, lr=2e-5, batching="modality", after_control="stripped"),
    },
}


def parse() -> tuple[int, bool, Recipe]:
    """The stage, whether to resume, and the recipe with the flags laid over it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", type=int, choices=(1, 2), required=True)
    parser.add_argument("--config", choices=RECIPES, default="tiny", help="recipe to start from")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    for f in fields(Recipe):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        name = f"--{f.name.replace('_', '-')}"
        parser.add_argument(name, **kind, help=f.metadata["help"])
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    stage, config, resume = (given.pop(name) for name in ("stage", "config", "resume"))
    return stage, resume, replace(RECIPES[config][stage], **given)


def build_model(recipe: Recipe) -> LLaVA:
    """A LLaVA folder as it is, or a LLaMA and a CLIP folder with a new projector between them."""
    source = checkpoint.Checkpoint(recipe.model)
    if source.part != "language_model":
        return LLaVA.from_pretrained(recipe.model, recipe.vision_tower or None, torch.float32)
    if not recipe.vision_tower:
        raise ValueError(f"{recipe.model} is a language model only: add --vision-tower DIR")
    vit = ViT.from_pretrained(recipe.vision_tower, torch.float32)
    llama = LLaMA.from_pretrained(recipe.model, torch.float32)
    size = vit.config.image_size
    config = LLaVAConfig(vit.config, llama.config, ImageConfig(size), recipe.projector)
    model = LLaVA(config)
    model.vision_tower, model.language_model = vit, llama
    model.tokenizer = tokenizer.load(source.path)
    return model


def plan(recipe: Recipe, lengths, records, epoch: int) -> list:
    """The global batches of an epoch: the same on every process, and after every restart."""
    size, seed = recipe.batch, recipe.seed
    if recipe.batching == "packed":
        return batches.packed(lengths, records.pictures, recipe.row_length, size, seed, epoch)
    if recipe.batching == "modality":
        return batches.by_modality(lengths, records.pictures, size, seed, epoch)
    return batches.by_length(lengths, size, seed, epoch)


def learning_rate(step: int, total: int, warmup: float) -> float:
    """Share of the highest rate at a step: a linear rise, then a cosine to zero."""
    rise = math.ceil(warmup * total)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def train(stage: int, resume: bool, recipe: Recipe):
    # ---- processes and devices ----
    parallel = "RANK" in os.environ  # started by torchrun
    on_gpu = torch.cuda.is_available()
    if parallel:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if parallel else (0, 1)
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu")
    main_process = rank == 0
    # ---- model: what learns is float32; the arithmetic is in the compute type ----
    torch.manual_seed(recipe.seed)
    model = build_model(recipe)
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    model.language_model.requires_grad_(recipe.train_llm)
    model.to(device).train()
    if recipe.after_control != "auto":
        model.tokenizer.after_control = recipe.after_control

    # ---- data: the same global batches, in the same order, for any number of processes ----
    if recipe.data == str(TINY / "data" / f"stage{stage}.json") and not Path(recipe.data).exists():
        if main_process:
            say("drawing the tiny world, once")
            subprocess.run([sys.executable, TINY / "make_data.py"], check=True)
        if parallel:
            dist.barrier()
    image_config = replace(model.config.image, aspect=recipe.aspect)
    samples = data.Conversations(
        recipe.data,
        recipe.images,
        model.tokenizer,
        recipe.template,
        image_config,
        recipe.max_length,
        model.config.n_visual,
        recipe.on_long,
        "skip",  # what is done about a bad record is decided in the loop
        recipe.image_order,
        recipe.seed,
    )
    packing = recipe.batching == "packed"
    lengths = samples.lengths(recipe.workers) if packing else samples.records.words
    epochs = [plan(recipe, lengths, samples.records, e) for e in range(math.ceil(recipe.epochs))]
    total = int(len(epochs[0]) * recipe.epochs)
    if total == 0:
        raise ValueError(f"--epochs {recipe.epochs} of {len(epochs[0])} batches is not one step")
    hands = [batches.deal(batch, lengths, world) for batches_of in epochs for batch in batches_of]
    order = [hand[rank] for hand in hands[:total]]

    # ---- optimizer, and FSDP2 if there are several processes ----
    if parallel:
        # The frozen tower stays whole on every process; the rest is cut into shards, the decoder
        # block by block, and gathered where it is needed.
        frozen = set(model.vision_tower.parameters())
        for block in model.language_model.layers:
            fully_shard(block)
        fully_shard(model, ignored_params=frozen)
        register_fsdp_forward_method(model, "loss")
    parts = [(model.projector, recipe.projector_lr or recipe.lr), (model.language_model, recipe.lr)]
    groups = [
        {"params": [p for p in part.parameters() if p.requires_grad], "peak": lr}
        for part, lr in parts
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, recipe.lr, (0.9, 0.999), 1e-8, recipe.weight_decay)
    trainable = [p for group in groups for p in group["params"]]

    # ---- resume: weights, optimizer, random state and place in the data ----
    out = Path(recipe.out)
    state_file, start, lost = out / "resume.pt", 0, [0, 0]  # skipped records, cut turns
    whole = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    if resume:
        state = torch.load(state_file, weights_only=True) if state_file.exists() else None
        if state is None:
            raise ValueError(f"nothing to resume: there is no {state_file}")
        if changed := [k for k, v in asdict(recipe).items() if state["recipe"][k] != v]:
            raise ValueError(f"{state_file} was written with another --{', --'.join(changed)}")
        relaxed = replace(whole, strict=False)  # frozen parts are not in the state
        dcp.set_model_state_dict(model, state["model"], options=relaxed)
        dcp.set_optimizer_state_dict(model, optimizer, state["optimizer"], options=relaxed)
        torch.set_rng_state(state["random"])
        start, lost = state["step"], state["lost"]

    def save_state(step: int):
        model_state = dcp.get_model_state_dict(model, options=whole)
        optimizer_state = dcp.get_optimizer_state_dict(model, optimizer, options=whole)
        if main_process:
            state = {"step": step, "model": model_state, "optimizer": optimizer_state}
            state["lost"] = lost
            state |= {"random": torch.get_rng_state(), "recipe": asdict(recipe)}
            torch.save(state, state_file.with_suffix(".tmp"))
            os.replace(state_file.with_suffix(".tmp"), state_file)

    # ---- the loop ----
    bf16 = torch.cuda.is_bf16_supported() if on_gpu else torch.cpu._is_avx512_bf16_supported()
    dtype = DTYPES[recipe.dtype] if recipe.dtype != "auto" else DTYPES["bf16" if bf16 else "fp32"]
    micro = recipe.micro_batch or recipe.batch
    loader = torch.utils.data.DataLoader(
        samples,
        batch_sampler=order[start:],
        num_workers=recipe.workers,
        collate_fn=lambda rows: [
            data.collate(rows[i : i + micro]) for i in range(0, len(rows), micro)
        ],
    )
    if main_process:
        out.mkdir(parents=True, exist_ok=True)
        if not resume:
            (out / "skipped.txt").unlink(missing_ok=True)
        counts = {
            name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()
        }
        hardware = f"{world} x {device.type} in {dtype}"
        say(f"stage {stage}: {total} steps of {recipe.batch} samples on {hardware}")
        say(f"parameters: {counts}; learning: {sum(p.numel() for p in trainable):,}")
        log_file = out / "log.jsonl"
        if resume and log_file.exists():  # steps after the saved state are done again
            rows = log_file.read_text().splitlines(keepends=True)
            kept = [row for row in rows if json.loads(row).get("step", -1) < start]
            log_file.with_suffix(".tmp").write_text("".join(kept))
            os.replace(log_file.with_suffix(".tmp"), log_file)
        log = open(log_file, "a" if resume else "w")
        header = {"stage": stage, "recipe": asdict(recipe), "torch": torch.__version__}
        print(
            json.dumps(header | {"processes": world, "device": str(device)}), file=log, flush=True
        )
    started = last_shown = time.time()
    for step, micro_batches in enumerate(loader, start):
        # Every process takes as many backward passes as the one with most: FSDP waits for all.
        most = math.ceil(max(map(len, hands[step])) / micro)
        micro_batches += [data.collate([]) for _ in range(most - len(micro_batches))]
        bad, cut = zip(*(batch.pop("lost", ((), 0)) for batch in micro_batches), strict=True)
        bad = [why for found in bad for why in found]
        rate = learning_rate(step, total, recipe.warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        if bad and recipe.on_bad == "error":
            raise ValueError(bad[0])
        n_learned = sum(int((b["labels"] != data.IGNORE).sum()) for b in micro_batches)
        counts = torch.tensor([n_learned, len(bad), sum(cut)], device=device)
        if parallel:
            dist.all_reduce(counts)
        n_learned, *new = counts.tolist()
        lost = [before + now for before, now in zip(lost, new, strict=True)]
        if bad:
            with open(out / "skipped.txt", "a") as file:
                file.writelines(f"{why}\n" for why in bad)
        if lost[0] > recipe.max_bad:
            raise ValueError(
                f"{lost[0]} records were skipped up to step {step}, more than --max-bad "
                f"{recipe.max_bad}; {out / 'skipped.txt'} says why"
            )
        if n_learned == 0:
            raise ValueError(f"step {step} has no token to learn from, see {out / 'skipped.txt'}")
        loss = torch.zeros((), device=device)
        for batch in micro_batches:
            batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                part = model.loss(**batch, reduction="sum") / n_learned
            (part * world).backward()  # FSDP takes the mean over the processes
            loss += part.detach()
        if parallel:
            dist.all_reduce(loss)
        norm = torch.nn.utils.get_total_norm([p.grad for p in trainable])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if not torch.isfinite(loss + norm):
            raise ValueError(
                f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}; stopped before "
                f"the update. The records are {hands[step]}; try a lower --lr"
            )
        if recipe.clip:
            torch.nn.utils.clip_grads_with_norm_(trainable, recipe.clip, norm)
        optimizer.step()
        optimizer.zero_grad()

        if main_process:
            done, seconds = step + 1 - start, time.time() - started
            per_second = done * recipe.batch / seconds
            row = {"step": step, "loss": round(loss.item(), 5), "grad_norm": round(norm.item(), 4)}
            row |= {"lr": recipe.lr * rate, "samples_per_s": round(per_second, 2)}
            row |= {"skipped": lost[0], "cut_turns": lost[1]} if any(lost) else {}
            print(json.dumps(row), file=log, flush=True)
            if time.time() - last_shown > 5 or step + 1 == total:
                last_shown = time.time()
                left = clock((total - step - 1) * seconds / done)
                say(
                    f"step {step + 1}/{total}  loss {row['loss']:.4f}  {per_second:.1f} samples/s  "
                    f"{clock(seconds)} gone, {left} left"
                )
        if (step + 1) % recipe.save_every == 0 and step + 1 < total:
            save_state(step + 1)

    # ---- the trained model, in the llava-hf layout ----
    weights = dcp.get_model_state_dict(model, options=replace(whole, ignore_frozen_params=False))
    if main_process:
        config = replace(model.config, image=image_config, template=recipe.template)
        source = checkpoint.Checkpoint(recipe.model)
        words = tokenizer.files(source.path)
        dtype = DTYPES[recipe.save_dtype]
        ids = source.config.token_ids()
        checkpoint.save(out, "llava", weights, asdict(config), words, dtype, ids)
        state_file.unlink(missing_ok=True)
        if any(lost):
            say(f"skipped {lost[0]} records (see skipped.txt) and cut {lost[1]} turns of long ones")
        say(f"saved {out}")
    if parallel:
        dist.barrier()
        dist.destroy_process_group()


def say(text: str):
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        train(*parse())
    except ValueError as error:
        sys.exit(f"train.py: {error}")
