"""Open a data file of 700,000 records: seconds, and the most memory of the process.

python benchmarks/records.py        writes 0.9 GB into a temporary folder first
"""

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from records import Records

N = 700_000
WORDS = "the a cat dog man woman sitting standing near table with red blue photo of two".split()


def write(file: Path):
    """Conversations of one to eight questions, some indented; as long as mix665k's on average."""
    chance = random.Random(0)
    with open(file, "w") as out:
        for i in range(N):
            turns = []
            for _ in range(chance.choice((1, 2, 3, 5, 8))):
                asked = " ".join(chance.choices(WORDS, k=chance.randint(5, 25)))
                said = " ".join(chance.choices(WORDS, k=chance.choice((1, 2, 30, 80))))
                turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
            record = {"id": f"{i:012}", "image": f"coco/{i // 2:012}.jpg", "conversations": turns}
            text = json.dumps(record, indent=2 if i % 2 else None)
            out.write(f"{',' if i else '['}{text}\n")
        out.write("]\n")


def main():
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "data.json")
        write(file)
        started = time.time()
        records = Records(file)
        seconds = time.time() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"{len(records):,} records, {file.stat().st_size / 1e9:.2f} GB: ", end="")
        print(f"{seconds:.1f} s, {peak:.2f} GB of memory")


if __name__ == "__main__":
    main()
