"""The command line: ``fit`` and ``validate`` through LightningCLI, the other commands as plain functions (``commands/``).

Unknown keys and abbreviations are refused, what a user can mend is printed as one line, and the exit code is 2 for it, 128 + n for a signal n.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from torchspec.errors import DeviceLost, GroupStopped, UserError
from torchspec.imports import heavy_imports
from torchspec.paths import at_home, expand_all
from torchspec.proxies import spare_this_machine

COMMANDS: dict[str, str] = {
    "show_data": "show conversations as they would be trained: tokens, and which of them are supervised",
    "vocabulary": "count the tokens of the answers, report what smaller draft vocabularies cover",
    "extract": "write the hidden states of a run's data to disk, to train from them without engines",
    "regenerate": "answer the prompts of a conversation file with the target itself",
    "export": "turn a training checkpoint into a draft directory for vLLM, speculators or SGLang",
    "import_draft": "read a published draft, check it, and write it in another format",
    "acceptance": "serve a draft in vLLM and measure its acceptance length and speed",
    "vllm_command": "print how to start a vllm serve that engine vllm_remote can use",
    "sglang_command": "print how to start an SGLang server that engine sglang_remote can use",
    "worker": "start an engine worker by hand and connect it to a running coordinator",
    "doctor": "check this machine: versions, libraries, GPU, ports, memory, the store",
}
"""A command and what it does: the function of that name in the module of that name in ``torchspec.commands``."""

TRAINING: dict[str, str] = {
    "fit": "train a draft: start engines, stream hidden states, train, validate, save, export",
    "validate": "measure a draft on the validation data",
}

_STRICT: dict[str, Any] = {"allow_abbrev": False, "exit_on_error": False}
"""Of every parser: no abbreviations, and errors that are raised, because a page of usage before each hides it."""
_LAST_RANK = 120.0
"""Seconds for the other ranks to finish after the first."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        argv: words after the program's name; None takes ``sys.argv``.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    spare_this_machine()
    if not words or words[0] in {"-h", "--help"}:
        print(_overview())
        raise SystemExit(0 if words else 2)
    try:
        if words[0] not in TRAINING | COMMANDS:
            raise UserError("command", words[0], "does not exist", f"use one of {', '.join([*TRAINING, *COMMANDS])}")
        if any("help" in word or word.startswith(("-h", "--print_config")) for word in words[1:]):
            _explain_fields()
        if words[0] in TRAINING:
            _train(words)
        else:
            _command(words[0], words[1:])
    except UserError as error:
        _fail(error)
    except ArgumentError as error:
        from torchspec.lightning_errors import missing_logger
        from torchspec.moved import moved

        _fail(moved(str(error)) or missing_logger(str(error)) or f"{' '.join(str(error).split())}. Fix: see main.py {words[0]} --help")
    except (GroupStopped, DeviceLost) as error:
        _fail(error, code=1)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _explain_fields() -> None:
    """Make the docstring behind a dataclass's field the help of its option; it takes half a second, so only where help is printed."""
    from jsonargparse import set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)


def _overview() -> str:
    rows = "\n".join(f"  {name:<14}{what}" for name, what in {**TRAINING, **COMMANDS}.items())
    head = "usage: main.py COMMAND ...\n\nTorchSpec trains the draft models of speculative decoding."
    return f"{head}\n\n{rows}\n\nmain.py COMMAND --help shows the options of a command."


_AS_TYPED = {"data.target.path": "target", "data.target.revision": "revision", "data.target.dtype": "dtype", "ckpt_path": "checkpoint"}
"""Options of ``fit``, by which errors name what they are about, as other commands call them."""


def _fail(error: BaseException | str, code: int = 2) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(code) from None


def command(name: str) -> Callable[..., Any]:
    """The function of a command, whose module alone is imported for it."""
    function: Callable[..., Any] = getattr(import_module(f"torchspec.commands.{name}"), name)
    return function


def _command(name: str, words: list[str]) -> None:
    if name == "extract":
        from torchspec.commands.extract import extract

        extract(words)
        return
    from jsonargparse import auto_cli

    function = command(name)
    try:
        code = auto_cli(at_home(function), args=words, as_positional=False, prog=f"main.py {name}", **_STRICT)
    except UserError as error:
        typed = _AS_TYPED.get(error.field, error.field)
        raise UserError(typed if typed in signature(function).parameters else error.field, error.value, error.problem, error.fix) from error
    if isinstance(code, int) and code:
        raise SystemExit(code)


def _train(words: list[str]) -> None:
    _quiet()
    with heavy_imports():
        import lightning.pytorch as pl
        from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback

        from torchspec import ranks
        from torchspec.data.datamodule import DraftDataModule
        from torchspec.lightning_errors import mendable
        from torchspec.models.module import DraftModule
        from torchspec.models.training.parallelize import refuse_fsdp1, register_strategies
        from torchspec.run_record import config_text, or_without
        from torchspec.saved_config import save_configuration
        from torchspec.trainer import Trainer

    class SaveConfig(SaveConfigCallback):
        """Writes the whole configuration into the folder of a run, whatever the logger, once it trains: a run that was refused leaves what is there."""

        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            """Nothing yet."""

        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.is_global_zero:
                path = Path(trainer.default_root_dir) / self.config_filename
                with or_without(path):
                    save_configuration(config_text(self.parser, self.config), path)

    class TorchSpecCLI(LightningCLI):
        """LightningCLI with the target configured once, under ``data``."""

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {
                "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
                "validate": {"model", "dataloaders", "datamodule", "weights_only"},
            }

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.link_arguments("data", "model.target", compute_fn=lambda data: data.target.config, apply_on="instantiate")

        def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
            super().parse_arguments(parser, args)
            self.config = expand_all(self.config)
            refuse_fsdp1(self.config[self.config.subcommand].trainer.strategy)

        def _parse_ckpt_path(self) -> None:
            """Lightning would lay the hyper-parameters saved in a single-file checkpoint over the command line; ours are checked instead."""

    register_strategies()
    try:
        made = TorchSpecCLI(
            DraftModule,
            DraftDataModule,
            trainer_class=Trainer,
            seed_everything_default=0,
            save_config_callback=SaveConfig,
            parser_kwargs={**_STRICT, **{name: dict(_STRICT) for name in TRAINING}},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=words,
        )
    except BaseException as error:
        told = None if isinstance(error, UserError) else mendable(error)
        if ranks.leave_at_once:
            _leave_at_once(told or error)
        if told is not None:
            raise told from error
        raise
    ranks.part()
    ranks.wait_for_children(made.trainer, seconds=_LAST_RANK)


def _leave_at_once(error: BaseException) -> None:
    """End this process now, with the words and the code it would have ended with."""
    if isinstance(error, UserError | GroupStopped | DeviceLost):
        print(f"error: {error}", file=sys.stderr)
    elif not isinstance(error, SystemExit):
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    code = error.code if isinstance(error, SystemExit) else 2 if isinstance(error, UserError) else 1
    os._exit(code if isinstance(code, int) else 1)


def _quiet() -> None:
    """Silence notices of our dependencies that say nothing to the user of this program."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.getMessage())
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*`tensorboardX` has been removed as a dependency.*")  # metrics.csv is what the documentation speaks of
    warnings.filterwarnings("ignore", message=".*using the WeightAveraging callback with a model that overrides the configure_model.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*The number of training batches .* is smaller than the logging interval.*")
