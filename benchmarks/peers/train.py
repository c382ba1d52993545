"""speculators' own EAGLE-3 trainer (its model, loss, optimizers, schedule and loader) on a folder of ``data.py``; prints one JSON line at its end.

Only what the comparison fixes is set here: data, split, vocabulary, aux layers, full attention (equal to its window of 2048 at these lengths) and the plain
implementation of its losses (its fused one fails under torch 2.11's compiler). Any option of ``speculators train`` given behind wins.

    python benchmarks/peers/train.py FOLDER TARGET OUTPUT --max-steps 2480 --epochs 9 --ttt-steps 4 --lr 3e-3
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def on_cpu() -> None:
    """Let its trainer run where there is no accelerator."""
    import speculators.train.trainer as trainer
    import torch

    torch.accelerator.synchronize = lambda *_: None  # type: ignore[assignment]
    trainer.get_local_rank = lambda: torch.device("cpu")
    original = trainer.Trainer.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.device_type = "cpu"

    trainer.Trainer.__init__ = init


def read_records(folder: Path, records: Path) -> None:
    """Have its loader read our records instead of a file of hidden states a conversation."""
    import speculators.train.data as data
    from speculators.train.data import ArrowDataset

    from benchmarks.peers.records import RecordsTransfer

    original = ArrowDataset.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.transfer = RecordsTransfer(folder, records)

    data.ArrowDataset.__init__ = init  # type: ignore[method-assign]


def main() -> None:
    folder, target, output, *more = sys.argv[1:]
    facts = json.loads((Path(folder) / "facts.json").read_text())
    given = {
        "speculator-type": "eagle3",
        "verifier-name-or-path": target,
        "data-path": folder,
        "save-path": output,
        "train-data-ratio": facts["train_share"],
        "on-missing": "raise",
        "draft-vocab-size": facts["draft_vocabulary"],
        "d2t-path": f"{folder}/d2t.npy",
        "t2d-path": f"{folder}/t2d.npy",
        "full-attention-indices": 0,
        "loss-implementation": "eager",
        "num-workers": 4,
        "log-dir": f"{output}-logs",
    }
    arguments = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    arguments += ["--target-layer-ids", *map(str, facts["aux_layers"]), *more]
    import torch

    if not torch.cuda.is_available():
        on_cpu()
    read_records(Path(folder), Path(facts["records"]))
    from speculators.train.cli import main as train
    from speculators.train.config import TrainConfig

    began = time.monotonic()
    train(TrainConfig.resolve(arguments))
    last = max((path for path in Path(output).iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    print(json.dumps({"peer": "speculators", "options": more, "draft": str(last), "seconds": round(time.monotonic() - began, 1)}), flush=True)


if __name__ == "__main__":  # its loader's workers are spawned and import this file
    main()
