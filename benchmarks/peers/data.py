"""Our tokenised conversations and records as the data folder that speculators' trainer reads: same ids, loss masks, hidden states and vocabulary.

Takes the records that ``main.py extract`` wrote (states in Transformers' counting, the last one before the final norm, as vLLM's extraction gives them) and
writes an Arrow data set (input_ids, loss_mask, seq_len), numbers.npy (the record of each row, which ``records.py`` reads), d2t.npy, t2d.npy and facts.json.

    python main.py vocabulary --target T --input TRAIN --size 16384 --output V.safetensors
    python benchmarks/peers/data.py --target T --train TRAIN --validate VALIDATE --records RECORDS --vocabulary V.safetensors --output FOLDER
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("target", "train", "validate", "records", "vocabulary", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--max_length", type=int, default=2048)
    given = parser.parse_args()
    import datasets
    from safetensors import safe_open

    from torchspec.data.datamodule import DraftDataModule
    from torchspec.target import TargetConfig
    from torchspec.transfer.shard_reader import ShardReader

    data = DraftDataModule(TargetConfig(given.target), train=given.train, validate=given.validate, max_length=given.max_length, max_tokens=8192)
    output = Path(given.output)
    output.mkdir(parents=True)
    reader = ShardReader(Path(given.records))
    rows: list[tuple[np.ndarray, np.ndarray, int]] = []
    parts = []
    for stage in ("train", "validate"):
        found = data.corpus.dataset(stage)
        numbers = reader.find(found.hashes)
        rows += [(np.asarray(found.ids(i), dtype=np.int64), np.asarray(found.mask(i), dtype=np.int64), int(numbers[i])) for i in range(len(found))]
        parts.append(len(found))
    columns: dict[str, list[Any]] = {
        "input_ids": [ids for ids, _, _ in rows],
        "loss_mask": [mask for _, mask, _ in rows],
        "seq_len": [len(ids) for ids, _, _ in rows],
    }
    numbers_of = datasets.List(datasets.Value("int64"))
    features = datasets.Features({"input_ids": numbers_of, "loss_mask": numbers_of, "seq_len": datasets.Value("int64")})
    table = datasets.Dataset.from_dict(columns, features=features)
    table.set_format("torch")
    table.save_to_disk(str(output))

    np.save(output / "numbers.npy", np.array([number for _, _, number in rows], dtype=np.int64))
    with safe_open(given.vocabulary, "pt") as file:
        np.save(output / "d2t.npy", file.get_tensor("d2t").numpy().astype(np.int64))
        np.save(output / "t2d.npy", file.get_tensor("t2d").numpy().astype(bool))
        size = int(file.get_tensor("draft_ids").numel())
    share = (parts[0] + 0.5) / sum(parts)  # the trainer cuts at int(rows x share)
    aux = list(reader.manifest.spec.aux_layers)
    facts = {
        "conversations": parts,
        "train_share": share,
        "draft_vocabulary": size,
        "aux_layers": aux,
        "records": str(Path(given.records).resolve()),
        "tokens": int(sum(columns["seq_len"][: parts[0]])),
    }
    (output / "facts.json").write_text(json.dumps(facts))
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
