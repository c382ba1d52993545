"""Build the tokenised data set once, and keep it under a key of everything that changes it.

Rows go through ``datasets.map`` (processes, progress bar, on disk), then into the flat files that ``dataset.py`` reads; memory does not grow with the number
of rows beyond a few bytes each. An entry is written under a temporary name and renamed, so a crash leaves no half entry, and two hosts that build the same
one on a shared disk do not disturb each other. The key holds the content of the sources, tokenizer and chat template, the options, and the format of the
code: what is stale is never found.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from torchspec.data.conversations import RowError, parse
from torchspec.data.dataset import FORMAT, Summary, TokenizedDataset
from torchspec.data.render import Renderer, special_ids, tokenizer_fingerprint
from torchspec.data.sources import Source, find_sources, read_rows
from torchspec.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class DataOptions:
    """What changes the tokens of a data set, beside its rows and the target's tokenizer."""

    max_length: int
    min_supervised_tokens: int = 2
    messages_key: str | None = None


def prepare(
    given: str | Sequence[str],
    *,
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    cache_dir: Path,
    target_name: str,
    config_key: str = "data.train",
    max_bad_fraction: float = 0.0,
    num_proc: int | None = None,
) -> TokenizedDataset:
    """The tokenised data set of some sources, from the cache where it is there.

    Args:
        given: sources (``conversations.find_sources``).
        options: what changes the tokens.
        tokenizer: the target's, or None when it has none (rows must then be tokens).
        vocab_size: V; ids beyond it are refused.
        cache_dir: folder of entries.
        target_name: for errors.
        config_key: the config key of ``given``, for errors.
        max_bad_fraction: share of unusable rows that is tolerated.
        num_proc: processes; None takes the cores there are (at most 8) for large inputs.

    Raises:
        UserError: missing or empty sources, too many bad rows, a tokenizer that does not fit the target.
    """
    sources = find_sources(given, config_key=config_key)
    key = _key(sources, options, tokenizer, vocab_size)
    folder = cache_dir / key
    try:
        dataset = TokenizedDataset(folder)
    except FileNotFoundError:
        if folder.exists():  # damaged, or of an older format; one that is not there yet may appear at any moment
            shutil.rmtree(folder, ignore_errors=True)
        dataset = _build(folder, sources, options, tokenizer, vocab_size, target_name, config_key, max_bad_fraction, num_proc)
    summary = dataset.summary
    if summary.bad > max_bad_fraction * summary.rows:
        raise _too_many_bad(dataset.folder, summary, max_bad_fraction, config_key)
    return dataset


def _key(sources: list[Source], options: DataOptions, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> str:
    described = [FORMAT, [asdict(source) for source in sources], asdict(options), tokenizer_fingerprint(tokenizer), vocab_size]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]


def _build(
    folder: Path,
    sources: list[Source],
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    target_name: str,
    config_key: str,
    max_bad_fraction: float,
    num_proc: int | None,
) -> TokenizedDataset:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    building = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}")
    building.mkdir()
    try:
        rows = _load_rows(sources, building / "rows", config_key)
        if len(rows) == 0:
            raise UserError(config_key, [source.name for source in sources], "holds no rows", "check the files")
        renderer = _renderer(rows[0]["row"], tokenizer, target_name, options)
        tokenised = _tokenise(rows, renderer, options, num_proc, building / "rows")
        summary = _write(tokenised, building, sources, options, tokenizer if renderer is not None else None, vocab_size, target_name)
        if summary.bad > max_bad_fraction * summary.rows:
            raise _too_many_bad(building, summary, max_bad_fraction, config_key)
        if summary.kept == 0:
            raise UserError(
                config_key,
                [source.name for source in sources],
                f"leaves no conversation: {summary.too_short} of {summary.rows} rows have fewer than {options.min_supervised_tokens} supervised tokens "
                f"within data.max_length={options.max_length}",
                "check that the rows have answers, and raise data.max_length",
            )
        del rows, tokenised
        shutil.rmtree(building / "rows", ignore_errors=True)
        try:
            building.rename(folder)
        except OSError:  # another host or process was first
            return TokenizedDataset(folder)
        return TokenizedDataset(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what builds of this entry that died on this host left."""
    for left in folder.parent.glob(f".{folder.name}.{socket.gethostname()}.*"):
        if not Path(f"/proc/{left.suffix[1:]}").exists():
            shutil.rmtree(left, ignore_errors=True)


def _load_rows(sources: list[Source], scratch: Path, config_key: str) -> Any:
    """All rows as a memory-mapped ``datasets.Dataset`` of (row, source, line), or an empty list."""
    import datasets
    import pyarrow as pa

    scratch.mkdir()
    schema = pa.schema({"row": pa.large_binary(), "source": pa.int32(), "line": pa.int32()})
    every = ((row, number, line) for number, source in enumerate(sources) for row, line in read_rows(source, config_key=config_key))
    count = 0
    with pa.OSFile(str(scratch / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        while batch := list(itertools.islice(every, 1024)):
            writer.write_batch(pa.record_batch(list(map(list, zip(*batch, strict=True))), schema=schema))
            count += len(batch)
    return datasets.Dataset.from_file(str(scratch / "rows.arrow")) if count else []


def _renderer(first: bytes, tokenizer: PreTrainedTokenizerBase | None, target_name: str, options: DataOptions) -> Renderer | None:
    """A renderer, or None where the first row brings its tokens."""
    try:
        if parse(first, messages_key=options.messages_key).input_ids is not None:
            return None
    except RowError:
        pass  # counted with the others
    if tokenizer is None:
        raise UserError(
            "data.target.path", target_name, "has no tokenizer that loads", "add the tokenizer files to the target, or give rows with input_ids and loss_mask"
        )
    return Renderer(tokenizer, name=target_name)


class _Tokenise:
    """Rows → tokens, in a worker process of ``datasets.map``."""

    def __init__(self, renderer: Renderer | None, options: DataOptions) -> None:
        self.renderer = renderer
        self.options = options

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        done = [self._row(row) for row in batch["row"]]
        limit = self.options.max_length
        return {
            "ids": [ids[:limit] for ids, _, _ in done],
            "mask": [mask[:limit] for _, mask, _ in done],
            "length": [ids.shape[0] for ids, _, _ in done],
            "problem": [problem for _, _, problem in done],
        }

    def _row(self, row: bytes) -> tuple[np.ndarray, np.ndarray, str]:
        try:
            conversation = parse(row, messages_key=self.options.messages_key)
            if (self.renderer is None) != (conversation.input_ids is not None):
                raise RowError("mixes tokens with messages: the first row decides, put the other kind into a run of its own")
            if self.renderer is None:
                return np.array(conversation.input_ids, dtype=np.int32), np.array(conversation.loss_mask, dtype=np.uint8), ""
            rendered = self.renderer.render(conversation)
            return rendered.ids, rendered.mask, ""
        except RowError as error:
            return np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.uint8), str(error)


def _tokenise(rows: Any, renderer: Renderer | None, options: DataOptions, num_proc: int | None, scratch: Path) -> Any:
    import datasets

    if num_proc is None:
        num_proc = min(len(os.sched_getaffinity(0)), 8) if len(rows) >= 5000 else 1
    features = datasets.Features(
        {
            "source": datasets.Value("int32"),
            "line": datasets.Value("int32"),
            "ids": datasets.List(datasets.Value("int32")),
            "mask": datasets.List(datasets.Value("uint8")),
            "length": datasets.Value("int32"),
            "problem": datasets.Value("string"),
        }
    )
    with _quiet_unless(len(rows) >= 2000):
        return rows.map(
            _Tokenise(renderer, options),
            batched=True,
            batch_size=256,
            remove_columns=["row"],
            features=features,
            num_proc=num_proc if num_proc > 1 else None,
            cache_file_name=str(scratch / "tokenised.arrow"),
            new_fingerprint="tokenised",
            desc="tokenising",
        )


class _Writer:
    """Appends batches of tokenised rows to the files of a cache entry."""

    def __init__(self, folder: Path, options: DataOptions, special: np.ndarray, vocab_size: int, target_name: str, sources: list[Source]) -> None:
        self.folder, self.options, self.special, self.vocab_size, self.target_name, self.sources = folder, options, special, vocab_size, target_name, sources
        self.totals = dict.fromkeys(Summary.__dataclass_fields__, 0)
        self.counts = np.zeros(vocab_size, dtype=np.int64)
        self.ends: set[int] = set()
        self.lengths: list[np.ndarray] = []
        self.places: list[np.ndarray] = []
        self.digest = xxhash.xxh3_128()

    def write(self, batches: Iterator[Any]) -> Summary:
        """Write every batch (Arrow tables) and the index files.

        Raises:
            UserError: for a token id beyond the target's vocabulary.
        """
        with (
            (self.folder / "tokens.i32").open("wb") as tokens,
            (self.folder / "mask.u8").open("wb") as masks,
            (self.folder / "bad_rows.jsonl").open("w") as bad,
        ):
            for table in batches:
                ids, mask = self._batch(table, bad)
                tokens.write(ids.tobytes())
                masks.write(mask.tobytes())
                self.digest.update(ids.tobytes())
                self.digest.update(mask.tobytes())
        lengths = np.concatenate([np.zeros(1, dtype=np.int64), *self.lengths])
        self.digest.update(lengths.tobytes())
        np.save(self.folder / "offsets.npy", np.cumsum(lengths))
        np.save(self.folder / "places.npy", np.concatenate([np.zeros((0, 2), dtype=np.int32), *self.places]))
        np.save(self.folder / "counts.npy", self.counts)
        return Summary(**self.totals)

    def _batch(self, table: Any, bad: Any) -> tuple[np.ndarray, np.ndarray]:
        ids, mask = (_flat(table, name) for name in ("ids", "mask"))
        source, line, full = (table.column(name).to_numpy() for name in ("source", "line", "length"))
        problems = table.column("problem").to_pylist()
        good = np.array([not problem for problem in problems])
        lengths = np.minimum(full, self.options.max_length).astype(np.int64)
        bounds = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        supervised = np.diff(np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(mask, dtype=np.int64)])[bounds])
        keep = good & (supervised >= self.options.min_supervised_tokens)
        for row in np.flatnonzero(~good):
            bad.write(json.dumps({"place": f"{self.sources[source[row]].name}:{line[row]}", "problem": problems[row]}) + "\n")
        if ids.size and int(ids.max()) >= self.vocab_size:
            row = int(np.searchsorted(bounds, int(ids.argmax()), side="right")) - 1
            place = f"{self.sources[source[row]].name}:{line[row]}"
            raise UserError(
                "data.target.path",
                self.target_name,
                f"has {self.vocab_size} tokens, but {place} renders to id {int(ids.max())}",
                "use the tokenizer that belongs to the target",
            )
        chosen = np.repeat(keep, lengths)
        ids, mask = ids[chosen], mask[chosen]
        self.lengths.append(lengths[keep])
        self.places.append(np.stack([source[keep], line[keep]], axis=1).astype(np.int32))
        self.counts += np.bincount(ids[mask == 1], minlength=self.vocab_size)
        turn_end = (mask == 1) & np.concatenate([mask[1:] == 0, np.ones(min(1, mask.size), dtype=bool)])
        self.ends.update(int(i) for i in np.unique(ids[turn_end]) if i in self.special)
        for name, count in {
            "rows": len(problems),
            "kept": keep.sum(),
            "bad": (~good).sum(),
            "too_short": (good & ~keep).sum(),
            "truncated": (keep & (full > self.options.max_length)).sum(),
            "tokens": ids.size,
            "supervised": mask.sum(),
        }.items():
            self.totals[name] += int(count)
        return ids, mask


def _flat(table: Any, name: str) -> np.ndarray:
    """All values of a list column."""
    values: np.ndarray = table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values


def _write(
    tokenised: Any, folder: Path, sources: list[Source], options: DataOptions, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, target_name: str
) -> Summary:
    special = np.array(sorted(special_ids(tokenizer))) if tokenizer is not None else np.zeros(0, dtype=np.int64)
    writer = _Writer(folder, options, special, vocab_size, target_name, sources)
    summary = writer.write(tokenised.with_format("arrow").iter(batch_size=1024))
    names = ("tokens.i32", "mask.u8", "offsets.npy", "places.npy", "counts.npy", "bad_rows.jsonl")
    meta = {
        "format": FORMAT,
        "files": {name: (folder / name).stat().st_size for name in names},
        "summary": asdict(summary),
        "sources": [asdict(source) for source in sources],
        "content": f"xxh3:{writer.digest.hexdigest()}",
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "end_ids": sorted(writer.ends),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    return summary


def _too_many_bad(folder: Path, summary: Summary, allowed: float, config_key: str) -> UserError:
    with (folder / "bad_rows.jsonl").open() as handle:
        first = [json.loads(line) for _, line in zip(range(3), handle, strict=False)]
    shown = "; ".join(f"{row['place']} {row['problem']}" for row in first)
    more = f"; and {summary.bad - len(first)} more" if summary.bad > len(first) else ""
    return UserError(
        config_key,
        first[0]["place"],
        f"is a row that cannot be used: {summary.bad} of {summary.rows} rows are bad, data.max_bad_fraction={allowed} are tolerated ({shown}{more})",
        "mend or remove these rows, or raise data.max_bad_fraction",
    )


@contextmanager
def _quiet_unless(shown: bool) -> Iterator[None]:
    """Progress bars of ``datasets`` only where there is something to wait for."""
    import datasets

    was_on = datasets.are_progress_bars_disabled() is False
    if not shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_on:
            datasets.enable_progress_bars()
