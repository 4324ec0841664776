"""A real language model: SmolLM2-135M, ours beside transformers', in float32 on the same folder.

    pytest tests/test_smollm2.py        (under a minute; see tests/smollm2.py for the weights)

Proves with trained weights what random ones cannot: that text goes in and the same text comes
out, token for token, through our tokenizer, our loader, our decoder and its cache. Random weights
hide mistakes (a wrong RoPE theta, a swapped norm) behind small differences of meaningless logits.
"""

import pytest
import smollm2
import torch

import tokenizer
from llama import KVCache, LLaMA

transformers = pytest.importorskip("transformers", reason="the reference: pip install transformers")

STORY = """The lighthouse keeper counted 1,437 steps each evening, and each evening he lost count at
the same landing, where a window looked west. In 1912 a ship had gone down there; in 1913 another.
Afterwards the harbour office (two rooms, one stove) sent him a telephone he never used. He wrote
letters instead: to his sister in Gdańsk, to the makers of his lamp, to a newspaper which had once
printed that light travels 299,792 kilometres in a second. How, he asked, had they counted *that*?
"""
PROMPTS = {
    "short": "The capital of France is",
    "code": "<html>\n  <body class='x'>\n\tif (i <= 10) { s += a[i]; }",
    "unicode": "Ünïcödé: 東京は日本の首都です。 Москва — столица России. 🐶🏽 ½ + ٣ = ?",
    "long": STORY * 2,  # some 270 tokens: far enough for a slip of RoPE to grow
}

# Two orders of the same float32 sums. Logits reach 41, where neighbouring floats are 4e-6 apart,
# and 30 layers add up: transformers itself is 8e-5 away from its own result in float64. Where both
# take the same kernels the difference is 0; a last bit lost in RoPE's angles makes it 1.3e-4.
TOLERANCE = 1e-4
# One token at a time and all at once take different kernels, and each may be 8e-5 off. Measured
# 8e-5; a token that is forgotten or seen twice moves logits by more than 1.
CACHE_TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def folder():
    return smollm2.folder()


@pytest.fixture(scope="module")
def words(folder):
    return tokenizer.load(folder)


@pytest.fixture(scope="module")
def ours(folder):
    return LLaMA.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def reference(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # so that every continuation is 64 tokens long
    return model.eval()


@torch.no_grad()
def continue_greedily(model, ids, n):
    """Prefill once, then one token at a time: the ids and the logits float[n, V] they came from."""
    cache = KVCache(model.config, 1, len(ids) + n, torch.float32, "cpu")
    logits = [model(torch.tensor([ids]), cache=cache)[0, -1]]
    for _ in range(n - 1):
        logits.append(model(logits[-1].argmax()[None, None], cache=cache)[0, -1])
    return [int(row.argmax()) for row in logits], torch.stack(logits)


@pytest.fixture(scope="module", params=PROMPTS.values(), ids=PROMPTS.keys())
def case(request, words, ours):
    """The ids of a prompt, our 64 tokens after it, and the logits they were chosen by."""
    ids = words.encode(request.param)
    return ids, *continue_greedily(ours, ids, 64)


@torch.no_grad()
def test_every_logit_equals_the_reference(case, ours, reference):
    ids = torch.tensor([case[0]])
    error = (ours(ids) - reference(ids).logits).abs().max()
    assert error < TOLERANCE


@torch.no_grad()
def test_64_greedy_tokens_equal_the_reference(case, reference):
    ids, answer, _ = case
    expected = reference.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)
    assert answer == expected[0, len(ids) :].tolist()


@torch.no_grad()
def test_the_cache_changes_no_logit(case, ours):
    ids, answer, cached = case
    uncached = ours(torch.tensor([ids + answer[:-1]]))[0, len(ids) - 1 :]
    error = (cached - uncached).abs().max()
    assert error < CACHE_TOLERANCE
    assert uncached.argmax(-1).tolist() == answer


def test_the_answer_is_the_known_text(words, ours):
    # Recorded with transformers and, apart from it, with llama.cpp on the same weights.
    ids = words.encode(PROMPTS["short"])
    answer, _ = continue_greedily(ours, ids, 32)
    text = words.decode(answer[: answer.index(words.eos_id)])
    assert text == " Paris.\n\nThe answer is: 2018-01-22 12:12:53."


def test_ids_equal_those_of_transformers_own_reading_of_the_gguf(words, folder):
    pytest.importorskip("gguf", reason="reads SmolLM2's tokenizer: pip install gguf")
    file = smollm2.gguf_file()
    reader = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for name in ("short", "code", "long"):  # that reading forgets to set apart digits such as ½
        prompt = PROMPTS[name]
        assert words.encode(prompt) == reader.encode(prompt, add_special_tokens=False)


HARD = {
    "digits of all kinds": "½ ² ٣ ⅷ ① 〇 1٣½2 x²+y²",
    "blanks before digits": "  5 a  5b \n 5 \t7 \n\n7\r\n 8 \u00a09 \u3000 1",
    "blanks at the ends": "   a   \n\n  ",
    "blanks only": " \n \t  ",
    "unusual blanks": "a\u00a0b\u2003c\u2028d\x85 e\u200bf\x0bg",
    "contractions": "don't I'M they'RE 'tis 'llama '5's",
    "emoji and joiners": "👩‍👩‍👧‍👦 🐶🏽 🇵🇱 e\u0301 ñ",
    "scripts": "漢字かな交じり文 한국어 हिन्दी العربية עברית ไทย",
    "control tokens as text": "<|im_start|>user\n<|im_end|><|endoftext|>",
    "last code point": "\U0010ffff \ue000 \x00 \x7f",
    "nothing": "",
}


@pytest.mark.parametrize("text", HARD.values(), ids=HARD.keys())
def test_hard_strings_encode_as_in_the_tokenizers_library_and_come_back(text, words, folder):
    library = pytest.importorskip("tokenizers", reason="the reference: pip install tokenizers")
    reader = library.Tokenizer.from_file(str(folder / "tokenizer.json"))
    reader.encode_special_tokens = True  # there too: control tokens in a text are letters
    ids = words.encode(text)
    assert ids == reader.encode(text).ids
    assert words.decode(ids) == text


def test_a_stream_of_prefixes_grows_into_the_text(words):
    text = "Grüße, 東京 🐶!"
    ids = words.encode(text)
    prefixes = [words.decode(ids[: i + 1]) for i in range(len(ids))]
    assert all(text.startswith(prefix.rstrip("\ufffd")) for prefix in prefixes)
    assert prefixes[-1] == text
    assert any(prefix.endswith("\ufffd") for prefix in prefixes)  # half a character shows


def test_control_tokens_are_decoded_to_nothing(words):
    ids = [words.token_id("<|im_start|>"), *words.encode("a cat"), words.eos_id]
    assert words.eos_id == words.token_id("<|im_end|>") == 2
    assert words.decode(ids) == "a cat"
