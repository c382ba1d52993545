"""Options of before are refused by name, with where they are now."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchspec.cli import main
from torchspec.moved import moved


@pytest.mark.parametrize("command", ["fit", "validate", "extract"])
@pytest.mark.parametrize(("option", "value", "now"), [("unroll_steps", "3", "model.unroll_steps"), ("aux_layers", "[1, 2]", "model.aux_layers")])
def test_an_option_of_before(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, option: str, value: str, now: str) -> None:
    """In a configuration as well as on the command line."""
    plain = "data: {target: {path: x}, train: y"
    (tmp_path / "old.yaml").write_text(f"{plain}, {option}: {value}}}\n")
    (tmp_path / "new.yaml").write_text(f"{plain}}}\n")
    more = ["--output", str(tmp_path / "records")] if command == "extract" else []
    for words in (["--config", str(tmp_path / "old.yaml")], ["--config", str(tmp_path / "new.yaml"), f"--data.{option}={value}"]):
        with pytest.raises(SystemExit) as done:
            main([command, *words, *more])
        said = capsys.readouterr().err.splitlines()[-1]
        assert done.value.code == 2 and said.startswith(f"error: data.{option}=") and said.endswith(f"Fix: leave it out; {now} says it.")


def test_other_names_are_left_alone() -> None:
    assert moved("--model.unroll_steps") is None and moved("data.unroll_steps_too") is None and moved("x.data.aux_layers") is None
