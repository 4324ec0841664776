"""Samples per second and core: decode, resize, tokenise, collate; ours and the original's.

    python benchmarks/loader.py --original PYTHON --tokenizer FILE

PYTHON is that of an environment with the original code (tests/record_llava.py says how to make
one), FILE a sentencepiece model of 32,000 pieces. Both read the same files, in turns, one process
and one thread each: records of LLaVA-Instruct's length about JPEGs of COCO's size and weight.
Prints a table, the parts of ours too, and writes benchmarks/loader.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
ROUNDS, SAMPLES, BATCH = 7, 128, 16
WORDS = (
    "the picture shows a man and woman who sit on wooden bench near lake with two dogs that look "
    "at camera behind them there are several trees mountains under blue sky it seems to be warm"
).split()


def write(folder: Path):
    """SAMPLES records; photos of 640x480 (a third of them upright), 90 to 250 KB each."""
    import numpy as np
    from PIL import Image

    random, records = np.random.default_rng(0), []
    for i in range(SAMPLES):
        size = (480, 640) if i % 3 == 0 else (640, 480)
        layers = []
        for cells, weight in ((6, 1.0), (40, 0.5), (160, 0.35)):  # light, things, texture
            noise = random.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
            grown = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
            layers.append(weight * np.asarray(grown, np.float32))
        picture = sum(layers) / 1.85 + random.normal(0, 4, layers[0].shape)
        name = f"{i:05}.jpg"
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / name, quality=92)
        turns = []
        for _ in range(3):
            for role, n in (("human", 12), ("gpt", 50)):
                text = " ".join(random.choice(WORDS, n)) + ("?" if role == "human" else ".")
                turns.append({"from": role, "value": text})
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
        records.append({"id": str(i), "image": name, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))


def ours(folder: Path):
    """A function that makes every batch once, and the parts of it."""
    sys.path.insert(0, str(HERE.parent))
    import torch

    torch.set_num_threads(1)
    import data
    import image
    import tokenizer

    words, config = tokenizer.load(folder / "tokenizer.model"), image.ImageConfig(336, "pad")
    samples = data.Conversations(
        folder / "data.json", folder, words, "v1", config, 2048, lambda size: 576
    )
    rows = [tuple(range(i, i + 4)) for i in range(0, SAMPLES, 4)]  # packed, four to a row

    def run():
        for start in range(0, len(rows), BATCH // 4):
            data.collate([samples[row] for row in rows[start : start + BATCH // 4]])

    files = sorted(folder.glob("*.jpg"))
    pictures = [image.load(file) for file in files]
    squares = [image.expand_to_square(p, config.fill) for p in pictures]
    small = [image.resize_short_side(p, 336) for p in squares]
    parts = {
        "decode JPEG": lambda: [image.load(file) for file in files],
        "pad": lambda: [image.expand_to_square(p, config.fill) for p in pictures],
        "resize": lambda: [image.resize_short_side(p, 336) for p in squares],
        "normalise": lambda: [image.normalise(p, config.mean, config.std) for p in small],
        "tokenise": lambda: [samples.encode(samples.records[i], i, [1]) for i in range(SAMPLES)],
    }
    return run, parts


def original(folder: Path):
    import torch

    torch.set_num_threads(1)
    from llava.train import train
    from transformers import CLIPImageProcessor, LlamaTokenizer

    words = LlamaTokenizer(
        str(folder / "tokenizer.model"), legacy=False, model_max_length=2048, padding_side="right"
    )
    words.pad_token = words.unk_token
    train.conversation_lib.default_conversation = train.conversation_lib.conv_templates["v1"]
    processor = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336)
    args = train.DataArguments(
        data_path=str(folder / "data.json"),
        is_multimodal=True,
        image_folder=str(folder),
        image_aspect_ratio="pad",
    )
    args.image_processor, args.mm_use_im_start_end, train.local_rank = processor, False, 1
    samples = train.LazySupervisedDataset(args.data_path, words, args)
    collate = train.DataCollatorForSupervisedDataset(words)

    def run():
        for start in range(0, SAMPLES, BATCH):
            collate([samples[i] for i in range(start, start + BATCH)])

    return run, {}


def side(name: str, folder: Path):
    """Make ready, then for every line on stdin one round; its seconds go to stdout."""
    answer, sys.stdout = sys.stdout, sys.stderr
    run, parts = {"ours": ours, "original": original}[name](folder)
    run()
    for line in sys.stdin:
        task = parts.get(line.strip(), run)
        started = time.perf_counter()
        task()
        print(time.perf_counter() - started, file=answer, flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--original", help="python of an environment with the original code")
    parser.add_argument("--tokenizer", type=Path, help="sentencepiece model")
    parser.add_argument("--side", choices=("ours", "original"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return side(args.side, args.folder)
    if not args.original or not args.tokenizer:
        parser.error("--original and --tokenizer are needed")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        (folder / "tokenizer.model").write_bytes(args.tokenizer.read_bytes())
        weight = statistics.mean(file.stat().st_size for file in folder.glob("*.jpg"))
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        running = {
            name: subprocess.Popen(
                [python, Path(__file__).resolve(), "--side", name, "--folder", folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=env,
                cwd=folder,
            )
            for name, python in (("ours", sys.executable), ("original", args.original))
        }

        def ask(name: str, task: str) -> float:
            process = running[name]
            print(task, file=process.stdin, flush=True)
            return float(process.stdout.readline())

        rounds = [{name: ask(name, "all") for name in running} for _ in range(ROUNDS)]
        parts = {
            task: statistics.median(ask("ours", task) for _ in range(3)) / SAMPLES * 1000
            for task in ("decode JPEG", "pad", "resize", "normalise", "tokenise")
        }
        for process in running.values():
            process.stdin.close()
            process.wait()
    speed = {name: SAMPLES / statistics.median(times[name] for times in rounds) for name in running}
    ratio = statistics.median(times["original"] / times["ours"] for times in rounds)
    for name, per_second in speed.items():
        print(f"{name:10} {per_second:6.1f} samples/s on one core")
    print(f"ratio      {ratio:6.2f} (median of {ROUNDS} rounds in turns)")
    for task, ms in parts.items():
        print(f"  {task:12} {ms:5.2f} ms a sample")
    result = {
        "samples_per_s": {name: round(value, 1) for name, value in speed.items()},
        "ratio": round(ratio, 2),
        "ms_a_sample": {task: round(ms, 2) for task, ms in parts.items()},
        "kilobytes_a_jpeg": round(weight / 1000),
        "cpu": platform.processor() or platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    (HERE / "loader.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
