"""The tokenised data set of some sources: built once, kept under a key of everything that changes it.

The key holds the content of the sources, tokenizer and chat template, the options, and the format of the code: what is stale is never found. An entry is
written under a temporary name and renamed, so there is no half entry. A file lock lets one process build it while others wait for it, and tells what a build
that was killed left, which is gone on with. On a disk without locks each process builds its own, and the first one counts.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import xxhash

from torchspec.data.build import APPENDED, Progress, build, first_row
from torchspec.data.conversations import Conversation, RowError, parse
from torchspec.data.dataset import FORMAT, Summary, TokenizedDataset
from torchspec.data.render import Renderer, special_ids, tokenizer_fingerprint
from torchspec.data.served import LOOKED_AT, check_served
from torchspec.data.sources import Given, Source, read_rows, warn, weighted_sources
from torchspec.data.tokenise import Tokenise
from torchspec.data.unused import Unused
from torchspec.errors import UserError
from torchspec.images import VisionTower

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from torchspec.tokenizer import Served

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataOptions:
    """What changes the tokens of a data set, beside its rows and the target's tokenizer."""

    max_length: int
    min_supervised_tokens: int = 2
    messages_key: str | None = None
    supervise: str = "auto"
    media: str = "refuse"
    image_positions: str = "index"
    template_args: Mapping[str, Any] = field(default_factory=dict)


def prepare(
    given: Given,
    *,
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    cache_dir: Path,
    target_name: str,
    end_ids: Sequence[int] = (),
    tower: VisionTower | None = None,
    config_key: str = "data.train",
    max_bad_fraction: float = 0.0,
    num_proc: int | None = None,
    served: Served | None = None,
    no_tokenizer: UserError | None = None,
    say: Callable[[str], None] = warn,
) -> TokenizedDataset:
    """The tokenised data set of some sources, from the cache where it is there.

    Args:
        given: sources, with or without weights (``sources.find_sources``).
        options: what changes the tokens.
        tokenizer: the target's, or None when it has none (rows must then be tokens).
        vocab_size: V; ids beyond it are refused.
        cache_dir: folder of entries.
        target_name: for errors.
        end_ids: tokens that end what the target generates.
        tower: what the target makes of images, where engines are given any.
        config_key: the config key of ``given``, for errors.
        max_bad_fraction: share of unusable rows that is tolerated.
        num_proc: processes; None takes the cores there are (at most 8) for large inputs.
        served: what the tokenizer must agree with on the first conversations.
        no_tokenizer: why there is none, for rows that need one.
        say: takes a line a source about files and keys that are not used.

    Raises:
        UserError: missing or empty sources, too many bad rows, a tokenizer that does not fit the target.
    """
    pairs = weighted_sources(given, config_key=config_key, say=say)
    sources = [source for source, _ in pairs]
    key = _key(sources, options, tokenizer, vocab_size, end_ids, tower, served)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("data.cache_dir", str(cache_dir), f"is no folder that can be made ({error.strerror})", "give a folder") from error
    folder = cache_dir / key
    dataset = _cached(folder)
    if dataset is None:
        with _workspace(folder) as building:
            dataset = _cached(folder)  # another process may have built it while this one waited
            if dataset is None:
                if folder.exists():  # damaged, or of an older format; one that is not there yet may appear at any moment
                    shutil.rmtree(folder, ignore_errors=True)
                dataset = _build(
                    folder,
                    building,
                    sources,
                    options,
                    tokenizer,
                    vocab_size,
                    target_name,
                    end_ids,
                    tower,
                    config_key,
                    max_bad_fraction,
                    num_proc,
                    served,
                    no_tokenizer,
                )
    summary = dataset.summary
    if summary.bad > max_bad_fraction * summary.rows:
        raise _too_many_bad(dataset.folder, summary, max_bad_fraction, config_key)
    for line in Unused(dataset.unused).lines(config_key):
        say(line)
    weights = [weight for _, weight in pairs]
    if all(weight == 1.0 for weight in weights):
        return dataset
    chosen = dataset.weighted(weights)
    if not len(chosen):
        raise UserError(config_key, given, f"leaves no conversation: so small a part of {len(dataset)} is none", "raise the weights")
    return chosen


def _key(
    sources: list[Source],
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    end_ids: Sequence[int],
    tower: VisionTower | None,
    served: Served | None,
) -> str:
    seen = tower.fingerprint if tower is not None else ""
    described = [FORMAT, [asdict(source) for source in sources], asdict(options), tokenizer_fingerprint(tokenizer), vocab_size, sorted(end_ids), seen]
    described += [served.name] if served is not None else []  # what was compared when it was built
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _cached(folder: Path) -> TokenizedDataset | None:
    """The entry, where it is there and whole."""
    try:
        return TokenizedDataset(folder)
    except FileNotFoundError:
        return None


def _build(
    folder: Path,
    building: Path,
    sources: list[Source],
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    target_name: str,
    end_ids: Sequence[int],
    tower: VisionTower | None,
    config_key: str,
    max_bad_fraction: float,
    num_proc: int | None,
    served: Served | None,
    no_tokenizer: UserError | None,
) -> TokenizedDataset:
    names = [source.name for source in sources]
    first = first_row(sources, config_key=config_key)
    if first is None:
        raise UserError(config_key, names, "holds no rows", "check the files")

    renderer = _renderer(conversations(sources, options, config_key=config_key), tokenizer, target_name, options, end_ids, no_tokenizer)
    if renderer is not None:
        check_served(renderer, served, conversations(sources, options, config_key=config_key), name=target_name)
    building.mkdir(exist_ok=True)
    keep = True
    try:
        progress = build(
            building,
            sources,
            Tokenise(
                renderer,
                max_length=options.max_length,
                messages_key=options.messages_key,
                media=options.media,
                tower=tower,
                folders=[source.folder for source in sources],
            ),
            special=np.array(sorted(special_ids(tokenizer))) if tokenizer is not None and renderer is not None else np.zeros(0, dtype=np.int64),
            min_supervised_tokens=options.min_supervised_tokens,
            vocab_size=vocab_size,
            target_name=target_name,
            config_key=config_key,
            num_proc=num_proc,
        )
        summary = Summary(**progress.totals)
        if summary.bad > max_bad_fraction * summary.rows:
            raise _too_many_bad(building, summary, max_bad_fraction, config_key)
        if summary.kept == 0:
            raise UserError(
                config_key,
                names,
                f"leaves no conversation: {summary.too_short} of {summary.rows} rows have fewer than {options.min_supervised_tokens} supervised tokens "
                f"within data.max_length={options.max_length}",
                "check that the rows have answers, and raise data.max_length",
            )
        _finish(building, progress, sources, tokenizer if renderer is not None else None, options.image_positions)
        try:
            building.rename(folder)
        except OSError:  # another host or process was first
            keep = False
        return TokenizedDataset(folder)
    except UserError:
        keep = False
        raise
    finally:
        if not keep or not (building / "progress.json").is_file():
            shutil.rmtree(building, ignore_errors=True)


@contextmanager
def _workspace(folder: Path) -> Iterator[Path]:
    """Where this entry is built, by this process alone: it may hold what a build that was killed has left."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = folder.with_name(f".{folder.name}.{socket.gethostname()}")
    with building.with_name(building.name + ".lock").open("w") as lock:  # the file stays: one that goes could be locked by two
        try:
            if not _locked(lock):
                log.warning("another process builds the data set %s: waiting for it", folder)
                while not _locked(lock):
                    time.sleep(0.2)
        except OSError as error:
            log.info("%s takes no locks (%s): this process builds for itself", folder.parent, error)
            yield building.with_name(f"{building.name}.{os.getpid()}")
            return
        if building.exists() and not (building / "progress.json").is_file():
            shutil.rmtree(building)  # of a build that died before it had anything
        yield building


def _locked(file: IO[str]) -> bool:
    """Lock an open file until it is closed; False while another process has it. OSError where the file system knows no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _renderer(
    given: Iterator[Conversation],
    tokenizer: PreTrainedTokenizerBase | None,
    target_name: str,
    options: DataOptions,
    end_ids: Sequence[int],
    no_tokenizer: UserError | None,
) -> Renderer | None:
    """A renderer, or None where the target cannot have one and the first good row brings its tokens."""
    first = next(given, None)
    brings_tokens = first is not None and first.input_ids is not None
    try:
        if tokenizer is None:
            fix = "add the tokenizer files to the target, or give rows with input_ids and loss_mask"
            raise no_tokenizer or UserError("data.target.path", target_name, "has no tokenizer that loads", fix)
        return Renderer(tokenizer, name=target_name, end_ids=end_ids, supervise=options.supervise, variables=options.template_args)
    except UserError:
        if brings_tokens:
            return None
        raise


def conversations(sources: Sequence[Source], options: DataOptions, *, config_key: str = "input") -> Iterator[Conversation]:
    """The first good rows of each source, about :data:`LOOKED_AT` in all."""
    share = max(LOOKED_AT // len(sources), 100)
    every = (row for source in sources for row, _ in itertools.islice(read_rows(source, config_key=config_key), share))
    return (given for row in every if (given := _parsed(row, options)) is not None)


def _parsed(row: bytes, options: DataOptions) -> Conversation | None:
    try:
        return parse(row, messages_key=options.messages_key, media=options.media)
    except RowError:
        return None  # counted with the others


def _finish(folder: Path, progress: Progress, sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase | None, image_positions: str) -> None:
    """Index files and the description, which makes the entry whole."""
    lengths = np.fromfile(folder / "lengths.i64", dtype="<i8")
    np.save(folder / "offsets.npy", np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)]))
    (folder / "lengths.i64").unlink()
    (folder / "progress.json").unlink()
    names = (*(name for name in APPENDED if name != "lengths.i64"), "offsets.npy", "counts.npy")
    meta = {
        "format": FORMAT,
        "files": {name: (folder / name).stat().st_size for name in names},
        "summary": progress.totals,
        "sources": [asdict(source) for source in sources],
        "content": f"xxh3:{xxhash.xxh3_128_hexdigest(''.join(progress.digests).encode())}",
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "end_ids": progress.ends,
        "unused": progress.unused,
        "image_positions": image_positions,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


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
