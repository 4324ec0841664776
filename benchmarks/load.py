"""Load a checkpoint of LLaVA-1.5-7B's exact shape: seconds, GB/s, peak memory, and one answer.

    python benchmarks/load.py --work DIR      28 GB of disk: both layouts with random bf16 weights

Each layout is loaded in a process of its own, after a plain read of the same files for comparison;
the first also as generate.py loads it, laid out for a CPU, in bf16, int8 and int4, and from a
folder that `checkpoint.py convert --quantize int4` has made of it (4 GB more).
Peak memory is the process's largest resident set (VmHWM), mapped file pages included. Prints a
table and writes benchmarks/load.json.
"""

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as generate.py does

import checkpoint
import generate
from llava import LLaVA, LLaVAConfig
from weightfile import Stored

HERE = Path(__file__).parent
CONFIG = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "image_aspect_ratio": "pad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
}


def random_tensors() -> dict[str, Stored]:
    """{our name: a tensor that is made when it is read}, from one block of random numbers."""
    block = (torch.randn(2**24, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    with torch.device("meta"), checkpoint.NoInit():
        shapes = {name: list(t.shape) for name, t in LLaVA(LLaVAConfig()).state_dict().items()}

    def reader(shape):
        n = torch.Size(shape).numel()
        return lambda: block.repeat(math.ceil(n / len(block)))[:n].view(shape)

    return {
        name: Stored(Path(), name, shape, torch.bfloat16, reader(shape))
        for name, shape in shapes.items()
    }


def write_original(folder: Path, tensors: dict[str, Stored]):
    """The layout of liuhaotian/llava-v1.5-7b: two .bin files, and the tower beside them."""
    config = asdict(LLaVAConfig())
    tower = folder / "tower"
    inside = {
        name.removeprefix("vision_tower."): stored
        for name, stored in tensors.items()
        if name.startswith("vision_tower.")
    }
    checkpoint.save(tower, "vision_tower", inside, config["vision"])
    names = {}
    for ours in tensors.keys() - {f"vision_tower.{name}" for name in inside}:
        names[checkpoint.stored_name("llava", ours)] = tensors[ours]
    order, weight_map = sorted(names), {}
    for i, part in enumerate((order[: len(order) // 2], order[len(order) // 2 :]), start=1):
        file = f"pytorch_model-{i:05}-of-00002.bin"
        torch.save({name: names[name].read() for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"mm_vision_tower": str(tower)}))


def memory(key: str) -> float:
    """GB of this process: VmHWM (largest resident set) or VmRSS (now)."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024e-9


def load(folder: str, how: str):
    """In a process of its own: print one JSON line."""
    import fast
    from image import sawtooth

    before, started = memory("VmRSS"), time.perf_counter()
    if how == "plain":
        model = LLaVA.from_pretrained(folder)
    else:
        bits = {"int8": 8, "int4": 4}.get(how)
        model = fast.prepare(LLaVA.from_pretrained(folder, quantize=bits, mapped=True))
    seconds = time.perf_counter() - started
    stored, _, _ = checkpoint.Checkpoint(folder).sort_names()
    n_bytes = sum(tensor.n_bytes for tensor in stored.values())
    peak = memory("VmHWM")

    class Words:
        bos_id, eos_id, vocab_size = 1, 2, 32000

    model.tokenizer = Words()
    started = time.perf_counter()
    ids = [1, 3148, 1001, -200, 1724, 338]
    (tokens,) = generate.generate(model, [ids], [sawtooth(640, 427)], 4)
    answer = time.perf_counter() - started
    figures = {"GB": n_bytes / 1e9, "load_s": seconds, "GB_per_s": n_bytes / 1e9 / seconds}
    figures |= {"peak_GB": peak, "peak_over_bytes": (peak - before) / (n_bytes / 1e9)}
    figures |= {"imports_GB": before, "answer_s": answer, "tokens": tokens}
    figures["peak_after_the_answer_GB"] = memory("VmHWM")
    print(json.dumps(figures))


def plain_read(folder: Path) -> float:
    """GB/s of reading the same files, whatever they hold."""
    files = [f for f in folder.rglob("*") if f.suffix in (".bin", ".safetensors")]
    buffer, started = bytearray(2**24), time.perf_counter()
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return sum(f.stat().st_size for f in files) / 1e9 / (time.perf_counter() - started)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        return load(*args.load)
    rows = {}
    for layout in ("llava-hf", "original"):
        folder = args.work / layout
        if not (folder / "config.json").exists():
            print(f"writing {folder}", file=sys.stderr)
            folder.mkdir(parents=True, exist_ok=True)
            if layout == "original":
                write_original(folder, random_tensors())
            else:
                checkpoint.save(folder, "llava", random_tensors(), asdict(LLaVAConfig()))
        rate = plain_read(folder)
        for how in ("plain", "bf16", "int8", "int4") if layout == "llava-hf" else ("plain",):
            command = [sys.executable, __file__, "--work", str(args.work), "--load", str(folder)]
            done = subprocess.run([*command, how], stdout=subprocess.PIPE, text=True, check=True)
            name = layout if how == "plain" else f"{layout}, laid out in {how}"
            rows[name] = {"plain_read_GB_per_s": rate} | json.loads(done.stdout)
    small = args.work / "int4"
    if not (small / "config.json").exists():
        checkpoint.convert(args.work / "llava-hf", small, quantize=4)
    command = [sys.executable, __file__, "--work", str(args.work), "--load", str(small), "stored"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows["llava-hf, stored in int4"] = json.loads(done.stdout)
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    machine |= {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    result = {"machine": machine, "rows": rows}
    (HERE / "load.json").write_text(json.dumps(result, indent=1) + "\n")
    for layout, figures in rows.items():
        print(layout, {k: round(v, 2) if isinstance(v, float) else v for k, v in figures.items()})


if __name__ == "__main__":
    main()
