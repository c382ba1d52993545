"""Drafts as stock vLLM proposes them: ``python -m tests.parity.vllm_proposals JOB.json OUT.json``.

One process serves several drafts of one target, one after the other, greedily and in fp32. Its proposer is watched, not changed: of every call we keep
which request it was for, where the target stood, the token that the target had just produced, the tokens proposed, and the logit of each.

    {"target": DIR, "drafts": [DIR, ...], "prompts": [[ids], ...], "tokens": 12, "k": 3, "engine_args": {}}
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
    found = [serve(job, draft) for draft in job["drafts"]]
    Path(sys.argv[2]).write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


def serve(job: dict[str, Any], draft: str) -> dict[str, Any]:
    """``answers`` [prompt][token], and ``proposals`` of each prompt: position of the last row, token after it, tokens proposed, their logits."""
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = vllm.LLM(
        job["target"], dtype="float32", seed=0, enforce_eager=True, max_model_len=256, max_num_seqs=64, max_num_batched_tokens=4096,
        speculative_config={"method": "eagle3", "model": draft, "num_speculative_tokens": job["k"]}, disable_log_stats=False, **job["engine_args"],
    )  # fmt: skip
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    calls = watch(runner)
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=job["tokens"], ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], sampling, use_tqdm=False)
    numbers = {output.request_id: number for number, output in enumerate(outputs)}
    proposals: list[list[Any]] = [[] for _ in outputs]
    for request, *rest in calls:
        # the core's own id is the caller's, a dash and random characters
        proposals[numbers[request if request in numbers else request.rpartition("-")[0]]].append(rest)
    counts = {m.name: m.value for m in llm.get_metrics() if m.name in ("vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens")}
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    llm.llm_engine.engine_core.shutdown()
    del llm, runner
    gc.collect()
    cleanup_dist_env_and_memory()
    return {"answers": answers, "proposals": proposals, "accepted": counts["vllm:spec_decode_num_accepted_tokens"], "version": vllm.__version__}


def watch(runner: Any) -> list[tuple[str, int, int, list[int], list[float]]]:
    """Record what the proposer is asked and what it says."""
    calls: list[tuple[str, int, int, list[int], list[float]]] = []
    propose, compute_logits = runner.drafter.propose, runner.drafter.model.compute_logits
    highest: list[list[float]] = []

    def watched_logits(*args: Any, **given: Any) -> Any:
        logits = compute_logits(*args, **given)
        highest.append(logits.amax(-1).tolist())
        return logits

    def watched(*args: Any, **given: Any) -> Any:
        assert not args
        requests = list(runner.input_batch.req_ids)
        rows = given["token_indices_to_sample"]
        rows = given["common_attn_metadata"].query_start_loc[1:] - 1 if rows is None else rows
        positions, following = given["target_positions"][rows.long()].tolist(), given["next_token_ids"].tolist()  # before the call: it changes its inputs
        highest.clear()
        drafts = propose(**given)
        calls.extend(zip(requests, positions, following, drafts.tolist(), [list(of_request) for of_request in zip(*highest, strict=True)], strict=True))
        return drafts

    runner.drafter.propose, runner.drafter.model.compute_logits = watched, watched_logits
    return calls


if __name__ == "__main__":
    main()
