"""How far does each of several drafts get on logged answers? The serving walk by prefill alone: nothing is decoded.

Each draft (an export in any format, or a checkpoint) is unrolled over the hidden states of the answers, and the walk counts what a server would accept at
each k. On answers that the target gave greedily this is what vLLM counts at temperature 0 (docs/numerics.md). One JSON line a draft, set and k, then a table:
acceptance length with a 95 % interval, and its ratio to the first draft, paired by conversation. Intervals are percentiles of a bootstrap over conversations.

    python main.py extract --config CONFIG ... --data.validate '{greedy: A.jsonl}' --output RECORDS
    python benchmarks/walks.py --target T --records RECORDS --sets greedy=A.jsonl --k 3 7 --output OUT.jsonl DRAFT [DRAFT...]
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from torchspec.files import lines_with, refuse_foreign, write
from torchspec.looping import LOOPING, repeats
from torchspec.paths import expand_all

_SAMPLES = 2000
"""Bootstrap resamples."""


@dataclass(frozen=True)
class Walk:
    """One draft on one set at one k; a list entry is a conversation, in the order of the data set."""

    draft: str
    set: str
    k: int
    stops: list[int]
    """Times that the draft proposed."""
    accepted: list[int]
    """Draft tokens accepted."""
    looping: list[bool]
    """Whether the answer repeats itself (:func:`loops`)."""

    @property
    def length(self) -> float:
        """Acceptance length, the bonus token included."""
        return 1.0 + sum(self.accepted) / max(sum(self.stops), 1)


def loops(answers: list[np.ndarray]) -> bool:
    """Whether a conversation repeats itself, as ``AcceptanceLength`` judges it: loops are easy to draft and flatter every draft."""
    counts = [repeats(answer) for answer in answers]
    pieces, again = sum(pieces for pieces, _ in counts), sum(again for _, again in counts)
    return pieces > 0 and again > LOOPING * pieces


def measure(draft: str, *, target: str, records: str, sets: dict[str, str], ks: list[int], config: dict[str, Any]) -> list[Walk]:
    """Walk one draft over all sets."""
    import lightning.pytorch as pl
    import torch

    from torchspec.data.datamodule import DraftDataModule
    from torchspec.models.metrics import serving_walk
    from torchspec.models.module import DraftModule
    from torchspec.models.training.start import read_start
    from torchspec.target import Target, TargetConfig

    torch.set_num_threads(1)
    aux = list(read_start(draft, Target(TargetConfig(target))).draft.config.aux_layers)
    module = DraftModule(TargetConfig(target), start_from=draft, aux_layers=aux, unroll_steps=max(ks), loss=config.get("loss"))
    data = DraftDataModule(
        TargetConfig(target),
        train=next(iter(sets.values())),
        validate=dict(sets),
        max_length=config.get("max_length", 2048),
        max_tokens=config.get("max_tokens", 8192),
        packs_per_step=1,
        engine="replay",
        records=records,
    )
    found: dict[tuple[int, int], dict[int, tuple[int, int]]] = {}
    looping: dict[int, dict[int, bool]] = {}

    class Collect(pl.Callback):
        """Walks of each conversation of a batch."""

        def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            base = batch.rows.base
            turn, sequence = batch.turn[base + 1].tolist(), batch.sequence[base].tolist()
            accepted, ids, turns, owner = outputs["accepted"].tolist(), batch.input_ids.tolist(), batch.turn.tolist(), batch.sequence.tolist()
            for number, sample in enumerate(batch.sample_ids):
                mine = [i for i, s in enumerate(sequence) if s == number]
                for k in ks:
                    stops, right, _ = serving_walk([accepted[i] for i in mine], [turn[i] for i in mine], k)
                    found.setdefault((dataloader_idx, k), {})[sample] = (stops, right)
                own = [(turns[i], ids[i]) for i, s in enumerate(owner) if s == number and turns[i] >= 0]
                answers = [np.array([token for t, token in own if t == each]) for each in dict.fromkeys(t for t, _ in own)]
                looping.setdefault(dataloader_idx, {})[sample] = loops(answers)

    trainer = pl.Trainer(
        accelerator="auto", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, callbacks=[Collect()],
    )  # fmt: skip
    trainer.validate(module, datamodule=data, verbose=False)
    walks = []
    for number, name in enumerate(sets):
        for k in ks:
            rows = found[number, k]
            order = sorted(rows)
            walks.append(Walk(draft, name, k, [rows[i][0] for i in order], [rows[i][1] for i in order], [looping[number][i] for i in order]))
    return walks


def interval(stops: np.ndarray, accepted: np.ndarray, *, over: tuple[np.ndarray, np.ndarray] | None = None) -> tuple[float, float]:
    """95 % interval of the acceptance length, or of its ratio to ``over`` (stops, accepted of the same conversations), by bootstrap over conversations.

    Args:
        stops, accepted: [n] of each conversation.
        over: of another draft.
    """
    picks = np.random.default_rng(0).integers(0, stops.size, (_SAMPLES, stops.size))

    def lengths(s: np.ndarray, a: np.ndarray) -> np.ndarray:
        return np.asarray(1.0 + a[picks].sum(1) / np.maximum(s[picks].sum(1), 1))

    values = lengths(stops, accepted) if over is None else lengths(stops, accepted) / lengths(*over)
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def table(walks: list[Walk], *, names: dict[str, str] | None = None) -> str:
    """Rows of drafts; of each set and k the length, its interval, and the ratio to the first draft; then the same without looping answers."""
    lines = []
    drafts = list(dict.fromkeys(walk.draft for walk in walks))
    for name, k in dict.fromkeys((walk.set, walk.k) for walk in walks):
        rows = {walk.draft: walk for walk in walks if (walk.set, walk.k) == (name, k)}
        first = rows[drafts[0]]
        share = float(np.mean(first.looping))
        lines.append(f"{name}, k={k}: {len(first.stops)} answers, {share:.0%} of them loop; length [95 %] ratio to the first [95 %] | without loops")
        for draft in drafts:
            cells = []
            for keep in ([True] * len(first.looping), [not loop for loop in first.looping]):
                stops, accepted = (np.array(values)[np.array(keep)] for values in (rows[draft].stops, rows[draft].accepted))
                base = tuple(np.array(values)[np.array(keep)] for values in (first.stops, first.accepted))
                if not stops.size:
                    continue
                low, high = interval(stops, accepted)
                length = 1 + accepted.sum() / max(stops.sum(), 1)
                ratio = length / (1 + base[1].sum() / max(base[0].sum(), 1))
                below, above = interval(stops, accepted, over=(base[0], base[1]))
                cells.append(f"{length:.3f} [{low:.3f} {high:.3f}] {ratio:.3f} [{below:.3f} {above:.3f}]")
            lines.append(f"  {(names or {}).get(draft, draft):<32} {' | '.join(cells)}")
    return "\n".join(lines)


def measure_all(drafts: list[str], *, jobs: int, **rest: Any) -> list[Walk]:
    """Several drafts side by side, each in a process of its own."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        runs = [pool.submit(measure, draft, **rest) for draft in drafts]
        return [walk for run in runs for walk in run.result()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drafts", nargs="+", help="exports or checkpoints; the first is what the others are compared with")
    parser.add_argument("--target", required=True)
    parser.add_argument("--records", required=True, help="folder of main.py extract")
    parser.add_argument("--sets", required=True, nargs="+", help="NAME=FILE of conversations")
    parser.add_argument("--k", type=int, nargs="+", default=[3, 7])
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--output", help="JSON lines")
    given = expand_all(parser.parse_args())
    if given.output:
        refuse_foreign(Path(given.output), lines_with("draft", "set", "k", "stops"), field="output", what="list of walks")
    sets = dict(pair.split("=", 1) for pair in given.sets)
    walks = measure_all(
        given.drafts, jobs=given.jobs, target=given.target, records=given.records, sets=sets, ks=given.k, config={"max_length": given.max_length}
    )
    if given.output:
        write(Path(given.output), "".join(json.dumps(asdict(walk)) + "\n" for walk in walks))
    print(table(walks))


if __name__ == "__main__":
    main()
