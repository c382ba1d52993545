"""Our tokenised conversations and records as the data folder that speculators' trainer reads: same ids, loss masks, hidden states and vocabulary.

Takes the records that ``main.py extract`` wrote (states in Transformers' counting, the last one before the final norm, as vLLM's extraction gives them) and
writes an Arrow data set (input_ids, loss_mask, seq_len), ``hidden_states/hs_<i>.safetensors`` ([T, n + 1, D]), d2t.npy, t2d.npy and facts.json.

    python main.py vocabulary --target T --input TRAIN --size 16384 --output V.safetensors
    python benchmarks/peers/data.py --target T --train TRAIN --validate VALIDATE --records RECORDS --vocabulary V.safetensors --output FOLDER
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def states_of(reader, number: int) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """[T, n + 1, D] of a record; where the engine wrote no state of the last token, which nothing supervised reads, its row is zero."""
    from torchspec.transfer.record import views

    spec = reader.manifest.spec
    tokens, rows = reader.size(number)
    memory = torch.empty(spec.layout(tokens, rows).total, dtype=torch.uint8)
    reader.read(number, memory)
    _, aux, last = views(memory, spec, tokens, rows)
    joined = torch.cat([aux, last], dim=1).view(rows, len(spec.aux_layers) + 1, -1)
    return torch.nn.functional.pad(joined, (0, 0, 0, 0, 0, tokens - rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("target", "train", "validate", "records", "vocabulary", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--max_length", type=int, default=2048)
    given = parser.parse_args()
    import datasets
    from safetensors import safe_open
    from safetensors.torch import save_file

    from torchspec.data.datamodule import DraftDataModule
    from torchspec.target import TargetConfig
    from torchspec.transfer.shard_reader import ShardReader

    data = DraftDataModule(TargetConfig(given.target), train=given.train, validate=given.validate, max_length=given.max_length, max_tokens=8192)
    output = Path(given.output)
    (output / "hidden_states").mkdir(parents=True)
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

    def write(index: int) -> None:
        ids, _, number = rows[index]
        states = {"hidden_states": states_of(reader, number), "token_ids": torch.from_numpy(ids)}
        save_file(states, str(output / "hidden_states" / f"hs_{index}.safetensors"))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(len(rows))))
    with safe_open(given.vocabulary, "pt") as file:
        np.save(output / "d2t.npy", file.get_tensor("d2t").numpy().astype(np.int64))
        np.save(output / "t2d.npy", file.get_tensor("t2d").numpy().astype(bool))
        size = int(file.get_tensor("draft_ids").numel())
    share = (parts[0] + 0.5) / sum(parts)  # the trainer cuts at int(rows x share)
    aux = list(reader.manifest.spec.aux_layers)
    facts = {"conversations": parts, "train_share": share, "draft_vocabulary": size, "aux_layers": aux, "tokens": int(sum(columns["seq_len"][: parts[0]]))}
    (output / "facts.json").write_text(json.dumps(facts))
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
