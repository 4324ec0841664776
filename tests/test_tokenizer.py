"""Text <-> ids: the published vocabularies, the three formats, and what no text may do.

    pytest tests/test_tokenizer.py        (some 20 seconds)
    pip install --no-deps llama-models mistral-common        (the vocabularies; else three skips)

SmolLM2's tokenizer.json has its tests in test_smollm2.py.
"""

import io
import json
from importlib import metadata
from pathlib import Path

import pytest
import sentencepiece

import tokenizer

TEXTS = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "  two blanks,\n\ttabs\r\n\r\nand   an end  ",
    "12345.678 ½ ² ٣ don't I'M they'RE",
    "Grüße, 東京, Привет, हिन्दी, e\u0301 🐶🏽👩‍👧",
    "<s> </s> <|eot_id|> [INST] <image>",
    "",
]


def published(package: str, ending: str) -> Path:
    """A file in an installed package, whose code is not imported."""
    try:
        files = metadata.files(package)
    except metadata.PackageNotFoundError:
        pytest.skip(f"needs a published vocabulary: pip install --no-deps {package}")
    return Path(next(file.locate() for file in files if str(file).endswith(ending)))


@pytest.fixture(scope="module")
def llama3_file():
    return published("llama-models", "llama3/tokenizer.model")


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """A sentencepiece model of 400 tokens with LLaMA's settings, trained on this file."""
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(__file__).read_text().splitlines()),
        model_writer=content,
        model_type="bpe",
        vocab_size=400,
        character_coverage=0.98,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    file = tmp_path_factory.mktemp("small") / "tokenizer.model"
    file.write_bytes(content.getvalue())
    return file


def test_llama3_ids_are_those_of_the_original_prompt(llama3_file):
    llama3 = tokenizer.load(llama3_file)
    text = "\n\nYou are a helpful language and vision assistant. You are able to understand"
    ids = [271, 2675, 527, 264, 11190, 4221, 323, 11376, 18328, 13, 1472, 527, 3025, 311, 3619]
    assert llama3.encode(text, bos=True) == [128000, *ids]
    assert llama3.token_id("<|start_header_id|>") == 128006
    assert llama3.token_id("<|end_header_id|>") == 128007
    assert llama3.token_id("<|eot_id|>") == 128009
    assert llama3.vocab_size == 128256


def test_mistral_ids_are_those_of_the_original_prompt():
    mistral = tokenizer.load(published("mistral-common", "tokenizer.model.v1"))
    before, after = "[INST] ", "\nWhat is shown in this image? [/INST]"  # a picture goes between
    assert mistral.encode(before, bos=True) == [1, 733, 16289, 28793, 28705]
    ids = [28705, 13, 3195, 349, 4894, 297, 456, 3469, 28804, 733, 28748, 16289, 28793]
    assert mistral.encode(after) == ids
    assert (mistral.vocab_size, mistral.bos_id, mistral.eos_id) == (32000, 1, 2)


def test_llama3_as_tokenizer_json_gives_the_ids_of_metas_file(llama3_file, tmp_path):
    reason = "writes the tokenizer.json: pip install transformers"
    convert = pytest.importorskip("transformers.convert_slow_tokenizer", reason=reason)
    converter = convert.TikTokenConverter(
        vocab_file=str(llama3_file),
        pattern=tokenizer.LLAMA3,
        extra_special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
    )
    parts = json.loads(converter.converted().to_str())
    begin = {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [begin, {"Sequence": {"id": "A"}}]}
    parts["post_processor"] = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end_of_text|>"}')
    from_json, from_meta = tokenizer.load(tmp_path), tokenizer.load(llama3_file)
    for text in TEXTS:
        assert from_json.encode(text, bos=True, eos=True) == from_meta.encode(text, True, True)
    assert (from_json.bos_id, from_json.eos_id) == (128000, 128001)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("format", ["sentencepiece", "tiktoken"])
def test_every_text_comes_back(format, text, request):
    file = request.getfixturevalue(
        {"sentencepiece": "small_file", "tiktoken": "llama3_file"}[format]
    )
    words = tokenizer.load(file)
    assert words.decode(words.encode(text, bos=True, eos=True)) == text


def test_control_tokens_enter_by_id_and_never_from_a_text(small_file, llama3_file):
    small, llama3 = tokenizer.load(small_file), tokenizer.load(llama3_file)
    assert small.token_id("</s>") == small.eos_id not in small.encode("the end</s>")
    assert max(llama3.encode("<|eot_id|><|begin_of_text|>")) < 128000


def test_sentencepiece_puts_a_blank_before_every_text(small_file):
    words = tokenizer.load(small_file)
    blank, *rest = words.encode("\nfile")  # a newline is never merged with the blank before it
    assert blank == words.token_id("▁")
    assert words.decode(rest) == "\nfile"


def test_a_stream_of_prefixes_grows_into_the_text(small_file):
    words, text = tokenizer.load(small_file), "Grüße 東京 🐶!"
    ids = words.encode(text)
    prefixes = [words.decode(ids[: i + 1]) for i in range(len(ids))]
    assert all(text.startswith(prefix.rstrip("\ufffd")) for prefix in prefixes)
    assert prefixes[-1] == text
    assert any(prefix.endswith("\ufffd") for prefix in prefixes)  # half a character shows


def test_the_name_of_the_file_does_not_matter(small_file, llama3_file, tmp_path):
    swapped = tmp_path / "tokenizer.json"
    swapped.write_bytes(small_file.read_bytes())
    assert isinstance(tokenizer.load(tmp_path), tokenizer.SentencePiece)
    swapped.write_bytes(llama3_file.read_bytes())
    assert isinstance(tokenizer.load(swapped), tokenizer.ByteBPE)


UNREADABLE = {
    "empty": (b"", "neither a sentencepiece model nor a tiktoken file nor JSON"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "neither a sentencepiece model"),
    "cut JSON": (b'{"model": {"vo', "starts like JSON and is none"),
    "other JSON": (b'{"model": {"type": "WordPiece"}}', "other than SmolLM2's and LLaMA 3's"),
    "cut tiktoken": (b"QQ== 0\nQg==", "not 'base64 rank'"),
    "other tiktoken": (b"QQ== 0\nQg== 1\n", "2 tokens; LLaMA 3 has 128000"),
}


@pytest.mark.parametrize(("content", "message"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_an_unreadable_file_is_refused_in_one_sentence(content, message, tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tokenizer.load(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    assert tokenizer.find(tmp_path) is None
    with pytest.raises(ValueError, match="has no tokenizer"):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize("i", [-200, -1, 400])
def test_an_id_out_of_range_is_refused(small_file, i):
    with pytest.raises(ValueError, match=f"token id {i} is not in 0 ... 399"):
        tokenizer.load(small_file).decode([5, i])


def test_an_unknown_token_has_no_id(small_file):
    with pytest.raises(ValueError, match="no token 'nobody'"):
        tokenizer.load(small_file).token_id("nobody")
