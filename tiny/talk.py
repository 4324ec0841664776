"""The tiny world in words: captions, questions, answers, all read off a `Scene` by a program.

It stands in for the captions of stage 1 and for the instruction data of stage 2. The kinds of
record are those of the papers: conversation, detailed description and complex reasoning (LLaVA,
arXiv 2304.08485, section 3), short answers under a response-format prompt and multiple choice
(LLaVA-1.5, arXiv 2310.03744, section 3.2), and some text without a picture.

Every function takes a scene and a numpy RandomState and returns plain strings. Questions and
answers come as (question, answer) pairs; a conversation is a list of them.
"""

from world import FAMILIES, FAMILY, KINDS, PAPERS, PLACES, Scene, Sticker

SHORT_PROMPT = "Answer the question using a single word or phrase."
LETTER_PROMPT = "Answer with the option's letter from the given choices directly."
BRIEF_QUESTIONS = (
    "What is this?",
    "Give a brief description of the picture.",
    "Say in one sentence what the picture shows.",
)
DETAIL_QUESTIONS = (
    "Describe the picture in detail.",
    "What do you see in this picture?",
    "Please give a full description of the picture.",
    "Tell me everything that is in the picture.",
)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
PLURALS = {
    "butterfly": "butterflies",
    "strawberry": "strawberries",
    "bus": "buses",
    "octopus": "octopuses",
    "food": "pieces of food",
}


def pick(random, options):
    return options[random.randint(len(options))]


def a(noun: str) -> str:
    """The noun with its article: "a cat", "an apple"."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def plural(noun: str) -> str:
    return PLURALS.get(noun, noun + "s")


def count(n: int, noun: str) -> str:
    """ "one cat", "two cats", "one piece of food"."""
    one = {"food": "piece of food"}.get(noun, noun)
    return f"{NUMBERS[n]} {one if n == 1 else plural(noun)}"


def at(place: str) -> str:
    return "in the middle" if place == "middle" else f"at the {place}"


def listing(parts) -> str:
    """["a cat", "a dog", "a bus"] -> "a cat, a dog and a bus"."""
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


def phrase(sticker: Sticker) -> str:
    return f"a {sticker.size} {sticker.kind} {at(sticker.place)}"


def unique(scene: Scene) -> list[Sticker]:
    """The stickers whose kind is there once, so that "the cat" says which."""
    kinds = [s.kind for s in scene.stickers]
    return [s for s in scene.stickers if kinds.count(s.kind) == 1]


# ---- descriptions ---------------------------------------------------------------------------


def caption(scene: Scene, random) -> str:
    """One line, as alt text has it: "a small cat at the top and a large bus at the left on ..."."""
    stickers = listing([phrase(s) for s in scene.stickers])
    return pick(
        random,
        (
            f"{stickers} on {scene.paper} paper",
            f"on {scene.paper} paper {stickers}",
            f"{scene.paper} paper with {stickers}",
        ),
    )


def detail(scene: Scene) -> str:
    """The detailed description: the paper, the number, then every sticker in reading order."""
    n = len(scene.stickers)
    sentences = [f"The picture shows {count(n, 'sticker')} on {scene.paper} paper."]
    sentences += [f"There is {phrase(s)}." for s in scene.stickers]
    return " ".join(sentences)


def notes(scene: Scene, random) -> str:
    """The scene written down in no particular order, for a model that cannot see."""
    parts = [f"{s.place} {s.kind} {s.size}" for s in scene.stickers] + [f"paper {scene.paper}"]
    return ", ".join(parts[i] for i in random.permutation(len(parts)))


# ---- short answers --------------------------------------------------------------------------


def what(scene: Scene, random):
    sticker = pick(random, scene.stickers)
    there = at(sticker.place)
    return pick(random, (f"What is {there}?", f"Which sticker is {there}?")), sticker.kind


def where(scene: Scene, random):
    if stickers := unique(scene):
        sticker = pick(random, stickers)
        kind = sticker.kind
        return pick(
            random, (f"Where is the {kind}?", f"Where do you see the {kind}?")
        ), sticker.place


def size(scene: Scene, random):
    if stickers := unique(scene):
        sticker = pick(random, stickers)
        return f"Is the {sticker.kind} small or large?", sticker.size


def family(scene: Scene, random):
    sticker = pick(random, scene.stickers)
    return f"Which family is the sticker {at(sticker.place)} from?", sticker.family


def paper(scene: Scene, random):
    questions = ("What colour is the paper?", "What color is the background?")
    return pick(random, questions), scene.paper


def number(scene: Scene, random):
    """Counts of stickers, of a family or of a kind, no count more often than another there."""
    nouns = pick(random, (["sticker"], list(FAMILIES), kinds_and_others(scene, random, 1)))
    numbers = {noun: number_of(noun, scene) for noun in nouns}
    n = pick(random, sorted(set(numbers.values())))
    return how_many(pick(random, [noun for noun in nouns if numbers[noun] == n]), scene, random)


def kinds_and_others(scene: Scene, random, n: int) -> list[str]:
    """The kinds that are there and n that are not: else "How many cats?" is answered with 1."""
    present = {s.kind for s in scene.stickers}
    absent = [kind for kind in KINDS if kind not in present]
    return sorted(present) + [absent[i] for i in random.permutation(len(absent))[:n]]


def number_of(noun: str, scene: Scene) -> int:
    return sum(noun in ("sticker", s.family, s.kind) for s in scene.stickers)


def how_many(noun: str, scene: Scene, random):
    verb = pick(random, ("are there", "do you see"))
    return f"How many {plural(noun)} {verb}?", str(number_of(noun, scene))


def exists(scene: Scene, random):
    """Half the time about something that is there."""
    present = {s.kind for s in scene.stickers}
    answer = pick(random, ("yes", "no"))
    kind = pick(random, [kind for kind in KINDS if (kind in present) == (answer == "yes")])
    question = pick(random, (f"Is there {a(kind)} in the picture?", f"Do you see {a(kind)}?"))
    return question, answer


def pair(scene: Scene, random, axis: str):
    """Two nameable stickers that differ in `axis` ("row" or "column"), in random order, or None."""
    stickers = unique(scene)
    pairs = [(s, t) for s in stickers for t in stickers if getattr(s, axis) != getattr(t, axis)]
    return pick(random, pairs) if pairs else None


def left_right(scene: Scene, random):
    if two := pair(scene, random, "column"):
        s, t = two
        answer = "left" if s.column < t.column else "right"
        return f"Is the {s.kind} to the left or to the right of the {t.kind}?", answer


def above_below(scene: Scene, random):
    if two := pair(scene, random, "row"):
        s, t = two
        answer = "above" if s.row < t.row else "below"
        return f"Is the {s.kind} above or below the {t.kind}?", answer


def choice(scene: Scene, random):
    """Multiple choice with letters, over kinds or over colours of paper."""
    if random.randint(3):
        present = {s.kind for s in scene.stickers}
        right = pick(random, sorted(present))
        wrong = [kind for kind in KINDS if kind not in present]
        question = "Which of these is in the picture?"
    else:
        right = scene.paper
        wrong = [name for name in PAPERS if name != right]
        question = "What colour is the paper?"
    options = [wrong[i] for i in random.permutation(len(wrong))[:3]] + [right]
    options = [options[i] for i in random.permutation(4)]
    lines = [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True)]
    return "\n".join([question, *lines]), "ABCD"[options.index(right)]


SHORT = {
    "kind": what,
    "place": where,
    "size": size,
    "family": family,
    "paper": paper,
    "count": number,
    "exists": exists,
    "left/right": left_right,
    "above/below": above_below,
}


def short_answers(scene: Scene, random, n: int) -> list[tuple[str, str]]:
    """Up to n short questions of random families; the response-format prompt ends the first."""
    turns = []
    for name in [tuple(SHORT)[random.randint(len(SHORT))] for _ in range(n)]:
        turn = SHORT[name](scene, random)
        if turn and turn not in turns:
            turns.append(turn)
    turns = turns or [paper(scene, random)]
    return prompted(turns, SHORT_PROMPT)


def counts(scene: Scene, random, n: int) -> list[tuple[str, str]]:
    """Up to n questions of how many, each about something else."""
    nouns = ["sticker", *FAMILIES, *kinds_and_others(scene, random, 3)]
    order = random.permutation(len(nouns))[:n]
    return prompted([how_many(nouns[i], scene, random) for i in order], SHORT_PROMPT)


def choices(scene: Scene, random, n: int) -> list[tuple[str, str]]:
    return prompted([choice(scene, random) for _ in range(n)], LETTER_PROMPT)


def prompted(turns, prompt: str):
    (question, answer), *rest = turns
    return [(f"{question}\n{prompt}", answer), *rest]


# ---- the three types of v1 ------------------------------------------------------------------


def conversation(scene: Scene, random) -> list[tuple[str, str]]:
    """Three or four turns, answered in sentences."""
    group = pick(random, tuple(FAMILIES))
    members = [s for s in scene.stickers if s.family == group]
    if members:
        verb = "is" if len(members) == 1 else "are"
        names = listing([a(s.kind) for s in members])
        group_answer = f"There {verb} {count(len(members), group)}: {names}."
    else:
        group_answer = f"There are no {plural(group)}."
    sticker = pick(random, scene.stickers)
    absent = pick(random, [k for k in KINDS if k not in {s.kind for s in scene.stickers}])
    turns = [
        ("What colour is the paper?", f"The paper is {scene.paper}."),
        (f"How many {plural(group)} are there?", group_answer),
        (f"What is {at(sticker.place)}?", f"There is {a(sticker.size)} {sticker.kind}."),
        (f"Can you see {a(absent)}?", f"No, there is no {absent} in the picture."),
    ]
    if stickers := unique(scene):
        one = pick(random, stickers)
        turns.append((f"Where is the {one.kind}?", f"The {one.kind} is {at(one.place)}."))
    return [turns[i] for i in random.permutation(len(turns))[: random.randint(3, 5)]]


def reasoning(scene: Scene, random) -> list[tuple[str, str]]:
    """One question whose answer takes several looks, given with its reasons."""
    groups = {f: [s for s in scene.stickers if s.family == f] for f in FAMILIES}
    groups = {f: members for f, members in groups.items() if members}
    counts = listing([count(len(members), f) for f, members in groups.items()])
    which = random.randint(3)
    if which == 0:
        most = max(len(members) for members in groups.values())
        leaders = [f for f, members in groups.items() if len(members) == most]
        question = "Which family has the most stickers, and why?"
        if len(leaders) == 1:
            answer = f"The {leaders[0]} family, because I see {counts}."
        else:
            answer = f"No family is ahead, because I see {counts}."
    elif which == 1:
        gone = pick(random, tuple(FAMILIES))
        rest = [s for s in scene.stickers if s.family != gone]
        all_gone = "the food" if gone == "food" else f"the {plural(gone)}"
        question = f"If all {all_gone} were taken away, what would be left?"
        left = (
            f"{listing([a(s.kind) for s in rest])} would be left"
            if rest
            else "nothing would be left"
        )
        answer = f"I see {counts}, so {left}."
    else:
        two = pair(scene, random, "column")
        if two is None:
            top = scene.stickers[0]
            question = "Which sticker do I meet first when I read the picture line by line?"
            answer = f"The {top.kind}, because it is {at(top.place)}."
        else:
            s, t = sorted(two, key=lambda sticker: sticker.column)
            names = [two[0].kind, two[1].kind]
            question = (
                f"I walk from left to right. Do I meet the {names[0]} or the {names[1]} first?"
            )
            answer = f"The {s.kind}, because it is {at(s.place)} and the {t.kind} is {at(t.place)}."
    return [(question, answer)]


def record(scene: Scene, random, which: int) -> list[tuple[str, str]]:
    """The turns of one record; `which` in 0..19 picks its type, short answers most often."""
    if which < 6:
        return short_answers(scene, random, 8)
    if which < 9:
        return counts(scene, random, 8)
    if which < 11:
        return choices(scene, random, 3)
    if which < 13:
        return conversation(scene, random)
    if which < 18:
        return [(pick(random, DETAIL_QUESTIONS), detail(scene))]
    return reasoning(scene, random)


# ---- without a picture ----------------------------------------------------------------------


def knowledge(random) -> list[tuple[str, str]]:
    """Two to four questions about the world that need no picture."""
    turns = []
    for _ in range(random.randint(2, 5)):
        kind = pick(random, KINDS)
        group = pick(random, tuple(FAMILIES))
        x, y = random.randint(5), random.randint(4)
        place = pick(random, [place for place in PLACES if place != "middle"])
        turns.append(
            pick(
                random,
                (
                    (f"Which family is {a(kind)} from?", FAMILY[kind]),
                    (
                        f"Is {a(kind)} from the {group} family?",
                        "yes" if FAMILY[kind] == group else "no",
                    ),
                    (f"What is {NUMBERS[x]} plus {NUMBERS[y]}?", NUMBERS[x + y]),
                    (f"What is the opposite of {place}?", OPPOSITE[place]),
                ),
            )
        )
    return turns


OPPOSITE = {place: PLACES[8 - i] for i, place in enumerate(PLACES)}
