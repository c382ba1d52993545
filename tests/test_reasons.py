"""Why a library refused is shown whole and in one line: every message, the missing package by name, no dump of arguments."""

from __future__ import annotations

import logging
import logging.config

import pytest
from pydantic import BaseModel, model_validator

from torchspec.engines.vllm.refusals import refusals
from torchspec.errors import UserError
from torchspec.reasons import last_error_in, missing_package, overheard, reason_of, without_bars

LACKS = "ModuleNotFoundError: No module named 'torchvision_of_nobody'"


class Sizes(BaseModel):
    width: int
    depth: int


class Picky(BaseModel):
    name: str

    @model_validator(mode="after")
    def refuse(self) -> Picky:
        try:
            import torchvision_of_nobody  # type: ignore[import-not-found]  # noqa: F401
        except ImportError as error:
            raise ValueError("Model architectures ['Seeing'] failed to be inspected.\nPlease check the logs") from error
        return self


def raised(call: object) -> BaseException:
    try:
        call()  # type: ignore[operator]
    except BaseException as error:
        return error
    raise AssertionError("raised nothing")


def test_every_message_of_a_validation_error() -> None:
    reason = reason_of(raised(lambda: Sizes(width="broad" * 500, depth=None)))  # type: ignore[arg-type]
    assert reason.startswith("width: Input should be a valid integer") and "depth: Input should be a valid integer" in reason
    assert "broad" not in reason and "\n" not in reason and "validation error" not in reason


def test_the_missing_package_behind_a_validation_error() -> None:
    error = raised(lambda: Picky(name="x"))
    assert missing_package(error) == "torchvision_of_nobody"
    assert reason_of(error) == (
        "the package torchvision_of_nobody is not installed: Model architectures ['Seeing'] failed to be inspected. Please check the logs"
    )


def test_the_missing_package_that_was_only_logged() -> None:
    """As vLLM does it: the model is looked at in a process of its own, whose traceback goes into the log."""
    logger = logging.getLogger("vllm_like.models.registry")
    before = logging.getLogRecordFactory()
    with overheard("vllm_like") as heard:
        logging.config.dictConfig({"version": 1, "loggers": {"vllm_like": {"handlers": [], "propagate": False}}, "disable_existing_loggers": False})
        logging.getLogger("other").error(LACKS.replace("torchvision", "something"))
        try:
            raise RuntimeError(f"Error raised in subprocess:\nTraceback (most recent call last):\n  File x\n{LACKS}\n")
        except RuntimeError:
            logger.exception("Error in inspecting model architecture %s", "Seeing")
    assert logging.getLogRecordFactory() is before
    assert missing_package(ValueError("failed to be inspected"), heard=heard) == "torchvision_of_nobody"
    assert reason_of(ValueError("failed"), heard=heard) == "the package torchvision_of_nobody is not installed: failed"


def test_a_missing_part_of_a_package_that_is_there_is_not_called_a_package() -> None:
    error = raised(lambda: __import__("torchspec.nowhere"))
    assert reason_of(error) == "the module torchspec.nowhere does not exist here"


def test_causes_are_followed_and_not_repeated() -> None:
    def chained() -> None:
        try:
            try:
                raise OSError("disk is full")
            except OSError as error:
                raise RuntimeError("cannot load:\n disk is full") from error
        except RuntimeError as error:
            raise ValueError("bad model") from error

    assert reason_of(raised(chained)) == "bad model; caused by cannot load: disk is full"
    circle = ValueError("a")
    circle.__cause__ = other = ValueError("b")
    other.__cause__ = circle
    assert reason_of(circle) == "a; caused by b"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError(), "ValueError"),
        (KeyError("rope_theta"), "KeyError: 'rope_theta'"),
        (AssertionError("no such head size"), "AssertionError: no such head size"),
        (ExceptionGroup("two", [ValueError("one"), TypeError("other")]), "one; other"),
        (RuntimeError("in a child:\nTraceback (most recent call last):\n  File x\nValueError: its words\n"), "ValueError: its words"),
        (ValueError("x" * 1000), "x" * 497 + "..."),
    ],
)
def test_one_line_of_any_error(error: BaseException, reason: str) -> None:
    assert reason_of(error) == reason


def test_a_log_names_its_last_telling_error() -> None:
    log = [
        "INFO starting",
        "(EngineCore pid=7) ERROR 01-02 [core.py:9] ValueError: No available memory for the cache blocks",
        "RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    assert last_error_in(log) == "ValueError: No available memory for the cache blocks"
    assert last_error_in(log[2:]) == log[2] and last_error_in(log[:1]) is None


def test_a_log_without_its_progress_bars() -> None:
    assert without_bars("one\rtwo\n Loading:  40%|####      | 2/5\rLoading: 100%|####| 5/5\n\nlast\r\n") == ["two", "last"]


GIVEN = {"max_num_seqs": 0, "attention_backend": "NONE"}


@pytest.mark.parametrize(
    ("given", "raises", "words"),
    [
        (GIVEN, TypeError("got an unexpected keyword argument 'max_num_seqs'"), "data.engines.engine_args.max_num_seqs=0 is refused by vLLM (got an"),
        (GIVEN, ValueError("no such thing"), "data.engines.engine_args={'max_num_seqs': 0, 'attention_backend': 'NONE'} are refused by vLLM, or"),
        (GIVEN, ValueError("Unknown attention backend: 'NONE'"), "data.engines.engine_args.attention_backend='NONE' is refused by vLLM (Unknown"),
        ({}, ValueError("no such model"), "data.engine='vllm' does not take this target (no such model). Fix: set data.engine to transformers"),
        (GIVEN, ModuleNotFoundError("No module named 'nobodys'", name="nobodys"), "the package nobodys is not installed). Fix: install nobodys beside vLLM"),
    ],
)
def test_what_vllm_refuses_names_the_argument_or_the_target(given: dict[str, object], raises: Exception, words: str) -> None:
    with pytest.raises(UserError) as refused, refusals(given, field="data.engines.engine_args"):
        raise raises
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_validation_error_names_the_argument_of_the_user() -> None:
    with pytest.raises(UserError) as refused, refusals({"depth": "low", "other": 1}, field="engine_args", engine=("engine", "vllm")):
        Sizes(width=1, depth="low")  # type: ignore[arg-type]
    assert str(refused.value).startswith("engine_args.depth='low' is refused by vLLM (depth: Input should be a valid integer")


def test_an_error_of_ours_goes_through() -> None:
    ours = UserError("f", 1, "is wrong", "mend it")
    with pytest.raises(UserError) as refused, refusals({}, field="x"):
        raise ours
    assert refused.value is ours
