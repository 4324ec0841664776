"""Conversation templates: how the turns of a conversation become one string.

Each language model was trained with strings of one form, and answers best to exactly that:

    v1        A chat between ... USER: <image>\\nWhat is this? ASSISTANT: A cat.</s>USER: ...
    mistral   [INST] <image>\\nWhat is this? [/INST] A cat. </s>[INST] ...
    chatml    <|im_start|>system\\nAnswer ...<|im_end|><|im_start|>user\\n<image>\\nWhat ...

The strings are those of the original code (LLaVA 1.2.2, LLaVA-NeXT for LLaVA-3), blanks and line
breaks included. Read next: data.py, which turns them into ids and labels.
"""

import re
from dataclasses import astuple, dataclass

IMAGE_TAG = "<image>"
TOKENS = r"</?s>|<\|\w+\|>"  # what is one token where a template says it
CONTROL = re.compile(f"({TOKENS})")


@dataclass(frozen=True)
class Template:
    """How turns become one string: first question gpt answer stop, human question gpt answer ..."""

    first: str  # before the first question: the system text too
    human: str  # before every other question
    gpt: str  # between a question and its answer
    stop: str = "</s>"  # after an answer, and the end of generation
    space: str = " "  # before an answer; not in a prompt, whose last token it would change
    system: str = ""  # the part of `first` that a "system" turn replaces

    @property
    def stop_token(self) -> str:
        """`stop` without the space that Mistral and LLaMA 2 have before it."""
        return self.stop.strip()


CHAT = (
    "A chat between a curious {who} and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the {who}'s questions."
)
SEES = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
# The system text of LLaMA-2-chat, and the example in front of every conversation with Vicuna v0.
META = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially unbiased "
    "and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of "
    "answering something not correct. If you don't know the answer to a question, please don't "
    "share false information."
)
ENERGY_QUESTION = "What are the key differences between renewable and non-renewable energy sources?"
ENERGY_ANSWER = (
    "Renewable energy sources are those that can be replenished naturally in a relatively short "
    "amount of time, such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy "
    "sources, on the other hand, are finite and will eventually be depleted, such as coal, oil, "
    "and natural gas. Here are some key differences between renewable and non-renewable energy "
    "sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable "
    "energy sources are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than "
    "non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, "
    "and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they "
    "typically have lower operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more "
    "remote locations than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to "
    "different situations and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while "
    "non-renewable sources are not, and their depletion can lead to economic and social "
    "instability.\n"
)
LLAMA3_ROLE = "<|start_header_id|>{}<|end_header_id|>\n\n"


def vicuna(who: str) -> Template:
    system = CHAT.format(who=who)
    return Template(system + " USER: ", "USER: ", " ASSISTANT:", system=system)


def vicuna_v0(example: str) -> Template:
    system = CHAT.format(who="human")
    first = f"{system}###{example}Human: "
    return Template(first, "Human: ", "###Assistant:", "###", system=system)


def llama_2(system: str) -> Template:
    first = f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n"
    return Template(first, "<s>[INST] ", " [/INST]", " </s>", system=system)


TEMPLATES = {
    "v0": vicuna_v0(f"Human: {ENERGY_QUESTION}###Assistant: {ENERGY_ANSWER}###"),
    "v1": vicuna("user"),  # training and every evaluation of LLaVA-1.5
    "llava_v0": vicuna_v0(""),
    "llava_v1": vicuna("human"),  # the original's command line and demo
    "llama_2": llama_2(META),
    "llava_llama_2": llama_2(SEES),
    "mistral_instruct": Template("[INST] ", "[INST] ", " [/INST]", " </s>"),
    "chatml_direct": Template(
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n",
        "<|im_start|>user\n",
        "<|im_end|><|im_start|>assistant\n",
        "<|im_end|>",
        "",
        "Answer the questions.",
    ),
    "llava_llama_3": Template(
        f"<|begin_of_text|>{LLAMA3_ROLE.format('system')}{SEES}<|eot_id|>{LLAMA3_ROLE.format('user')}",
        LLAMA3_ROLE.format("user"),
        f"<|eot_id|>{LLAMA3_ROLE.format('assistant')}",
        "<|eot_id|>",
        "",
        SEES,
    ),
    "plain": None,  # stage 1: picture, caption, newline; the question is thrown away
}


def template_named(name: str) -> Template | None:
    if name not in TEMPLATES:
        raise ValueError(f"no template is called {name!r}: choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def pieces(turns, template: str) -> list[tuple[str, bool, bool]]:
    """Turns [(role, text)] as strings in order: (text, is it an answer?, is it the template's?).

    A turn of role "system" before all others stands for the template's own system text.
    """
    style = template_named(template)
    found, system = [], None
    if turns and turns[0][0] == "system":
        (_, system), *turns = turns
        if not (style and style.system):
            raise ValueError(f"template {template!r} has no place for a system text")
    for i, (role, text) in enumerate(turns):
        if style is None:
            found.append((text + "\n", True, False) if role == "gpt" else (IMAGE_TAG, False, True))
        elif role == "human":
            start = style.human if i else style.first
            if system is not None and i == 0:  # whose words are no template's
                before, start = style.first.split(style.system)
                found += [(before, False, True), (system, False, False)]
            found += [(start, False, True), (text, False, False), (style.gpt, False, True)]
        else:
            found += [(style.space, True, True), (text, True, False), (style.stop, True, True)]
    return found


def training_pieces(turns, template: str) -> list[tuple[str, bool, bool]]:
    """The same for training, where the models on Vicuna v0 wrote and learned other strings.

    They learned to write the "###" between turns, and a speaker's name. (1.2.2 of the original
    takes `--version v0`, and then trains with v1's strings and masks.)

        A chat ...\\n\\n### Human: What is this?\\n### Assistant: A cat.\\n###
        learn         ^^^                        ^^^^^^^^^^^^^^^^^^^^^^^^^^
    """
    style = template_named(template)
    if style is None or style.stop != "###":
        return pieces(turns, template)
    found = [(CHAT.format(who="human") + "\n\n", False, True)]
    for role, text in turns:
        name, learned = (" Assistant: ", True) if role == "gpt" else (" Human: ", False)
        found += [("###", True, True), (name, learned, True)]
        found += [(text, learned, False), ("\n", learned, True)]
    return [*found, ("### ", True, True)]


def render(turns, template: str) -> str:
    """Write turns [(role, text)], role "human" | "gpt" (first "system"), as one prompt string.

    After a human turn the string ends where the answer starts. `</s>` stands for end-of-sequence.
    """
    return "".join(text for text, _, _ in pieces(turns, template))


def control_tokens(template: str) -> set[str]:
    """The strings in a template that are one token each."""
    style = template_named(template)
    return set(CONTROL.findall("".join(astuple(style)))) if style else set()


def main():
    """Print one conversation in every template."""
    turns = [("human", "<image>\nWhat is this?"), ("gpt", "A cat."), ("human", "Its colour?")]
    for name in TEMPLATES:
        prompt = render(turns, name)
        print(f"{name:16} {prompt if len(prompt) < 400 else '...' + prompt[-300:]!r}")


if __name__ == "__main__":
    import argparse

    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    main()
