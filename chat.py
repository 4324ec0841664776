"""A conversation about pictures, line by line: what `generate.py --chat` does.

    python generate.py --chat --image examples/stickers.jpg

Everything read or said stays in the KV cache. The prompt of the next turn is the whole conversation
again, and only what the cache does not hold is read, from the first token that differs:

    read before   A chat ... USER: [v1 ... vN] What is it? ASSISTANT: A cat
    next prompt   A chat ... USER: [v1 ... vN] What is it? ASSISTANT: A cat</s>USER: Its colour? ...
                                                                           ^^^^^^^^^^^^^^^^^^^^^^^^^
Lines that start with / are commands, see COMMANDS. Ctrl-C stops the answer, which stays as far as
it came; Ctrl-D, or the end of the input, ends the program.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import data
import image
from answers import GREEDY, Memory
from generate import answer, proper_text, question, say

COMMANDS = """\
/image FILE    show a picture; it goes with your next question
/system TEXT   what the model is told before everything else
/reset         forget the conversation and its pictures
/save FILE     write the conversation as a record that train.py reads
/help          this list
Ctrl-C stops an answer, Ctrl-D ends the program."""


@dataclass
class Chat:
    """A model and what was said to it; `ask` asks, `command` does what a line with / wants."""

    model: "torch.nn.Module"  # noqa: F821
    max_new_tokens: int = 512
    how: "decoding.Decoding" = GREEDY  # noqa: F821
    turns: list = field(default_factory=list)  # [(role, text)], the system text not among them
    system: str | None = None  # None: the template's own
    pictures: list = field(default_factory=list)  # of all turns
    files: list = field(default_factory=list)  # where the pictures came from
    waiting: list = field(default_factory=list)  # (file, picture) for the next question
    memory: Memory = field(default_factory=Memory)

    def ask(self, text: str, out=None) -> dict:
        """Answer a question, as `generate.answer`. Raises ValueError, and forgets the question, if
        it does not fit."""
        files, pictures = zip(*self.waiting, strict=True) if self.waiting else ((), ())
        turns = [*self.turns, ("human", question(text, len(pictures)))]
        start = [("system", self.system)] if self.system is not None else []
        result = answer(
            self.model,
            start + turns,
            [*self.pictures, *pictures],
            self.max_new_tokens,
            self.how,
            out,
            self.memory,
        )
        if result["answer"]:  # a turn without an answer never was
            self.turns = [*turns, ("gpt", result["answer"])]
            self.pictures += pictures
            self.files += files
            self.waiting = []
        return result

    def reset(self):
        self.turns, self.pictures, self.files, self.waiting = [], [], [], []
        self.memory = Memory()

    def show(self, file: str) -> str:
        path = Path(file).expanduser()
        self.waiting.append((str(path), image.load(path, warn=say)))
        return f"{path} goes with your next question"

    def set_system(self, text: str) -> str:
        proper_text(text)
        data.render([("system", text), ("human", "")], self.model.template)  # is there a place?
        self.system = text
        return "the model is told so from now on"

    def save(self, file: str) -> str:
        """Write the conversation as a list of one record in the official format."""
        turns = [{"from": role, "value": text} for role, text in self.turns]
        record = {"id": Path(file).stem, "conversations": turns}
        if self.files:
            record["image"] = self.files[0] if len(self.files) == 1 else self.files
        if self.system is not None:
            record["system"] = self.system
        try:
            with open(Path(file).expanduser(), "x") as out:
                json.dump([record], out, ensure_ascii=False, indent=1)
        except FileExistsError:
            raise ValueError(f"{file} is there already; choose another name") from None
        except OSError as error:
            raise ValueError(f"{file} cannot be written ({error.strerror})") from None
        return f"{len(self.turns) // 2} questions and answers written to {file}"

    def command(self, line: str):
        """Carry out "/name argument". Raises ValueError for what does not exist or work."""
        name, _, argument = line[1:].partition(" ")
        argument = argument.strip().strip("'\"")
        actions = {"image": self.show, "system": self.set_system, "save": self.save}
        if name == "help":
            say(COMMANDS)
        elif name == "reset":
            self.reset()
            say("conversation and pictures forgotten")
        elif name not in actions:
            raise ValueError(f"/{name} is no command; see /help")
        elif not argument:
            raise ValueError(f"/{name} wants something after it; see /help")
        else:
            say(actions[name](argument))


def lines():
    """What is typed, line by line, with line editing where a person types."""
    by_hand = sys.stdin.isatty() and sys.stdout.isatty()
    if by_hand:
        try:
            import readline  # noqa: F401  input() then has a history and keys to edit with
        except ImportError:  # Windows
            pass
    while True:
        try:
            if by_hand:
                yield input("you: ")
                continue
            say("you: ", end="")
            line = sys.stdin.readline()
            if not line:
                return
            yield line
        except KeyboardInterrupt:  # drops the line
            say("\n(Ctrl-D ends the program)")
        except EOFError:
            return say("")


def run(model, files, pictures, args, how):
    """Ask until the input ends; `pictures` go with the first question."""
    chat = Chat(model, args.max_new_tokens, how)
    chat.waiting = list(zip(files, pictures, strict=True))
    say("/help lists commands")
    limit = model.config.text.max_positions
    for line in lines():
        line = line.strip()
        if not line:
            continue
        try:
            if line.startswith("/"):
                chat.command(line)
                continue
            result = chat.ask(line, None if args.json else sys.stdout)
        except ValueError as error:
            hint = "; /reset starts anew" if "context" in str(error) else ""
            say(f"{error}{hint}")
            continue
        if args.json:
            print(json.dumps(result, ensure_ascii=False), flush=True)
        if result["ended"] == "context":
            say(f"the answer was cut: the context ({limit} tokens) is full; /reset starts anew")
        elif result["ended"] == "length":
            say(f"the answer was cut after {args.max_new_tokens} tokens (--max-new-tokens)")
        elif result["ended"] == "interrupted":
            say("stopped")


if __name__ == "__main__":
    import argparse

    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    print(COMMANDS)
