"""python -m pytest tests/test_readme.py: what the README says is so."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)


def test_the_first_command_prints_the_printed_answer():
    command = next(text for kind, text in BLOCKS if kind == "bash").strip()
    install, ask = command.split(" && ")
    assert install == "pip install -r requirements.txt"
    done = subprocess.run(
        ask.replace("python", sys.executable, 1),
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    printed = next(text for kind, text in BLOCKS if kind == "")
    assert done.returncode == 0 and done.stdout == printed


@pytest.mark.parametrize("code", [text for kind, text in BLOCKS if kind == "python"])
def test_each_python_example_runs(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip()


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`([\w/]+(?:\.(?:py|md|jsonl?|txt|jpg)|/))`", README)))
)
def test_every_file_that_is_named_is_there(name):
    assert (ROOT / name).exists() or name == "runs/"


def test_every_module_of_the_house_is_in_the_tour():
    named = set(re.findall(r"^\| `(\w+\.py)`", README, re.M))
    assert named == {path.name for path in ROOT.glob("*.py")}


@functools.cache
def help_of(path: Path, *command):
    call = [sys.executable, path, *command, "--help"]
    return subprocess.run(call, capture_output=True, text=True)


def test_every_flag_that_is_shown_exists():
    for script, rest in re.findall(r"python (?:\S*/)?(\w+\.py)([^\n#|`]*)", README):
        path = next(p for p in (ROOT / script, ROOT / "tiny" / script) if p.exists())
        command = rest.split()[:1] if script == "checkpoint.py" else []
        shown = help_of(path, *command).stdout
        for flag in re.findall(r"--[a-z-]+", rest):
            assert flag in shown, f"{script} has no {flag}"


def test_the_table_is_the_one_that_was_measured():
    results = json.loads((ROOT / "tiny" / "results.json").read_text())
    for row, figures in results["rows"].items():
        line = re.search(rf"^\| {row} \| (.*) \|$", README, re.M)[1].split(" | ")
        assert line == [f"{share:.1%}" for share in figures.values()]


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_every_file_says_what_it_is(path):
    done = help_of(path)
    assert done.returncode == 0 and len(done.stdout) > 40
