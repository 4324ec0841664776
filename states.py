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
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as dcp_state

from recipes import Recipe

# What may differ when a run is resumed: it changes no batch and no gradient, but for rounding.
FREE = {"out", "save_every", "keep", "workers", "shard", "recompute", "compile", "micro_batch"}
FREE |= {"attention", "timeout", "eval_data", "eval_every", "save_dtype", "max_bad", "on_bad"}


def newest(out: Path) -> Path | None:
    """The last state that was saved whole: it got its name when it was complete."""
    found = sorted(out.glob("states/step-*[0-9]"))
    return found[-1] if found else None


def save(out: Path, keep: int, model, optimizer, notes: dict):
    """Write weights that learn, optimizer and random state, each process its own shards.

    All of it goes to a temporary folder, which is renamed when it is complete; then the oldest
    states are removed. Whenever the process dies, there is a whole state.
    """
    parallel = dist.is_initialized()
    rank = dist.get_rank() if parallel else 0
    target = out / "states" / f"step-{notes['step']:08}"
    work = target.with_suffix(".tmp")
    if rank == 0:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    if parallel:
        dist.barrier()
    try:
        dcp.save(tensors_of(model, optimizer), checkpoint_id=work, no_dist=not parallel)
        torch.save(torch.get_rng_state(), work / f"random-{rank}.pt")
        if rank == 0:
            (work / "notes.json").write_text(json.dumps(notes))
    except (OSError, dcp.api.CheckpointException, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1][:200]
        raise ValueError(
            f"the state of step {notes['step']} could not be saved ({reason}); "
            f"the one before is untouched: {newest(out) or 'there is none'}"
        ) from None
    if parallel:
        dist.barrier()
    if rank == 0:
        shutil.rmtree(target, ignore_errors=True)
        os.replace(work, target)
        for old in sorted(out.glob("states/step-*[0-9]"))[:-keep]:
            shutil.rmtree(old)
    if parallel:
        dist.barrier()


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
        torch.set_rng_state(torch.load(state / f"random-{rank}.pt", weights_only=True))
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
