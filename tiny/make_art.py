"""Make the two sticker sheets of the toy world from the emoji art they are derived from.

A sheet is a table of 72 x 72 pixel stickers, one row per family and one column per kind, in the
order of `FAMILIES` in world.py. A sticker is one emoji with a white die-cut rim, so that it shows
on paper of any colour; rim included, its longer side spans the cell.

    art/noto.png    Noto Emoji, Google, Apache-2.0 (art/LICENSE-noto.txt)
    art/fluent.png  Fluent Emoji flat, Microsoft, MIT (art/LICENSE-fluent.txt)

Both sheets are committed: only a new kind or a new rim calls for this script. To run it again,

    pip install resvg-py==0.5.0 pillow==13.0.0
    npm pack @iconify-json/noto@1.2.9 @iconify-json/fluent-emoji-flat@1.2.6
    python tiny/make_art.py

with the two .tgz files in the current folder; with these versions it repeats every byte.
"""

import io
import json
import math
import tarfile
from pathlib import Path

from PIL import Image, ImageChops
from world import FAMILIES

CELL, RIM = 72, 2.5  # pixels
SCALE = 4  # the rim is cut on a picture this many times larger, so that its edge comes out smooth
SHEETS = {"noto": "noto-1.2.9", "fluent": "fluent-emoji-flat-1.2.6"}

# Both icon sets name an emoji by its Unicode name; these kinds go by a shorter word here.
# fmt: off
ICON_NAMES = {
    "cat": "cat-face", "dog": "dog-face", "pig": "pig-face", "bee": "honeybee",
    "apple": "red-apple", "burger": "hamburger", "cheese": "cheese-wedge", "cake": "shortcake",
    "car": "automobile", "truck": "delivery-truck", "train": "locomotive",
    "plane": "airplane", "boat": "sailboat", "scooter": "kick-scooter", "clock": "alarm-clock",
    "book": "closed-book", "bulb": "light-bulb", "ball": "soccer-ball", "hat": "top-hat",
}
# fmt: on


def render(svg: str) -> Image.Image:
    """Draw an SVG at twice the working size and crop it to what is more than half opaque."""
    try:
        import resvg_py
    except ImportError:
        raise SystemExit("make_art.py draws SVG with resvg: pip install resvg-py==0.5.0") from None
    side = 2 * SCALE * CELL
    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side)
    art = Image.open(io.BytesIO(png)).convert("RGBA")
    return art.crop(art.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox())


def cut_out(art: Image.Image) -> Image.Image:
    """Centre the art on a square of transparent paper and cut it out with a white rim."""
    side, rim = SCALE * CELL, SCALE * RIM
    zoom = (side - 2 * rim) / max(art.size)
    art = art.resize([round(zoom * length) for length in art.size], Image.Resampling.LANCZOS)
    ink = Image.new("RGBA", (side, side))
    ink.paste(art, [(side - length) // 2 for length in art.size])

    # The rim is the union of the art's shadows, moved by `rim` in 64 directions.
    alpha = cut = ink.getchannel("A")
    for step in range(64):
        angle = math.tau * step / 64
        dx, dy = round(rim * math.cos(angle)), round(rim * math.sin(angle))
        cut = ImageChops.lighter(cut, ImageChops.offset(alpha, dx, dy))
    paper = Image.new("RGBA", ink.size, "white")
    paper.putalpha(cut)
    return Image.alpha_composite(paper, ink).resize((CELL, CELL), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    for name, package in SHEETS.items():
        with tarfile.open(f"iconify-json-{package}.tgz") as tar:
            icons = json.load(tar.extractfile("package/icons.json"))
        box = f"0 0 {icons['width']} {icons['height']}"
        sheet = Image.new("RGBA", (CELL * max(map(len, FAMILIES.values())), CELL * len(FAMILIES)))
        for row, kinds in enumerate(FAMILIES.values()):
            for column, kind in enumerate(kinds):
                body = icons["icons"][ICON_NAMES.get(kind, kind)]["body"]
                svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{body}</svg>'
                sheet.paste(cut_out(render(svg)), (column * CELL, row * CELL))
        sheet.save(Path(__file__).parent / "art" / f"{name}.png", optimize=True)
