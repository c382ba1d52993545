"""Which recipe gives the better draft? Trainings side by side on one device from the same records, ours and a peer's, and a table of acceptance lengths.

A search is a YAML file: ``base`` (a configuration of ``main.py fit``), ``common`` (options of all our runs), ``runs`` (options of each), ``peers`` (options of
speculators' trainer, see ``peers/train.py``). All train on the same conversations; acceptance is the walk of ``walks.py`` on answers that no run trained on,
with the first run as the yardstick. A run that fails is said to have failed, and does not stop the others.

    python benchmarks/recipe_search.py SEARCH.yaml --target T --train TRAIN --validate VALIDATE --records RECORDS --peer_data FOLDER \
        --sets tune=A.jsonl report=B.jsonl --output OUT --jobs 7
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.walks import measure_all, table
from torchspec.paths import expand_all

_ROOT = Path(__file__).resolve().parents[1]


def command(name: str, options: dict[str, Any], *, search: dict[str, Any], given: argparse.Namespace) -> list[str]:
    """Our run of a name: ``main.py fit`` by replay."""
    merged = {**search.get("common", {}), **options}
    merged |= {
        "data.target.path": given.target, "data.train": given.train, "data.validate": given.validate, "data.engine": "replay",
        "data.records": given.records, "trainer.default_root_dir": str(Path(given.output) / name), "trainer.enable_progress_bar": False,
    }  # fmt: skip
    words = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in merged.items()]
    return [sys.executable, str(_ROOT / "main.py"), "fit", f"--config={search['base']}", *words]


def peer_command(name: str, options: dict[str, Any], *, search: dict[str, Any], given: argparse.Namespace) -> list[str]:
    """speculators' run of a name."""
    merged = {**search.get("peer_common", {}), **options}
    words = [word for key, value in merged.items() for word in (f"--{key}", str(value))]
    return [sys.executable, str(_ROOT / "benchmarks/peers/train.py"), given.peer_data, given.target, str(Path(given.output) / name), *words]


def run(name: str, words: list[str], *, output: Path, timeout: float) -> tuple[str, str | None, float]:
    """Train; returns (name, draft or None, seconds)."""
    began = time.monotonic()
    log = output / f"{name}.log"
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    with log.open("w") as handle:
        try:
            code = subprocess.run(words, stdout=handle, stderr=subprocess.STDOUT, cwd=_ROOT, env=environment, timeout=timeout).returncode
        except subprocess.TimeoutExpired:
            code = -1
    seconds = time.monotonic() - began
    ours = output / name / "draft"
    numbered = sorted((path for path in (output / name).glob("*") if path.name.isdigit()), key=lambda path: int(path.name))
    draft = str(ours) if ours.is_dir() else str(numbered[-1]) if numbered else None
    if code or draft is None:
        print(json.dumps({"run": name, "failed": code, "last": log.read_text(errors="replace").strip().splitlines()[-3:]}), flush=True)
        return name, None, seconds
    print(json.dumps({"run": name, "seconds": round(seconds, 1), "command": " ".join(words[2:])}), flush=True)
    return name, draft, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("search", help="YAML file")
    for name in ("target", "train", "validate", "records", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--peer_data", help="folder of peers/data.py")
    parser.add_argument("--sets", nargs="+", default=[], help="NAME=FILE of conversations to walk on; their records are in --records")
    parser.add_argument("--k", type=int, nargs="+", default=[3, 7])
    parser.add_argument("--only", nargs="+", help="names of runs; all of the file otherwise")
    parser.add_argument("--jobs", type=int, default=7, help="trainings side by side")
    parser.add_argument("--timeout", type=float, default=560.0, help="seconds of a training")
    given = expand_all(parser.parse_args())
    search = yaml.safe_load(Path(given.search).read_text())
    output = Path(given.output)
    output.mkdir(parents=True, exist_ok=True)
    runs = {name: command(name, options or {}, search=search, given=given) for name, options in (search.get("runs") or {}).items()}
    if given.peer_data:
        runs |= {name: peer_command(name, options or {}, search=search, given=given) for name, options in (search.get("peers") or {}).items()}
    chosen = [name for name in runs if not given.only or name in given.only]
    with ThreadPoolExecutor(given.jobs) as pool:
        results = list(pool.map(lambda name: run(name, runs[name], output=output, timeout=given.timeout), chosen))
    drafts = {draft: name for name, draft, _ in results if draft is not None}
    if not drafts or not given.sets:
        return
    sets = dict(pair.split("=", 1) for pair in given.sets)
    walks = measure_all(list(drafts), jobs=given.jobs, target=given.target, records=given.records, sets=sets, ks=given.k, config=search.get("walk", {}))
    with (output / "walks.jsonl").open("a") as handle:
        handle.writelines(json.dumps(asdict(walk) | {"run": drafts[walk.draft]}) + "\n" for walk in walks)
    print(table(walks, names=drafts))


if __name__ == "__main__":
    main()
