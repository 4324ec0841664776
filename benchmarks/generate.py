"""Answers on two cores: ours, and transformers' `generate` on the same weights, in turns.

    python benchmarks/generate.py text llava starts speed seven quality      all, some 20 minutes

text     SmolLM2-135M (tests/smollm2.py), 640 random tokens, 128 new ones; llama.cpp on the same
         weights too, where llama-cpp-python is installed (it is built in some minutes)
llava    ViT-L/14-336 and an MLP, both random, before it: a picture (576), 64 tokens, 128 new ones
starts   the same two in new processes: from before the first import to the first token, with the
         tokenizer loaded and the weights in the page cache; the largest resident set (VmHWM)
speed    the shape of TinyLlama-1.1B, random weights: tokens/s against the memory's bandwidth
seven    LLaVA-1.5-7B's shape in int4, random weights: tokens/s and peak memory
quality  what bfloat16, int8 and int4 do to SmolLM2's logits and to the bundled model's answers
gpu      LLaVA-1.5-7B's decoder on a CUDA GPU, random weights, after a prompt of 640: tokens/s in
         bf16, int8 and int4, of 1 to 64 answers at a time, beside the memory's bandwidth

Another program on the same two cores makes threads wait for each other. So the rate of the fastest
tenth of the tokens and the CPU's seconds are given too (with OMP_WAIT_POLICY=passive these leave
the waiting out). Figures are medians with the smallest and largest; ratios are taken round by
round; "speed" takes the fastest tenth and the fastest read. Each part replaces its own in the JSON.
"""

import argparse
import copy
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests"), str(HERE.parent / "tiny")]
FILE = HERE / "generate.json"
PROMPT, NEW, N_PATCHES = 640, 128, 576
IMAGE_ID = 4  # where transformers puts a picture: a token of SmolLM2 that no text contains
SECONDS = 60  # after so long no further round begins
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def folder(case: str, dtype: str) -> Path:
    """The weights of a case, made once and kept beside SmolLM2's."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    path = cache / "llava-from-scratch" / f"bench-{case}-{dtype}"
    if path.is_dir():
        return path
    import smollm2

    import checkpoint
    from image import ImageConfig
    from llama import LLaMA
    from llava import LLaVA, LLaVAConfig
    from vit import ViTConfig

    small = smollm2.folder()
    decoder = LLaMA.from_pretrained(small, DTYPES[dtype])
    files = [small / "tokenizer.json", small / "tokenizer_config.json"]
    if case == "text":
        state, config, kind = decoder.state_dict(), decoder.config, "language_model"
    else:
        torch.manual_seed(0)
        config = LLaVAConfig(ViTConfig(), decoder.config, ImageConfig())
        model = LLaVA(config).to(DTYPES[dtype])
        model.language_model = decoder
        state, kind = model.state_dict(), "llava"
    ids = {"image_token_index": IMAGE_ID} if kind == "llava" else {}
    checkpoint.save(path, kind, state, asdict(config), files, DTYPES[dtype], ids)
    return path


def prompt(case: str, image_id: int) -> list[int]:
    """Random tokens; those of the picture stand in the middle, or one that stands for them."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(100, 49000, (PROMPT,), generator=random).tolist()
    if case == "llava":
        ids[32 : 32 + N_PATCHES] = [image_id] if image_id < 0 else [image_id] * N_PATCHES
    return ids


class Ours:
    def __init__(self, case: str, dtype: str):
        import fast
        import tokenizer
        from llama import LLaMA
        from llava import LLaVA

        self.case, self.dtype = case, DTYPES[dtype]
        self.ids = torch.tensor([prompt(case, -200)])
        if case == "text":
            self.tokenizer = tokenizer.load(folder(case, dtype))
            self.decoder = fast.Decoder(
                LLaMA.from_pretrained(folder(case, dtype), self.dtype, mapped=True)
            )
        else:
            self.model = LLaVA.from_pretrained(folder(case, dtype), dtype=self.dtype, mapped=True)
            self.decoder = fast.prepare(self.model).language_model
        self.decoder.eval()

    @torch.inference_mode()
    def answer(self, n: int, pixels=None):
        """Greedy tokens, as generate.py makes them, and the time of each."""
        if self.case == "text":
            embeds = self.decoder.embed_tokens(self.ids)
        else:
            embeds, _, _ = self.model.embed(self.ids, [pixels])
        return continue_greedily(self.decoder, embeds, n)

    @torch.inference_mode()
    def see(self, pixels):
        return self.model.vision_tower(pixels.to(self.dtype), -2)


def continue_greedily(decoder, embeds, n: int):
    """Of a batch, the tokens of its first row."""
    from llama import KVCache

    B, T, _ = embeds.shape
    cache = KVCache(decoder.config, B, T + n, embeds.dtype, embeds.device)
    hidden = decoder.hidden(embeds=embeds, cache=cache)
    tokens, times = [], []
    while True:
        token = decoder.head(hidden[:, -1]).argmax(-1)
        tokens.append(int(token[0]))
        times.append(time.perf_counter())
        if len(tokens) == n:
            return tokens, times
        hidden = decoder.hidden(token[:, None], cache=cache)


class Theirs:
    def __init__(self, case: str, dtype: str):
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        classes = {"text": "LlamaForCausalLM", "llava": "LlavaForConditionalGeneration"}
        self.case, self.dtype = case, DTYPES[dtype]
        self.ids = torch.tensor([prompt(case, IMAGE_ID)])
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder(case, dtype))
        cls = getattr(transformers, classes[case])
        self.model = cls.from_pretrained(folder(case, dtype), dtype=self.dtype).eval()
        self.model.generation_config.eos_token_id = None

    def put(self, value):  # `generate` calls this with the prompt, then with each token
        self.times.append(time.perf_counter())
        self.tokens.append(value)

    def end(self):
        pass

    def answer(self, n: int, pixels=None):
        self.times, self.tokens = [], []
        inputs = {} if pixels is None else {"pixel_values": pixels.to(self.dtype)}
        self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            max_new_tokens=n,
            do_sample=False,
            streamer=self,
            **inputs,
        )
        return [int(token) for token in self.tokens[1:]], self.times[1:]

    @torch.inference_mode()
    def see(self, pixels):
        tower = self.model.model.vision_tower
        out = tower(pixels.to(self.dtype), output_hidden_states=True)
        return out.hidden_states[-2][:, 1:]


class LlamaCpp:
    def __init__(self, case: str, dtype: str):
        import ctypes

        import llama_cpp
        import smollm2

        file = folder(case, dtype) / "llama.gguf"
        if not file.exists():
            how = llama_cpp.llama_model_quantize_default_params()
            how.allow_requantize = True
            how.ftype = {"bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16, "fp32": 0}[dtype]
            source = str(smollm2.gguf_file()).encode()
            llama_cpp.llama_model_quantize(source, str(file).encode(), ctypes.byref(how))
        both = dict(n_threads=2, n_threads_batch=2, n_batch=PROMPT, n_ctx=PROMPT + NEW + 8)
        self.model = llama_cpp.Llama(str(file), verbose=False, **both)
        self.ids = prompt(case, IMAGE_ID)

    def answer(self, n: int, pixels=None):
        self.model.reset()
        tokens, times = [], []
        for token in self.model.generate(self.ids, top_k=1, temp=0.0, repeat_penalty=1.0):
            tokens.append(token)
            times.append(time.perf_counter())
            if len(tokens) == n:
                return tokens, times


ENGINES = {"ours": Ours, "theirs": Theirs}


def memory(key: str = "VmHWM") -> float:
    """Of this process, in MB; VmHWM is the largest resident set so far, VmRSS the present one."""
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1000


def cold(engine: str, case: str, dtype: str) -> dict:
    """One answer in a new process: seconds to the first token, peak memory."""
    command = [sys.executable, __file__, "--child", engine, case, dtype]
    pages = {"THP_MEM_ALLOC_ENABLE": "1"} if engine == "ours" else {}  # as generate.py sets it
    started = time.time()
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | pages
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "cold start, s": found["first"] - started,
        "peak, MB": found["peak"],
        "of it imports, MB": found["imported"],
    }


def child(engine: str, case: str, dtype: str):
    torch.set_num_threads(2)
    if engine == "theirs":
        import transformers  # noqa: F401
    imported = memory("VmRSS")
    pixels = torch.randn(1, 3, 336, 336) if case == "llava" else None
    epoch = time.time() - time.perf_counter()  # the parent counts from 1970
    _, times = ENGINES[engine](case, dtype).answer(NEW, pixels)
    print(json.dumps({"first": epoch + times[0], "peak": memory(), "imported": imported}))


def measure(engine, pixels, n_new: int) -> dict:
    """One answer in this process, taken apart."""
    found = {}
    for n in (1, 4) if pixels is not None else ():
        started, worked = time.perf_counter(), time.process_time()
        engine.see(pixels.expand(n, -1, -1, -1))
        found[f"{n} pictures, s"] = time.perf_counter() - started
        found[f"{n} pictures, CPU s"] = time.process_time() - worked
    worked = time.process_time()
    engine.answer(1, pixels)
    first = time.process_time() - worked
    started, worked = time.perf_counter(), time.process_time()
    tokens, times = engine.answer(n_new, pixels)
    found["first token, s"] = times[0] - started
    found["first token, CPU s"] = first
    if pixels is None:
        found["prefill, tokens/s"] = PROMPT / (times[0] - started)
    steps = sorted(end - start for start, end in zip(times, times[1:], strict=False))
    found["decode, tokens/s"] = len(steps) / sum(steps)
    found["decode, fastest tenth, tokens/s"] = 1 / steps[len(steps) // 10]
    found["decode, CPU s per token"] = (time.process_time() - worked - first) / len(steps)
    found["end to end, s"] = times[-1] - started
    return found | {"tokens": tokens}


def compare(case: str, dtype: str, rounds: int, n_new: int) -> dict:
    """Both engines in turns: {engine: {figure: [median, smallest, largest]}} and their ratios."""
    pixels = torch.randn(1, 3, 336, 336) if case == "llava" else None
    makers = dict(ENGINES)
    if case == "text" and importlib.util.find_spec("llama_cpp"):
        makers["llama.cpp"] = LlamaCpp
    engines = {name: make(case, dtype) for name, make in makers.items()}
    runs, started = {name: [] for name in engines}, time.time()
    for engine in engines.values():
        engine.answer(2, pixels)  # pages of the weights come in, kernels are chosen
    for i in range(rounds):
        if i and time.time() - started > SECONDS:
            break
        for name, engine in engines.items():
            runs[name].append(measure(engine, pixels, n_new))
    tokens = {name: [run.pop("tokens") for run in found][0] for name, found in runs.items()}
    pairs = zip(tokens["ours"], tokens["theirs"], strict=True)
    same = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), n_new)
    return summaries(runs) | {
        "rounds": len(runs["ours"]),
        "new tokens": n_new,
        "same greedy tokens": same,
    }


def summaries(runs: dict) -> dict:
    """Figures of all, and how many times better ours is, round by round."""
    result = {name: summary(found) for name, found in runs.items()}
    for name in [name for name in runs if name != "ours"]:
        ratios = [
            {
                key: ours[key] / theirs[key] if "tokens/s" in key else theirs[key] / ours[key]
                for key in ours
            }
            for ours, theirs in zip(runs["ours"], runs[name], strict=True)
        ]
        result[{"theirs": "ours is better by"}.get(name, f"than {name} by")] = summary(ratios)
    return result


def compare_starts(case: str, dtype: str, rounds: int) -> dict:
    """The same for processes that start, answer once and end."""
    runs = {name: [] for name in ENGINES}
    for _ in range(rounds):
        for name, found in runs.items():
            found.append(cold(name, case, dtype))
    cache = 2 * 30 * 3 * 64 * (PROMPT + NEW) * DTYPES[dtype].itemsize
    weights = sum(f.stat().st_size for f in folder(case, dtype).glob("*.safetensors"))
    return summaries(runs) | {"weights and cache, MB": round((weights + cache) / 1e6)}


def summary(runs: list[dict]) -> dict:
    """{figure: [median, smallest, largest]}"""
    values = {key: [run[key] for run in runs] for key in runs[0]}
    return {
        key: [round(f(v), 4) for f in (statistics.median, min, max)] for key, v in values.items()
    }


def random_decoder(config, bits=None, device="cpu"):
    """A decoder of random bfloat16 weights, quantised matrix by matrix: little memory is needed.

    Every layer has the same numbers, in memory of its own: making new ones would take minutes.
    """
    import fast
    from checkpoint import NoInit
    from llama import LLaMA
    from quantize import taker

    with torch.device("meta"), NoInit():
        holder = torch.nn.Module()
        holder.language_model = LLaMA(config)
    made = {}
    for name, meta in list(holder.named_parameters()):
        path, _, _ = name.rpartition(".")
        kind = path.rpartition(".")[2]
        if kind not in made:
            weight = torch.empty(meta.shape, dtype=torch.bfloat16, device=device)
            weight.normal_(0, 0.02)
            weight = torch.ones_like(weight) if "norm" in name else weight
            if not (bits and taker(bits)(holder, name, weight)):
                holder.get_submodule(path).weight = torch.nn.Parameter(weight, False)
            if ".layers." in name:
                made[kind] = copy.deepcopy(holder.get_submodule(path))
        else:
            holder.set_submodule(path, copy.deepcopy(made[kind]))
    del made
    with torch.no_grad():
        return fast.Decoder(holder.language_model.eval())


def n_bytes_read(config, bits: float) -> float:
    """What a token reads of the decoder: all matrices and the head."""
    c, kv = config, config.n_kv_heads * config.head_dim
    block = c.dim * (2 * c.n_heads * c.head_dim + 2 * kv + 3 * c.mlp_dim)
    head_bits = bits if bits > 8.1 else 8
    return (c.n_layers * block * bits + c.vocab_size * c.dim * head_bits) / 8


@torch.inference_mode()
def speed(rounds: int) -> dict:
    """Tokens/s of TinyLlama's shape beside the floor: bytes over the bandwidth of the same run."""
    from llama import LLaMAConfig

    config = LLaMAConfig(
        vocab_size=32000, dim=2048, mlp_dim=5632, n_layers=22, n_heads=32, n_kv_heads=4
    )
    memory_block = torch.ones(2**28)  # 1 GiB
    embeds = torch.randn(1, 64, 2048).bfloat16()
    result = {}
    for name, quantize, bits in (("bf16", None, 16), ("int8", 8, 8), ("int4", 4, 4.25)):
        decoder = random_decoder(config, quantize)
        runs = []
        for i in range(rounds + 1):
            reads = []
            for _ in range(7):
                started = time.perf_counter()
                memory_block.sum()
                reads.append(time.perf_counter() - started)
            bandwidth = 2**30 / min(reads)
            _, times = continue_greedily(decoder, embeds, 32)
            steps = sorted(b - a for a, b in zip(times, times[1:], strict=False))
            rate = 1 / steps[len(steps) // 10]
            share = rate * n_bytes_read(config, bits) / bandwidth
            run = {"decode, tokens/s": rate, "bandwidth, GB/s": bandwidth / 1e9}
            runs += [run | {"share of the floor": share}] if i else []
        result[name] = summary(runs)
        del decoder
    return result


@torch.inference_mode()
def seven(n_prompt: int = 592, n_new: int = 16) -> dict:
    """A picture and an answer for LLaVA-1.5-7B's shape in int4, in a process of its own."""
    import fast
    from llava import LLaVA, LLaVAConfig

    torch.set_num_threads(2)
    config = LLaVAConfig()
    with torch.device("meta"):
        model = LLaVA(config)
    model.language_model = random_decoder(config.text, 4)
    for part in (model.vision_tower, model.projector):
        part.to_empty(device="cpu").bfloat16()
        for p in part.parameters():
            p.data.normal_(0, 0.02)
    model.vision_tower = fast.Tower(model.vision_tower.eval())
    loaded = memory()
    started = time.perf_counter()
    words = model.encode_images([torch.randn(1, 3, 336, 336)])[0][None]
    seen = time.perf_counter()
    embeds = torch.cat([words, words], 1)[:, :n_prompt]  # a picture (576) and a question
    begun = time.perf_counter()
    _, times = continue_greedily(model.language_model, embeds, n_new)
    steps = sorted(end - start for start, end in zip(times, times[1:], strict=False))
    return {
        "picture, s": round(seen - started, 2),
        "prefill, tokens/s": round(embeds.shape[1] / (times[0] - begun), 1),
        "decode, tokens/s": round(len(steps) / sum(steps), 2),
        "decode, fastest, tokens/s": round(1 / steps[0], 2),
        "prompt": embeds.shape[1],
        "after loading, MB": round(loaded),
        "peak, MB": round(memory()),
    }


@torch.inference_mode()
def on_gpu(config, batches=(1, 8, 32, 64), n_new=64, device="cuda") -> dict:
    """Decoding on a GPU, token by token as generate.py does it."""
    import kernels

    kernels.backend, result = "kernel" if device == "cuda" else "auto", {}
    for name, quantize, bits in (("bf16", None, 16), ("int8", 8, 8), ("int4", 4, 4.25)):
        decoder = random_decoder(config, quantize, device)
        for batch in batches:
            embeds = torch.randn(batch, PROMPT, config.dim, device=device).bfloat16()
            for _ in range(2):  # kernels are compiled in the first
                started = time.perf_counter()
                _, times = continue_greedily(decoder, embeds, n_new)
            rate = (n_new - 1) / (times[-1] - times[0])
            result[f"{name}, {batch} at a time"] = {
                "first token, s": round(times[0] - started, 4),
                "decode, tokens/s": round(batch * rate, 1),
                "weights read, GB/s": round(rate * n_bytes_read(config, bits) / 1e9, 1),
            }
    return result


@torch.inference_mode()
def quality(pictures: int) -> dict:
    """Logits of SmolLM2 after a story, and the bundled model's scores on fresh pictures."""
    import evaluate
    import smollm2
    import test_smollm2
    import world

    import fast
    import tokenizer
    from llama import LLaMA
    from llava import LLaVA
    from quantize import taker

    small = smollm2.folder()
    ids = torch.tensor([tokenizer.load(small).encode(test_smollm2.STORY)])
    exact = LLaMA.from_pretrained(small, torch.float32)(ids)
    bundled = HERE.parent / "tiny" / "weights" / "llava"
    scenes = [world.make_scene(evaluate.SEED, i, False) for i in range(pictures)]
    result = {}
    for name, dtype, bits in (
        ("fp32", "fp32", None),
        ("bf16", "bf16", None),
        ("int8", "bf16", 8),
        ("int4", "bf16", 4),
    ):
        holder = torch.nn.Module()
        holder.language_model = LLaMA.from_pretrained(small, DTYPES[dtype])
        for key, weight in list(holder.named_parameters()) if bits else ():
            taker(bits)(holder, key, weight)
        logits = fast.Decoder(holder.language_model)(ids).float()
        odds, ours = exact.log_softmax(-1), logits.log_softmax(-1)
        found = {
            "logits off by": ((logits - exact).norm() / exact.norm()).item(),
            "KL, nats": (odds.exp() * (odds - ours)).sum(-1).mean().item(),
            "same next token": (logits.argmax(-1) == exact.argmax(-1)).float().mean().item(),
            "loss": -ours[0, :-1].gather(-1, ids[0, 1:, None]).mean().item(),
        }
        model = fast.prepare(LLaVA.from_pretrained(bundled, dtype=DTYPES[dtype], quantize=bits))
        found["tiny, mean score"] = evaluate.short_answers(model, scenes, "fresh")["mean"]
        result[name] = {key: round(value, 5) for key, value in found.items()}
    return result | {"pictures": pictures}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("text", "llava", "starts", "speed", "seven", "quality", "gpu")
    parser.add_argument("parts", nargs="*", choices=names, help="what to measure")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=NEW, help="tokens to be answered")
    parser.add_argument("--pictures", type=int, default=200, help="of the tiny world, for quality")
    if sys.argv[1:2] == ["--child"]:  # one of the processes that `cold` and "seven" start
        return child(*sys.argv[2:]) if sys.argv[2:] else print(json.dumps(seven()))
    args = parser.parse_args()
    torch.set_num_threads(2)
    results = json.loads(FILE.read_text()) if FILE.exists() else {}
    flags = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    results["machine"] = f"{flags}, {os.cpu_count()} cores, Python {platform.python_version()}"
    results["torch"] = torch.__version__
    for part in args.parts:
        found = {}
        if part in ("text", "llava"):
            for dtype in args.dtypes:
                found[f"{part} {dtype}"] = compare(part, dtype, args.rounds, args.new)
        elif part == "starts":
            for case in ("text", "llava"):
                for dtype in args.dtypes:
                    found[f"start {case} {dtype}"] = compare_starts(case, dtype, args.rounds)
        elif part == "speed":
            found[part] = speed(args.rounds)
        elif part == "seven":
            command = [sys.executable, __file__, "--child"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[part] = json.loads(done.stdout.splitlines()[-1])
        elif part == "gpu":
            if not torch.cuda.is_available():
                parser.error("gpu needs a CUDA GPU, there is none here")
            from gpu import machine

            from llama import LLaMAConfig

            found[part] = machine() | on_gpu(LLaMAConfig())
        else:
            found[part] = quality(args.pictures)
        for figures in found.values():
            figures["load of the machine"] = round(os.getloadavg()[0], 1)  # 2: nothing but this
        results |= found
        FILE.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
