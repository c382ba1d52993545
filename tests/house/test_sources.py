"""Rules of the house that a machine can check: who may import whom, what stays lazy, how a file opens, and what must not be in the repository."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "torchspec"
SOURCES = sorted(PACKAGE.rglob("*.py"))
LAZY = ("torch.distributed", "vllm", "mooncake", "ray", "wandb")
MAY_IMPORT: dict[str, set[str]] = {
    "transfer": {"transfer"},
    "engines": {"engines", "transfer"},
    "models": {"models"},
    "data": {"data", "engines", "transfer"},
    "callbacks": {"callbacks", "models", "data", "engines", "transfer"},
    "commands": {"commands", "models", "data", "engines", "transfer"},
}
"""Folders of ours that a module of a folder may import; modules directly under torchspec are contracts, open to all."""
ABOVE: dict[str, set[str]] = {
    "acceptance": {"data", "engines", "models"},
    "acceptance_requests": {"data"},
    "cli": {"commands", "data", "models"},
    "trainer": {"callbacks", "models"},
    "lightning_rules": {"models"},
    "ranks": {"engines"},
    "target": {"transfer"},
}
"""Modules directly under torchspec that may import folders, and which; all others are for every folder, so they know none."""
ENTRIES = ("torchspec.cli", "torchspec.trainer", "torchspec.lightning_rules", "torchspec.lightning_errors", "torchspec.commands")
"""What stands above the folders: none of them imports these."""


_FAMILY = {"draft_defaults", "family", "metrics", "ops", "target_head", "vocabulary"}
"""What a family's folder may import of ``models`` beside itself: never another family."""
ROOMS: dict[str, set[str]] = {
    "logits_rule": set(),
    "target_tensors": {"logits_rule"},
    "vocabulary": set(),
    "metrics": set(),
    "target_head": {"ops", "target_tensors"},
    "ops": {"ops", "target_head"},
    "draft_defaults": {"ops"},
    "family": {"metrics", "ops", "vocabulary"},
    "eagle3": {"eagle3", *_FAMILY},
    "blocks": {"blocks", *_FAMILY},
    "families": {"family"},
    "optim": {"optim", "ops"},
    "training": {"export", "families", "family", "module", "ops", "optim", "training", "vocabulary"},  # the module: its type alone
    "export": {"export", "families", "family", "ops", "training", "vocabulary"},
    "choice": {"families", "family", "training"},
    "module": {"choice", "families", "family", "metrics", "ops", "optim", "training", "vocabulary"},
}
"""Rooms and files of ``models`` → what they may import of it."""
EAGLE3 = {
    "models/families.py": "the table",
    "engines/vllm/options.py": "vLLM's own name of an interface",
    "engines/sglang/options.py": "SGLang's own name of an algorithm",
    "engines/sglang/families.py": "SGLang's own name of an interface",
}
"""Files outside its folder that say EAGLE-3, and why."""


def imports(tree: ast.Module, *, module_level: bool) -> Iterator[str]:
    """Names imported anywhere, or only where importing the file runs them (type-checking blocks left out)."""

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module and child.level == 0:
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            elif module_level and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                if not module_level:
                    yield from walk(child)
            else:
                yield from walk(child)

    return walk(tree)


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), filename=str(file))


def test_heavy_packages_load_where_they_are_used() -> None:
    loaded_by_vllm = PACKAGE / "engines/vllm/connector.py"
    found = {
        str(file.relative_to(PACKAGE)): name
        for file in SOURCES
        if file != loaded_by_vllm
        for name in imports(parsed(file), module_level=True)
        if any(name == lazy or name.startswith(f"{lazy}.") for lazy in LAZY)
    }
    assert not found, "imported at module level"


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_one_way(folder: str) -> None:
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir()} & MAY_IMPORT.keys()
    for file in (PACKAGE / folder).rglob("*.py"):
        for name in imports(parsed(file), module_level=False):
            parts = name.split(".")
            if parts[0] == "torchspec" and len(parts) > 1 and parts[1] in folders:
                assert parts[1] in MAY_IMPORT[folder], f"{file.relative_to(ROOT)} imports {name}"


def test_what_every_folder_may_import_imports_no_folder() -> None:
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir()}
    found = {
        f"{file.stem} imports {name}"
        for file in PACKAGE.glob("*.py")
        for name in imports(parsed(file), module_level=False)
        if name.startswith("torchspec.") and name.split(".")[1] in folders - ABOVE.get(file.stem, set())
    }
    assert not found


def test_nothing_below_imports_the_command_line_or_the_trainer() -> None:
    found = {
        f"{file.relative_to(PACKAGE)} imports {name}"
        for folder in MAY_IMPORT.keys() - {"commands"}
        for file in (PACKAGE / folder).rglob("*.py")
        for name in imports(parsed(file), module_level=False)
        if name.startswith(ENTRIES)
    }
    assert not found


def test_rooms_of_the_models_import_one_way() -> None:
    """module → families → a family's folder → ops; what two families share is in ``ops``."""
    found = set()
    models = PACKAGE / "models"
    for file in models.rglob("*.py"):
        first = file.relative_to(models).parts[0].removesuffix(".py")
        for name in imports(parsed(file), module_level=False):
            parts = name.split(".")
            if parts[:2] == ["torchspec", "models"] and len(parts) > 2 and parts[2] not in ROOMS.get(first, set()):
                found.add(f"{file.relative_to(PACKAGE)} imports {name}")
    assert not found


def test_one_family_is_named_nowhere_else() -> None:
    """Whatever knows EAGLE-3 outside its folder should ask the draft's family."""
    said = {str(file.relative_to(PACKAGE)) for file in SOURCES if re.search(r"eagle[-_ ]?3", file.read_text(), re.IGNORECASE)}
    assert {file for file in said if not file.startswith("models/eagle3/")} == EAGLE3.keys()


def test_importing_the_package_is_cheap() -> None:
    heavy = ("torch", "transformers", "lightning", "vllm")
    code = f"import sys, torchspec, torchspec.cli, torchspec.commands, torchspec.transfer; print([m for m in {heavy} if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


def test_a_file_says_what_it_is_and_stays_small() -> None:
    assert {str(file.relative_to(PACKAGE)): problem for file in SOURCES if (problem := _problem(file))} == {}


def _problem(file: Path) -> str | None:
    text = file.read_text()
    if not text.strip():
        return None if file.name == "__init__.py" else "empty"
    tree = parsed(file)
    opening = ast.get_docstring(tree)
    if not opening:
        return "no opening docstring"
    if len(opening.splitlines()) > 25:
        return "the opening is an essay"
    if len(text.splitlines()) > 500:
        return "split it"
    defines = any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body)
    return "no from __future__ import annotations" if defines and "from __future__ import annotations" not in text else None


def test_every_folder_of_the_package_is_a_package() -> None:
    folders = {file.parent for file in SOURCES}
    assert [str(f.relative_to(ROOT)) for f in sorted(folders) if not (f / "__init__.py").is_file()] == []


def test_nothing_of_one_machine_is_in_the_repository() -> None:
    """Paths of a developer's machine, mirrors, left-over notes. The words are put together here so that this file does not hold them."""
    banned = ["/wo" + "rk/", "/opt/" + "pypi", "/opt/" + "wheels", "/ro" + "ot/", "TO" + "DO", "FIX" + "ME", "XX" + "X:"]
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split("\n")
    files = [ROOT / name for name in tracked if name] or [
        p for p in ROOT.rglob("*") if p.suffix in {".py", ".md", ".yaml", ".toml", ".sh"} and ".venv" not in p.parts
    ]
    for file in files:
        if not file.is_file() or file.suffix in {".jsonl", ".png"}:
            continue
        text = file.read_text(errors="replace")
        assert not [word for word in banned if word in text], f"{file.relative_to(ROOT)} holds {[word for word in banned if word in text]}"


def test_the_map_names_every_module() -> None:
    """docs/map.md has a section a folder, in which each file stands by its name (kernels without the ending)."""
    sections = {text.split("\n", 1)[0].split(":")[0]: text for text in (ROOT / "docs/map.md").read_text().split("\n## ")[1:]}
    missing = []
    for path in SOURCES:
        folder, *below = path.relative_to(PACKAGE).parts
        name = path.stem if "kernels" in below else "/".join(below) or folder
        if path.name != "__init__.py" and f"`{name}`" not in sections.get(f"{folder}/" if below else "torchspec/", ""):
            missing.append(str(path.relative_to(PACKAGE)))
    assert missing == []


def test_no_engine_imports_another() -> None:
    """What two share stands in engines/ or engines/capture/; the table alone names them."""
    own = {path.name for path in (PACKAGE / "engines").iterdir() if path.is_dir()} - {"capture", "__pycache__"}
    found = [
        f"{file.relative_to(PACKAGE)} imports {name}"
        for file in (PACKAGE / "engines").rglob("*.py")
        for name in imports(parsed(file), module_level=False)
        if name.split(".")[:2] == ["torchspec", "engines"] and name.split(".")[2] in own - {file.relative_to(PACKAGE / "engines").parts[0]}
    ]
    assert found == []
