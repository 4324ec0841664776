"""The curves of training runs, drawn into one PNG: loss, held-out loss, gradient norm, rate.

    python plot.py runs/stage2 [RUN ...] --out curves.png

Reads the run.jsonl of each run. Each curve is a running mean over a hundredth of the run; the thin
line behind it is what was measured.
"""

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw

WIDTH, HEIGHT, MARGIN = 900, 260, 56
COLOURS = ("#1f5fbf", "#c4472e", "#2f8f4e", "#8a4fb0", "#b08900", "#3c8f9c")
PANELS = {"loss": "loss", "eval_loss": "held-out loss", "grad_norm": "gradient norm", "lr": "rate"}


def read_log(run: Path) -> list[dict]:
    """The steps of a run. Raises ValueError if it has none."""
    file = run / "run.jsonl" if run.is_dir() else run
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is no log of a run: {error}") from None
    rows = [row for row in rows if "step" in row]
    if not rows:
        raise ValueError(f"{file} has no steps")
    return rows


def smooth(values: list[float], width: int) -> list[float]:
    """The running mean of up to `width` values before each and itself."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    starts = (max(0, i - width + 1) for i in range(len(values)))
    return [(sums[i + 1] - sums[s]) / (i + 1 - s) for i, s in enumerate(starts)]


def lighter(colour: str) -> str:
    return "#" + "".join(f"{(int(colour[i : i + 2], 16) + 3 * 255) // 4:02x}" for i in (1, 3, 5))


def draw_panel(draw: ImageDraw.ImageDraw, top: int, key: str, runs: dict[str, list[dict]]):
    """One diagram: `key` of every run over its steps."""
    curves = {
        name: [(row["step"] + 1, row[key]) for row in rows if key in row]
        for name, rows in runs.items()
    }
    points = [point for curve in curves.values() for point in curve]
    high, last = max(y for _, y in points), max(x for x, _ in points)
    low = min(0.0, min(y for _, y in points))
    span = (high - low) or 1.0
    box = (MARGIN, top + 28, WIDTH - 16, top + HEIGHT - 24)

    def place(x, y):
        across = box[0] + (box[2] - box[0]) * x / last
        return across, box[3] - (box[3] - box[1]) * (y - low) / span

    draw.text((MARGIN, top + 8), PANELS[key], "black", font_size=14)
    for i in range(5):
        y = low + span * i / 4
        draw.line([place(0, y), place(last, y)], "#dddddd")
        draw.text((6, place(0, y)[1] - 6), f"{y:.3g}", "#555555", font_size=11)
        x = last * i // 4
        draw.text((place(x, low)[0] - 8, box[3] + 5), f"{x}", "#555555", font_size=11)
    for curve, colour in zip(curves.values(), COLOURS * len(curves), strict=False):
        if len(curve) > 1:
            xs, ys = zip(*curve, strict=True)
            means = smooth(list(ys), max(1, len(ys) // 100))
            draw.line([place(*point) for point in curve], lighter(colour))
            draw.line([place(*p) for p in zip(xs, means, strict=True)], colour, width=2)


def draw_runs(runs: dict[str, list[dict]]) -> Image.Image:
    """{name: steps} -> a picture with a diagram for each thing that was logged."""
    keys = [key for key in PANELS if any(key in row for rows in runs.values() for row in rows)]
    picture = Image.new("RGB", (WIDTH, HEIGHT * len(keys) + 30), "white")
    draw = ImageDraw.Draw(picture)
    across = MARGIN
    for name, colour in zip(runs, COLOURS * len(runs), strict=False):
        draw.text((across, 8), name, colour, font_size=14)
        across += draw.textlength(name, font_size=14) + 24
    for i, key in enumerate(keys):
        draw_panel(draw, 30 + i * HEIGHT, key, runs)
    return picture


def draw(paths, out: Path):
    """Draw runs into a PNG. Raises ValueError for what is no run."""
    runs = {str(path): read_log(Path(path)) for path in paths}
    draw_runs(runs).save(out)
    print(f"{out}: {', '.join(f'{name} {len(rows)} steps' for name, rows in runs.items())}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or their run.jsonl")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="PNG to write")
    args = parser.parse_args()
    try:
        draw(args.runs, args.out)
    except ValueError as error:
        parser.exit(2, f"plot.py: {error}\n")


if __name__ == "__main__":
    main()
