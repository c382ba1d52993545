"""``main.py extract``: takes the configuration file of a run, of which it uses the data, and writes that data's records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchspec.errors import UserError
from torchspec.moved import moved
from torchspec.paths import expand_all

_CAPTURED = {"family": str | None, "draft": str | None, "start_from": str | None, "aux_layers": list[int] | None}
"""Options of ``model`` that decide which states are captured."""


def extract(words: list[str]) -> None:
    """Parse and extract.

    Args:
        words: of the command line.

    Raises:
        UserError: a file that is no configuration, or what extraction refuses.
    """
    from jsonargparse import ArgumentParser

    from torchspec.data.datamodule import DraftDataModule
    from torchspec.data.extract import extract as write_records
    from torchspec.models.choice import choose
    from torchspec.transfer.sizes import show_bytes

    parser = ArgumentParser(prog="main.py extract", description=__doc__.split(":", 1)[1].strip(), allow_abbrev=False, exit_on_error=False)
    parser.add_argument(
        "-c", "--config", type=str, help="YAML of a run; its data, and of model what says which states, are used. Of several, later ones win key by key"
    )
    for name, kind in _CAPTURED.items():
        parser.add_argument(f"--model.{name}", type=kind, default=None, help="as of fit")
    parser.add_function_arguments(write_records, as_group=False, skip={"data", "aux_layers"})
    parser.add_class_arguments(DraftDataModule, "data")
    files, rest = _configs_of(words)
    if not {"-h", "--help"} & set(rest):
        sections = [(file, _used_of(file)) for file in files]
        if files and not any("data" in used for _, used in sections):
            raise UserError("config", ", ".join(files), "has no data section", "give the YAML of a run")
        for file, used in sections:
            for name, value in _flat(used).items():
                try:
                    parser.set_defaults({name: value})
                except KeyError:
                    fix = "see main.py extract --help, and mend the name"
                    raise moved(name, value) or UserError(name, value, f"is no option ({file})", fix) from None
    given = expand_all(parser.parse_args(rest))
    made = parser.instantiate_classes(given)
    report = write_records(
        made.data, given.output, choose(made.data.target, **vars(given.model)).aux_layers, part=given.part, shard_size=given.shard_size, fp8=given.fp8
    )
    rate = report.tokens / report.seconds if report.seconds else 0.0
    error = "" if report.fp8_error is None else f"; fp8 changed the states by {report.fp8_error:.2%} (relative root mean square)"
    print(
        f"{report.records} records written, {report.there} were there, {report.failed} failed; {report.tokens} tokens at {rate:.0f} tokens/s, "
        f"{show_bytes(report.nbytes)}{error} -> {given.output}"
    )


def _configs_of(words: list[str]) -> tuple[list[str], list[str]]:
    """(the values of every ``--config`` or ``-c``, the other words)."""
    files: list[str] = []
    rest: list[str] = []
    left = iter(words)
    for word in left:
        name, given, value = word.partition("=")
        if name not in ("--config", "-c"):
            rest.append(word)
        elif given:
            files.append(value)
        elif (value := next(left, "")) and not value.startswith("--"):
            files.append(value)
        else:
            raise UserError("config", None, "names no file", "give the YAML of a run behind --config")
    return files, rest


def _used_of(file: str) -> dict[str, Any]:
    """What one file says of the data, and what of the model decides which states are captured."""
    import yaml

    try:
        plain = yaml.safe_load(Path(file).expanduser().read_text())
        found = dict(plain or {})
        data, model = dict(found.get("data") or {}), dict(found.get("model") or {})
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(
            "config", file, f"is no configuration of a run ({type(error).__name__}: {error})".replace("\n", " "), "give a YAML with a data section"
        ) from error
    captured = {name: model[name] for name in _CAPTURED if model.get(name) is not None}
    return {name: section for name, section in (("data", data), ("model", captured)) if section}


def _flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections by dotted names; dictionaries that are values stay."""
    flat: dict[str, Any] = {}
    for name, value in plain.items():
        whole = f"{prefix}{name}"
        if isinstance(value, dict) and whole in ("data", "model", "data.target", "data.engines", "data.store"):
            flat |= _flat(value, f"{whole}.")
        else:
            flat[whole] = value
    return flat
