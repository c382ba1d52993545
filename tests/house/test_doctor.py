"""The doctor's verdicts on this machine and under injected faults."""

from __future__ import annotations

import pytest

from torchspec.commands import doctor
from torchspec.errors import UserError


@pytest.fixture(autouse=True)
def no_vllm_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing vLLM takes ten seconds; ``test_a_broken_import...`` covers the real thing."""
    monkeypatch.setattr(doctor, "_import_fails", lambda name: "")


def test_a_sound_machine_passes_line_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.doctor("shm") == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.split()[0] in ("OK", "WARN") for line in lines[:-1])
    assert lines[-1].startswith("This machine can train.")
    for what in ("python", "torch", "lightning", "transformers", "vllm", "mooncake", "gpu", "ports", "shared memory", "store", "wandb"):
        assert any(line[6:].startswith(what) for line in lines), f"no line about {what}"
    (store,) = (line for line in lines if line[6:].startswith("store"))
    assert "GB/s" in store and "shm" in store
    assert all("  -> " in line for line in lines if line.startswith(("WARN", "FAIL")))


def test_a_broken_store_fails_with_its_fix(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(config: object) -> None:
        raise UserError("store.shm_dir", "/dev/shm", "has only 64 MB", "start the container with --shm-size=2g")

    monkeypatch.setattr("torchspec.transfer.selfcheck", broken)
    assert doctor.doctor("shm") == 1
    out = capsys.readouterr().out
    assert "FAIL  store" in out and "-> start the container with --shm-size=2g" in out
    assert "wandb" in out, "the checks after a failure still run"


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def boom() -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(doctor, "_ports", boom)
    found = list(doctor.verdicts("shm"))
    assert any(v.level == "FAIL" and "boom" in v.found for v in found)
    assert any(v.what == "store" for v in found)


def test_versions_outside_the_declared_range_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_requirements", lambda: {"lightning": ">=2.6.6,<2.7", "torch": ">=2.11,<2.15"})
    monkeypatch.setattr(doctor, "_version", lambda name: {"lightning": "2.6.3", "torch": "2.13.0+cpu"}.get(name))
    found = {v.what: v for v in doctor._packages()}
    assert found["lightning"].level == "FAIL" and "2.6.6" in found["lightning"].fix
    assert found["torch"].level == "OK"
    assert found["transformers"].level == "FAIL" and "not installed" in found["transformers"].found


def test_two_mooncake_wheels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "0.3.13" if "mooncake" in name and "cuda13" not in name else None)
    assert any(v.level == "FAIL" and "overwrite" in v.found for v in doctor._mooncake())


def test_small_shared_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = doctor.shutil.disk_usage("/")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage._replace(free=64 << 20))
    (line,) = (v for v in doctor._machine() if v.what == "shared memory")
    assert line.level == "WARN" and "--shm-size" in line.fix


def test_a_broken_import_is_told_in_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert doctor._import_fails("json") == ""
    assert "no_such_module" in doctor._import_fails("no_such_module")
