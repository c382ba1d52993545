"""Do the vLLM (or SGLang) and the Transformers engine write the same records, and how fast?

Both run the same conversations (lengths from 1 token to beyond what vLLM takes in one step, so that prefills are cut into chunks) through a real store in this
machine. Compared: token ids; states, as the norm of the difference over the norm of the Transformers engine's, over all samples and for the worst sample; the
losses of one fresh draft on both. Then vLLM runs twice with ``engine.deterministic`` and the records must repeat bit for bit. Prints one JSON line.

    python benchmarks/engine_parity.py --target outputs/quickstart/target --data examples/hf-quickstart/data/train.jsonl --samples 200

On a GPU (``--device cuda:0 --store mooncake --batch_tokens 8192 --more 3000``) the engines are also timed over more samples, and with ``--file_connector``
beside vLLM's own connector that writes files (in a process of its own). ``--target random`` is a random Llama of 12 blocks, width 1024, and random ids: it
needs no model file.
With ``--engine_args '{"tensor_parallel_size": 2}'`` (on GPUs also ``CUDA_VISIBLE_DEVICES=0,1``) vLLM splits the target over two. What is known so far goes
to stderr after each part.
"""

from __future__ import annotations

import argparse
import faulthandler
import fcntl
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from torchspec.data.collate import collate
from torchspec.data.conversations import parse
from torchspec.data.render import Renderer
from torchspec.data.sources import find_sources, read_rows
from torchspec.engines.engine import Engine, EngineConfig, EngineStats, Job
from torchspec.engines.messages import Finished, Lease
from torchspec.engines.table import ENGINES
from torchspec.engines.worker import build
from torchspec.files import dumps
from torchspec.models.eagle3.config import DraftConfig, default_layers
from torchspec.models.eagle3.task import DraftTask
from torchspec.models.family import Build
from torchspec.models.vocabulary import VocabularyMapping
from torchspec.paths import expand_all
from torchspec.supervision import Unroll
from torchspec.target import Target, TargetConfig
from torchspec.transfer import StoreConfig, StoreServer, make_server, open_store
from torchspec.transfer.record import Record, RecordSpec, open_record

_STEPS = 4


class _AllAnswers:
    """What ``collate`` asks of a dataset; every token is supervised."""

    def loss_mask(self, index: int, tokens: int) -> np.ndarray:
        return np.ones(tokens, dtype=np.uint8)

    def positions(self, index: int, tokens: int) -> None:
        return None


def conversations(target: Target, data: str, *, count: int, longest: int) -> list[list[int]]:
    """Token ids of ``count`` pieces of the data's text, of lengths as :func:`spread` says."""
    renderer = Renderer(target.tokenizer(), name=target.config.path)
    stream: list[int] = []
    lengths = spread(count, longest)
    for source in find_sources(data, config_key="--data"):
        for text, _ in read_rows(source, config_key="--data"):
            stream += renderer.render(parse(text)).ids.tolist()
            if len(stream) > lengths.sum():
                break
    if len(stream) < lengths.sum():  # again from its beginning
        stream *= 1 + int(lengths.sum()) // len(stream)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return [stream[low:high] for low, high in pairwise(starts)]


def save_random_target(folder: Path) -> str:
    """A random Llama in bf16, 200 million parameters; heads and vocabulary divide by 2, 4 and 8."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=8,
        max_position_embeddings=8192, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def spread(count: int, longest: int) -> np.ndarray:
    """``count`` lengths spread evenly over the logarithm from 1 to ``longest``, in mixed order."""
    lengths = np.unique(np.geomspace(1, longest, count).round().astype(int))
    lengths = np.concatenate([lengths, np.random.default_rng(0).choice(lengths, count - len(lengths))])
    np.random.default_rng(1).shuffle(lengths)
    return lengths


def random_ids(target: Target, *, count: int, longest: int) -> list[list[int]]:
    """Samples of random token ids."""
    source = np.random.default_rng(2)
    return [source.integers(3, target.vocab_size, int(length)).tolist() for length in spread(count, longest)]


def frequent(samples: list[list[int]], size: int) -> VocabularyMapping:
    """A draft vocabulary of the 4,096 most frequent tokens of the samples."""
    counts = np.bincount(np.concatenate([np.asarray(ids) for ids in samples]), minlength=size)
    return VocabularyMapping(torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:4096])), size)


def warm_up(samples: list[list[int]]) -> int:
    """Samples that run before the clock starts: kernels are compiled and memory is touched in them."""
    return max(4, len(samples) // 20)


def run_engine(engine: Engine, samples: list[list[int]]) -> tuple[dict[int, Lease], dict[int, Finished], dict[str, float]]:
    """Write a record of every sample; returns leases, results, and rates over the samples after the first few."""
    warm = warm_up(samples)
    keys = [secrets.token_hex(8) for _ in samples]
    leases = {i: Lease(i, keys[i], "train", i, np.asarray(ids, dtype=np.int32).tobytes()) for i, ids in enumerate(samples)}
    done: dict[int, Finished] = {}

    def work(todo: list[int]) -> None:
        waiting = list(todo)
        missing = set(todo)
        while missing:
            room, tokens = engine.room()
            while waiting and room > 0 and tokens > 0:
                engine.submit([leases[waiting[0]]])
                tokens -= len(samples[waiting.pop(0)])
                room -= 1
            finished, failed = engine.poll(1.0)
            if failed:
                raise SystemExit(f"sample {failed[0].lease} failed: {failed[0].reason}")
            done.update({f.lease: f for f in finished if isinstance(f, Finished)})
            missing -= {f.lease for f in finished}

    order = list(range(len(samples)))
    work(order[:warm])
    before: EngineStats = engine.stats()
    started = time.perf_counter()
    work(order[warm:])
    seconds = time.perf_counter() - started
    after = engine.stats()
    rates = {
        "tokens_per_s": round(sum(len(ids) for ids in samples[warm:]) / seconds, 1),
        "write_share": round((after.write_s - before.write_s) / seconds, 4),
    }
    return leases, done, rates


def read_all(address: dict[str, Any], spec: RecordSpec, leases: dict[int, Lease], done: dict[int, Finished], *, first: int) -> dict[int, Record]:
    """The first records, verified; all are deleted."""
    store = open_store(address)
    found = {}
    for i, result in done.items():
        if i < first:
            buffer = torch.empty(result.nbytes, dtype=torch.uint8)
            store.get([leases[i].key], [buffer])
            found[i] = open_record(buffer, spec)
        store.delete([leases[i].key])
    store.close()
    return found


def file_connector_rate(config: TargetConfig, layers: list[int], samples: list[list[int]], *, longest: int, batch_tokens: int, extra: dict[str, Any]) -> float:
    """Tokens/s of vLLM with its own connector, which writes a file for each request with eight threads, into memory-backed files; until the last is whole."""
    import vllm

    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        llm = vllm.LLM(
            model=config.path,
            skip_tokenizer_init=True,
            max_model_len=longest + 1,
            max_num_batched_tokens=batch_tokens,
            enable_prefix_caching=False,
            speculative_config={
                "method": "extract_hidden_states",
                "num_speculative_tokens": 1,
                "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": layers}},
            },
            kv_transfer_config={
                "kv_connector": "ExampleHiddenStatesConnector",
                "kv_role": "kv_producer",
                "kv_connector_extra_config": {"shared_storage_path": folder},
            },
            **extra,
        )
        prompts: list[Any] = [{"prompt_token_ids": ids} for ids in samples]
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
        warm = warm_up(samples)
        llm.generate(prompts[:warm], sampling, use_tqdm=False)
        started = time.perf_counter()
        for output in llm.generate(prompts[warm:], sampling, use_tqdm=False):
            path = Path((output.kv_transfer_params or {})["hidden_states_path"])
            with path.with_name(f"{path.name}.lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH)  # its writer lets go when the file is whole
            if not path.is_file():
                raise SystemExit(f"vLLM's own connector did not write {path.name}")
        seconds = time.perf_counter() - started
        llm.llm_engine.engine_core.shutdown()
    return sum(map(len, samples[warm:])) / seconds


def errors(ours: dict[int, Record], theirs: dict[int, Record], part: str) -> tuple[float, float]:
    """Relative error over all samples, and of the worst one."""
    difference = norm = worst = 0.0
    for i, record in theirs.items():
        rows = min(record.last.shape[0], ours[i].last.shape[0])
        a, b = getattr(record, part)[:rows].double(), getattr(ours[i], part)[:rows].double()
        d, n = float((a - b).square().sum()), float(a.square().sum())
        difference, norm, worst = difference + d, norm + n, max(worst, (d / n) ** 0.5)
    return (difference / norm) ** 0.5, worst


def loss_of(task: DraftTask, records: dict[int, Record], spec: RecordSpec, device: str) -> float:
    """Mean over packs of about a thousand tokens of the draft's loss."""
    packs: list[list[int]] = [[]]
    for i, record in sorted(records.items()):  # engines finish in different orders: the same packs for both
        if sum(records[j].input_ids.shape[0] for j in packs[-1]) + record.input_ids.shape[0] > 1024:
            packs.append([])
        packs[-1].append(i)
    dataset, total = _AllAnswers(), 0.0
    for pack in filter(None, packs):
        masks = [dataset.loss_mask(i, records[i].input_ids.shape[0]) for i in pack]
        rule, bounds = Unroll(_STEPS), np.cumsum([0, *map(len, masks)])
        counts = rule.counts(np.concatenate(masks), bounds).sum(axis=0)
        batch = collate(
            records,
            dataset=dataset,  # type: ignore[arg-type]  # it has what collation asks of a data set
            samples=pack,
            keys=np.zeros(len(pack), dtype=np.uint64),
            spec=spec,
            supervision=rule,
            counts=counts,
            pack_index=0,
            stage="train",
        )
        with torch.no_grad():
            total += float(task(batch.to(device)).loss)
    return total / len(packs)


def in_a_fresh_process(args: argparse.Namespace, target: Target) -> float:
    """:func:`file_connector_rate` on the same samples: a second engine of another kind in one process is no fair start."""
    words = [f"--{name}={getattr(args, name)}" for name in ("data", "samples", "more", "longest", "batch_tokens", "dtype")]
    words += [f"--target={target.config.path}", f"--engine_args={json.dumps(args.engine_args)}", "--only_file_connector"]
    words += ["--random_ids"] if args.random_ids else []
    said = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True).stdout
    return float(said.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--target", default="outputs/quickstart/target", help="model directory, hub id, or random")
    parser.add_argument("--data", default="examples/hf-quickstart/data/train.jsonl", help="conversation file")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--longest", type=int, default=700, help="tokens of the longest sample")
    parser.add_argument("--batch_tokens", type=int, default=256, help="tokens of a step of the engines; shorter than the longest sample")
    parser.add_argument("--engine", default="vllm", choices=["vllm", "sglang"], help="compared with the Transformers engine")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", help="of the target: float32 leaves no rounding to hide a fault")
    parser.add_argument("--store", default="shm", choices=["shm", "mooncake"])
    parser.add_argument("--more", type=int, default=0, help="further samples, for the rates only")
    parser.add_argument("--engine_args", type=json.loads, default={}, help="JSON, passed to the engine")
    parser.add_argument("--file_connector", action="store_true", help="also time vLLM's own connector (it needs a GPU)")
    parser.add_argument("--only_file_connector", action="store_true", help="time that alone, and print tokens/s")
    parser.add_argument("--random_ids", action="store_true", help="random token ids instead of the data's (always so for a random target)")
    parser.add_argument("--repeat", type=int, default=24, help="samples run twice with engine.deterministic; 0 for none")
    args = expand_all(parser.parse_args())
    os.environ.setdefault("TORCHSPEC_TOKEN", secrets.token_hex(8))
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        if args.target == "random":
            args.target, args.random_ids = save_random_target(Path(scratch)), True
        target = Target(TargetConfig(args.target, dtype=args.dtype))
        count, longest = args.samples + args.more, args.longest
        everything = random_ids(target, count=count, longest=longest) if args.random_ids else conversations(target, args.data, count=count, longest=longest)
        spec = target.record_spec(default_layers(target), tokenizer="")
        if args.only_file_connector:
            layers = sorted({*spec.aux_layers, target.num_layers})
            extra = {"max_num_seqs": 256, **args.engine_args}
            faulthandler.dump_traceback_later(60.0)  # where it stands, should it hang
            print(file_connector_rate(target.config, layers, everything, longest=longest, batch_tokens=args.batch_tokens, extra=extra))
            return
        budget = sum(spec.nbytes(len(ids)) for ids in everything) + (64 << 20)
        server = make_server(StoreConfig(kind=args.store, shm_dir=folder), run=secrets.token_hex(4), budget=budget)
        server.start()
        try:
            print(dumps(compare(args, target, everything, spec, server)))
        finally:
            server.close()


def compare(args: argparse.Namespace, target: Target, everything: list[list[int]], spec: RecordSpec, server: StoreServer) -> dict[str, Any]:
    """All measurements, as the arguments say."""
    samples = everything[: args.samples]
    result: dict[str, Any] = {
        "samples": len(samples),
        "tokens": sum(map(len, everything)),
        "longest": max(map(len, samples)),
        "batch_tokens": args.batch_tokens,
    }

    def note(**found: Any) -> None:
        result.update(found)
        print(f"so far: {dumps(result)}", file=sys.stderr, flush=True)

    def capture(kind: str, these: list[list[int]], **options: Any) -> tuple[dict[int, Record], dict[str, float], dict[str, Any]]:
        extra = args.engine_args if kind == args.engine else {}
        engines = EngineConfig(batch_tokens=args.batch_tokens, batch_samples=256, engine_args=extra, **options)
        engine = build(ENGINES[kind], Job(target.config, spec, server.address, engines, max_length=args.longest, device=args.device))
        try:
            info = engine.start()
            leases, done, rates = run_engine(engine, these)
            return read_all(server.address, spec, leases, done, first=args.samples), rates, info
        finally:
            engine.close()

    ours, rates, info = capture(args.engine, everything)
    told = {name: info[name] for name in ("versions", "dtype", "tensor_parallel_size")}
    note(store=server.kind, **told, **{args.engine: rates})
    if args.file_connector:
        note(file_connector_tokens_per_s=in_a_fresh_process(args, target))
    theirs, rates, _ = capture("transformers", everything)
    note(transformers=rates, ids_equal=all(ours[i].input_ids.tolist() == ids == theirs[i].input_ids.tolist() for i, ids in enumerate(samples)))
    for part in ("aux", "last"):
        overall, worst = errors(ours, theirs, part)
        note(**{f"{part}_rel_err": round(overall, 6), f"{part}_rel_err_worst": round(worst, 6)})
    torch.manual_seed(0)
    task = DraftTask.build(
        DraftConfig.from_target(target, aux_layers=spec.aux_layers).with_draft_vocabulary(4096),
        Build(target, frequent(samples, target.vocab_size), torch.float32, torch.device(args.device)),
        step_weights=[0.8**k for k in range(_STEPS)],
    ).to(args.device)
    losses = [loss_of(task, records, spec, args.device) for records in (ours, theirs)]
    note(loss_rel_diff=round(abs(losses[0] - losses[1]) / losses[1], 6), **{f"loss_{args.engine}": round(losses[0], 3)}, loss_transformers=round(losses[1], 3))
    if args.repeat:
        again = [capture(args.engine, samples[: args.repeat], deterministic=True)[0] for _ in range(2)]
        equal = all(torch.equal(getattr(again[0][i], part), getattr(again[1][i], part)) for i in again[0] for part in ("aux", "last"))
        note(deterministic_samples=args.repeat, deterministic_equal=equal)
    return result


if __name__ == "__main__":
    main()
