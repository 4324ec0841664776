"""python -m pytest tests/test_train.py: both stages really train, and only what should; resume too.

The models are new and small, the data a few hundred pictures of the tiny world. Everything runs
through the command line, as a user would.
"""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import tokenizer
import train
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
    """Of all steps, from the log."""
    lines = (folder / "run.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
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
    stop_after += "def replace(*a): keep(*a); sys.exit(7) if 'states' in str(a[1]) else None\n"
    stop_after += "train.os.replace = replace; train.main()"
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
    assert done.returncode == 7 and len(losses(tmp_path / "out")) >= 10
    with open(tmp_path / "out" / "run.jsonl", "a") as log:  # two steps more, lost with the process
        print('{"step": 10, "loss": 9}\n{"step": 11, "loss": 9}', file=log)
    run(*args, "--resume")
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "out", stage2))
    assert moved(ours, theirs) == set()
    assert losses(tmp_path / "out") == losses(stage2)


def torchrun(n: int):
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n))


SHORT = ("--epochs", 0.25, "--lr", 1e-3, "--keep", 1)


@pytest.fixture(scope="module")
def alone(start, stage1, tmp_path_factory):
    """A run of one process, for a few steps: {batching: folder}."""
    found = {}
    for kind in ("modality", "packed"):
        found[kind] = tmp_path_factory.mktemp("alone")
        size = ("--batch", 4 if kind == "packed" else 16, "--row-length", 900)
        more = ("--model", stage1, *SHORT, "--batching", kind, *size)
        stage(2, start, found[kind], *more)
    return found


@pytest.mark.parametrize(
    ("processes", "kind", "more"),
    [
        (1, "modality", ("--micro-batch", 3, "--recompute", "full")),
        (1, "packed", ("--micro-batch", 1, "--recompute", "selective")),
        (2, "modality", ("--micro-batch", 5)),
        (2, "packed", ("--recompute", "full")),
        (4, "modality", ("--shard", 2)),  # HSDP: two copies, each on two processes
        (3, "modality", ("--workers", 1)),  # 16 samples do not share out evenly among three
    ],
)
def test_every_way_to_run_it_gives_the_same_losses_and_weights(
    start, stage1, alone, tmp_path, processes, kind, more
):
    size = ("--batch", 4 if kind == "packed" else 16, "--row-length", 900)
    launcher = torchrun(processes) if processes > 1 else ()
    # Judged by what it wrote: gloo now and then aborts a process that has finished its work.
    flags = ("--model", stage1, *SHORT, "--batching", kind, *size, *more)
    stage(2, start, tmp_path, *flags, launcher=launcher, fails=None)
    one, many = (torch.tensor(losses(folder)) for folder in (alone[kind], tmp_path))
    assert len(one) >= 4 and torch.allclose(one, many, rtol=1e-5)
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path, alone[kind]))
    for name, weight in theirs.items():
        # Adam divides by the gradient's size: where that is rounding alone, its sign is chance.
        close = (ours[name] - weight).abs() <= 1e-5 + 1e-3 * weight.abs()
        assert close.float().mean() > 0.999, name


@pytest.mark.parametrize("batching", ["modality", "packed"])
def test_llava_16_learns_with_its_tower_on_any_number_of_processes(
    start, stage1, tmp_path, batching
):
    """AnyRes pictures, the tower at its own rate, and processes that get no picture at all."""
    size = ("--batch", 4 if batching == "packed" else 8, "--row-length", 1500)
    flags = ("--model", stage1, "--aspect", "anyres", "--tower-lr", 1e-4, "--lr", 1e-3)
    flags += ("--batching", batching, *size, "--epochs", 0.15)
    for folder, launcher in (("one", ()), ("two", torchrun(2))):
        stage(2, start, tmp_path / folder, *flags, launcher=launcher, fails=None)
    one, two = (torch.tensor(losses(tmp_path / f)) for f in ("one", "two"))
    assert len(one) >= 2 and torch.allclose(one, two, rtol=1e-5)
    before, after = (load_file(f / "model.safetensors") for f in (stage1, tmp_path / "one"))
    assert "image_newline" in after
    changed = moved(before, {name: after[name] for name in before})
    last = [n for n in before if ".layers.1." in n and n.startswith("vision_tower")]
    unused = {n for n in before if n.startswith("vision_tower") and "post_layernorm" in n}
    assert changed == set(before) - unused - set(last)  # its last block is never run


def test_the_held_out_loss_is_the_same_on_two_processes(start, stage1, tmp_path):
    """240 or so records in batches of 16, five at a time: processes get unequal numbers."""
    held_out = ("--eval-data", start / "data" / "stage1.json", "--eval-every", 3)
    flags = ("--model", stage1, *SHORT, *held_out, "--micro-batch", 5, "--batch", 14)
    found = []
    for name, launcher in (("one", ()), ("two", torchrun(2))):
        stage(2, start, tmp_path / name, *flags, launcher=launcher, fails=None)
        rows = map(json.loads, (tmp_path / name / "run.jsonl").read_text().splitlines())
        found.append([row["eval_loss"] for row in rows if "eval_loss" in row])
    assert len(found[0]) >= 2 and found[1] == pytest.approx(found[0], rel=1e-5)


def test_half_precision_follows_the_same_curve(start, stage1, alone, tmp_path):
    """Alone by autocast, under FSDP by its own casts; bfloat16 has 8 bits: 0.4 % a rounding."""
    flags = ("--model", stage1, *SHORT, "--batching", "modality", "--dtype", "bf16")
    for name, launcher in (("one", ()), ("two", torchrun(2))):
        stage(2, start, tmp_path / name, *flags, launcher=launcher, fails=None)
        exact, rounded = (torch.tensor(losses(f)) for f in (alone["modality"], tmp_path / name))
        error = ((rounded - exact) / exact).abs().max()
        assert error < 1e-3


def command(start, out, *more):
    data = ("--data", start / "data" / "stage2.json", "--images", start / "data" / "images")
    common = ("--batch", 16, "--save-dtype", "fp32", "--dtype", "fp32", "--out", out)
    return [*map(str, ("train.py", "--stage", 2, *data, *common, "--lr", 3e-3, *more))]


def begin(start, out, *more, launcher=(), limit=None):
    """A run in the background."""
    return subprocess.Popen(
        [sys.executable, *launcher, *command(start, out, *more)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=limit,
    )


def wait_for(process, out, n_rows: int):
    while not (out / "run.jsonl").exists() or len(losses(out)) < n_rows:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bits(
    start, stage1, stage2, tmp_path
):
    """SIGKILL in steps and while states are written; KILLS=100 is the long form.

    When a run has come to its end, its weights and log are compared, and it begins anew.
    """
    kills, chance = int(os.environ.get("KILLS", 3)), random.Random(0)
    n_killed = n_writing = n_ended = 0
    while n_killed < kills or not n_ended:
        before = len(losses(tmp_path)) if (tmp_path / "run.jsonl").exists() else 0
        resumed = ("--resume",) * bool(list(tmp_path.glob("states/step-*[0-9]")))
        process = begin(start, tmp_path, "--model", stage1, "--save-every", 1, *resumed)
        while n_killed < kills and process.poll() is None:
            if (tmp_path / "run.jsonl").exists() and len(losses(tmp_path)) > before:
                time.sleep(chance.random() * 0.3)
                break
            time.sleep(0.005)
        if n_killed < kills:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:
            ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path, stage2))
            assert moved(ours, theirs) == set()
            assert losses(tmp_path) == losses(stage2)
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()
            n_ended += 1
        else:
            assert process.returncode == -signal.SIGKILL
            n_killed += 1
            n_writing += bool(list(tmp_path.glob("states/*.tmp")))
    print(f"{n_killed} kills, {n_writing} while a state was written, {n_ended} runs to their end")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_ends_the_run(start, stage1, stage2, tmp_path, name):
    process = begin(start, tmp_path, "--model", stage1)
    wait_for(process, tmp_path, 3)
    process.send_signal(getattr(signal, name))
    said = process.communicate()[1]
    assert process.returncode == 0 and "--resume goes on" in said
    assert not (tmp_path / "model.safetensors").exists()
    run(*command(start, tmp_path, "--model", stage1, "--resume"))
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path, stage2))
    assert moved(ours, theirs) == set()


def kill_a_worker(process):
    """SIGKILL one of torchrun's processes, and wait for what torchrun makes of it."""
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    return process.communicate()[1]


def test_one_of_two_processes_is_killed_and_the_run_is_resumed_by_one(
    start, stage1, alone, tmp_path
):
    more = ("--model", stage1, *SHORT, "--batching", "modality", "--save-every", 2)
    process = begin(start, tmp_path, *more, launcher=torchrun(2))
    wait_for(process, tmp_path, 4)
    kill_a_worker(process)
    assert process.returncode != 0
    assert list(tmp_path.glob("states/step-*[0-9]"))
    # One process goes on where two were.
    args = command(start, tmp_path, *more, "--resume")
    run(*args)
    one, both = (torch.tensor(losses(folder)) for folder in (alone["modality"], tmp_path))
    assert torch.allclose(one, both, rtol=1e-5)


def test_torchrun_brings_a_killed_process_back(start, stage1, alone, tmp_path):
    more = ("--model", stage1, *SHORT, "--batching", "modality", "--save-every", 2)
    launcher = (*torchrun(2), "--max-restarts", "1")
    process = begin(start, tmp_path, *more, "--timeout", 20, launcher=launcher)
    wait_for(process, tmp_path, 4)
    said = kill_a_worker(process)
    one, two = (torch.tensor(losses(folder)) for folder in (alone["modality"], tmp_path))
    assert len(one) == len(two), said
    assert torch.allclose(one, two, rtol=1e-5)
    assert (tmp_path / "model.safetensors").exists()


@pytest.fixture
def two_nodes():
    """Two network namespaces with a cable between them: their names and a function that cuts it."""
    names = ("llava-node-0", "llava-node-1")

    def ip(*args, node=None, check=True):
        inside = ("ip", "netns", "exec", node) if node else ()
        subprocess.run([*inside, "ip", *args], check=check, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces need root and the ip command")
    try:
        ip("link", "add", "cable0", "type", "veth", "peer", "name", "cable1")
        for i, name in enumerate(names):
            ip("link", "set", f"cable{i}", "netns", name)
            ip("addr", "add", f"10.77.0.{i + 1}/24", "dev", f"cable{i}", node=name)
            for device in (f"cable{i}", "lo"):
                ip("link", "set", device, "up", node=name)
        yield names, lambda: ip("link", "set", "cable0", "down", node=names[0])
    finally:
        for name in names:
            ip("netns", "del", name, check=False)


def test_two_nodes_stop_when_the_link_between_them_is_cut(
    start, stage1, alone, tmp_path, two_nodes
):
    """torchrun on two "nodes"; the run stops within the timeout, says so, and is resumed by one."""
    names, cut = two_nodes
    more = ("--model", stage1, *SHORT, "--batching", "modality", "--save-every", 2)
    more += ("--timeout", 8)
    running = []
    for i, name in enumerate(names):
        node = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"]
        node += ["--nnodes", "2", "--node-rank", str(i), "--nproc-per-node", "1"]
        node += ["--master-addr", "10.77.0.1", "--master-port", "29511"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"cable{i}"}
        running.append(
            subprocess.Popen(
                [*node, *command(start, tmp_path, *more)],
                cwd=ROOT,
                env=env,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
    try:
        wait_for(running[0], tmp_path, 4)
        cut()
        started = time.time()
        said = [process.communicate(timeout=90)[1] for process in running]
        assert time.time() - started < 60
        assert all(process.returncode != 0 for process in running)
        # While a state was being written, it says that: the state before is whole.
        pattern = r"train.py: (the processes have lost each other|.* could not be saved)"
        assert any(re.search(pattern, text) for text in said)
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    run(*command(start, tmp_path, *more, "--resume"))
    one, both = (torch.tensor(losses(folder)) for folder in (alone["modality"], tmp_path))
    assert torch.allclose(one, both, rtol=1e-5)


def test_a_full_disk_stops_the_run_and_keeps_the_state_before(start, stage1, tmp_path):
    process = begin(start, tmp_path, "--model", stage1, "--save-every", 3)
    wait_for(process, tmp_path, 5)
    process.kill()
    process.communicate()
    (state,) = tmp_path.glob("states/step-*[0-9]")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = begin(start, tmp_path, "--model", stage1, "--save-every", 3, "--resume", limit=limit)
    said = process.communicate()[1]
    assert process.returncode == 1 and "Traceback" not in said
    assert "could not be saved" in said and f"the one before is untouched: {state}" in said
    run(*command(start, tmp_path, "--model", stage1, "--save-every", 3, "--resume"))


def test_a_damaged_or_foreign_state_is_one_sentence(start, stage1, tmp_path):
    more = ("--model", stage1, "--save-every", 3)
    process = begin(start, tmp_path, *more)
    wait_for(process, tmp_path, 5)
    process.kill()
    process.communicate()
    said = run(*command(start, tmp_path, *more, "--resume", "--seed", 1), fails=True)
    assert "was written with another --seed" in said
    (file,) = tmp_path.glob("states/step-*[0-9]/*.distcp")
    file.write_bytes(file.read_bytes()[:1000])
    said = run(*command(start, tmp_path, *more, "--resume"), fails=True)
    assert "cannot be read" in said and "Traceback" not in said


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


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_give_the_same_losses(start, stage1, alone, tmp_path):
    flags = ("--model", stage1, *SHORT, "--batching", "modality", "--compile")
    stage(2, start, tmp_path, *flags, launcher=torchrun(2), fails=None)
    one, compiled = (torch.tensor(losses(folder)) for folder in (alone["modality"], tmp_path))
    assert torch.allclose(one, compiled, rtol=1e-5)


def test_the_model_of_the_last_state_is_exported_on_demand(start, stage1, tmp_path):
    process = begin(start, tmp_path, "--model", stage1, "--save-every", 2)
    wait_for(process, tmp_path, 4)
    process.kill()
    process.communicate()
    states = sorted(tmp_path.glob("states/step-*[0-9]"))
    said = run(*command(start, tmp_path, "--model", stage1, "--save-every", 2, "--export"))
    assert f"exported the state of step {int(states[-1].name[5:])}" in said
    before, after = (load_file(f / "model.safetensors") for f in (stage1, tmp_path))
    assert moved(before, after)
    assert sorted(tmp_path.glob("states/step-*[0-9]")) == states  # still there to go on from


def test_a_run_is_watched_in_what_is_installed(monkeypatch, tmp_path):
    shown = []
    board = SimpleNamespace(add_scalar=lambda *scalar: shown.append(scalar))
    run = SimpleNamespace(log=lambda row, step: shown.append((row, step)))
    fakes = {
        "torch.utils.tensorboard": SimpleNamespace(SummaryWriter=lambda folder: board),
        "wandb": SimpleNamespace(init=lambda **how: run),
    }
    row = {"step": 7, "loss": 0.5, "spike": [[1]]}
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
        train.watcher(name.rpartition(".")[2], tmp_path, {})(row)
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
        with pytest.raises(ValueError, match=f"pip install {name.rpartition('.')[2]}"):
            train.watcher(name.rpartition(".")[2], tmp_path, {})
    assert shown == [("loss", 0.5, 7), (row, 7)]
    with pytest.raises(ValueError, match="expected tensorboard or wandb"):
        train.watcher("paper", tmp_path, {})


def test_a_full_memory_says_which_knobs_there_are(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "train", full)
    monkeypatch.setattr(sys, "argv", ["train.py", "--stage", "2"])
    with pytest.raises(SystemExit, match="--micro-batch, or --recompute full"):
        train.main()
