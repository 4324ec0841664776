"""python -m pytest tests/test_instruct.py: instruction data from a teacher that has every fault.

The server is real, on loopback, and so is the openai client; nothing else is asked.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from teacher import BROKEN, BUSY, CUT, EMPTY, NONSENSE, SLOW, serve

import data
import instruct
import tokenizer
from records import Records

ROOT = Path(__file__).parent.parent
WORDS = ROOT / "tiny" / "weights" / "llama"
TALK = "Question:\nHow many cats are there?\n===\nAnswer:\nThere is one cat.\n===\n"
TALK += "Question:\nWhere is it?\n===\nAnswer:\nIt lies on the left side.\n==="
DETAIL = "The picture shows a cat. " * 12
REASONING = "Question:\nWhy is it there?\n===\nAnswer:\n" + "It lies there because it is warm. " * 5


@pytest.fixture
def pictures(tmp_path):
    """Twelve pictures as the tiny world describes them."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(12):
        box = [0.1, 0.2, 0.3, 0.4 + i / 100]
        told = {
            "captions": [f"a cat {i}", "one cat"],
            "instances": [{"category": "cat", "bbox": box}],
        }
        (folder / f"{i:05}.json").write_text(json.dumps(told))
        (folder / f"{i:05}.jpg").touch()
    return folder


def command(pictures, url, *more, kind="conversation"):
    args = ["--captions", pictures, "--type", kind, "--base-url", url, "--model", "teacher"]
    args += ["--out", pictures.parent / "out.json", *more]
    return [sys.executable, str(ROOT / "instruct.py"), *map(str, args)]


def run(pictures, url, *more, kind="conversation", code=0):
    done = subprocess.run(command(pictures, url, *more, kind=kind), capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def rows_of(pictures):
    lines = (pictures.parent / "out.json.answers.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("kind", "text", "n_turns"),
    [("conversation", TALK, 4), ("detail", DETAIL, 2), ("reasoning", REASONING, 2)],
)
def test_answers_become_official_records(pictures, kind, text, n_turns):
    with serve(lambda messages, n: text) as server:
        done = run(pictures, server.url, "--images", "tiny/{}", "--jobs", "4", kind=kind)
    records = Records(pictures.parent / "out.json")
    assert len(records) == server.n_requests == 12 and server.most <= 4
    assert "12 records" in done.stdout and "tokens asked" in done.stdout
    ends = set()
    for i, record in enumerate(records):
        assert record["image"] == f"tiny/{i:05}.jpg" and len(record["conversations"]) == n_turns
        first = record["conversations"][0]["value"]
        ends.add(first.startswith("<image>\n"))
        assert first.count("<image>") == 1
        data.encode(record["conversations"], tokenizer.load(WORDS), "v1")
    assert ends == {True, False}  # on either side of the question
    told = server.seen[0]["messages"]
    assert (
        told[0]["role"] == "system" and "[0." not in told[-1]["content"] or kind != "conversation"
    )
    roles = [message["role"] for message in told[1:]]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"] and len(roles) >= 5


def test_conversations_are_written_without_boxes_and_the_others_with(pictures):
    (picture,) = instruct.read_pictures(pictures, None, 1)
    assert instruct.context(picture, "conversation") == "a cat 0\none cat"
    told = "a cat 0\none cat\n\ncat: [0.100, 0.200, 0.300, 0.400]"
    assert instruct.context(picture, "detail") == instruct.context(picture, "reasoning") == told


def test_cocos_files_are_read(tmp_path):
    images = [{"id": 9, "file_name": "000000000009.jpg", "width": 200, "height": 100}]
    images.append({"id": 10, "file_name": "x.jpg", "width": 10, "height": 10})
    captions = {"images": images, "annotations": [{"image_id": 9, "caption": " A cat. "}]}
    crowd = {"image_id": 9, "category_id": 3, "bbox": [0, 0, 1, 1], "iscrowd": 1}
    boxes = {
        "categories": [{"id": 3, "name": "cat"}],
        "annotations": [{"image_id": 9, "category_id": 3, "bbox": [20, 10, 100, 50]}, crowd],
    }
    for name, content in (("c.json", captions), ("b.json", boxes)):
        (tmp_path / name).write_text(json.dumps(content))
    (picture,) = instruct.read_pictures(tmp_path / "c.json", tmp_path / "b.json")
    assert picture["file"] == "000000000009.jpg" and picture["id"] == "000000000009"
    assert instruct.context(picture, "detail") == "A cat.\n\ncat: [0.100, 0.100, 0.600, 0.600]"


def test_every_fault_is_tried_again(pictures):
    """The first answers are faults; each is asked again until all is well."""
    faults = (BUSY, BROKEN, SLOW, CUT)
    with serve(lambda messages, n: faults[n - 1] if n <= len(faults) else TALK) as server:
        run(pictures, server.url, "--timeout", "1", "--jobs", "3")
    assert len(Records(pictures.parent / "out.json")) == 12
    assert server.n_requests == 12 + len(faults)


@pytest.mark.parametrize("fault", [BUSY, BROKEN, SLOW, CUT, NONSENSE, EMPTY])
def test_a_fault_that_stays_is_named_and_asked_again_by_the_next_run(pictures, fault):
    def answer(messages, n):
        return fault if "a cat 3" in messages[-1]["content"] else TALK

    more = ("--retries", "1", "--timeout", "0.5")
    with serve(answer, pause=1) as server:
        done = run(pictures, server.url, *more, code=1)
        assert "00003: " in done.stderr and "1 requests failed" in done.stderr
        assert len(Records(pictures.parent / "out.json")) == 11
    with serve(lambda messages, n: TALK) as server:
        run(pictures, server.url, *more)
        assert server.n_requests == 1
    assert len(Records(pictures.parent / "out.json")) == 12


def test_a_killed_run_goes_on_and_asks_for_nothing_twice(pictures):
    def slowly(messages, n):
        time.sleep(0.1)
        return TALK

    with serve(slowly) as server:
        process = subprocess.Popen(
            command(pictures, server.url, "--jobs", "2"), stderr=subprocess.DEVNULL
        )
        log = pictures.parent / "out.json.answers.jsonl"
        while not log.exists() or log.read_bytes().count(b"\n") < 4:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        n_done = len(rows_of(pictures))
        assert 4 <= n_done < 12
        with open(log, "a") as file:  # a line that was being written
            file.write('{"id": "00011", "type": "conv')
        asked = server.n_requests
        done = run(pictures, server.url)
        assert server.n_requests - asked == 12 - n_done
    assert f"{n_done} were answered before" in done.stderr
    assert len(Records(pictures.parent / "out.json")) == 12
    assert len({row["id"] for row in rows_of(pictures)}) == len(rows_of(pictures)) == 12


BAD = {
    "no pairs": ("form", "I see a cat."),
    "an answer is missing": ("form", "Question:\nWhat?\n===\n"),
    "labels": ("form", "Q: What?\n===\nA: A cat."),
    "captions": ("told", TALK.replace("one cat", "one cat, as the captions say")),
    "boxes": ("told", TALK.replace("left side", "left; its bounding box is small")),
    "numbers": ("told", TALK.replace("left side", "left, at [0.123, 0.4]")),
    "a picture": ("form", TALK.replace("one cat", "<image>")),
    "twice": ("form", TALK.replace("Where is it?", "How many cats are there?")),
    "long": ("length", TALK.replace("left side", "left " * 300)),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_answer_is_kept_with_the_reason_and_not_asked_again(pictures, name):
    reason, text = BAD[name]
    with serve(lambda messages, n: text if n == 1 else TALK) as server:
        done = run(pictures, server.url, "--jobs", "1")
        run(pictures, server.url)
        assert server.n_requests == 12
    assert f"rejected for {reason}: 1" in done.stdout
    (row,) = [row for row in rows_of(pictures) if "reason" in row]
    assert row["text"] == text and row["reason"].startswith(f"{reason}: ")
    assert row["tokens"][1] == len(text.split())
    assert len(Records(pictures.parent / "out.json")) == 11


def test_a_number_in_ordinary_speech_is_no_box():
    chance = random.Random(0)
    text = "The picture shows 3 cats at 1.5 metres from 2 dogs. " * 6
    instruct.check(instruct.pairs_of(text, "detail", chance), "detail")


@pytest.mark.parametrize("kind", instruct.TYPES)
def test_our_own_examples_pass_our_own_checks(kind):
    answers = [m["content"] for m in instruct.read_seeds(kind) if m["role"] == "assistant"]
    assert len(answers) >= 2
    for answer in answers:
        instruct.check(instruct.pairs_of(answer, kind, random.Random(0)), kind)


def test_a_dry_run_prints_the_messages_and_asks_nobody(pictures):
    done = run(pictures, "http://127.0.0.1:9/v1", "--dry-run")
    assert done.stdout.startswith("--- system\n") and done.stdout.rstrip().endswith("one cat")
    assert not (pictures.parent / "out.json").exists()


def test_mistakes_are_one_sentence(pictures, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "describes no pictures" in run(empty, "http://127.0.0.1:9/v1", code=2).stderr
    captions = {"images": [{"id": 1, "file_name": "x", "width": 1, "height": 1}]}
    captions["annotations"] = [{"image_id": 1, "caption": "A cat."}]
    (tmp_path / "c.json").write_text(json.dumps(captions))
    done = run(tmp_path / "c.json", "http://127.0.0.1:9/v1", kind="detail", code=2)
    assert "add --boxes FILE" in done.stderr
    (tmp_path / "d.json").write_text("{}")
    done = run(tmp_path / "d.json", "http://127.0.0.1:9/v1", code=2)
    assert "lacks the key 'annotations'" in done.stderr


def test_without_the_client_one_sentence_says_what_to_install(pictures):
    code = "import sys; sys.modules['openai'] = None; import instruct; instruct.main()"
    args = command(pictures, "http://127.0.0.1:9/v1")[2:]
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and "pip install openai" in done.stderr
