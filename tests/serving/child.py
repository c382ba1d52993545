"""Block drafts as stock vLLM proposes them: ``python -m tests.serving.child JOB.json OUT.json``.

One process serves several drafts of one target, one after the other, greedily and in fp32. Its proposer is watched, not
changed: of every proposal we keep the request, the anchor's position and token, the tokens proposed, and the logits of
each (runner 2: none).

Two repairs of the CPU build, both outside of what is compared: its batched norm gives every layer the first one's
k_norm, so that keys of the context are normed layer by layer here; and the newer runner needs Triton, which its
interpreter stands in for (``interpreted``).

    {"target": DIR, "drafts": [{"folder": DIR, "method": "dflash", "k": 7}, ...], "prompts": [[ids], ...], "tokens": 12, "newer": false}
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    if job["newer"]:
        interpreted()
    norm_by_layer()
    found = [serve(job, draft) for draft in job["drafts"]]
    Path(sys.argv[2]).write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


def interpreted() -> None:
    """Runner 2 on a CPU, its kernels in Triton's interpreter. Before vLLM is imported."""
    os.environ |= {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
    from types import SimpleNamespace

    import triton.backends
    from triton.runtime.interpreter import InterpreterBuilder

    active: Any = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
    triton.backends.backends["cpu"] = active
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    InterpreterBuilder.create_masked_load = lambda self, at, mask, *rest: load(self, at, as_array(mask, at), *rest)
    InterpreterBuilder.create_masked_store = lambda self, at, value, mask, *rest: store(self, at, value, as_array(mask, at), *rest)


def as_array(mask: Any, pointers: Any) -> Any:
    """A mask as the array of bool that the interpreter's loads and stores want; a scalar one is a number there."""
    import numpy as np

    mask.data = np.broadcast_to(np.asarray(mask.data).astype(bool), np.shape(pointers.data)).copy()
    return mask


def norm_by_layer() -> None:
    import torch
    from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model

    def normalised(self: Any, keys: torch.Tensor) -> torch.Tensor:
        inverse = torch.rsqrt(keys.square().mean(-1, keepdim=True) + self._rms_norm_eps)
        return keys * inverse * self._k_norm_weights[:, None, None, :]

    DFlashQwen3Model._normalize_context_k = normalised


def serve(job: dict[str, Any], draft: dict[str, Any]) -> dict[str, Any]:
    """``answers`` [prompt][token], and ``proposals`` of each prompt: anchor's position and token, tokens proposed, their
    logits.
    """
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    speculative = {"method": draft["method"], "model": draft["folder"], "num_speculative_tokens": draft["k"]}
    llm = vllm.LLM(
        job["target"], dtype="float32", seed=0, enforce_eager=True, max_model_len=256, max_num_seqs=8 if job["newer"] else 64,
        max_num_batched_tokens=4096, speculative_config=speculative, disable_log_stats=False,
    )  # fmt: skip
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    calls = watch_newer(runner) if job["newer"] else watch(runner, draft["k"])
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=job["tokens"], ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], sampling, use_tqdm=False)
    numbers = {output.request_id: number for number, output in enumerate(outputs)}
    proposals: list[list[Any]] = [[] for _ in outputs]
    for request, *rest in calls:
        # the core's own id is the caller's, a dash and random characters
        proposals[numbers[request if request in numbers else request.rpartition("-")[0]]].append(rest)
    counts = {m.name: m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_accepted_tokens"}
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    llm.llm_engine.engine_core.shutdown()
    del llm, runner
    gc.collect()
    cleanup_dist_env_and_memory()
    return {"answers": answers, "proposals": proposals, "accepted": sum(counts.values()), "version": vllm.__version__}


Call = tuple[str, int, int, list[int], list[float]]


def watch(runner: Any, k: int) -> list[Call]:
    """Runner 1: what the proposer is asked and what it says."""
    calls: list[Call] = []
    propose, compute_logits = runner.drafter.propose, runner.drafter.model.compute_logits
    highest: list[float] = []

    def watched_logits(*args: Any, **given: Any) -> Any:
        logits = compute_logits(*args, **given)
        highest[:] = logits.amax(-1).tolist()
        return logits

    def watched(*args: Any, **given: Any) -> Any:
        assert not args
        requests = list(runner.input_batch.req_ids)
        rows = given["token_indices_to_sample"]
        rows = given["common_attn_metadata"].query_start_loc[1:] - 1 if rows is None else rows
        # before the call: it changes its inputs
        anchors = (given["target_positions"][rows.long()] + 1).tolist()
        following = given["next_token_ids"].tolist()
        drafts = propose(**given)
        logits = [highest[k * i : k * (i + 1)] for i in range(len(requests))]
        calls.extend(zip(requests, anchors, following, drafts.tolist(), logits, strict=True))
        return drafts

    runner.drafter.propose, runner.drafter.model.compute_logits = watched, watched_logits
    return calls


def watch_newer(runner: Any) -> list[Call]:
    """Runner 2: the speculator's buffers after each draft; a request's first query is its anchor."""
    calls: list[Call] = []
    in_batch: list[str] = []
    speculator = runner.speculator
    propose, generate = speculator.propose, speculator._generate_draft

    def watched_propose(input_batch: Any, *args: Any, **given: Any) -> Any:
        in_batch[:] = list(input_batch.req_ids)
        return propose(input_batch, *args, **given)

    def watched(num_reqs: int, *args: Any, **given: Any) -> Any:
        found = generate(num_reqs, *args, **given)
        width = speculator.num_query_per_req
        ids = speculator.input_buffers.input_ids[: num_reqs * width : width].tolist()
        positions = speculator.input_buffers.positions[: num_reqs * width : width].tolist()
        drafts = speculator.draft_tokens[:num_reqs].tolist()
        calls.extend(zip(in_batch[:num_reqs], positions, ids, drafts, [[] for _ in drafts], strict=True))
        return found

    speculator.propose, speculator._generate_draft = watched_propose, watched
    return calls


if __name__ == "__main__":
    main()
