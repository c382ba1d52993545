"""Rates of the hidden-state store: put and get by 1, 2 and 4 processes at once, beside a plain memory copy by the same processes.

    python benchmarks/transfer.py --kinds shm mooncake --sizes 1 7 64 --writers 1 2 4 --seconds 1

Prints one JSON line a case: records put and got one by one; ``pack``, in which a call takes all that a process has (``--pack``); and ``both``, in which a
second client of the process gets a pack over and over while the first puts one, as engines and trainers do. A rate is 10^9 bytes a second over all
processes: what they moved, divided by the time from the first one's start to the last one's end. (Adding up each one's own rate would flatter processes that
take turns.) A put includes the deletion of the record it replaces, as in a run. Records are of one size, moved out of and into buffers of the store that exist
and were touched before. ``taskset -c 0-3`` in front shows what Mooncake does with one thread on each side (on fewer than 8 cores it has no more).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from torchspec.transfer import StoreConfig, make_server, open_store  # noqa: E402

MB = 1_000_000
ACTIONS = ("memcpy", "put", "get", "pack_put", "pack_get", "both")


def work(address: dict[str, Any], name: str, nbytes: int, pack: int, seconds: float) -> None:
    """One process: for each action, wait for a line on stdin, move records for ``seconds``, say bytes, start and end."""
    import torch

    torch.set_num_threads(1)
    store, reader = open_store(address), open_store(address)
    count = max(1, pack // nbytes)
    source, sink = store.buffer(count * nbytes), store.buffer(count * nbytes)
    read = reader.buffer(count * nbytes)
    source.random_(0, 256)
    sink.zero_()
    read.zero_()
    parts = [slice(i * nbytes, (i + 1) * nbytes) for i in range(count)]
    keys = [f"{name}/{i}" for i in range(count)]

    def copy() -> None:
        for part in parts:
            sink[part].copy_(source[part])

    def put() -> None:
        for key, part in zip(keys, parts, strict=True):
            store.put([key], [source[part]])

    def get() -> None:
        for key, part in zip(keys, parts, strict=True):
            store.get([key], [sink[part]])

    def pack_put() -> None:
        store.put(keys, [source[part] for part in parts])

    def pack_get() -> None:
        store.get(keys, [sink[part] for part in parts])

    other = [f"{key}/read" for key in keys]
    got = [0]

    def get_until(end: float) -> None:
        while time.monotonic() < end:
            reader.get(other, [read[part] for part in parts])
            got[0] += count * nbytes

    put()  # warm: connections, and pages of the store
    store.put(other, [source[part] for part in parts])
    for name, action in zip(ACTIONS, (copy, put, get, pack_put, pack_get, pack_put), strict=True):
        print("ready", flush=True)
        input()
        moved, got[0], began = 0, 0, time.monotonic()  # one clock for all processes of the host
        beside = threading.Thread(target=get_until, args=(began + seconds if name == "both" else 0.0,))
        beside.start()
        while time.monotonic() < began + seconds:
            if action in (put, pack_put):
                store.delete(keys)
            action()
            moved += count * nbytes
        beside.join()
        print(json.dumps([moved + got[0], began, time.monotonic()]), flush=True)
    store.close()
    reader.close()


def measure(kind: Any, nbytes: int, writers: int, pack: int, seconds: float) -> dict[str, Any]:
    """One case."""
    server = make_server(StoreConfig(kind=kind), run=f"bench-{os.getpid()}", budget=max(4 << 30, 3 * writers * max(pack, nbytes)))
    server.start()
    processes: list[subprocess.Popen[str]] = []
    try:
        for number in range(writers):
            arguments = json.dumps([server.address, f"bench/{number}", nbytes, pack, seconds])
            processes.append(subprocess.Popen([sys.executable, __file__, "--worker", arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        rates = {}
        for action in ACTIONS:
            for process in processes:
                _line(process.stdout)
            for process in processes:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
            results = [json.loads(_line(process.stdout)) for process in processes]
            span = max(end for _, _, end in results) - min(began for _, began, _ in results)
            rates[f"{action}_gb_s"] = round(sum(moved for moved, _, _ in results) / span / 1e9, 2)
        for process in processes:
            process.wait(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        server.close()
    return {"store": kind, "record_mb": nbytes / MB, "writers": writers, **rates}


def _line(pipe: IO[str] | None) -> str:
    assert pipe is not None
    line = pipe.readline()
    if not line:
        raise RuntimeError("a benchmark process ended early; its error is above")
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["shm", "mooncake"], choices=["shm", "mooncake"])
    parser.add_argument("--sizes", nargs="+", type=float, default=[1, 7, 64], help="record sizes, 10^6 bytes")
    parser.add_argument("--pack", type=float, default=64, help="what a process has in the store, 10^6 bytes")
    parser.add_argument("--writers", nargs="+", type=int, default=[1, 2, 4], help="processes at once")
    parser.add_argument("--seconds", type=float, default=1.0, help="time of each measurement")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(*json.loads(arguments.worker))
        return
    for kind in arguments.kinds:
        for size in arguments.sizes:
            for writers in arguments.writers:
                print(json.dumps(measure(kind, int(size * MB), writers, int(arguments.pack * MB), arguments.seconds)), flush=True)


if __name__ == "__main__":
    main()
