"""The parts of the SGLang backend that need no SGLang: rows over chunks into records, which way to a state is taken, orders, arguments, stand-ins."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engines.parts import read_record, save_tiny
from tests.engines.test_vllm_parts import Inbox, inbox
from torchspec.engines.arguments import check_arguments
from torchspec.engines.capture.requests import TOKEN_VARIABLE, CaptureRequest, Destination, ids_digest
from torchspec.engines.engine import EngineConfig
from torchspec.engines.sglang.checks import family_of, wrong_arguments
from torchspec.engines.sglang.collector import PREFIX, PROBE, Collector, Facts
from torchspec.engines.sglang.families import FAMILIES
from torchspec.engines.sglang.options import OWNED, serve_command, server_arguments
from torchspec.engines.table import ENGINES
from torchspec.errors import UserError
from torchspec.target import Target, TargetConfig
from torchspec.transfer import StoreServer, open_store
from torchspec.transfer.spec import RecordSpec

__all__ = ["inbox"]
HIDDEN, LAYERS = 16, (0, 1, 3, 4)
SPEC = RecordSpec(target="t", tokenizer="", aux_layers=(0, 1, 3), hidden_size=HIDDEN, dtype="float32")
FACTS = Facts(
    layer_ids=LAYERS, architecture="LlamaForCausalLM", family=FAMILIES["LlamaForCausalLM"], allow_unknown=False, target="t", path="/t",
    hidden_size=HIDDEN, dtype="float32", alone=False, max_tokens=64, producer="sglang test",
)  # fmt: skip
EXTEND = SimpleNamespace(is_extend=lambda: True)


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")


def order_of(key: str, server: StoreServer, inbox: Inbox, *, prompt: int, tail: tuple[int, ...] = (7,), ids: str = "", **changed: Any) -> str:
    run = Destination(server.address, dataclasses.replace(SPEC, **changed), ("127.0.0.1", inbox.port)).to_dict()
    return PREFIX + json.dumps(CaptureRequest(key=key, tail=list(tail), answer=False, ids=ids, prompt=prompt, run=run).signed("secret").to_dict())


def forward(
    collector: Collector, parts: list[tuple[str, int, torch.Tensor, list[int]]], *, silent: tuple[int, ...] = (), captured: Any = "same", mode: Any = EXTEND
) -> None:
    """One forward: of each request (id, rows before, states [rows, layers, D], ids). The same tensor is given for every state, as a model reuses its own."""
    states = torch.cat([states for _, _, states, _ in parts])
    reused = torch.empty(states.shape[0], HIDDEN)
    for place, index in enumerate(LAYERS):
        if index not in silent:
            collector.entered(index, reused.copy_(states[:, place]))
    if isinstance(captured, str):
        captured = [states[:, 1], states[:, 2]]
    batch = SimpleNamespace(
        forward_mode=mode,
        rids=[rid for rid, _, _, _ in parts],
        extend_prefix_lens_cpu=[before for _, before, _, _ in parts],
        extend_seq_lens_cpu=[len(ids) for _, _, _, ids in parts],
    )
    collector.forward_done(batch, torch.tensor([one for _, _, _, ids in parts for one in ids]), captured)


def states_of(rows: int) -> torch.Tensor:
    return torch.randn(rows, len(LAYERS), HIDDEN)


@pytest.mark.parametrize("captured", ["list", "packed", None])
def test_rows_of_chunks_side_by_side_become_records(server: StoreServer, inbox: Inbox, captured: str | None) -> None:
    collector = Collector(FACTS)
    long, short, foreign = states_of(9), states_of(3), states_of(4)
    a = order_of("a", server, inbox, prompt=9, ids=ids_digest([*range(9), 7]))
    b = order_of("b", server, inbox, prompt=3, tail=())
    given = {"list": lambda s: [s[:, 1], s[:, 2]], "packed": lambda s: s[:, 1:3].flatten(1), None: lambda s: None}[captured]
    parts = [("x", 0, foreign, [1, 2, 3, 4]), (a, 0, long[:5], [0, 1, 2, 3, 4])]
    forward(collector, parts, captured=given(torch.cat([foreign, long[:5]])))
    assert inbox.reports == []
    forward(collector, [(a, 5, long[5:], [5, 6, 7, 8]), (b, 0, short, [4, 5, 6])], captured=given(torch.cat([long[5:], short])))
    reports = inbox.wait(2)
    assert [(report.key, report.rows, report.error) for report in reports] == [("a", 9, ""), ("b", 3, "")]
    store = open_store(server.address)
    for report, states, ids in zip(reports, (long, short), ([*range(9), 7], [4, 5, 6]), strict=True):
        record = read_record(store, report.key, report.nbytes, SPEC)
        assert record.input_ids.tolist() == ids
        assert torch.equal(record.aux, states[:, :3].flatten(1)) and torch.equal(record.last, states[:, 3])
    store.close()
    forward(collector, [(b + " ", 0, short, [4, 5, 6])], captured=given(short))  # sent again: one record, one report
    forward(collector, [(order_of("c", server, inbox, prompt=3), 0, short, [4, 5, 6])], captured=given(short))
    assert [report.key for report in inbox.wait(3)] == ["a", "b", "c"]


def test_what_enters_the_norms_is_taken_where_the_models_capture_differs(server: StoreServer, inbox: Inbox) -> None:
    collector = Collector(dataclasses.replace(FACTS, architecture="Gemma3ForCausalLM", family=FAMILIES["Gemma3ForCausalLM"]))
    states = states_of(3)
    forward(collector, [(order_of("a", server, inbox, prompt=3), 0, states, [4, 5, 6])], captured=[states[:, 1] * 0.2, states[:, 2] * 0.2])
    (report,) = inbox.wait(1)
    store = open_store(server.address)
    assert torch.equal(read_record(store, "a", report.nbytes, SPEC).aux, states[:, :3].flatten(1))
    store.close()


def test_a_capture_that_was_seen_to_be_right_is_taken_where_norms_are_silent(server: StoreServer, inbox: Inbox) -> None:
    collector = Collector(FACTS)
    states = states_of(3)
    forward(collector, [(order_of("a", server, inbox, prompt=3), 0, states, [4, 5, 6])], silent=(1, 3))
    (report,) = inbox.wait(1)
    assert not report.error and collector.ways == {0: "entering", 1: "captured", 3: "captured", 4: "entering"}
    forward(collector, [(order_of("b", server, inbox, prompt=3), 0, states, [4, 5, 6])], silent=(0, 1, 3))
    assert inbox.wait(2)[1].error == "the hooks did not see this forward"


@pytest.mark.parametrize(
    ("architecture", "silent", "captured", "problem"),
    [
        ("LlamaForCausalLM", (1, 3), None, "hidden state 1 of LlamaForCausalLM was not to be seen"),
        ("LlamaForCausalLM", (4,), "same", "hidden state 4 of LlamaForCausalLM was not to be seen"),
        ("Gemma3ForCausalLM", (3,), "same", "hidden state 3 of Gemma3ForCausalLM as its model captures it may be wrong"),
        ("NewForCausalLM", (), "same", "NewForCausalLM is not among the targets whose states were compared"),
    ],
)
def test_a_probe_is_told_what_cannot_be_had(architecture: str, silent: tuple[int, ...], captured: Any, problem: str, server: StoreServer, inbox: Inbox) -> None:
    collector = Collector(dataclasses.replace(FACTS, architecture=architecture, family=FAMILIES.get(architecture)))
    for key in (PROBE, "a"):
        forward(collector, [(order_of(key, server, inbox, prompt=3), 0, states_of(3), [4, 5, 6])], silent=silent, captured=captured)
    assert all(problem in report.error for report in inbox.wait(2))


def test_a_probe_writes_nothing(server: StoreServer, inbox: Inbox) -> None:
    collector = Collector(FACTS)
    forward(collector, [(order_of(f"{PROBE}-1", server, inbox, prompt=3), 0, states_of(3), [4, 5, 6])])
    (report,) = inbox.wait(1)
    assert not report.error and not report.rows
    store = open_store(server.address)
    assert store.exists([report.key]) == [False]
    store.close()


def test_orders_that_cannot_be_followed_are_their_own_failures(server: StoreServer, inbox: Inbox) -> None:
    collector = Collector(FACTS)
    for key, changed, before, why in (
        ("layers", {"aux_layers": (1, 2)}, 0, "the run wants hidden states [1, 2, 4], this SGLang was started with [0, 1, 3, 4]"),
        ("width", {"hidden_size": 8}, 0, "the run wants states of width 8, the target /t has 16"),
        ("target", {"target": "u"}, 0, "the run is of the target u, this SGLang runs t (/t)"),
        ("cached", {}, 2, "2 rows of it came from a cache, without states"),
    ):
        forward(collector, [(order_of(key, server, inbox, prompt=3, **changed), before, states_of(3), [4, 5, 6])])
        assert inbox.wait(1)[-1].error == why
        inbox.reports.clear()
    forward(collector, [(order_of("ids", server, inbox, prompt=3, ids=ids_digest([1])), 0, states_of(3), [4, 5, 6])])
    assert "other tokens" in inbox.wait(1)[0].error
    for broken in (PREFIX + "{", PREFIX + "{}", order_of("a", server, inbox, prompt=3).replace('"a"', '"b"')):
        forward(collector, [(broken, 0, states_of(3), [4, 5, 6])])  # nobody to tell
    collector.forward_done(None, None, None)
    forward(collector, [(order_of("decoded", server, inbox, prompt=3), 0, states_of(3), [4, 5, 6])], mode=SimpleNamespace(is_extend=lambda: False))
    forward(collector, [(order_of("good", server, inbox, prompt=3), 0, states_of(3), [4, 5, 6])])
    assert [(report.key, report.error) for report in inbox.wait(2)[1:]] == [("good", "")]


def test_rows_that_are_not_in_order_fail_their_record(server: StoreServer, inbox: Inbox) -> None:
    collector = Collector(FACTS)
    rid = order_of("a", server, inbox, prompt=9)
    forward(collector, [(rid, 0, states_of(3), [1, 2, 3])])
    forward(collector, [(rid, 5, states_of(3), [1, 2, 3])])
    assert "rows 5 to 8 came after 3 of 9" in inbox.wait(1)[0].error


@pytest.mark.parametrize("name", sorted(OWNED))
def test_owned_arguments_are_refused_with_a_reason(name: str) -> None:
    with pytest.raises(UserError, match=f"data.engines.engine_args.{name}"):
        check_arguments(EngineConfig(engine_args={name: 1}), owned=OWNED)


def test_arguments(tmp_path: Path) -> None:
    target = Target(TargetConfig(str(save_tiny(tmp_path))))
    config = EngineConfig(batch_tokens=100, batch_samples=5, engine_args={"mem_fraction_static": 0.5, "attention_backend": "mine"})
    found = server_arguments(target, config, aux_layers=(0, 1, 3), max_length=64, device="cpu")
    assert found["return_aux_hidden_state_layer_ids"] == [0, 2] and found["context_length"] == 72 and found["attention_backend"] == "mine"
    assert (found["chunked_prefill_size"], found["max_prefill_tokens"], found["max_running_requests"]) == (100, 100, 5)
    hooked = [name for entry in found["forward_hooks"] for name in entry["target_modules"]]
    assert hooked == [*(f"model.layers.{i}.input_layernorm" for i in (0, 1, 3)), "model.norm", "*logits_processor"]
    alone = server_arguments(target, dataclasses.replace(config, deterministic=True), aux_layers=(0,), max_length=64, device="cuda:0")
    assert alone["prefill_max_requests"] == 1 and alone["chunked_prefill_size"] == -1 and "enable_return_aux_hidden_states" not in alone
    assert list(wrong_arguments(SimpleNamespace(**found))) == []
    found |= {"disable_radix_cache": False, "kv_cache_dtype": "fp8_e5m2"}
    assert [name for name, _, _ in wrong_arguments(SimpleNamespace(**found))] == ["disable_radix_cache", "kv_cache_dtype"]
    words = serve_command(target, (1, 3))
    assert words.startswith("TORCHSPEC_TOKEN=SECRET python -m sglang.launch_server --model-path") and "--return-aux-hidden-state-layer-ids 0 2" in words


def test_a_window_that_sglang_does_not_obey_is_refused() -> None:
    config = SimpleNamespace(architectures=["MistralForCausalLM"], sliding_window=32, _name_or_path="m")
    assert family_of(config, max_length=32)[1] is FAMILIES["MistralForCausalLM"]
    with pytest.raises(UserError, match="sliding_window 32, which SGLang does not obey"):
        family_of(config, max_length=33)
    assert family_of(SimpleNamespace(architectures=["Other"]), max_length=64) == ("Other", None)


def test_versions() -> None:
    ENGINES["sglang"].check_version("0.5.23", allow_unknown=False)
    for version in ("0.5.22", "0.5.230", "0.6.0"):
        with pytest.raises(UserError, match="allow_unknown_version"):
            ENGINES["sglang"].check_version(version, allow_unknown=False)


def test_stand_ins_are_for_what_is_missing_alone() -> None:
    """In a process of its own: they stay once they are installed."""
    code = """
import sys
from torchspec.engines.sglang import stand_ins
import torchspec.engines.sglang.hooks, torchspec.engines.sglang.launch, torchspec.engines.sglang.engine
assert "sglang" not in sys.modules  # what a child imports first must not
stand_ins._NAMES = ("json", "no_such_package")
stand_ins.install(), stand_ins.install()
import json, no_such_package.deep.er as deep
from no_such_package import thing
from transformers.utils import is_torchvision_available
assert json.dumps(1) == "1" and thing.nested.name and len([f for f in sys.meta_path if isinstance(f, stand_ins._Finder)]) == 1
try:
    deep.call(1)
except ImportError as error:
    print(error)
try:
    import no_such_other
except ImportError:
    print("missing")
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=None)
    assert said.stdout.splitlines() == ["no_such_package.deep.er.call is needed, and no_such_package is not installed", "missing"]
