"""python -m pytest tests/test_tiny.py: the tiny world is the same everywhere, and told truly."""

import hashlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tiny"))
import talk
import world


def test_pictures_are_the_same_on_every_machine():
    pixels = b"".join(world.draw(world.make_scene(7, i)).tobytes() for i in range(20))
    assert hashlib.sha256(pixels).hexdigest() == PIXELS


PIXELS = "43bad3642b817fae586297e924210799e8665b5e2ca0b4b2c404162b8b22c8d1"


def test_words_are_the_same_on_every_machine():
    said = ""
    for i in range(50):
        random = np.random.RandomState([7, i])
        for which in range(20):
            said += repr(talk.record(world.make_scene(7, i), random, which))
    assert hashlib.sha256(said.encode()).hexdigest() == WORDS


WORDS = "99dc6683f463ceb98dd10d2d8203286fd620439f7ae85a414ee4629dc05cc07b"


def test_there_are_48_kinds_in_four_families():
    assert len(set(world.KINDS)) == 48 and len(world.FAMILIES) == 4


def test_held_out_combinations_are_never_drawn_for_training():
    for i in range(500):
        for only in (False, True):
            for s in world.make_scene(7, i, only).stickers:
                assert world.held_out(s.kind, s.place, s.size) == only


def test_no_kind_loses_both_sizes_at_a_place():
    combinations = [(k, p, s) for k in world.KINDS for p in world.PLACES for s in world.SIZES]
    lost = [c for c in combinations if world.held_out(*c)]
    assert 0.08 < len(lost) / len(combinations) < 0.12
    assert len({(k, p) for k, p, _ in lost}) == len(lost)


def test_boxes_lie_on_the_sheet_around_the_middle_of_their_place():
    for i in range(200):
        for s in world.make_scene(7, i).stickers:
            x1, y1, x2, y2 = s.box
            assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1
            assert int((x1 + x2) / 2 * 3) == s.column and int((y1 + y2) / 2 * 3) == s.row


@pytest.mark.parametrize("name", talk.SHORT)
def test_short_answers_agree_with_the_detailed_description(name):
    """The description is parsed back by regular expressions and the question answered from it."""
    asked = 0
    for i in range(300):
        scene = world.make_scene(7, i)
        turn = talk.SHORT[name](scene, np.random.RandomState([7, i]))
        if turn is None:
            continue
        question, answer = turn
        text = talk.detail(scene)
        there = re.findall(r"There is a (\w+) (\w+) (?:at|in) the ([a-z ]+)\.", text)
        place = {kind: place for _, kind, place in there}
        column = {p: n % 3 for n, p in enumerate(world.PLACES)}
        row = {p: n // 3 for n, p in enumerate(world.PLACES)}
        kinds = [kind for kind in re.findall(r"[a-z]+", question) if kind in world.KINDS]
        spot = re.search(r"(?:at|in) the ([a-z ]+?)(?: from)?\?", question)
        at = {p: (size, kind) for size, kind, p in there}
        if name == "kind":
            wanted = at[spot[1]][1]
        elif name == "place":
            wanted = place[kinds[0]]
        elif name == "size":
            wanted = at[place[kinds[0]]][0]
        elif name == "family":
            wanted = world.FAMILY[at[spot[1]][1]]
        elif name == "paper":
            wanted = re.search(r"on (\w+) paper", text)[1]
        elif name == "exists":
            wanted = "yes" if kinds[0] in place else "no"
        elif name == "left/right":
            wanted = "left" if column[place[kinds[0]]] < column[place[kinds[1]]] else "right"
        elif name == "above/below":
            wanted = "above" if row[place[kinds[0]]] < row[place[kinds[1]]] else "below"
        else:
            continue  # counts have a test of their own
        assert answer == wanted, (text, question)
        asked += 1
    assert asked > 100 or name == "count"


def test_counts_are_those_of_the_stickers():
    for i in range(300):
        scene = world.make_scene(7, i)
        question, answer = talk.number(scene, np.random.RandomState([7, i]))
        noun = re.match(r"How many (.+) (?:are there|do you see)\?", question)[1]
        names = [n for s in scene.stickers for n in ("sticker", s.kind, s.family)]
        assert sum(talk.plural(n) == noun for n in names) == int(answer)


def test_options_hold_exactly_one_right_answer():
    for i in range(200):
        scene = world.make_scene(7, i)
        question, letter = talk.choice(scene, np.random.RandomState([7, i]))
        options = dict(re.findall(r"^([A-D])\. (\w+)$", question, re.M))
        truth = {s.kind for s in scene.stickers} | {scene.paper}
        assert [k for k, v in options.items() if v in truth] == [letter] and len(options) == 4
