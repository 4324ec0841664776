"""python -m pytest tests/test_demo.py: the page, as a person with a browser and as ten at once.

The turns and the memory are tested everywhere. The rest needs gradio (requirements-demo.txt), and
the browser test playwright and Chromium (`apt install chromium`); where they are missing it is
skipped. SCREENSHOT=FILE keeps a picture of the page.
"""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import demo
import generate
from decoding import Decoding

ROOT = Path(__file__).parent.parent
STICKERS = ROOT / "examples" / "stickers.jpg"
QUESTION, ANSWER = "What colour is the paper?", "The paper is green."
needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="pip install -r requirements-demo.txt"
)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def text(words):
    return [{"type": "text", "text": words}]


def picture(path):
    return {"type": "file", "file": {"path": str(path)}}


def test_messages_become_turns_with_their_pictures():
    history = [
        {"role": "user", "content": [picture("a.jpg"), *text("What is it?")]},
        {"role": "assistant", "content": text("A cat.")},
    ]
    turns, files = demo.turns_of(history, {"text": "And <image>this?", "files": ["b.jpg", "c.jpg"]})
    assert files == ["a.jpg", "b.jpg", "c.jpg"]
    assert turns == [
        ("human", "<image>\nWhat is it?"),
        ("gpt", "A cat."),
        ("human", "<image>\n<image>\nAnd this?"),
    ]


def test_a_question_without_an_answer_is_left_out_with_its_pictures():
    failed = {"role": "assistant", "content": text("it is damaged"), "metadata": {"title": "no"}}
    for answer in ([], [failed]):  # stopped before the first word; an error
        history = [{"role": "user", "content": [picture("a.jpg"), *text("What is it?")]}, *answer]
        turns, files = demo.turns_of(history, {"text": "Once more", "files": ["b.jpg"]})
        assert turns == [("human", "<image>\nOnce more")] and files == ["b.jpg"]


def test_a_follow_up_does_not_read_the_picture_again():
    host = demo.Host(generate.parser().parse_args([]))
    seen = []
    host.model.vision_tower.register_forward_hook(lambda *a: seen.append(1))
    turns, files = [("human", f"<image>\n{QUESTION}")], [STICKERS]
    *_, first = host.reply(turns, files, "tiny model", 50, Decoding())
    turns += [("gpt", first.text), ("human", "Is there a lemon?")]
    *_, second = host.reply(turns, files, "tiny model", 50, Decoding())
    assert first.text == ANSWER and second.text and len(seen) == 1
    host.names.append("another")  # chosen on the page: it knows nothing of the conversation
    *_, third = host.reply(turns, files, "another", 50, Decoding())
    assert host.name == "another" and third.ids == second.ids and len(seen) == 1
    with pytest.raises(ValueError, match="no model is called"):
        list(host.reply(turns, files, "../secret", 50, Decoding()))


def test_without_gradio_it_is_one_sentence(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ImportError")
    done = subprocess.run(
        [sys.executable, "demo.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "requirements-demo.txt" in done.stderr


@pytest.fixture(scope="module")
def page():
    """The address of a running page."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "demo.py", "--port", str(port), "--max-upload", "1mb"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if "http://127.0.0.1" in line:
            break
    threading.Thread(target=process.stderr.read, daemon=True).start()
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()


def knobs(**changes):
    values = dict(name="tiny model", tokens=60, temperature=0, top_p=1, top_k=0, min_p=0)
    return list((values | dict(penalty=1, seed=None) | changes).values())


@needs_gradio
def test_ten_at_once_are_all_answered_and_a_bad_one_harms_nobody(page, tmp_path):
    import gradio_client

    (tmp_path / "bad.png").write_text("not a picture")
    client = gradio_client.Client(page, verbose=False)
    jobs = []
    for i in range(10):
        file = tmp_path / "bad.png" if i == 4 else STICKERS
        words = "word " * 3500 if i == 7 else QUESTION
        message = {"text": words, "files": [gradio_client.handle_file(str(file))]}
        jobs.append(client.submit(message, *knobs(), api_name="/chat"))
    for i, job in enumerate(jobs):
        said = job.result(60)
        if i in (4, 7):
            assert ("bad.png: expected a picture" if i == 4 else "context is 1024") in str(said)
            assert "no answer" in str(said)
        else:
            assert said == ANSWER
    message = {"text": QUESTION, "files": []}
    for wrong in (dict(name="/etc"), dict(temperature=-1), dict(tokens=10**9)):
        with pytest.raises(Exception):  # noqa: B017  gradio's own words
            client.predict(message, *knobs(**wrong), api_name="/chat")


@needs_gradio
def test_files_of_the_server_and_large_ones_are_refused(page, tmp_path):
    import httpx

    secret = {"path": str(STICKERS), "meta": {"_type": "gradio.FileData"}}
    asked = {"data": [{"text": QUESTION, "files": [secret]}, *knobs()]}
    event = httpx.post(f"{page}/gradio_api/call/chat", json=asked).json()["event_id"]
    said = httpx.get(f"{page}/gradio_api/call/chat/{event}", timeout=30).text
    assert "event: error" in said and ANSWER not in said
    big = {"files": ("big.png", bytes(2_000_000))}
    assert httpx.post(f"{page}/gradio_api/upload", files=big).status_code == 413


@needs_gradio
@pytest.mark.skipif(
    not CHROMIUM or importlib.util.find_spec("playwright") is None,
    reason="needs Chromium, and pip install playwright",
)
def test_in_a_browser_a_picture_is_uploaded_asked_about_and_answered(page):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1100, "height": 800})
        hosts = set()
        tab.on("request", lambda request: hosts.add(re.match(r"\w+:(//[^/]+)?", request.url)[1]))
        tab.goto(page)
        tab.locator("input[type=file]").first.set_input_files(STICKERS)
        tab.wait_for_selector("img[src*='stickers.jpg']")
        for words, expected in (
            ("Describe the picture in detail.", "small camera at the bottom."),
            (QUESTION, ANSWER),
            ("word " * 3900, "the model's context is"),
            ("Is there a lemon?", "yes"),
        ):
            tab.locator("textarea").first.fill(words)
            tab.keyboard.press("Enter")
            tab.wait_for_selector(f"text={expected}", timeout=30_000)
            time.sleep(0.5)
        if "SCREENSHOT" in os.environ:
            tab.screenshot(path=os.environ["SCREENSHOT"])
        browser.close()
    assert hosts - {None} == {page.removeprefix("http:")}
