"""The tiny world: 1 to 4 stickers on a sheet of coloured paper, drawn by a program.

It stands in for COCO. A `Scene` is the whole truth about a picture; `draw` shows it to the eye,
tiny/talk.py puts it into words, and a model has to get from the one to the other. Everything
follows from (seed, index) through numpy's RandomState, whose stream is frozen for ever, so every
machine sees the same world. Sticker art: Noto Emoji (Apache 2.0); a second sheet, Fluent Emoji
(MIT), is never trained on (tiny/art/).

About one in ten (kind, place, size) combinations is never drawn for training, so that a test can
ask for things that were never seen together.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

FAMILIES = {
    family: tuple(kinds.split())
    for family, kinds in {
        "animal": "cat dog pig frog lion panda penguin elephant turtle octopus bee butterfly",
        "food": "apple banana lemon carrot strawberry watermelon"
        " pizza burger cheese doughnut cake mushroom",
        "vehicle": "car bus truck tractor bicycle train rocket helicopter plane boat ship scooter",
        "thing": "clock key book umbrella guitar hammer bulb drum bell ball hat camera",
    }.items()
}
KINDS = tuple(kind for kinds in FAMILIES.values() for kind in kinds)
FAMILY = {kind: family for family, kinds in FAMILIES.items() for kind in kinds}
PLACES = (
    *("top left", "top", "top right"),
    *("left", "middle", "right"),
    *("bottom left", "bottom", "bottom right"),
)
SIZES = {"small": 40, "large": 62}  # longest side in pixels
PAPERS = {
    "white": (244, 243, 238),
    "grey": (158, 160, 163),
    "black": (44, 44, 48),
    "red": (206, 66, 60),
    "yellow": (243, 208, 84),
    "green": (92, 168, 96),
    "blue": (80, 132, 208),
    "purple": (142, 96, 184),
}
SHEET = 192  # pixels per side of a picture
CELL = SHEET // 3  # the nine places are the cells of a 3 x 3 grid
ART = {name: Path(__file__).parent / "art" / f"{name}.png" for name in ("noto", "fluent")}
SPRITE = 72  # pixels per side of a sticker in the art


@dataclass(frozen=True)
class Sticker:
    kind: str
    size: str
    place: str
    centre: tuple[int, int]  # x, y in pixels
    angle: int  # degrees
    flipped: bool

    @property
    def family(self) -> str:
        return FAMILY[self.kind]

    @property
    def row(self) -> int:
        return PLACES.index(self.place) // 3

    @property
    def column(self) -> int:
        return PLACES.index(self.place) % 3

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Upright box x1, y1, x2, y2 in 0..1, three decimals, as the paper writes COCO's boxes."""
        half = SIZES[self.size] / 2
        corners = [c + side * half for side in (-1, 1) for c in self.centre]
        return tuple(round(min(max(c / SHEET, 0.0), 1.0), 3) for c in corners)


@dataclass(frozen=True)
class Scene:
    paper: str
    stickers: tuple[Sticker, ...]  # in reading order: row by row, each from left to right
    seed: int  # of the light, the grain and the exact shade of the paper


def held_out(kind: str, place: str, size: str) -> bool:
    """Is this combination kept for testing? One in ten is; no (kind, place) loses both sizes."""
    number = 7 * KINDS.index(kind) + 5 * PLACES.index(place) + 3 * (size == "large")
    return number % 10 == 0


def make_scene(seed: int, index: int, only_held_out: bool = False) -> Scene:
    """Scene number `index` of the world `seed`; `only_held_out`: of unseen combinations only."""
    random = np.random.RandomState([seed, index])
    places = sorted(random.permutation(9)[: random.randint(1, 5)])
    kinds: list[str] = []
    stickers = []
    for place in places:
        while True:
            # Now and then a kind comes again, or counting one kind would always give 1.
            again = kinds and random.randint(4) == 0
            kind = kinds[random.randint(len(kinds))] if again else KINDS[random.randint(48)]
            size = ("small", "large")[random.randint(2)]
            if held_out(kind, PLACES[place], size) == only_held_out:
                break
        kinds.append(kind)
        stickers.append(place_sticker(random, kind, size, PLACES[place]))
    paper = tuple(PAPERS)[random.randint(len(PAPERS))]
    return Scene(paper, tuple(stickers), int(random.randint(2**31)))


def place_sticker(random, kind: str, size: str, place: str) -> Sticker:
    """Put a sticker into the cell of its place, a little off the middle, turned a little."""
    row, column = divmod(PLACES.index(place), 3)
    slack = {"small": 10, "large": 4}[size]
    margin = SIZES[size] // 2
    centre = tuple(
        int(
            np.clip(
                cell * CELL + CELL // 2 + random.randint(-slack, slack + 1), margin, SHEET - margin
            )
        )
        for cell in (column, row)
    )
    return Sticker(kind, size, place, centre, int(random.randint(-15, 16)), bool(random.randint(2)))


@cache
def sprites(art: str) -> dict[str, Image.Image]:
    """Cut the sheet of an art style into one RGBA picture per kind."""
    with Image.open(ART[art]) as sheet:
        sheet = sheet.convert("RGBA")
    return {
        kind: sheet.crop((x, y, x + SPRITE, y + SPRITE))
        for i, kind in enumerate(KINDS)
        for x, y in [(i % 12 * SPRITE, i // 12 * SPRITE)]
    }


def draw(scene: Scene, art: str = "noto") -> Image.Image:
    """Draw a scene: an RGB picture of SHEET x SHEET pixels."""
    random = np.random.RandomState(scene.seed)
    shade = random.randint(-12, 13, size=3)
    light = random.randint(-10, 11, size=2)  # the paper is a little brighter on one side
    ramp = np.arange(SHEET) - SHEET // 2
    paper = np.array(PAPERS[scene.paper]) + shade  # (3)
    paper = paper + (light[0] * ramp[:, None, None] + light[1] * ramp[None, :, None]) // SHEET
    grain = random.randint(-4, 5, size=(SHEET, SHEET, 1))
    picture = Image.fromarray(np.clip(paper + grain, 0, 255).astype(np.uint8))
    for sticker in scene.stickers:
        sprite = sprites(art)[sticker.kind]
        if sticker.flipped:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        size = SIZES[sticker.size]
        sprite = sprite.resize((size, size), Image.Resampling.LANCZOS)
        sprite = sprite.rotate(sticker.angle, Image.Resampling.BICUBIC, expand=True)
        corner = [c - side // 2 for c, side in zip(sticker.centre, sprite.size, strict=True)]
        picture.paste(sprite, corner, sprite)
    return picture
