"""Turn ``prompts/*.txt`` (one prompt a line) into ``prompts/train.jsonl`` and ``prompts/validate.jsonl``, conversations whose answers are still to be given by the target.

Every 13th conversation is for validation. Every 25th prompt becomes the second turn of a conversation that starts with the prompt before it, so that the data holds a few dozen dialogues of two turns.
"""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
TWO_TURNS = 25
VALIDATE = 13


def main() -> None:
    rows = []
    for file in sorted((HERE / "prompts").glob("*.txt")):
        prompts = [line.strip() for line in file.read_text().splitlines() if line.strip()]
        for number, prompt in enumerate(prompts, start=1):
            asked = [prompts[number - 2], prompt] if number % TWO_TURNS == 0 else [prompt]
            messages = [message for text in asked for message in ({"role": "user", "content": text}, {"role": "assistant", "content": ""})]
            rows.append({"id": f"{file.stem}-{number:04d}", "conversations": messages})
    for name, chosen in (("validate", rows[::VALIDATE]), ("train", [row for i, row in enumerate(rows) if i % VALIDATE])):
        (HERE / "prompts" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
        print(f"{name}: {len(chosen)} conversations")


if __name__ == "__main__":
    main()
