"""python -m pytest tests/test_answers.py: batches, decoding and beams give the answers they should.

Proves, on the bundled model and on random ones in float32: rows answered together get the answers
that they get alone, and leave the batch when they have ended; what each knob leaves of a
distribution, and beams, are transformers'; a conversation that goes on from its cache says what it
would say if it were read anew; what is shown of an answer is never taken back.
"""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import answers
import data
import generate as g
import image
from answers import Answer, Memory, decode
from decoding import Decoding, choose, keep_min_p, keep_top_k, keep_top_p, penalise
from llama import LLaMA
from llava import LLaVA, LLaVAConfig

STICKERS = image.load(Path(__file__).parent.parent / "examples" / "stickers.jpg")
QUESTIONS = (
    "What colour is the paper?",
    "Describe the picture in detail.",
    "How many cats do you see?",
    "What is at the top left?\nAnswer the question using a single word or phrase.",
    "Is there a lemon?",
)


@pytest.fixture(scope="module")
def model():
    return LLaVA.from_pretrained(g.TINY, dtype=torch.float32)


def prompt(text, n_pictures=0, template="v1"):
    return data.render([("human", g.question(text, n_pictures))], template)


def random_picture(draw: random.Random) -> Image.Image:
    """A part of the sticker sheet, of any shape."""
    width, height = STICKERS.size
    left, top = draw.randrange(width // 2), draw.randrange(height // 2)
    right, bottom = draw.randrange(left + 40, width + 1), draw.randrange(top + 40, height + 1)
    return STICKERS.crop((left, top, right, bottom))


# Batches


@pytest.mark.parametrize("seed", range(6))
def test_random_batches_give_the_answers_of_their_rows_alone(model, seed):
    draw = random.Random(seed)
    n_pictures = [draw.choice((0, 1, 1, 1, 2)) for _ in range(draw.randint(2, 7))]
    images = [[random_picture(draw) for _ in range(n)] for n in n_pictures]
    prompts = [prompt(draw.choice(QUESTIONS), n) for n in n_pictures]
    options = dict(max_new_tokens=draw.randint(1, 40))
    if seed % 2:  # sampled: a row's draws are its own
        options |= dict(temperature=draw.uniform(0.5, 2), top_p=0.9, seed=seed)
    if seed % 3 == 2:
        options |= dict(repetition_penalty=1.3, stop=("paper",))
    together = g.generate(model, prompts, images, **options)
    for i, (p, pictures) in enumerate(zip(prompts, images, strict=True)):
        mine = options | ({"seed": seed + i} if "seed" in options else {})
        assert g.generate(model, [p], [pictures], **mine) == [together[i]]


def test_rows_that_have_ended_leave_the_batch(model, monkeypatch):
    rows = []
    hidden = model.language_model.hidden
    spy = lambda *a, **k: rows.append(len((a or [k["embeds"]])[0])) or hidden(*a, **k)  # noqa: E731
    monkeypatch.setattr(model.language_model, "hidden", spy)
    prompts = [prompt(QUESTIONS[i], 1) for i in (0, 1, 3)]
    found = g.generate(model, prompts, [STICKERS] * 3, 60)
    lengths = [len(ids) for ids in found]
    assert len(set(lengths)) == 3
    # Step t, the reading being step 0, is taken by the answers that have t tokens or more.
    assert rows == [sum(n >= t for n in lengths) for t in range(max(lengths) + 1)]


def test_a_long_neighbour_takes_no_context_from_a_short_prompt(model):
    limit = model.config.text.max_positions
    short = prompt("Describe the picture in detail.", 1)
    ids = answers.encode(model, short)
    filler = limit - 2 - answers.measure(model, ids, [STICKERS])
    long = [ids[0]] * filler + ids
    *_, (first, second) = decode(model, [long, short], [STICKERS] * 2, 60)
    assert first.ended == "context" and len(first.ids) == 2
    assert [second.ids] == g.generate(model, [short], [STICKERS], 60) and second.ended == "end"


def test_stream_yields_the_answers_column_by_column(model):
    prompts, images = [prompt(QUESTIONS[0], 1), prompt(QUESTIONS[1], 1)], [STICKERS] * 2
    columns = list(g.stream(model, prompts, images, 60))
    rows = [[t for t in row if t is not None] for row in zip(*columns, strict=True)]
    assert rows == g.generate(model, prompts, images, 60)
    assert columns[-1][0] is None and columns[-1][1] is not None


def test_several_answers_are_those_of_as_many_seeds(model):
    ask = [prompt(QUESTIONS[1], 1)], [STICKERS], 30
    three = g.generate(model, *ask, temperature=3.0, seed=5, answers=3)
    assert three == [g.generate(model, *ask, temperature=3.0, seed=s)[0] for s in (5, 6, 7)]
    assert len(set(map(tuple, three))) == 3


# Decoding


@pytest.mark.parametrize("seed", range(3))
def test_each_knob_leaves_what_transformers_leaves(seed):
    hf = pytest.importorskip("transformers", reason="the reference: pip install transformers")
    torch.manual_seed(seed)
    logits, prompts = torch.randn(4, 50) * 3, torch.randint(0, 50, (4, 12))
    seen = torch.zeros(4, 50, dtype=torch.bool).scatter_(1, prompts, True)
    for ours, theirs in (
        (penalise(logits, seen, 1.7), hf.RepetitionPenaltyLogitsProcessor(1.7)),
        (penalise(logits, seen, 0.6), hf.RepetitionPenaltyLogitsProcessor(0.6)),
        (keep_top_k(logits, 7), hf.TopKLogitsWarper(7)),
        (keep_top_k(logits, 70), hf.TopKLogitsWarper(70)),
        (keep_top_p(logits, 0.8), hf.TopPLogitsWarper(0.8)),
        (keep_top_p(logits, 1e-6), hf.TopPLogitsWarper(1e-6)),
        (keep_min_p(logits, 0.05), hf.MinPLogitsWarper(0.05)),
        (keep_min_p(logits, 1.0), hf.MinPLogitsWarper(1.0)),
    ):
        assert torch.equal(ours, theirs(prompts, logits.clone()))


def test_all_knobs_together_draw_from_transformers_distribution():
    hf = pytest.importorskip("transformers", reason="the reference: pip install transformers")
    torch.manual_seed(0)
    logits, prompts = torch.randn(1, 30) * 2, torch.randint(0, 30, (1, 6))
    seen = torch.zeros(1, 30, dtype=torch.bool).scatter_(1, prompts, True)
    how = Decoding(temperature=1.5, top_k=12, top_p=0.9, min_p=0.03, repetition_penalty=1.4)
    steps = [hf.RepetitionPenaltyLogitsProcessor(1.4), hf.TemperatureLogitsWarper(1.5)]
    steps += [hf.TopKLogitsWarper(12), hf.TopPLogitsWarper(0.9), hf.MinPLogitsWarper(0.03)]
    expected = hf.LogitsProcessorList(steps)(prompts, logits.clone()).softmax(-1)[0]
    drawn = choose(logits.expand(20_000, -1), how, None, seen.expand(20_000, -1))
    shares = drawn.bincount(minlength=30) / 20_000
    assert ((shares > 0) <= (expected > 0)).all()
    assert (shares - expected).abs().max() < 0.02  # five standard deviations


def test_a_temperature_near_zero_is_greedy_and_never_nan():
    logits = torch.randn(5, 40) * 50
    assert torch.equal(choose(logits, Decoding(temperature=1e-30)), logits.argmax(-1))


def test_log_probabilities_are_those_of_the_whole_text_read_at_once(model):
    text = prompt(QUESTIONS[1], 1)
    *_, (answer,) = decode(model, [text], [STICKERS], 60, Decoding(temperature=2.0, seed=1))
    ids = answers.encode(model, text) + answer.ids
    with torch.no_grad():
        logits = model(torch.tensor([ids]), [image.to_pixels(STICKERS, model.config.image)])
    logprobs = logits[0, :, : model.tokenizer.vocab_size].log_softmax(-1)[-len(answer.ids) - 1 : -1]
    expected = logprobs.gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-4, rtol=1e-4)


def test_a_stop_text_ends_the_answer_before_it(model):
    ask = [prompt(QUESTIONS[1], 1)], [STICKERS], 60
    *_, (whole,) = decode(model, *ask)
    *_, (cut,) = decode(model, *ask, Decoding(stop=("no such text", "frog at")))
    assert cut.ended == "stop" and cut.text == whole.text.partition("frog at")[0].strip()
    assert whole.ids[: len(cut.ids)] == cut.ids


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=-1),
        dict(temperature=float("nan")),
        dict(top_p=0),
        dict(top_p=1.5),
        dict(top_k=-1),
        dict(min_p=2),
        dict(repetition_penalty=0),
        dict(beams=0),
        dict(stop=("",)),
        dict(answers=2),
        dict(beams=2, answers=3),
        dict(beams=2, temperature=1),
        dict(lookup=-1),
        dict(lookup=4, temperature=1),
        dict(lookup=4, beams=2),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError):
        Decoding(**options)


def test_guessing_ahead_says_the_same_in_fewer_steps(model, monkeypatch):
    lengths = []
    hidden = model.language_model.hidden
    spy = lambda *a, **k: lengths.append(len(a)) or hidden(*a, **k)  # noqa: E731
    monkeypatch.setattr(model.language_model, "hidden", spy)
    draw = random.Random(0)
    for k in (1, 3, 8):
        picture, memory = random_picture(draw), Memory()
        turns, steps = [], []
        for text in (QUESTIONS[1], QUESTIONS[0], QUESTIONS[1]):
            turns.append(("human", g.question(text, not turns)))
            ids, _ = data.encode_turns(turns, model.tokenizer, model.template)
            lengths.clear()
            *_, (plain,) = decode(model, [ids], [[picture]], 50)
            steps.append(len(lengths))
            lengths.clear()
            *_, (ahead,) = decode(model, [ids], [[picture]], 50, Decoding(lookup=k), memory)
            steps.append(len(lengths))
            assert ahead.ids == plain.ids and ahead.ended == plain.ended
            torch.testing.assert_close(
                torch.tensor(ahead.logprobs), torch.tensor(plain.logprobs), atol=1e-4, rtol=1e-4
            )
            turns.append(("gpt", plain.text))
        assert steps[5] < 0.7 * steps[4]  # the description was there before


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_guessing_ahead_keeps_the_length_and_the_stop_texts(model, limit):
    ask = [prompt(QUESTIONS[1], 1)], [STICKERS]
    assert g.generate(model, *ask, limit, lookup=6) == g.generate(model, *ask, limit)
    options = dict(stop=("large",), lookup=6)
    assert g.generate(model, *ask, 60, **options) == g.generate(model, *ask, 60, stop=("large",))
    assert list(g.stream(model, *ask, limit, lookup=6)) == list(g.stream(model, *ask, limit))


# Beams


@pytest.fixture(scope="module")
def small():
    """transformers' LLaMA with random weights, and ours with the same, ready to generate."""
    hf = pytest.importorskip("transformers", reason="the reference: pip install transformers")
    sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    torch.manual_seed(0)
    reference = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, tie_word_embeddings=False)).eval()
    for weight in reference.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=1.5 * weight.shape[1] ** -0.5)
    return reference


def as_llava(llama: LLaMA) -> LLaVA:
    """A LLaVA that has never seen a picture, around a decoder."""
    with torch.device("meta"):
        model = LLaVA(LLaVAConfig(text=llama.config))
    model.language_model = llama
    model.tokenizer = SimpleNamespace(eos_id=-1, vocab_size=llama.config.vocab_size)
    return model


@pytest.mark.parametrize("seed", range(10))
def test_beams_are_transformers_beams(small, seed, tmp_path):
    reference = small
    reference.save_pretrained(tmp_path)
    model = as_llava(LLaMA.from_pretrained(tmp_path, dtype=torch.float32))
    draw = random.Random(seed)
    for _ in range(4):
        ids = [draw.randrange(40) for _ in range(draw.randint(1, 12))]
        beams, length = draw.randint(2, 6), draw.randint(1, 20)
        n = draw.randint(1, beams)
        model.tokenizer.eos_id = -1
        (greedy,) = g.generate(model, [ids], [None], 4)
        model.tokenizer.eos_id = end = draw.choice(greedy)  # so that some beams do end
        expected = reference.generate(
            torch.tensor([ids]),
            num_beams=beams,
            num_return_sequences=n,
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )
        expected = [row[len(ids) :].tolist() for row in expected]
        expected = [row[: row.index(end)] if end in row else row for row in expected]
        assert g.generate(model, [ids], [None], length, beams=beams, answers=n) == expected


def test_beams_with_a_picture_are_transformers_beams(model):
    hf = pytest.importorskip("transformers", reason="the reference: pip install transformers")
    reference = hf.LlavaForConditionalGeneration.from_pretrained(g.TINY, dtype=torch.float32).eval()
    text = prompt(QUESTIONS[1], 1)
    ids, n = [], model.config.n_visual(STICKERS.size)
    for i in answers.encode(model, text):
        ids += [reference.config.image_token_id] * n if i == data.IMAGE_TOKEN else [i]
    for beams in (2, 4):
        expected = reference.generate(
            input_ids=torch.tensor([ids]),
            pixel_values=image.to_pixels(STICKERS, model.config.image),
            num_beams=beams,
            num_return_sequences=2,
            max_new_tokens=50,
            do_sample=False,
            eos_token_id=model.tokenizer.eos_id,
            pad_token_id=model.tokenizer.eos_id,
        )
        ends = {model.tokenizer.eos_id}
        expected = [[int(i) for i in row[len(ids) :] if int(i) not in ends] for row in expected]
        assert g.generate(model, [text], [STICKERS], 50, beams=beams, answers=2) == expected


# Conversations


def turns_of(model, questions, memory, pictures=(STICKERS,)):
    """Ask one after the other; how many tokens were read each time, and the answers."""
    read, turns, found = [], [], []
    hidden = model.language_model.hidden
    for i, text in enumerate(questions):
        turns.append(("human", g.question(text, len(pictures) if i == 0 else 0)))
        ids, _ = data.encode_turns(turns, model.tokenizer, model.template)
        model.language_model.hidden = lambda *a, **k: (
            read.append(k["embeds"].shape[1]) if "embeds" in k else None,
            hidden(*a, **k),
        )[1]
        try:
            *_, (answer,) = decode(model, [ids], [list(pictures)], 60, memory=memory)
        finally:
            del model.language_model.hidden
        found.append(answer.ids)
        turns.append(("gpt", answer.text))
    return read, found


def test_a_follow_up_reads_nothing_twice_and_is_answered_as_if_it_had(model):
    questions = [QUESTIONS[i] for i in (1, 0, 3, 2)]
    seen = []
    hook = model.vision_tower.register_forward_hook(lambda *a: seen.append(1))
    read, kept = turns_of(model, questions, Memory())
    assert len(seen) == 1
    anew_read, anew = turns_of(model, questions, None)
    hook.remove()
    assert kept == anew and len(seen) == 1 + len(questions)
    assert read[0] == anew_read[0]
    for text, n in zip(questions[1:], read[1:], strict=True):
        # the end of the last answer, the question, and what the template puts around it
        assert n <= len(model.tokenizer.encode(f"USER: {text} ASSISTANT:")) + 4


def test_a_memory_of_something_else_is_not_used(model):
    memory, text = Memory(), prompt(QUESTIONS[1], 1)
    other = Image.new("RGB", STICKERS.size, "red")
    for picture in (STICKERS, other, STICKERS):
        *_, (answer,) = decode(model, [text], [picture], 60, memory=memory)
        assert [answer.ids] == g.generate(model, [text], [picture], 60)


def test_random_conversations_equal_reading_all_anew(model):
    draw, memory = random.Random(1), Memory()
    turns, pictures = [], []
    for _ in range(12):
        if draw.random() < 0.3 or len(turns) > 4:  # another conversation, or another end of it
            turns = turns[: 2 * draw.randrange(3)]
            pictures = pictures[: sum(text.count("<image>") for _, text in turns)]
        new = [random_picture(draw) for _ in range(draw.choice((0, 0, 1)))]
        turns.append(("human", g.question(draw.choice(QUESTIONS), len(new))))
        pictures += new
        ids, _ = data.encode_turns(turns, model.tokenizer, model.template)
        *_, (kept,) = decode(model, [ids], [pictures], 30, memory=memory)
        assert [kept.ids] == g.generate(model, [ids], [pictures], 30)
        turns.append(("gpt", kept.text))


# What is shown


class Bytes:
    """A tokenizer whose tokens are bytes, so that most characters take several."""

    eos_id, vocab_size = 256, 257

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("Grüße, 東京 🐶🏽!", (), "Grüße, 東京 🐶🏽!"),
        ("  blanks \n around  ", (), "blanks \n around"),
        ("one ## two ### three", ("###",), "one ## two"),
        ("ends with half a stop ##", ("###",), "ends with half a stop ##"),
        ("a\n\nb", ("\n\n", "zzz"), "a"),
        ("Ja! Nein! Ä", ("Nein! Ö", "! Ä"), "Ja! Nein"),
    ],
)
def test_what_is_shown_of_an_answer_only_grows_and_has_no_half_characters(text, stops, shown):
    model = SimpleNamespace(tokenizer=Bytes(), template="v1")
    answer, so_far = Answer(model, stops, 1000, 1000), ""
    for byte in [*text.encode(), 256]:
        answer.add(byte, 0.0)
        assert answer.settled.startswith(so_far) and "\ufffd" not in answer.settled
        so_far = answer.settled
        if answer.ended:
            break
    assert so_far == answer.text == shown
    assert answer.ended == ("end" if byte == 256 else "stop")
