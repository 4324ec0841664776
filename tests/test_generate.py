"""python -m pytest tests/test_generate.py: it answers, or refuses in one sentence."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import generate as g
import image
from llava import LLaVA

ROOT = Path(__file__).parent.parent
STICKERS = ROOT / "examples" / "stickers.jpg"
GOLDEN = json.loads((ROOT / "examples" / "stickers.json").read_text())


def ask(*args, stdin=None):
    command = [sys.executable, "generate.py", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, input=stdin)


@pytest.fixture(scope="module")
def model():
    return LLaVA.from_pretrained(g.TINY, dtype=torch.float32)


def test_the_answer_is_all_that_stdout_holds_and_comes_quickly():
    started = time.time()
    done = ask("--image", STICKERS, "--prompt", GOLDEN["question"])
    seconds = time.time() - started
    assert done.returncode == 0 and done.stdout == GOLDEN["answer"] + "\n"
    assert done.stderr.startswith("tiny model") and done.stderr.count("\n") == 1
    assert seconds < 10  # 3 on a quiet machine; the README has the measured figure


def test_the_bundled_model_gives_its_golden_answer_token_for_token():
    done = ask("--image", STICKERS, "--prompt", GOLDEN["question"], "--json")
    result = json.loads(done.stdout)
    assert result["token_ids"] == GOLDEN["token_ids"]
    assert set(result) == {"answer", "token_ids", "logprobs", "ended", "prompt", "timings"}
    assert len(result["logprobs"]) == len(result["token_ids"]) and result["ended"] == "end"


def test_a_batch_gives_the_answers_of_its_rows_alone(model):
    picture = image.load(STICKERS)
    questions = [
        "What colour is the paper?",
        "Describe the picture in detail.",
        "How many cats do you see?",
    ]
    prompts = [g.data.render([("human", f"<image>\n{q}")], "v1") for q in questions]
    prompts.append(g.data.render([("human", "What is one plus two?")], "v1"))
    pictures = [picture] * 3 + [None]
    together = g.generate(model, prompts, pictures, 40)
    alone = [g.generate(model, [p], [i], 40)[0] for p, i in zip(prompts, pictures, strict=True)]
    assert together == alone and all(together)


def test_the_first_token_takes_less_than_two_seconds(model):
    prompt = g.data.render([("human", "<image>\nDescribe the picture in detail.")], "v1")
    started = time.process_time()  # what other programs do does not count
    next(g.stream(model, [prompt], [image.load(STICKERS)], 30))
    assert time.process_time() - started < 2


def test_a_seed_repeats_a_sample_and_a_low_top_p_is_greedy(model):
    prompt = [g.data.render([("human", "<image>\nWhat do you see in this picture?")], "v1")]
    picture = [image.load(STICKERS)]
    greedy = g.generate(model, prompt, picture, 30)
    assert g.generate(model, prompt, picture, 30, temperature=1.0, top_p=1e-6) == greedy
    wild = [g.generate(model, prompt, picture, 30, temperature=3.0, seed=s) for s in (1, 1, 2)]
    assert wild[0] == wild[1] != wild[2]


def test_pictures_are_encoded_once_per_prompt(model, monkeypatch):
    calls = []
    forward = model.vision_tower.forward
    monkeypatch.setattr(model.vision_tower, "forward", lambda *a: calls.append(1) or forward(*a))
    prompt = g.data.render([("human", "<image>\nDescribe the picture in detail.")], "v1")
    (ids,) = g.generate(model, [prompt], [image.load(STICKERS)], 30)
    assert len(ids) > 3 and len(calls) == 1


def test_chat_keeps_the_picture_for_the_second_question():
    done = ask(
        "--image", STICKERS, "--chat", stdin="What colour is the paper?\nWhat is one plus two?\n"
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2


@pytest.fixture
def bad_files(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "cut.jpg").write_bytes(STICKERS.read_bytes()[:2000])
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    return tmp_path


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--image", "{bad}/gone.png"], "gone.png"),
        (["--image", "{bad}/empty.png"], "empty"),
        (["--image", "{bad}/text.png"], "text.png"),
        (["--image", "{bad}/cut.jpg"], "cut.jpg"),
        (["--image", "{bad}/bomb.png"], "bomb.png"),
        (["--model", "{bad}"], "config.json"),
        (["--model", "{bad}/nowhere"], "nowhere"),
        (["--prompt", "<image> and <image>", "--image", str(STICKERS)], "2 <image> for 1"),
        (["--prompt", "word " * 3000], "context"),
        (["--prompt", "\udcff"], "UTF-8"),
        (["--template", "v9"], "v9"),
        (["--temperature", "-1"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(bad_files, args, complaint, monkeypatch, capsys):
    args = [a.replace("{bad}", str(bad_files)) for a in args]
    monkeypatch.setattr(sys, "argv", ["generate.py", *args])
    with pytest.raises(SystemExit) as stopped:
        g.main()
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == ""
    assert complaint in said.err.splitlines()[-1]


def test_the_exit_code_reaches_the_shell():
    done = ask("--image", "gone.png")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


def test_an_animated_picture_gives_its_first_frame_and_says_so(tmp_path):
    frame = image.load(STICKERS)
    blank = Image.new("RGB", frame.size)
    frame.save(tmp_path / "moving.webp", save_all=True, append_images=[blank], lossless=True)
    done = ask("--image", tmp_path / "moving.webp", "--prompt", GOLDEN["question"])
    assert done.stdout == GOLDEN["answer"] + "\n" and "first" in done.stderr


def test_the_device_and_its_best_type_are_chosen(monkeypatch):
    cuda, mps = torch.cuda, torch.backends.mps
    monkeypatch.setattr(cuda, "is_available", lambda: False)
    monkeypatch.setattr(mps, "is_available", lambda: False)
    assert g.place(None, None) == ("cpu", torch.float32)
    assert g.place(None, "bf16") == ("cpu", torch.bfloat16)
    with pytest.raises(ValueError, match="--device is mps"):
        g.place("mps", None)
    monkeypatch.setattr(mps, "is_available", lambda: True)
    monkeypatch.setattr(mps, "is_macos_or_newer", lambda major, minor: major < 14)
    assert g.place(None, None) == ("mps", torch.float16)
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    for has_bf16, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(cuda, "is_bf16_supported", lambda has=has_bf16, **k: has)
        assert g.place(None, None) == ("cuda", dtype)
    assert g.place("cpu", None) == ("cpu", torch.float32)


def test_from_python_it_streams_and_answers_a_batch(model, capsys):
    picture = image.load(STICKERS)
    ask = lambda text: g.data.render([("human", text)], model.template)  # noqa: E731
    prompts = [ask("<image>\nWhat is at the top left?"), ask("<image>\nIs there a lemon?")]
    batch = g.generate(model, prompts, [picture, [picture]], max_new_tokens=20)
    said = [[], []]
    for tokens in g.stream(model, prompts, [picture, [picture]], max_new_tokens=20):
        for row, token in zip(said, tokens, strict=True):
            row += [] if token is None else [token]
    assert said == batch and "panda" in model.tokenizer.decode(batch[0])
