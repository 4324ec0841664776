"""What a stopped run goes on from: weights that learn, optimizer, random state, place in the data.

    out/states/step-00000500/
        __0_0.distcp, ...     the tensors, one file a process (torch.distributed.checkpoint)
        random-0.pt, ...      the random state of each process
        notes.json            the step, the recipe, what was skipped so far

A state is written under another name and renamed when it is complete. So a kill, a full disk or a
power cut leaves the one before as it was. Any number of processes reads what any other wrote.
Read next: train.py.
"""

import argparse
import contextlib
import json
import os
import shutil
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as dcp_state

from recipes import Recipe

# What may differ when a run is resumed: it changes no batch and no gradient, but for rounding.
FREE = set(
    "out save_every keep save_in_background save_dtype eval_data eval_every watch workers timeout "
    "max_bad on_bad shard recompute compile attention micro_batch".split()
)


def newest(out: Path) -> Path | None:
    """The last state that was saved whole: it got its name when it was complete."""
    found = sorted(out.glob("states/step-*[0-9]"))
    return found[-1] if found else None


class Saver:
    """Writes the states of a run, each process its own shards.

    All of a state goes to a temporary folder, which is renamed when it is complete; then the oldest
    states are removed. Whenever the process dies, there is a whole state.

    With `background` the tensors are copied to CPU memory, and the run goes on while they are
    written; its processes talk about that by themselves, in a group of their own.
    """

    def __init__(self, out: Path, recipe: Recipe):
        self.folder, self.keep = out / "states", recipe.keep
        self.parallel = dist.is_initialized()
        self.rank = dist.get_rank() if self.parallel else 0
        self.background, self.group = recipe.save_in_background, None
        if self.background and self.parallel:
            wait = timedelta(seconds=recipe.timeout)
            self.group = dist.new_group(backend="gloo", timeout=wait)
        self.writing = None  # (the state, what is done in the background)

    def save(self, model, optimizer, notes: dict):
        """Write a state; in the background it is whole only after `wait`, or `poll` later on."""
        self.wait()
        target = self.folder / f"step-{notes['step']:08}"
        work = target.with_suffix(".tmp")
        if self.rank == 0:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
        self.barrier()
        tensors, how = tensors_of(model, optimizer), {"checkpoint_id": work}
        how["no_dist"] = not self.parallel
        with self.named(target):
            torch.save(random_state(), work / f"random-{self.rank}.pt")
            if self.rank == 0:
                (work / "notes.json").write_text(json.dumps(notes))
            if self.background:
                self.barrier()  # every process has written its random state
                done = dcp.async_save(tensors, process_group=self.group, **how)
                self.writing = target, done
            else:
                dcp.save(tensors, **how)
        if not self.background:
            self.barrier()
            self.publish(target)

    def poll(self):
        """Give a state its name if it has been written meanwhile."""
        if self.writing and self.writing[1].done():
            self.wait()

    def wait(self):
        """Wait for the state that is being written. Raises ValueError if it could not be."""
        if self.writing:
            (target, done), self.writing = self.writing, None
            with self.named(target):
                done.result()
            self.publish(target)

    def publish(self, target: Path):
        if self.rank == 0:
            shutil.rmtree(target, ignore_errors=True)
            os.replace(target.with_suffix(".tmp"), target)
            for old in sorted(self.folder.glob("step-*[0-9]"))[: -self.keep]:
                shutil.rmtree(old)

    def barrier(self):
        if self.parallel:
            dist.barrier()

    @contextlib.contextmanager
    def named(self, target: Path):
        """Turn what goes wrong in writing into one sentence."""
        try:
            yield
        except (OSError, dcp.api.CheckpointException, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1][:200]
            raise ValueError(
                f"{target} could not be saved ({reason}); the one before is untouched: "
                f"{newest(self.folder.parent) or 'there is none'}"
            ) from None


def random_state() -> dict:
    gpu = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state()} | gpu


def tensors_of(model, optimizer) -> dict:
    options = dcp_state.StateDictOptions(ignore_frozen_params=True)
    return {
        "model": dcp_state.get_model_state_dict(model, options=options),
        "optimizer": dcp_state.get_optimizer_state_dict(model, optimizer, options=options),
    }


def load(out: Path, recipe: Recipe, model, optimizer) -> dict:
    """Fill model and optimizer from the newest state; returns the notes it was saved with."""
    state = newest(out)
    if state is None:
        raise ValueError(f"nothing to resume: there is no state in {out / 'states'}")
    try:
        notes = json.loads((state / "notes.json").read_text())
    except (OSError, ValueError) as error:
        raise unreadable(state, error) from None
    now = asdict(recipe)
    changed = [k for k, v in now.items() if k not in FREE and notes["recipe"].get(k) != v]
    if changed:
        raise ValueError(f"{state} was written with another --{', --'.join(changed)}")
    tensors = tensors_of(model, optimizer)
    try:
        dcp.load(tensors, checkpoint_id=state, no_dist=not dist.is_initialized())
    except (Exception, dcp.api.CheckpointException) as error:  # nearly anything, if it is damaged
        raise unreadable(state, error) from None
    options = dcp_state.StateDictOptions(strict=False, ignore_frozen_params=True)
    dcp_state.set_model_state_dict(model, tensors["model"], options=options)
    dcp_state.set_optimizer_state_dict(model, optimizer, tensors["optimizer"], options=options)
    rank = dist.get_rank() if dist.is_initialized() else 0
    if (state / f"random-{rank}.pt").exists():
        random = torch.load(state / f"random-{rank}.pt", weights_only=True)
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random["cuda"])
    return notes


def unreadable(state: Path, error) -> ValueError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1][:200]
    return ValueError(f"{state} cannot be read ({reason}); remove it to go on from the one before")


def main():
    """Print the states of a run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", nargs="?", type=Path, help="folder of a run")
    run = parser.parse_args().run
    if run is None:
        return print("python states.py RUN   the states from which a run can be resumed")
    for state in sorted(run.glob("states/step-*[0-9]")):
        notes = json.loads((state / "notes.json").read_text())
        n_bytes = sum(file.stat().st_size for file in state.iterdir())
        print(f"{state}: step {notes['step']}, {notes['processes']} processes, {n_bytes:,} bytes")


if __name__ == "__main__":
    main()
