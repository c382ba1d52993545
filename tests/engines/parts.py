"""A small engine group of real processes, and a rank that takes packs from it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from torchspec.engines.client import Endpoint, TrainerClient
from torchspec.engines.engine import EngineConfig
from torchspec.engines.group import GroupConfig
from torchspec.engines.messages import Pack, PackReady, Sample
from torchspec.target import Target, TargetConfig
from torchspec.transfer import Store, StoreConfig, open_store
from torchspec.transfer.record import Record, open_record
from torchspec.transfer.spec import RecordSpec

MAX_LENGTH = 64


def save_tiny(folder: Path, family: str = "llama", *, layers: int = 4, hidden: int = 32, dtype: torch.dtype = torch.float32) -> Path:
    """A random causal LM of a family, tens of kilobytes."""
    import transformers as t

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 96, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4, "max_position_embeddings": 512}
    sizes |= {"initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    more = {"intermediate_size": 2 * hidden, "num_key_value_heads": 2, "head_dim": hidden // 4}
    config: Any
    match family:
        case "llama":
            config = t.LlamaConfig(**sizes, **more)
        case "qwen3":
            config = t.Qwen3Config(**sizes, **more)
        case "gemma3":
            config = t.Gemma3TextConfig(**sizes, **more, sliding_window=8, query_pre_attn_scalar=8)
        case "mistral":
            config = t.MistralConfig(**sizes, **more, sliding_window=8)
        case "qwen3_moe":
            config = t.Qwen3MoeConfig(**sizes, **more, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=hidden)
        case "deepseek_v3":
            mla = {"q_lora_rank": 32, "kv_lora_rank": 512, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64, "v_head_dim": 32, "num_key_value_heads": 4}
            experts = {
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_shared_experts": 1,
                "n_group": 1,
                "topk_group": 1,
                "first_k_dense_replace": 1,
                "topk_method": "noaux_tc",
                "scoring_func": "sigmoid",
            }
            config = t.DeepseekV3Config(**sizes, intermediate_size=2 * hidden, moe_intermediate_size=hidden, **mla, **experts)
        case "qwen3_next":
            experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": hidden, "shared_expert_intermediate_size": hidden}
            linear = {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
            config = t.Qwen3NextConfig(**sizes, **more, **experts, **linear)
        case "minimax_m2":
            config = t.MiniMaxM2Config(
                **sizes, **more, num_local_experts=4, num_experts_per_tok=2, rotary_dim=hidden // 4, scoring_func="sigmoid", use_routing_bias=True
            )
        case "gpt2":
            config = t.GPT2Config(**{**sizes, "n_embd": hidden, "n_layer": layers, "n_head": 4, "n_positions": 512})
        case "gpt_neox":
            config = t.GPTNeoXConfig(**sizes, intermediate_size=2 * hidden)
        case "opt":
            config = t.OPTConfig(**sizes, ffn_dim=2 * hidden, word_embed_proj_dim=hidden)
        case _:
            raise AssertionError(family)
    t.AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    return folder


def spec_of(target: Path, aux_layers: tuple[int, ...] = (1, 2)) -> RecordSpec:
    return Target(TargetConfig(str(target))).record_spec(aux_layers, tokenizer="none")


def group_config(folder: Path, target: Path, *, engines: dict[str, Any] | None = None, **changes: Any) -> GroupConfig:
    """One worker, shared memory under ``folder``."""
    (folder / "shm").mkdir(exist_ok=True)
    given = {"workers": 1, "threads": 1, "batch_samples": 4, "batch_tokens": 256, "start_timeout": 120.0, **(engines or {})}
    config = GroupConfig(
        target=TargetConfig(str(target)),
        spec=spec_of(target),
        store=StoreConfig(kind="shm", shm_dir=str(folder / "shm")),
        engine="transformers",
        engines=EngineConfig(**given),
        budget=8 << 20,
        reserve=0,
        max_length=MAX_LENGTH,
        log_dir=folder / "logs",
    )
    return replace(config, **changes)


def random_packs(count: int, *, world: int = 1, rank: int = 0, per_pack: int = 3, seed: int = 0) -> list[Pack]:
    """Packs of one rank; sample indices are unique over the pass."""
    generator = torch.Generator().manual_seed(seed)
    packs = []
    for index in range(count):
        lengths = torch.randint(1, MAX_LENGTH + 1, (per_pack,), generator=generator).tolist()
        samples = [
            Sample(index * per_pack + i, torch.randint(0, 96, (n,), generator=generator, dtype=torch.int32).numpy().tobytes()) for i, n in enumerate(lengths)
        ]
        if index % world == rank:
            packs.append(Pack(index, samples))
    return packs


def read_record(store: Store, key: str, nbytes: int, spec: RecordSpec) -> Record:
    """A record out of a store, verified."""
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    assert store.get([key], [buffer]) == [nbytes]
    return open_record(buffer, spec)


class Rank:
    """A trainer's side of one pass: submits, waits, reads and verifies, acknowledges."""

    def __init__(self, endpoint: Endpoint, spec: RecordSpec, packs: list[Pack], *, rank: int = 0, world: int = 1, num_packs: int | None = None) -> None:
        self.client = TrainerClient(endpoint, f"rank-{rank}")
        self.store = open_store(self.client.welcome.store)
        self.spec = spec
        self.records: dict[int, Record] = {}
        self.failed: dict[int, str] = {}
        self.taken: list[int] = []
        self.ids = {sample.index: sample.ids for pack in packs for sample in pack.samples}
        self.waiting = {pack.index for pack in packs}
        self.most_bytes = 0
        self.client.open_stage("train", 0, first_pack=0, num_packs=num_packs or len(packs), rank=rank, world=world)
        self.client.submit("train", 0, packs)

    def take(self, *, timeout: float = 60.0) -> PackReady:
        """One pack, copied out, verified and acknowledged."""
        ready = self.client.poll(timeout)
        assert ready is not None, f"no pack within {timeout} s: {self.client.ask()}"
        assert ready.pack in self.waiting, f"pack {ready.pack} came twice"
        self.waiting.remove(ready.pack)
        self.taken.append(ready.pack)
        for ref in ready.records:
            record = read_record(self.store, ref.key, ref.nbytes, self.spec)
            assert record.input_ids.numpy().tobytes() == self.ids[ref.index]
            assert ref.index not in self.records
            self.records[ref.index] = record
        self.failed |= {failure.index: failure.reason for failure in ready.failed}
        self.client.acknowledge("train", 0, [ready.pack])
        return ready

    def take_all(self) -> None:
        while self.waiting:
            self.take()
        assert self.records.keys() | self.failed.keys() == self.ids.keys()

    def settled(self) -> dict[str, Any]:
        """State of the group once every byte is back."""
        return wait_until(lambda: (state := self.client.ask())["bytes_alive"] == 0 and state, what="the credit to return")

    def close(self) -> None:
        self.client.close()
        self.store.close()


def wait_until(condition: Callable[[], Any], *, timeout: float = 60.0, what: str) -> Any:
    """The condition's first true value; polls the outside world (files, processes, another process's state)."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout} s"
        time.sleep(0.02)
    return value


def of_run(run: str) -> list[psutil.Process]:
    """Living processes that carry a run's token, by environment or command line: workers and what they started."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("TORCHSPEC_TOKEN") == run:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass
    return found


def children(pid: int) -> list[psutil.Process]:
    """All processes below one, also in sessions of their own."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def still_running(processes: list[psutil.Process], *, timeout: float) -> list[psutil.Process]:
    """Those that have not ended by then. A dead process whose new parent, the machine's first one, takes its time to collect it has ended."""
    deadline = time.monotonic() + timeout
    while left := [p for p in processes if _runs(p)]:
        if time.monotonic() > deadline:
            return left
        time.sleep(0.05)
    return []


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def store_files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "shm"))
