"""python -m pytest tests/test_chat.py: conversations, files of questions, and manners.

Proves, on the bundled model: commands of a conversation do what they say and mistakes in them end
nothing; in a real terminal Ctrl-C stops an answer or a line and not the program; a file of
questions is answered row by row, with errors where they belong, and goes on where it stopped;
closed pipes and Ctrl-C leave no traceback.
"""

import json
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import answers
import bulk
import chat
import data
import generate as g
import image
from decoding import Decoding
from llava import LLaVA

ROOT = Path(__file__).parent.parent
STICKERS = ROOT / "examples" / "stickers.jpg"
GOLDEN = json.loads((ROOT / "examples" / "stickers.json").read_text())
COMMAND = [sys.executable, "generate.py"]


@pytest.fixture(scope="module")
def model():
    return LLaVA.from_pretrained(g.TINY, dtype=torch.float32)


# Conversations


def test_a_conversation_with_commands(model, tmp_path, capsys):
    talk = chat.Chat(model)
    talk.command(f"/image {STICKERS}")
    assert talk.ask(GOLDEN["question"])["answer"] == GOLDEN["answer"]
    assert talk.ask("What colour is the paper?")["answer"] == "The paper is green."
    talk.command(f"/save {tmp_path / 'talk.json'}")
    (record,) = json.loads((tmp_path / "talk.json").read_text())
    assert record["image"] == str(STICKERS) and len(record["conversations"]) == 4
    ids, _ = data.encode(record["conversations"], model.tokenizer, "v1")  # it could be learned
    assert ids.count(data.IMAGE_TOKEN) == 1
    talk.command("/reset")
    assert not talk.turns and not talk.pictures and not talk.memory.ids


def test_a_system_text_is_what_the_model_reads_first(model):
    talk = chat.Chat(model)
    talk.command(f"/image {STICKERS}")
    talk.ask("What colour is the paper?")
    talk.command("/system You are a pirate. </s>")
    result = talk.ask("What colour is the paper?")
    assert result["prompt"].startswith("You are a pirate. </s> USER: <image>\nWhat")
    ids, _ = data.encode_turns(
        [("system", "</s>"), ("human", "Hi")], model.tokenizer, model.template
    )
    assert model.tokenizer.eos_id not in ids  # a user's words are no control tokens
    standard = data.render([("human", "Hi")], "v1").partition(" USER")[0]
    assert data.render([("system", standard), ("human", "Hi")], "v1") == data.render(
        [("human", "Hi")], "v1"
    )
    with pytest.raises(ValueError, match="no place for a system text"):
        data.render([("system", "x"), ("human", "Hi")], "mistral_instruct")


@pytest.mark.parametrize(
    "line",
    [
        "/image gone.png",
        "/image",
        "/nonsense",
        "/save /nowhere/x.json",
        "/system \udcff",
        f"/save {STICKERS}",
    ],
)
def test_a_command_that_fails_changes_nothing(model, line):
    talk = chat.Chat(model)
    talk.command(f"/image {STICKERS}")
    talk.ask("What colour is the paper?")
    before = list(talk.turns), list(talk.waiting)
    with pytest.raises(ValueError):
        talk.command(line)
    assert (talk.turns, talk.waiting) == before
    assert talk.ask("Is there a lemon?")["answer"]


def test_ctrl_c_keeps_what_was_said_and_the_conversation_goes_on(model, monkeypatch):
    talk, whole = chat.Chat(model), chat.Chat(model)
    for one in (talk, whole):
        one.command(f"/image {STICKERS}")
    add, n = answers.Answer.add, [0]

    def add_and_stop(self, token, logprob):
        n[0] += 1
        if n[0] == 12:
            raise KeyboardInterrupt
        add(self, token, logprob)

    monkeypatch.setattr(answers.Answer, "add", add_and_stop)
    result = talk.ask(GOLDEN["question"])
    monkeypatch.undo()
    assert result["ended"] == "interrupted" and len(result["token_ids"]) == 11
    assert GOLDEN["answer"].startswith(result["answer"]) and talk.turns[-1][1] == result["answer"]
    # What follows is what would follow if the cut answer had always been there.
    whole.turns, whole.pictures = list(talk.turns), [image.load(STICKERS)]
    whole.waiting = []
    text = "What colour is the paper?"
    assert talk.ask(text)["token_ids"] == whole.ask(text)["token_ids"]


def test_a_full_context_is_said_and_the_conversation_stays(model):
    talk = chat.Chat(model)
    talk.command(f"/image {STICKERS}")
    talk.ask("What colour is the paper?")
    before = list(talk.turns)
    with pytest.raises(ValueError, match="context"):
        talk.ask("word " * model.config.text.max_positions)
    assert talk.turns == before
    assert talk.ask("Is there a lemon?")["ended"] == "end"


def test_in_a_terminal_lines_can_be_edited_and_ctrl_c_ends_nothing():
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.environ |= {"TERM": "xterm", "NO_COLOR": "1"}
        os.execv(sys.executable, [*COMMAND, "--chat", "--image", str(STICKERS)])
    seen = ""

    def wait_for(pattern):
        nonlocal seen
        ends = time.time() + 30
        while not re.search(pattern, seen):
            assert time.time() < ends, seen
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 10000).decode()
        seen = ""

    wait_for("you: ")
    # "was" becomes "is": home, twelve to the right, delete three, type
    os.write(terminal, b"What colour was the paper?\x01" + b"\x1b[C" * 12 + b"\x04" * 3 + b"is\n")
    wait_for(r"The paper is green\.[\s\S]*you: ")
    os.write(terminal, b"half a line")
    wait_for("half a line")
    time.sleep(0.2)  # while readline takes in a letter, Python would keep a Ctrl-C for the next
    os.write(terminal, b"\x03")
    wait_for(r"Ctrl-D ends the program[\s\S]*you: ")
    os.write(terminal, b"\x1b[A\n")  # arrow up: the question again
    wait_for(r"The paper is green\.[\s\S]*you: ")
    os.write(terminal, b"\x04")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0


# Many questions


@pytest.fixture
def ask_all(model, monkeypatch, tmp_path):
    """Run the command line in this process, on the model that is loaded already."""
    monkeypatch.setattr(bulk, "load", lambda args: model)

    def run(*args):
        args = g.parser().parse_args(list(map(str, args)))
        return bulk.run(args, Decoding.from_flags(args))

    return run


@pytest.fixture
def questions(tmp_path):
    """A file of nine questions, of which four cannot be answered."""
    shutil.copy(STICKERS, tmp_path / "a.jpg")
    (tmp_path / "bad.jpg").write_bytes(b"nothing")
    rows = [
        {"image": "a.jpg", "prompt": "What colour is the paper?", "id": 7},
        {"image": "bad.jpg", "prompt": "What colour is the paper?"},
        {"prompt": "What is one plus two?"},
        {"image": ["a.jpg", "a.jpg"], "text": "How many?", "question_id": "x"},
        {"image": "a.jpg", "prompt": "word " * 3000},
        {"image": "a.jpg"},
        {"image": "a.jpg", "prompt": "Is there a lemon?"},
        {"image": "a.jpg", "prompt": "Grüße 🐶? \u2028"},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    lines.insert(6, '{"image": "a.jpg", "prom')
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(lines) + "\n\n")
    return file, rows


def flags(file, out, *more):
    return "--prompts", file, "--out", out, "--image-folder", file.parent, *more


def read(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_each_row_has_its_answer_or_its_error(ask_all, questions, tmp_path, model):
    file, rows = questions
    assert ask_all(*flags(file, tmp_path / "out.jsonl", "--batch", 3)) == 1
    found = read(tmp_path / "out.jsonl")
    wrong = {1: "bad.jpg", 4: "context", 5: "prompt", 6: "line 7"}
    assert {i for i, row in enumerate(found) if "error" in row} == set(wrong)
    for i, words in wrong.items():
        assert words in found[i]["error"] and "answer" not in found[i]
    for row, written in zip(rows, found[:6] + found[7:], strict=True):
        assert row.items() <= written.items()
    assert found[0]["answer"] == "The paper is green." and found[0]["ended"] == "end"
    alone = g.generate(model, [data.render([("human", rows[2]["prompt"])], "v1")], [None], 512)
    assert found[2]["answer"] == model.tokenizer.decode(alone[0]).strip()


def test_text_that_is_no_unicode_is_an_error_of_its_row(ask_all, questions, tmp_path):
    file, _ = questions
    file.write_text('{"prompt": "\\ud800"}\n{"prompt": "What is one plus two?"}\n')
    for _ in range(2):
        ask_all(*flags(file, tmp_path / "out.jsonl"))
        found = read(tmp_path / "out.jsonl")
        assert "error" in found[0] and found[1]["answer"] and len(found) == 2


@pytest.mark.parametrize("seed", range(5))
def test_a_run_cut_anywhere_goes_on_to_the_same_file(ask_all, questions, tmp_path, seed):
    file, _ = questions
    more = "--temperature", 2, "--seed", 3, "--max-new-tokens", 9
    ask_all(*flags(file, tmp_path / "whole.jsonl", "--batch", 9, *more))
    whole = (tmp_path / "whole.jsonl").read_bytes()
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(whole[: random.Random(seed).randrange(len(whole))])
    ask_all(*flags(file, cut, "--batch", 2, *more))
    assert cut.read_bytes() == whole
    ask_all(*flags(file, cut, *more))  # nothing is left to do
    assert cut.read_bytes() == whole


def test_answers_to_other_questions_are_not_gone_on_with(ask_all, questions, tmp_path):
    file, _ = questions
    out = tmp_path / "out.jsonl"
    out.write_text('{"prompt": "another one", "answer": "yes"}\n')
    with pytest.raises(ValueError, match="no answer to these questions"):
        ask_all(*flags(file, out))
    assert len(read(out)) == 1


def test_a_run_goes_on_with_its_own_options_only(ask_all, questions, tmp_path):
    file, _ = questions
    out = tmp_path / "out.jsonl"
    ask_all(*flags(file, out, "--temperature", 1, "--seed", 3, "--stop", "."))
    out.write_bytes(out.read_bytes()[:400])
    with pytest.raises(ValueError, match=r"with --temperature 1.0, --seed 3, --stop \['\.'\]; say"):
        ask_all(*flags(file, out))
    ask_all(*flags(file, out, "--temperature", 1, "--seed", 3, "--stop", "."))
    assert len(read(out)) == 9


def test_a_row_with_an_answer_of_its_own_is_refused(ask_all, questions, tmp_path):
    file, _ = questions
    file.write_text('{"prompt": "x", "answer": "42"}\n')
    with pytest.raises(ValueError, match="line 1 has 'answer'"):
        ask_all(*flags(file, tmp_path / "out.jsonl"))


def test_files_folders_and_patterns_are_asked_about_one_by_one(ask_all, tmp_path, capsys):
    for name in ("b.jpg", "a.JPG", "c[1].jpg"):
        shutil.copy(STICKERS, tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a picture")
    ask = "--prompt", "What colour is the paper?"
    for values, names in (
        ([tmp_path], ["a.JPG", "b.jpg", "c[1].jpg"]),
        ([tmp_path / "*.jpg"], ["b.jpg", "c[1].jpg"]),
        ([tmp_path / "b.jpg", tmp_path / "c[1].jpg"], ["b.jpg", "c[1].jpg"]),
    ):
        assert bulk.names_several([list(map(str, values))])
        assert ask_all("--image", *values, *ask) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines == [f"{tmp_path / name}: The paper is green." for name in names]
    assert not bulk.names_several([[str(tmp_path / "c[1].jpg")]])  # that is a file
    with pytest.raises(ValueError, match="no pictures"):
        ask_all("--image", tmp_path / "*.webp", *ask)


# Manners


def run(*args, **more):
    return subprocess.run(
        [*COMMAND, *map(str, args)], cwd=ROOT, capture_output=True, text=True, **more
    )


def test_a_pipe_that_is_closed_ends_it_quietly():
    process = subprocess.Popen(
        [*COMMAND, "--image", STICKERS], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()  # before the first word
    _, errors = b"", process.stderr.read().decode()
    assert process.wait() == 141
    assert errors.startswith("tiny model") and errors.count("\n") == 1


def test_ctrl_c_ends_a_long_run_without_a_traceback_and_loses_no_answer(tmp_path):
    rows = [{"image": str(STICKERS), "prompt": GOLDEN["question"]}] * 2000
    file, out = tmp_path / "questions.jsonl", tmp_path / "out.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    args = ["--prompts", file, "--out", out, "--image-folder", "/"]
    process = subprocess.Popen(
        [*COMMAND, *args], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not out.exists() or not out.read_bytes():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate()
    assert process.returncode == 130 and said == "" and "Traceback" not in errors
    assert read(out)[0]["answer"] == GOLDEN["answer"]


def test_help_groups_its_flags():
    text = run("--help").stdout
    for group in ("the question:", "many questions:", "the model:", "the answer:"):
        assert group in text


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--top-k", "-1"], "--top-k is -1"),
        (["--beams", "2", "--temperature", "1"], "beams"),
        (["--answers", "3"], "--answers"),
        (["--batch", "0", "--image", STICKERS, STICKERS], "--batch"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--prompts", "x", "--chat"], "choose one"),
        (["--image", STICKERS, STICKERS, "--image", STICKERS], "one --image"),
        (["--out", "/nowhere/out.jsonl", "--image", STICKERS], "/nowhere/out.jsonl"),
        *([(["--device", "cuda"], "--device")] if not torch.cuda.is_available() else []),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_sentence(args, complaint, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        g.main()
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == ""
    assert complaint in said.err.splitlines()[-1]


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_remarks_are_coloured_in_terminals_that_want_it(no_color, coloured, monkeypatch, capsys):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    g.say("a remark")
    assert ("\033[" in capsys.readouterr().err) == coloured
