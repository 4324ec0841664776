"""A page to upload a picture and ask about it: gradio around the same answers as generate.py.

    pip install -r requirements-demo.txt
    python demo.py                                  # the tiny model, on http://127.0.0.1:7860
    python demo.py --model DIR --model OTHER        # one of them at a time, chosen on the page

Nothing but this computer can reach the page unless --host says otherwise, and the page asks no
other server for anything. One request is answered at a time, the others wait in a queue; what is
wrong with one is shown to whoever sent it. Pictures are deleted an hour after their upload.

The page sends the whole conversation with every question. What of it is still in the KV cache is
not read again (answers.Memory), as long as nobody else asked in between.
"""

import argparse
import os
import sys
from functools import lru_cache

import data
import generate
import image
from answers import Memory, decode
from bulk import SUFFIXES
from decoding import Decoding

HOUR = 3600  # seconds
MAX_QUESTION = 100_000  # letters, far more than any context
CUT = {
    "length": "this was the longest answer that is allowed, see below",
    "context": "the model's context is full: clear the conversation to start anew",
}
KNOBS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


class Host:
    """The model that is loaded, one of several, and its memory of the last conversation."""

    def __init__(self, args):
        self.args, self.names = args, args.model or ["tiny model"]
        self.name = self.model = self.memory = None
        self.load(self.names[0])

    def load(self, name: str):
        if name not in self.names:
            raise ValueError(f"no model is called {name!r}: choose one of {', '.join(self.names)}")
        if name != self.name:
            self.name = self.model = self.memory = None  # room for the next one
            path = name if self.args.model else None
            args = argparse.Namespace(**vars(self.args) | {"model": path})
            self.model, self.name, self.memory = generate.load(args), name, Memory()

    def reply(self, turns, files, name: str, max_new_tokens: int, how: Decoding):
        """Yield the Answer to the last of `turns`, as it grows. Raises ValueError."""
        if sum(len(text) for _, text in turns) > MAX_QUESTION:
            raise ValueError(f"the conversation is longer than {MAX_QUESTION} letters: clear it")
        self.load(name)
        pictures = [picture_in(file, os.stat(file).st_mtime_ns) for file in files]
        ids, _ = data.encode_turns(turns, self.model.tokenizer, self.model.template)
        for (answer,) in decode(self.model, [ids], [pictures], max_new_tokens, how, self.memory):
            yield answer


@lru_cache(maxsize=16)
def picture_in(file: str, changed: int):
    """A picture; the same object every time, by which the memory knows that it was read."""
    return image.load(file)


def turns_of(history, message) -> tuple[list[tuple[str, str]], list[str]]:
    """Gradio's messages -> turns [(role, text)] with `<image>` tags, and the picture files.

    A question that got no answer is left out, with its pictures.
    """
    asked = [*({"path": file} for file in message.get("files", [])), message.get("text", "")]
    turns, files = [], []
    for entry in [*history, {"role": "user", "content": asked}]:
        text, pictures, content = "", [], entry["content"]
        for part in content if isinstance(content, list) else [content]:
            # From a browser parts are {"type": "text" | "file", ...}, over the API plainer.
            if isinstance(part, str) or "text" in part:
                text += part if isinstance(part, str) else part["text"]
            else:
                pictures.append((part.get("file") or part)["path"])
        text = text.replace(data.IMAGE_TAG, "").strip()
        if entry["role"] == "assistant":
            if text and not (entry.get("metadata") or {}).get("title"):  # else a remark of ours
                turns.append(("gpt", text))
            continue
        if turns and turns[-1][0] == "human":
            _, unanswered = turns.pop()
            files = files[: len(files) - unanswered.count(data.IMAGE_TAG)]
        turns.append(("human", generate.question(text, len(pictures))))
        files += pictures
    return turns, files


def import_gradio():
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at import: nothing leaves the machine
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import gradio
    except ImportError:
        raise ValueError(
            "the page needs gradio: pip install -r requirements-demo.txt; generate.py does not"
        ) from None
    return gradio


def build(gr, host: Host, max_queue: int):
    """The page, as gradio.Blocks; `gr` is gradio."""

    def reply(message, history, name, max_new_tokens, *knobs):
        try:
            given = {k: v for k, v in zip(KNOBS, knobs, strict=True) if v is not None}
            for k in ("top_k", "seed"):
                given |= {k: int(given[k])} if k in given else {}
            turns, files = turns_of(history, message)
            if not turns[-1][1].replace(data.IMAGE_TAG, "").strip():
                raise ValueError("there is no question: write one beside the picture")
            how = Decoding(**given)
            for answer in host.reply(turns, files, name, int(max_new_tokens), how):
                yield answer.settled
            if answer.ended in CUT:
                why = gr.ChatMessage(CUT[answer.ended], metadata={"title": "cut"})
                yield [answer.settled, why]
        except (ValueError, OSError) as error:
            # Part of the conversation: gradio's own errors would lock the page (seen in 6.31).
            yield gr.ChatMessage(str(error), metadata={"title": "no answer"})

    knobs = [
        gr.Dropdown(host.names, value=host.names[0], label="model"),
        gr.Slider(1, 2048, 512, step=1, label="longest answer, tokens"),
        gr.Slider(0, 2, 0, step=0.05, label="temperature (0: always the likeliest)"),
        gr.Slider(0.01, 1, 1, step=0.01, label="top-p"),
        gr.Slider(0, 200, 0, step=1, label="top-k (0: all)"),
        gr.Slider(0, 1, 0, step=0.01, label="min-p"),
        gr.Slider(0.5, 2, 1, step=0.05, label="repetition penalty"),
        gr.Number(None, label="seed", precision=0),
    ]
    page = gr.ChatInterface(
        reply,
        multimodal=True,
        title="LLaVA from scratch",
        chatbot=gr.Chatbot(label="conversation", buttons=["copy"], height=480),  # none that shares
        textbox=gr.MultimodalTextbox(
            file_types=list(SUFFIXES),
            file_count="multiple",
            sources=["upload"],
            placeholder="a picture, and a question about it",
            show_label=False,
        ),
        additional_inputs=knobs,
        additional_inputs_accordion=gr.Accordion("how to answer", open=False),
        concurrency_limit=1,
        delete_cache=(HOUR, HOUR),
        flagging_mode="never",
        analytics_enabled=False,
        api_name="chat",
    )
    return page.queue(max_size=max_queue)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    generate.add_model_flags(parser, several=True)
    add = parser.add_argument_group("the page").add_argument
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="0.0.0.0 lets the network in")
    add("--port", type=int, default=7860, metavar="N", help="default: 7860")
    add("--max-upload", default="20mb", metavar="SIZE", help="of a picture; default: 20mb")
    add("--max-queue", type=int, default=32, metavar="N", help="requests that may wait")
    args = parser.parse_args()
    try:
        gr = import_gradio()
        page = build(gr, Host(args), args.max_queue)
        page.launch(
            server_name=args.host,
            server_port=args.port,
            max_file_size=args.max_upload,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            share=False,
            ssr_mode=False,
            show_error=True,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
        )
        generate.say(f"http://{args.host}:{args.port}  (Ctrl-C ends it)")
        page.block_thread()
    except (ValueError, OSError) as error:
        print(f"demo.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
