"""Both stages of LLaVA in one flat script, from top to bottom.

    python train.py --stage 1     teach the projector: picture -> caption, all else frozen
    python train.py --stage 2     teach projector and language model to answer questions
    torchrun --nproc-per-node 8 train.py --config llava-1.5-7b --stage 2 --data FILE --images DIR

Without further arguments this trains the tiny model on the tiny world (tiny/), on whatever hardware
is there. recipes.py has the official runs. Papers: LLaVA (arXiv 2304.08485, section 4.2) and
LLaVA-1.5 (arXiv 2310.03744).

The loss is the mean over the supervised tokens of the whole global batch, however these are spread
over processes and micro-batches. (The original averages each micro-batch and then averages the
averages, so that a token counts more in a batch with few of them: `--average-batches`.)

A run can be stopped at any moment: Ctrl-C and SIGTERM save before they end it, and what a kill
leaves behind is the last saved state, whole. `--resume` goes on from there, on any number of
processes, with exactly the batches that would have come.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.rendezvous import rendezvous

import assemble
import batches
import checkpoint
import data
import kernels
import lora
import plan
import plot
import states
import tokenizer
from configs import DTYPES, hf_config
from layouts import stored_name
from recipes import RECIPES, TINY, Recipe, add_flags, recipe_of


def order_of(recipe: Recipe, lengths, pictures, epoch: int) -> list:
    """The global batches of an epoch: the same on every process, and after every restart."""
    size, seed = recipe.batch, recipe.seed
    if recipe.batching == "packed":
        return batches.packed(lengths, pictures, recipe.row_length, size, seed, epoch)
    if recipe.batching == "modality":
        return batches.by_modality(lengths, pictures, size, seed, epoch)
    return batches.by_length(lengths, size, seed, epoch)


def learning_rate(step: int, total: int, warmup: float) -> float:
    """Share of the highest rate at a step: a linear rise, then a cosine to zero."""
    rise = math.ceil(warmup * total)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def export(model, recipe: Recipe, stage: int, image_config):
    """Write the model in the llava-hf layout; stage 1 also the original's mm_projector.bin, and a
    LoRA also by itself, under lora/."""
    whole = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = dcp_state.get_model_state_dict(model, options=whole)
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    out, source = Path(recipe.out), checkpoint.Checkpoint(recipe.model)
    config = asdict(replace(model.config, image=image_config, template=recipe.template))
    words, ids = tokenizer.files(source.path), source.config.token_ids()
    if recipe.lora_rank:
        base = hf_config("language_model", config["text"], torch.float16, ids)
        base |= {
            "model_type": "llava_llama",
            "architectures": ["LlavaLlamaForCausalLM"],
            "mm_vision_tower": recipe.vision_tower or str(source.path),
            "mm_projector_type": config["projector"],
            "mm_vision_select_layer": config["vision_layer"],
            "mm_vision_select_feature": "cls_patch" if config["keep_class"] else "patch",
            "mm_use_im_start_end": config["image_start_end"],
            "mm_use_im_patch_token": False,
            "mm_hidden_size": config["vision"]["dim"],
            "image_aspect_ratio": recipe.aspect,
        }
        sizes = recipe.lora_rank, recipe.lora_alpha, recipe.lora_dropout
        lora.save_lora(out / "lora", weights, recipe.model, base, *sizes)
        weights = lora.merged(weights, recipe.lora_alpha / recipe.lora_rank)
    if stage == 1:
        projector = {n: t for n, t in weights.items() if n.startswith("projector.")}
        projector = {stored_name("llava", n): t for n, t in projector.items()}
        torch.save(projector, out / "mm_projector.bin")
    checkpoint.save(out, "llava", weights, config, words, DTYPES[recipe.save_dtype], ids)


def watcher(name: str, out: Path, header: dict):
    """A function that shows a row of the log in TensorBoard or Weights & Biases, if installed."""
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(out / "tensorboard")
            return lambda row: [
                board.add_scalar(key, value, row["step"])
                for key, value in row.items()
                if isinstance(value, (int, float)) and key != "step"
            ]
        if name == "wandb":
            import wandb

            run = wandb.init(project="llava", dir=out, config=header)
            return lambda row: run.log(row, step=row["step"])
    except ImportError:
        raise ValueError(f"--watch {name} needs another package: pip install {name}") from None
    raise ValueError(f"--watch {name}: expected tensorboard or wandb, or both with a comma")


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def memory_gb(device: torch.device) -> float:
    """Most memory used so far: the GPU's, or this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# ---- the run ---------------------------------------------------------------------------------


def train(stage: int, resume: bool, recipe: Recipe, export_only: bool = False):
    # ---- processes and devices ----
    parallel = "RANK" in os.environ  # started by torchrun
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    rank, world = 0, 1
    on_gpu = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu")
    if parallel:
        if on_gpu:
            torch.cuda.set_device(device)
        wait = timedelta(seconds=recipe.timeout)
        store, rank, world = next(rendezvous("env://", timeout=wait))
        # torchrun keeps its store over restarts; in it are the addresses of the dead processes.
        store = dist.PrefixStore(f"restart {restarts}", store)
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, None, wait, world, rank, store)
    stopping = []  # the signals that asked to stop; a second one ends the run at once
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(
            name, lambda number, _: sys.exit(128 + number) if stopping else stopping.append(number)
        )

    # ---- model: what learns is float32; the arithmetic is in the compute type ----
    bf16 = torch.cuda.is_bf16_supported() if on_gpu else torch.cpu._is_avx512_bf16_supported()
    dtype = DTYPES[recipe.dtype] if recipe.dtype != "auto" else DTYPES["bf16" if bf16 else "fp32"]
    torch.manual_seed(recipe.seed)
    model, stored = assemble.describe(recipe)
    assemble.freeze(model, recipe, dtype)
    counts = {
        name: (sum(p.numel() for p in part.parameters() if p.requires_grad), part)
        for name, part in model.named_children()
    }
    if parallel:
        assemble.shard_model(model, recipe, device, dtype)
    assemble.fill(model, stored, device)
    model.train()
    model.language_model.recompute, kernels.backend = recipe.recompute, recipe.attention
    if recipe.compile:
        for block in [*model.language_model.layers, *model.vision_tower.layers]:
            block.compile()
    if recipe.after_control != "auto":
        model.tokenizer.after_control = recipe.after_control

    # ---- data: the same global batches, in the same order, for any number of processes ----
    if recipe.data == str(TINY / "data" / f"stage{stage}.json") and not Path(recipe.data).exists():
        if rank == 0:
            say("drawing the tiny world, once")
            subprocess.run([sys.executable, TINY / "make_data.py"], check=True)
        if parallel:
            dist.barrier()
    image_config = replace(model.config.image, aspect=recipe.aspect)
    looks = replace(model.config, image=image_config)

    def open_data(path: str) -> data.Conversations:
        return data.Conversations(
            path,
            recipe.images,
            model.tokenizer,
            recipe.template,
            image_config,
            recipe.max_length,
            looks.n_visual,
            recipe.on_long,
            "skip",  # what is done about a bad record is decided in the loop
            recipe.image_order,
            recipe.seed,
        )

    def micro_batches_of(samples, hands):
        """This process's micro-batches of each global batch, which `hands` shares out.

        Every process gets as many as the one with most: FSDP waits for all.
        """
        micro = recipe.micro_batch or recipe.batch
        loader = torch.utils.data.DataLoader(
            samples,
            batch_sampler=[hand[rank] for hand in hands],
            num_workers=recipe.workers,
            collate_fn=lambda rows: [
                data.collate(rows[i : i + micro]) for i in range(0, len(rows), micro)
            ],
        )
        for hand, found in zip(hands, loader, strict=True):
            most = math.ceil(max(map(len, hand)) / micro)
            yield found + [data.collate([]) for _ in range(most - len(found))]

    samples = open_data(recipe.data)
    packing, pictures = recipe.batching == "packed", samples.records.pictures
    lengths = samples.lengths(recipe.workers) if packing else samples.records.words
    epochs = [order_of(recipe, lengths, pictures, e) for e in range(math.ceil(recipe.epochs))]
    total = int(len(epochs[0]) * recipe.epochs)
    if total == 0:
        raise ValueError(f"--epochs {recipe.epochs} of {len(epochs[0])} batches is not one step")
    hands = [batches.deal(batch, lengths, world) for epoch in epochs for batch in epoch][:total]
    held_out = open_data(recipe.eval_data) if recipe.eval_data else None

    # ---- optimizer ----
    groups = assemble.parameter_groups(model, recipe)
    optimizer = torch.optim.AdamW(groups, recipe.lr, (0.9, 0.999), 1e-8, fused=True)
    trainable = [p for group in groups for p in group["params"]]
    torch.manual_seed(recipe.seed + rank)  # of dropout

    # ---- resume ----
    out = Path(recipe.out)
    start, lost = 0, [0, 0]  # skipped records, cut turns
    if resume or (restarts and states.newest(out)):
        notes = states.load(out, recipe, model, optimizer)
        start, lost = notes["step"], notes["lost"]
    saver = states.Saver(out, recipe)
    if export_only:
        export(model, recipe, stage, image_config)
        if rank == 0:
            say(f"exported the state of step {start} to {out}")
        return leave()

    def notes_at(step: int) -> dict:
        return {"step": step, "lost": lost, "recipe": asdict(recipe), "processes": world}

    # ---- what is about to happen ----
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        if not start:
            (out / "skipped.txt").unlink(missing_ok=True)
        say(f"stage {stage}: {total} steps of {recipe.batch} samples on {world} x {device.type}")
        say(f"{'part':16} {'parameters':>15} {'learning':>15}  type      rate")
        rates = {group["name"]: group["peak"] for group in groups}
        for name, (learning, part) in counts.items():
            n = sum(p.numel() for p in part.parameters())
            kind = "float32" if learning else str(dtype).removeprefix("torch.")
            say(f"{name:16} {n:15,} {learning:15,}  {kind:9} {rates.get(name, 'frozen')}")
        words = recipe.row_length if packing else statistics.mean(lengths)
        say(plan.expected(looks, recipe, world, words))
        log_file = out / "run.jsonl"
        if start and log_file.exists():  # steps after the saved state are done again
            rows = log_file.read_text().splitlines(keepends=True)
            rows = [row for row in rows if row.endswith("\n")]  # the last may be cut off
            kept = [row for row in rows if json.loads(row).get("step", -1) < start]
            log_file.with_suffix(".tmp").write_text("".join(kept))
            os.replace(log_file.with_suffix(".tmp"), log_file)
        log = open(log_file, "a" if start else "w")
        header = {"stage": stage, "recipe": asdict(recipe), "torch": torch.__version__}
        header |= {"processes": world, "device": str(device), "dtype": str(dtype)}
        print(json.dumps(header), file=log, flush=True)
        watchers = [watcher(name, out, header) for name in recipe.watch.split(",") if name]

    def loss_of(batch: dict, reduction: str):
        batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
        # FSDP casts parameters itself; alone, autocast does.
        cast = dtype != torch.float32 and not parallel
        with torch.autocast(device.type, dtype, enabled=cast):
            return model.loss(**batch, reduction=reduction)

    def over_processes(*numbers) -> list[float]:
        """Sums over all processes."""
        sums = torch.tensor(numbers, dtype=torch.float64, device=device)
        if parallel:
            dist.all_reduce(sums)
        return sums.tolist()

    @torch.no_grad()
    def held_out_loss() -> float:
        model.eval()
        words = held_out.records.words
        order = batches.by_length(words, recipe.batch, 0, 0)
        shares = [batches.deal(batch, words, world) for batch in order]
        loss = n = 0
        for micro_batches in micro_batches_of(held_out, shares):
            for batch in micro_batches:
                batch.pop("lost", None)
                n += int((batch["labels"] != data.IGNORE).sum())
                loss += loss_of(batch, "sum").item()
        loss, n = over_processes(loss, n)
        model.train()
        return loss / max(1, n)

    # ---- the loop ----
    started = last_shown = time.time()
    norms, n_seen, n_tokens, n_flops = [], 0, 0, 0.0
    peak = plan.peak_flops(torch.cuda.get_device_name()) if on_gpu else None
    for step, micro_batches in enumerate(micro_batches_of(samples, hands[start:]), start):
        rate = learning_rate(step, total, recipe.warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        bad, cut = zip(*(batch.pop("lost", ((), 0)) for batch in micro_batches), strict=True)
        bad = [why for found in bad for why in found]
        if bad and recipe.on_bad == "error":
            raise ValueError(bad[0])
        if bad:
            with open(out / "skipped.txt", "a") as file:
                file.writelines(f"{why}\n" for why in bad)
        learned = [int((b["labels"] != data.IGNORE).sum()) for b in micro_batches]
        flops = sum(plan.batch_flops(looks, recipe, batch) for batch in micro_batches)
        *sums, flops = over_processes(sum(learned), len(bad), sum(cut), len(stopping), flops)
        n_learned, n_bad, n_cut, n_stop = map(int, sums)
        lost = [lost[0] + n_bad, lost[1] + n_cut]
        if lost[0] > recipe.max_bad:
            raise ValueError(
                f"{lost[0]} records were skipped up to step {step}, more than --max-bad "
                f"{recipe.max_bad}; {out / 'skipped.txt'} says why"
            )
        if n_learned == 0:
            raise ValueError(f"step {step} has no token to learn from, see {out / 'skipped.txt'}")

        loss = torch.zeros((), device=device)
        for i, (batch, n) in enumerate(zip(micro_batches, learned, strict=True)):
            if parallel:  # gradients are summed over the processes once, after the last
                model.set_requires_gradient_sync(i + 1 == len(micro_batches))
            weight = 1 / n_learned
            if recipe.average_batches:
                weight = 1 / max(1, n) / (len(micro_batches) * world)
            part = loss_of(batch, "sum") * weight
            (part * world).backward()  # FSDP takes the mean over the processes
            loss += part.detach()
        (loss,) = over_processes(loss.item())
        norm = torch.nn.utils.get_total_norm([p.grad for p in trainable if p.grad is not None])
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        if not math.isfinite(loss + norm):
            raise ValueError(
                f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}; stopped before "
                f"the update. The records are {hands[step]}; try a lower --lr"
            )
        usual = statistics.median(norms) if len(norms) >= 20 else math.inf
        spiked = bool(recipe.spike) and norm > recipe.spike * usual
        norms = [*norms[-99:], norm]
        if not spiked:
            if recipe.clip:
                total_norm = torch.tensor(norm, device=device)
                torch.nn.utils.clip_grads_with_norm_(trainable, recipe.clip, total_norm)
            optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        measured = None
        if held_out and (done % recipe.eval_every == 0 or done == total):
            measured = held_out_loss()
        if rank == 0:
            seconds = time.time() - started
            items = [item for hand in hands[step] for item in hand]
            n_seen += sum(len(item) if isinstance(item, tuple) else 1 for item in items)
            n_tokens, n_flops = n_tokens + n_learned, n_flops + flops
            speed = n_flops / seconds / world  # model FLOP/s of each process
            used = f"MFU {speed / peak:.0%}" if peak else f"{speed / 1e12:.2f} TFLOP/s"
            row = {"step": step, "loss": round(loss, 6), "grad_norm": round(norm, 4)}
            row |= {"lr": recipe.lr * rate, "samples_per_s": round(n_seen / seconds, 2)}
            row |= {"tokens_per_s": round(n_tokens / seconds, 1)}
            row |= {"tflops": round(speed / 1e12, 3)} | ({"mfu": speed / peak} if peak else {})
            row |= {"skipped": lost[0], "cut_turns": lost[1]} if any(lost) else {}
            row |= {"eval_loss": round(measured, 6)} if measured is not None else {}
            row |= {"spike": hands[step]} if spiked else {}
            print(json.dumps(row), file=log, flush=True)
            for write in watchers:
                write(row)
            if time.time() - last_shown > 5 or done == total or measured is not None or spiked:
                last_shown = time.time()
                left = clock((total - done) * seconds / (done - start))
                say(
                    f"step {done}/{total}  loss {loss:.4f}  norm {norm:.2f}  "
                    f"rate {recipe.lr * rate:.1e}"
                    + (f"  held out {measured:.4f}" if measured is not None else "")
                    + ("  a spike, not followed" if spiked else "")
                    + f"  {n_seen / seconds:.1f} samples/s  {n_tokens / seconds:.0f} tokens/s  "
                    f"{used}  {memory_gb(device):.1f} GB  {clock(seconds)} gone, {left} left"
                )
        saver.poll()
        if n_stop and done < total:
            saver.save(model, optimizer, notes_at(done))
            saver.wait()
            if rank == 0:
                say(f"stopped after step {done}; the same command with --resume goes on")
            break
        if done % recipe.save_every == 0 and done < total:
            saver.save(model, optimizer, notes_at(done))

    # ---- the trained model ----
    else:
        saver.wait()
        export(model, recipe, stage, image_config)
        if rank == 0:
            shutil.rmtree(out / "states", ignore_errors=True)
            if any(lost):
                say(f"skipped {lost[0]} records (skipped.txt) and cut {lost[1]} turns of long ones")
            say(f"saved {out}")
    leave()


def leave():
    """Go when all processes go."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def say(text: str):
    print(text, file=sys.stderr, flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", type=int, choices=(1, 2), help="which of the two stages")
    parser.add_argument("--plan", action="store_true", help="print memory, FLOPs, hours instead")
    parser.add_argument("--gpus", type=int, default=8, help="of the plan")
    parser.add_argument("--gpu", default="a100-80", choices=plan.GPUS, help="of the plan: its kind")
    parser.add_argument("--mfu", type=float, default=0.4, help="of the plan: share of the peak")
    parser.add_argument("--samples", type=int, help="of the plan; default: the official data's")
    parser.add_argument("--tokens", type=float, help="of the plan: of a sample, pictures included")
    parser.add_argument("--plot", nargs="+", metavar="RUN", help="draw the curves of runs instead")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    parser.add_argument("--export", action="store_true", help="write the model of the last state")
    add_flags(parser)
    args = parser.parse_args()
    if args.stage is None and not args.plot:
        parser.error("--stage 1 or --stage 2")
    # Of states written by one process; that they are whole is what we want.
    warnings.filterwarnings("ignore", message="torch.distributed is ")
    try:
        if args.plot:
            return plot.draw(args.plot, Path("curves.png"))
        recipe = recipe_of(args, args.stage)
        if args.plan:
            return plan.show(args.config, recipe, args.stage, RECIPES[args.config]()[1], args)
        train(args.stage, args.resume or args.export, recipe, args.export)
    except ValueError as error:
        sys.exit(f"train.py: {error}")
    except torch.OutOfMemoryError:
        sys.exit(
            "train.py: out of memory; smaller steps at a time: --micro-batch, or --recompute full, "
            "or more processes"
        )
    except RuntimeError as error:
        # What torch.distributed raises when another process is gone or out of reach.
        if not dist.is_initialized() or not re.search(r"gloo|nccl|onnection|imed out", str(error)):
            raise
        reason = str(error).strip().splitlines()[-1][:200]
        say(f"train.py: the processes have lost each other ({reason}); --resume goes on")
        os._exit(1)  # at a normal exit this one would wait for the others


if __name__ == "__main__":
    main()
