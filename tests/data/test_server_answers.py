"""Answers from an OpenAI-compatible server: what it is asked, what comes back, and what happens when it fails. The server here injects the faults."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from torchspec.cli import main
from torchspec.commands.regenerate import regenerate
from torchspec.data.generators import ServerAnswerer
from torchspec.errors import UserError

CALL = {"id": "c", "type": "function", "function": {"name": "find", "arguments": '{"name": "dog"}'}}
GIVEN_CALL = {"role": "assistant", "content": "", "tool_calls": [CALL]}


class Handler(BaseHTTPRequestHandler):
    """Answers the last message in capitals; words of it ask for a fault."""

    server: Any

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        words = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.asked.append(body | {"key": self.headers.get("Authorization")})
            self.server.times[words] += 1
            time = self.server.times[words]
        if "busy" in words and time <= 2:
            return self.reply(503 if time == 1 else 429, {"error": "busy"}, {"Retry-After": "0"})
        if "refused" in words:
            return self.reply(400, {"error": "the prompt is too long"})
        if "broken" in words and time == 1:
            return self.connection.close()
        if "shortened" in words and time == 1:  # the text of an error breaks off
            return self.reply(503, {"error": "busy"}, {"Retry-After": "\u00b2", "Content-Length": "999"})
        if "odd" in words:
            return self.reply(200, {"choices": [{"message": "text"}]})
        message: dict[str, Any] = {"role": "assistant", "content": words.upper()}
        if "think" in words:
            message["reasoning"] = "hm"
        if "call" in words:
            message |= {"content": None, "tool_calls": [CALL]}
        if "silent" in words:
            message["content"] = ""
        if "garbled" in words:
            message |= {"content": None, "tool_calls": [{**CALL, "function": {"name": "find", "arguments": '{"name": '}}]}
        if "half" in words:
            message["content"] = "so \ud83d"
        finish = "length" if "long" in words else "content_filter" if "filtered" in words else "stop"
        self.reply(200, {"choices": [{"message": message, "finish_reason": finish}], "usage": {"completion_tokens": 3}})

    def reply(self, code: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[Any]:
    running: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.lock, running.asked, running.times = threading.Lock(), [], Counter()
    threading.Thread(target=running.serve_forever, daemon=True).start()
    running.url = f"http://127.0.0.1:{running.server_port}/v1"
    yield running
    running.shutdown()
    running.server_close()


def run(server: Any, folder: Path, rows: list[dict[str, Any]], **changes: Any) -> tuple[Any, dict[str, dict[str, Any]]]:
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"engine": "server", "server": server.url, "batch_size": 4, **changes}
    report = regenerate("model", input=str(folder / "in.jsonl"), output=str(folder / "out.jsonl"), **options)
    return report, {row["id"]: row for row in map(json.loads, (folder / "out.jsonl").read_text().splitlines())}


def asks(id: str, *questions: str, **fields: Any) -> dict[str, Any]:
    return {"id": id, "messages": [m for q in questions for m in ({"role": "user", "content": q}, {"role": "assistant", "content": "OLD"})], **fields}


def test_turns_tools_thinking_and_sampling(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    tools = [{"type": "function", "function": {"name": "find"}}]
    used = {
        "id": "used",
        "messages": [{"role": "user", "content": "where"}, GIVEN_CALL, {"role": "tool", "content": "there", "tool_call_id": "c"}],
        "tools": tools,
    }
    rows = [asks("a", "one", "two"), asks("t", "think"), asks("c", "call", "and", tools=tools), asks("l", "long", "more"), used]
    report, done = run(server, tmp_path, rows, temperature=0.5, seed=3, max_new_tokens=9, engine_args={"top_k": 7}, template_args={"enable_thinking": False})
    assert report.answered == 5 and report.failed == 0 and report.cut == 1 and report.tokens == 3 * 6
    assert [m["content"] for m in done["a"]["conversations"]] == ["one", "ONE", "two", "TWO"]
    assert done["t"]["conversations"][1]["reasoning_content"] == "hm"
    assert done["c"]["conversations"][1]["tool_calls"] == [CALL] and len(done["c"]["conversations"]) == 2 and done["c"]["tools"] == tools
    assert done["l"]["finish"] == "length" and len(done["l"]["conversations"]) == 2
    assert [m["role"] for m in done["used"]["conversations"]] == ["user", "assistant", "tool", "assistant"]  # the call stays, its result is answered
    assert done["a"]["sampling"] == {
        "target": "model",
        "max_new_tokens": 9,
        "temperature": 0.5,
        "top_p": 1.0,
        "seed": 3,
        "engine": "server",
        "revision": None,
        "dtype": "auto",
        "engine_args": {"top_k": 7},
        "template_args": {"enable_thinking": False},
    }
    for body in server.asked:
        assert body["chat_template_kwargs"] == {"enable_thinking": False}
        assert (body["temperature"], body["seed"], body["max_tokens"], body["top_k"], body["key"]) == (0.5, 3, 9, 7, "Bearer secret")
    asked = next(body for body in server.asked if body["messages"][-1]["role"] == "tool")
    assert asked["tools"] == tools and json.loads(asked["messages"][1]["tool_calls"][0]["function"]["arguments"]) == {"name": "dog"}


def test_what_passes_is_tried_again_and_what_does_not_is_listed(server: Any, tmp_path: Path) -> None:
    rows = [asks("b", "busy"), asks("r", "refused"), asks("x", "broken"), asks("s", "silent"), asks("a", "one"), asks("f", "filtered"), asks("h", "half")]
    rows += [asks("e", "shortened"), asks("o", "odd"), asks("g", "garbled")]
    report, done = run(server, tmp_path, rows)
    assert sorted(done) == ["a", "b", "e", "x"] and report.failed == 6
    assert server.times["busy"] == 3 and server.times["broken"] == server.times["shortened"] == 2 and server.times["refused"] == server.times["odd"] == 1
    failed = {row["id"]: row["problem"] for row in map(json.loads, (tmp_path / "out.jsonl.failed.jsonl").read_text().splitlines())}
    assert "HTTP 400" in failed["r"] and "prompt is too long" in failed["r"] and "empty answer" in failed["s"]
    assert "content filter cut" in failed["f"] and "half of a character" in failed["h"] and "no valid JSON" in failed["g"]
    report, again = run(server, tmp_path, rows)
    assert report.skipped == 4 and report.failed == 6 and again.keys() == done.keys() and server.times["busy"] == 3


def test_a_server_that_is_not_there_or_has_another_model(server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"target='other' is not served by .* \(it has model\)"):
        ServerAnswerer(server.url, model="other", concurrency=1)
    (tmp_path / "in.jsonl").write_text(json.dumps(asks("a", "one")) + "\n")
    words = ["regenerate", "--target", "model", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), "--engine", "server"]
    for more, said in (([], "server=None does not go with engine server"), (["--server", "http://127.0.0.1:9/v1"], "does not answer")):
        with pytest.raises(SystemExit) as done:
            main([*words, *more])
        assert done.value.code == 2 and said in capsys.readouterr().err


def test_what_has_an_option_of_its_own_is_no_engine_argument(server: Any, tmp_path: Path) -> None:
    for name, option in (("temperature", "--temperature"), ("max_tokens", "--max_new_tokens"), ("chat_template_kwargs", "--template_args")):
        with pytest.raises(UserError, match=f"sets {name}, which is an option of its own. Fix: use {option}"):
            run(server, tmp_path, [asks("a", "one")], engine_args={name: 1.3})
    run(server, tmp_path, [asks("a", "one")], engine_args={"top_k": 5})
    with pytest.raises(UserError, match=r"engine_args=\{\} differs from \{'top_k': 5\}"):
        run(server, tmp_path, [asks("a", "one")])
