"""python -m pytest tests/test_train.py: both stages really train, and only what should; resume too.

The models are new and small, the data a few hundred pictures of the tiny world. Everything runs
through the command line, as a user would.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import tokenizer
from llama import LLaMA, LLaMAConfig
from vit import ViT, ViTConfig

ROOT = Path(__file__).parent.parent
WORDS = ROOT / "tiny" / "weights" / "llama" / "tokenizer.model"


def run(*args, launcher=(), fails=False):
    command = [sys.executable, *launcher, *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert fails is None or (done.returncode != 0) == fails, done.stderr
    return done.stderr


def losses(folder):
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A small untrained ViT and LLaMA, and 240 pictures with their records."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    vit = ViT(ViTConfig(image_size=96, patch_size=24, dim=32, mlp_dim=64, n_layers=2, n_heads=2))
    sizes = LLaMAConfig(dim=32, mlp_dim=64, n_layers=2, n_heads=2, n_kv_heads=1, max_positions=1024)
    llama = LLaMA(replace(sizes, vocab_size=tokenizer.load(WORDS).vocab_size))
    checkpoint.save(folder / "vit", "vision_tower", vit.state_dict(), asdict(vit.config))
    checkpoint.save(
        folder / "llama", "language_model", llama.state_dict(), asdict(llama.config), WORDS
    )
    run("tiny/make_data.py", "--pictures", 240, "--out", folder / "data")
    return folder


def stage(number, start, out, *more, **how):
    images = ("--images", start / "data" / "images")
    data = ("--data", start / "data" / f"stage{number}.json")
    common = ("--batch", 16, "--save-dtype", "fp32", "--dtype", "fp32", "--out", out)
    return run("train.py", "--stage", number, *data, *images, *common, *more, **how)


@pytest.fixture(scope="module")
def stage1(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("stage1")
    stage(1, start, out, "--model", start / "llama", "--vision-tower", start / "vit", "--epochs", 2)
    return out


@pytest.fixture(scope="module")
def stage2(start, stage1, tmp_path_factory):
    out = tmp_path_factory.mktemp("stage2")
    stage(2, start, out, "--model", stage1, "--lr", 3e-3)
    return out


def moved(before, after):
    return {name for name in after if not torch.equal(before[name], after[name])}


def test_stage_1_moves_every_projector_tensor_and_nothing_else(start, stage1):
    after = load_file(stage1 / "model.safetensors")
    for part, prefix in (("vit", "vision_tower."), ("llama", "language_model.")):
        for name, tensor in load_file(start / part / "model.safetensors").items():
            assert torch.equal(tensor, after[prefix + name]), name
    curve = losses(stage1)
    assert len(curve) == 30 and sum(curve[-5:]) < sum(curve[:5])


def test_stage_2_moves_projector_and_decoder_and_leaves_the_tower_alone(stage1, stage2):
    before, after = (load_file(f / "model.safetensors") for f in (stage1, stage2))
    frozen = {name for name in after if name.startswith("vision_tower.")}
    assert frozen and moved(before, after) == set(after) - frozen
    curve = losses(stage2)
    assert sum(curve[-5:]) / 5 < 0.8 * sum(curve[:5]) / 5


def test_resuming_continues_to_the_same_bits(start, stage1, stage2, tmp_path):
    """A run is stopped after step 10 and resumed; its end equals that of the undisturbed run."""
    stop_after = "import sys, train; sys.argv = sys.argv[1:]; keep = train.os.replace\n"
    stop_after += "def replace(*a): keep(*a); sys.exit(7) if 'resume' in str(a[1]) else None\n"
    stop_after += "train.os.replace = replace; train.train(*train.parse())"
    (tmp_path / "stopped.py").write_text(stop_after)
    data = start / "data"
    args = ["train.py", "--stage", 2, "--data", data / "stage2.json", "--images", data / "images"]
    args += ["--batch", 16, "--save-dtype", "fp32", "--dtype", "fp32", "--out", tmp_path / "out"]
    args += ["--model", stage1, "--lr", 3e-3, "--save-every", 10]
    done = subprocess.run(
        [sys.executable, tmp_path / "stopped.py", *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 7 and len(losses(tmp_path / "out")) == 10
    with open(tmp_path / "out" / "log.jsonl", "a") as log:  # two steps more, lost with the process
        print('{"step": 10, "loss": 9}\n{"step": 11, "loss": 9}', file=log)
    run(*args, "--resume")
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "out", stage2))
    assert moved(ours, theirs) == set()
    assert losses(tmp_path / "out") == losses(stage2)


def test_two_processes_follow_the_loss_curve_of_one(start, stage1, stage2, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    # Judged by what it wrote: gloo now and then aborts a process that has finished its work.
    stage(2, start, tmp_path, "--model", stage1, "--lr", 3e-3, launcher=torchrun, fails=None)
    assert (tmp_path / "model.safetensors").exists()
    one, two = (torch.tensor(losses(f)) for f in (stage2, tmp_path))
    # Sums in another order: the last bits differ, and training carries them on.
    assert torch.allclose(one, two, rtol=1e-3)


def test_micro_batches_follow_the_loss_curve_of_whole_batches(start, stage1, stage2, tmp_path):
    stage(2, start, tmp_path, "--model", stage1, "--lr", 3e-3, "--micro-batch", 5)
    one, two = (torch.tensor(losses(f)) for f in (stage2, tmp_path))
    assert torch.allclose(one, two, rtol=1e-3)


def spoiled(start, folder, *numbers):
    """The stage 2 data with missing pictures in some records; returns the flag."""
    records = json.loads((start / "data" / "stage2.json").read_text())
    for number in numbers:
        records[number]["image"] = f"gone{number}.jpg"
    (folder / "spoiled.json").write_text(json.dumps(records))
    return "--data", folder / "spoiled.json"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_record_stops_training_with_one_sentence(start, stage1, tmp_path, workers):
    flags = spoiled(start, tmp_path, 5)
    said = stage(2, start, tmp_path, "--model", stage1, *flags, "--workers", workers, fails=True)
    assert "record 5 (id" in said and "gone5.jpg" in said and "Traceback" not in said


def test_skipped_records_are_counted_listed_and_capped(start, stage1, tmp_path):
    flags = (*spoiled(start, tmp_path, 5, 7), "--on-bad", "skip", "--model", stage1)
    said = stage(2, start, tmp_path, *flags)
    assert "skipped 2 records" in said
    listed = (tmp_path / "skipped.txt").read_text().splitlines()
    assert len(listed) == 2 and any("gone7.jpg" in line for line in listed)
    said = stage(2, start, tmp_path, *flags, "--max-bad", 1, fails=True)
    assert "2 records were skipped" in said and "more than --max-bad 1" in said


def test_packed_training_runs_and_resumes_from_the_same_plan(start, stage1, tmp_path):
    packing = ("--batching", "packed", "--row-length", 600, "--batch", 4, "--model", stage1)
    said = stage(2, start, tmp_path, *packing)
    assert "saved" in said
    curve = losses(tmp_path)
    assert sum(curve[-5:]) < sum(curve[:5])


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (("--resume",), "nothing to resume"),
        (("--template", "v7"), "no template is called 'v7'"),
        (("--data", "nowhere.json"), "no data file at nowhere.json"),
        (("--batch", "0"), "--batch must be more than 0"),
        (("--epochs", "0.01"), "is not one step"),
        (("--batching", "best"), "--batching is one of length, modality, packed"),
    ],
)
def test_a_mistake_is_one_sentence(start, stage1, tmp_path, more, complaint):
    said = stage(2, start, tmp_path, "--model", stage1, *more, fails=True)
    assert complaint in said and "Traceback" not in said
