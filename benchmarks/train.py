"""A training step on the CPU: ours, and a plain loop over transformers' LLaVA.

    python benchmarks/train.py

Same sizes, same weights' precision (float32, arithmetic in bfloat16 by autocast), same samples, in
turns, a process each. Prints samples/s and peak memory, and writes benchmarks/train.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
ROUNDS = 5
# Tokens of the samples of a batch beside the picture's 576, and how many are learned.
EQUAL = [(124, 90)] * 2
RAGGED = [(40, 12), (300, 200), (90, 60), (60, 20)]
CASES = {
    "stage 1, equal lengths": (1, EQUAL),
    "stage 2, equal lengths": (2, EQUAL),
    "stage 2, ragged": (2, RAGGED),
}
VISION = dict(image_size=336, patch_size=14, dim=512, mlp_dim=2048, n_layers=12, n_heads=8)
TEXT = dict(
    vocab_size=32064, dim=1024, mlp_dim=2752, n_layers=12, n_heads=16, n_kv_heads=16, norm_eps=1e-5
)
IMAGE = 32000


def samples(lengths):
    """Ids and labels of each sample; the picture stands at the fifth place."""
    random = torch.Generator().manual_seed(0)
    for n, learned in lengths:
        ids = torch.randint(3, 32000, (n,), generator=random)
        labels = torch.full_like(ids, -100)
        labels[-learned:] = ids[-learned:]
        yield ids, labels


def ours(stage: int, lengths):
    import data
    from image import ImageConfig
    from llama import LLaMAConfig
    from llava import LLaVA, LLaVAConfig
    from vit import ViTConfig

    model = LLaVA(LLaVAConfig(ViTConfig(**VISION), LLaMAConfig(**TEXT), ImageConfig()))
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    model.language_model.requires_grad_(stage == 2)
    for p in model.parameters():  # as train.py keeps what is frozen
        if not p.requires_grad:
            p.data = p.data.bfloat16()
    rows = []
    for ids, labels in samples(lengths):
        ids = torch.cat([ids[:4], torch.tensor([data.IMAGE_TOKEN]), ids[4:]])
        labels = torch.cat([labels[:4], torch.tensor([-100]), labels[4:]])
        row = {"input_ids": ids, "labels": labels, "pixels": [torch.randn(1, 3, 336, 336)]}
        rows.append(row | {"image_sizes": [(336, 336)]})
    batch = data.collate([rows] if len(set(lengths)) > 1 else rows)  # ragged samples are packed
    return model, lambda: model.loss(**batch)


def theirs(stage: int, lengths):
    import transformers

    vision = transformers.CLIPVisionConfig(
        hidden_size=VISION["dim"],
        intermediate_size=VISION["mlp_dim"],
        num_hidden_layers=VISION["n_layers"],
        num_attention_heads=VISION["n_heads"],
        image_size=336,
        patch_size=14,
    )
    text = transformers.LlamaConfig(
        vocab_size=TEXT["vocab_size"],
        hidden_size=TEXT["dim"],
        intermediate_size=TEXT["mlp_dim"],
        num_hidden_layers=TEXT["n_layers"],
        num_attention_heads=TEXT["n_heads"],
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    model.model.language_model.requires_grad_(stage == 2)
    model.lm_head.requires_grad_(stage == 2)
    rows = []
    for ids, labels in samples(lengths):
        picture = torch.full((576,), IMAGE)
        ids = torch.cat([ids[:4], picture, ids[4:]])
        rows.append((ids, torch.cat([labels[:4], torch.full((576,), -100), labels[4:]])))
    ids, labels = zip(*rows, strict=True)
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {
        "input_ids": pad(ids, batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(i) for i in ids], batch_first=True),
        "pixel_values": torch.randn(len(rows), 3, 336, 336),
    }
    return model, lambda: model(**batch).loss


def side(name: str, stage: int, lengths):
    """Make ready, then for every line on stdin one step; its seconds and the peak go to stdout."""
    import resource

    answer, sys.stdout = sys.stdout, sys.stderr
    torch.manual_seed(0)
    model, loss = {"ours": ours, "theirs": theirs}[name](stage, lengths)
    model.train()
    learns = [p for p in model.parameters() if p.requires_grad]
    # A plain loop takes AdamW as it comes; train.py asks for it in one kernel.
    optimizer = torch.optim.AdamW(learns, 1e-4, fused=True if name == "ours" else None)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    for _ in sys.stdin:
        started = time.perf_counter()
        step()
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(json.dumps([seconds, peak]), file=answer, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return side(args.side, *CASES[args.case])
    results = {}
    for case, (_, lengths) in CASES.items():
        running = {
            name: subprocess.Popen(
                [sys.executable, __file__, "--side", name, "--case", case],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for name in ("ours", "theirs")
        }
        rounds = []
        for _ in range(ROUNDS):
            for process in running.values():
                print("step", file=process.stdin, flush=True)
                rounds.append(json.loads(process.stdout.readline()))
        for process in running.values():
            process.stdin.close()
            process.wait()
        seconds = {name: [s for s, _ in rounds[i::2]] for i, name in enumerate(running)}
        ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
        row = {"ratio": round(statistics.median(ratios), 2)}
        for i, (name, times) in enumerate(seconds.items()):
            row[f"{name}_samples_per_s"] = round(len(lengths) / statistics.median(times), 3)
            row[f"{name}_peak_GB"] = round(rounds[-2 + i][1], 2)
        results[case] = row
        print(case, row)
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    machine |= {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    (HERE / "train.json").write_text(
        json.dumps({"machine": machine, "cases": results}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
