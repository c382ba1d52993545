"""Write the records of a run's data to disk once, to be trained from many times (engine ``replay``).

The run's own engine group captures, this process's loader reads and verifies, and a tee writes shards (``transfer/shards.py``): the same code as in training,
with nothing behind it. What the folder has already is not captured again, so a call that was cut off goes on, and parts of the data can be extracted at once by
several calls, on several machines that share the folder.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from torchspec.data.dataset import TokenizedDataset
from torchspec.data.group_start import group_config
from torchspec.data.loader import LoaderConfig, LoaderStats, PackLoader, Pass
from torchspec.data.outputs import output_folder
from torchspec.data.plan import Plan
from torchspec.data.sources import check_outside
from torchspec.errors import UserError
from torchspec.paths import home
from torchspec.supervision import Unroll
from torchspec.transfer.shards import ShardWriter
from torchspec.transfer.sizes import parse_bytes

if TYPE_CHECKING:
    from torchspec.data.datamodule import DraftDataModule


@dataclass(frozen=True)
class ExtractReport:
    """What a call did."""

    records: int
    """Written by this call."""
    there: int
    """Found in the folder (conversations of this part)."""
    failed: int
    tokens: int
    nbytes: int
    seconds: float
    fp8_error: float | None
    """Root mean square of what fp8 changed, relative to that of the states; None where records are exact."""


def part_of(text: str) -> tuple[int, int]:
    """(number, parts) of ``"2/4"``: the second of four.

    Raises:
        UserError: when it is not of that form.
    """
    number, _, parts = text.partition("/")
    if not (number.isdigit() and parts.isdigit() and 1 <= int(number) <= int(parts)):
        raise UserError("part", text, "is no part", 'write "1/1" for all, or "2/4" for the second of four')
    return int(number), int(parts)


def extract(
    data: DraftDataModule,
    output: str,
    aux_layers: tuple[int, ...],
    part: str = "1/1",
    shard_size: str = "256MiB",
    fp8: bool = False,
) -> ExtractReport:
    """Capture every conversation of a run's training and validation data that the folder lacks; ``main.py extract`` takes
    its options from here.

    Args:
        data: of the run, not yet used by a trainer.
        output: folder of the records; one that exists is gone on with
        aux_layers: hidden states that the run's draft is fed
        part: part of the conversations, such as 2/4, for several calls at once
        shard_size: bytes of a shard; twice as much memory is used
        fp8: store states in 8 bits: half the disk, with a small error that is stated

    Raises:
        UserError: what the run's data or engines refuse, or a folder of other records.
    """
    number, parts = part_of(part)
    data.aux_layers = aux_layers
    if data.records is not None or data.corpus.on_policy is not None:
        field = "data.engine" if data.records is not None else "data.on_policy"
        raise UserError(field, data.engine, "leaves nothing to extract", "use the configuration of a run that captures given conversations")
    for given in data.corpus.sources.values():
        check_outside(Path(home(output)), given or [], field="output")
    folder = output_folder(output, field="output")
    writer = ShardWriter(folder, data.spec, part=f"part{number}of{parts}", shard_bytes=parse_bytes(shard_size, field="shard_size"), fp8=fp8)
    started, records, there, failed, tokens = time.monotonic(), 0, 0, 0, 0
    stages = ["train", *data.validation_stages]
    wanted: list[tuple[str, TokenizedDataset]] = []
    for stage in stages:
        whole = data.corpus.dataset(stage)
        first = np.unique(whole.hashes, return_index=True)[1]  # a conversation that is there twice is captured once
        mine = np.sort(first)[number - 1 :: parts]
        lacking = mine[~np.isin(whole.hashes[mine].view(np.int64), np.array(sorted(writer.known), dtype=np.int64))]
        there += mine.size - lacking.size
        if lacking.size:
            wanted.append((stage, whole.only(lacking)))
    if wanted:
        from torchspec.engines.group import EngineGroup

        config = group_config(
            data.corpus,
            spec=data.spec,
            engine=data.engine,
            engines=data.engines,
            store=data.store,
            stages=stages,
            world=1,
            log_dir=folder / "logs",
            local_ranks=0,
        )
        data.group = EngineGroup(config, say=lambda line: tqdm.write(line, file=sys.stderr))
        try:
            data.endpoint = data.group.start()
            total = sum(int(chosen.lengths.sum()) for _, chosen in wanted)
            with tqdm(total=total, desc="extracting", unit="token", unit_scale=True, smoothing=0.05) as bar:
                for stage, chosen in wanted:
                    stats = _go_through(data, stage, chosen, writer, folder, bar.update)
                    records, failed, tokens = records + stats.samples, failed + stats.failed, tokens + stats.tokens
        finally:
            writer.close()
            data.close()
    return ExtractReport(records, there, failed, tokens, writer.written, time.monotonic() - started, writer.fp8_error if fp8 else None)


def _go_through(data: DraftDataModule, stage: str, chosen: TokenizedDataset, writer: ShardWriter, output: Path, show: Callable[[int], object]) -> LoaderStats:
    """Have every conversation captured and written; the batches are not used."""
    group = data.group
    assert group is not None
    plan = Plan(
        chosen.lengths,
        seed=0,
        epoch=0,
        max_tokens=data.corpus.max_tokens,
        packs_per_step=1,
        counts=np.ones((len(chosen), 1)),
        shuffle=False,
    )
    config = LoaderConfig(
        stage=stage,
        rank=0,
        world=1,
        dataset=chosen,
        spec=data.spec,
        supervision=Unroll(1),
        window_bytes=data.budget,
        prefetch_packs=data.prefetch_packs,
        failed_path=output / "failed_samples.jsonl",
        pin=False,
        health=group.check,
        interrupted=lambda: False,
        tee=writer.add,
    )
    loader = PackLoader(config, connect=data.connect, begin=lambda: Pass(plan, 0, 0, len(plan)), length=lambda: len(plan))
    try:
        for batch in loader:
            show(batch.num_tokens)
    finally:
        loader.close()
    return loader.stats
