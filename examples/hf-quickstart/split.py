"""Split the target's answers into ``data/train.jsonl`` and ``data/validate.jsonl``: every 16th conversation, in the order of the ids, is for validation."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

DATA = Path(__file__).resolve().parent / "data"
VALIDATE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("answers", help="what regenerate wrote")
    lines = Path(parser.parse_args().answers).expanduser().read_text().splitlines()
    rows = sorted((json.loads(line) for line in lines if line.strip()), key=lambda row: row["id"])
    parts = {"validate": rows[::VALIDATE], "train": [row for i, row in enumerate(rows) if i % VALIDATE]}
    for name, chosen in parts.items():
        (DATA / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
        print(f"{name}: {len(chosen)} conversations")


if __name__ == "__main__":
    main()
