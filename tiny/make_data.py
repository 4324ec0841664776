"""Write the tiny world to disk as the official data come: JSON records and picture files.

python tiny/make_data.py            16,000 pictures into tiny/data/ (a minute or two, 250 MB)

stage1.json        one caption for each picture, as in LLaVA-Pretrain
stage2.json        two records for each picture and some without one, as in LLaVA-1.5's mix
images/00000.jpg   the picture
images/00000.json  what is on it in symbols: five captions and the boxes, x1 y1 x2 y2 in 0..1,
                   all that the papers' text-only teacher was told
"""

import argparse
import json
import sys
import time
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import talk
import world

HERE = Path(__file__).parent


def conversations(turns, has_picture: bool = True) -> list[dict]:
    """[(question, answer), ...] -> official turns; the picture stands before the first question."""
    (question, answer), *rest = turns
    turns = [(f"<image>\n{question}" if has_picture else question, answer), *rest]
    return [
        {"from": role, "value": text}
        for turn in turns
        for role, text in zip(("human", "gpt"), turn, strict=True)
    ]


def make_picture(index: int, seed: int, images: Path) -> tuple[dict, list[dict]]:
    """Draw picture `index`, write it and its symbols, and return its records of both stages."""
    random = np.random.RandomState([seed, index, 4])
    scene = world.make_scene(seed, index)
    name = f"{index:05d}"
    world.draw(scene).save(images / f"{name}.jpg", quality=90)
    symbols = {
        "captions": [talk.caption(scene, random) for _ in range(5)],
        "instances": [{"category": s.kind, "bbox": s.box} for s in scene.stickers],
    }
    (images / f"{name}.json").write_text(json.dumps(symbols))
    record = {"id": name, "image": f"{name}.jpg"}
    brief = (talk.pick(random, talk.BRIEF_QUESTIONS), talk.caption(scene, random))
    stage1 = record | {"conversations": conversations([brief])}
    stage2 = [
        record | {"conversations": conversations(talk.record(scene, random, random.randint(20)))}
        for _ in range(2)
    ]
    if index % 10 == 0:
        turns = talk.knowledge(random)
        stage2.append({"id": f"{name}-text", "conversations": conversations(turns, False)})
    return stage1, stage2


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=16_000, help="how many pictures to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the world; 0 is the training world")
    parser.add_argument("--out", type=Path, default=HERE / "data", help="folder to write to")
    args = parser.parse_args()
    images = args.out / "images"
    images.mkdir(parents=True, exist_ok=True)
    stages: dict[str, list] = {"stage1": [], "stage2": []}
    started = time.time()
    with Pool() as pool:
        work = partial(make_picture, seed=args.seed, images=images)
        for stage1, stage2 in pool.imap(work, range(args.pictures), chunksize=64):
            stages["stage1"].append(stage1)
            stages["stage2"] += stage2
            done = len(stages["stage1"])
            if done % 500 == 0 or done == args.pictures:
                rate = done / (time.time() - started)
                left = (args.pictures - done) / rate
                print(
                    f"\r{done}/{args.pictures} pictures, {rate:.0f}/s, {left:.0f} s left ",
                    *("\n" if done == args.pictures else ""),
                    end="",
                    file=sys.stderr,
                )
    for name, records in stages.items():
        (args.out / f"{name}.json").write_text(json.dumps(records, indent=1))
        print(f"{args.out / name}.json: {len(records)} records", file=sys.stderr)


if __name__ == "__main__":
    main()
