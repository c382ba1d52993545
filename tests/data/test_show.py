"""What ``show_data`` prints is what is trained: text whole, supervised tokens marked, bad rows with their reason."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

from tests.tiny import save_target
from torchspec.cli import main

ROWS = [
    {"messages": [{"role": "user", "content": "the <cat>"}, {"role": "assistant", "content": "runs 🦜\nover"}]},
    {"messages": [{"role": "narrator", "content": "x"}]},
    {"input_ids": [10, 11, 12], "loss_mask": [0, 1, 1]},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("world")
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(save_target(folder / "target", layers=1)), str(folder / "a.jsonl")


def test_brackets_and_colour_are_around_what_is_supervised(world: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    target, file = world
    main(["show_data", "--target", target, "--input", file])
    shown = capsys.readouterr().out
    assert "⟦runs 🦜↵\nover<|im_end|>⟧" in shown and "<|im_start|>user\nthe <cat><|im_end|>" in shown and f"{file}:1: " in shown
    main(["show_data", "--target", target, "--input", f"[{file}]", "--color", "always"])
    colored = capsys.readouterr().out
    green = "".join(re.findall(r"\x1b\[30;42m(.*?)\x1b\[0m", colored))
    assert green == "runs 🦜↵over<|im_end|>"


def test_a_page_holds_every_token(world: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, file = world
    main(["show_data", "--target", target, "--input", f"[{file}]", "--limit", "3", "--html", str(tmp_path / "deep" / "page.html")])
    page = (tmp_path / "deep" / "page.html").read_text()
    on = "".join(re.findall(r"<i class='on[^']*' title='[^']*'>(.*?)</i>", page.split("<pre>")[1], flags=re.S))
    assert html.unescape(on) == "runs 🦜↵\nover<|im_end|>"
    assert "unknown role &#x27;narrator&#x27;" in page and "3 tokens, 2 supervised" in page
    assert [int(i) for ids in re.findall(r"title='([^']*)'", page.split("<pre>")[2]) for i in ids.split()] == [10, 11, 12]
    assert "unknown role 'narrator'" in capsys.readouterr().out


def test_cut_and_skip(world: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    target, file = world
    main(["show_data", "--target", target, "--input", f"[{file}]", "--skip", "2", "--max_length", "2"])
    assert "2 tokens, 1 more cut off by max_length, 1 supervised" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        main(["show_data", "--target", target, "--input", f"[{file}]", "--skip", "9"])
    assert done.value.code == 2 and "skip=9 leaves no row to show" in capsys.readouterr().err
