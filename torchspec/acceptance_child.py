"""One run of vLLM for ``acceptance.py``: ``python -m torchspec.acceptance_child FD`` with one JSON line on stdin.

Events go to file descriptor FD as JSON lines: ``ready``, ``done`` (answers so far), then the result, or ``error``: why vLLM did not start.
Standard output and error are vLLM's log.
The end of stdin means that the parent is gone, and ends this process with all that vLLM started.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

from torchspec.files import dumps
from torchspec.imports import heavy_imports
from torchspec.processes import kill_but_trackers
from torchspec.reasons import overheard, reason_of

COUNTERS = {
    "vllm:spec_decode_num_drafts": "drafts",
    "vllm:spec_decode_num_draft_tokens": "draft_tokens",
    "vllm:spec_decode_num_accepted_tokens": "accepted_tokens",
    "vllm:spec_decode_num_accepted_tokens_per_pos": "accepted_per_position",
}


def main() -> None:
    events = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

    with heavy_imports():
        import vllm
        from tqdm import tqdm
        from vllm.platforms import current_platform

    arguments = dict(job["engine_args"])
    on_cpu = current_platform.is_cpu()
    # The engine in this process: one process to end, nothing to serialise. But what vLLM 0.32 imports for some vision-language models (numba) breaks the
    # search through all modules with which its CPU build replaces kernels: then in a fresh one.
    apart = on_cpu and arguments.get("language_model_only", False)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "1" if apart else "0")
    if apart:
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if on_cpu:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        arguments.setdefault("enforce_eager", True)
        arguments.setdefault("max_num_seqs", 64)

    class Answers(tqdm):  # type: ignore[type-arg]
        """vLLM's own bar of finished answers, told to the parent instead of drawn."""

        def update(self, n: float | None = 1) -> bool | None:
            self.n += n or 0
            if str(self.desc).startswith("Processed"):
                events.write(json.dumps({"done": int(self.n)}) + "\n")
            return None

        def display(self, *_: Any, **__: Any) -> bool:  # type: ignore[override]  # the stubs say None, tqdm returns a bool
            return True

    with overheard("vllm") as heard:
        try:
            llm = vllm.LLM(**arguments, speculative_config=job["speculative_config"], disable_log_stats=False)
        except Exception as error:
            events.write(json.dumps({"error": reason_of(error, heard=heard)}) + "\n")
            raise
    sampling = vllm.SamplingParams(**job["sampling"])
    requests = [{"prompt_token_ids": ids} for ids in job["requests"]]
    llm.generate(requests[:1], vllm.SamplingParams(temperature=0.0, max_tokens=8, detokenize=False), use_tqdm=False)  # allocators and lazy kernels warm up
    if hasattr(llm, "reset_prefix_cache"):
        llm.reset_prefix_cache()
    events.write('{"ready": true}\n')
    before = _counts(llm)
    started = time.perf_counter()
    outputs = llm.generate(requests, sampling, use_tqdm=Answers)
    seconds = time.perf_counter() - started
    after = _counts(llm)
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    result = {
        "counts": {name: _difference(after[name], before[name]) for name in after},
        "seconds": seconds,
        "tokens": sum(map(len, answers)),
        "answers": answers,
        "vllm_version": vllm.__version__,
        "device": "cpu" if on_cpu else str(current_platform.get_device_name()),
    }
    events.write(dumps(result) + "\n")
    events.close()
    sys.stdout.flush()
    os._exit(0)  # the memory is freed with the process; vLLM's own shutdown takes seconds


def _counts(llm: Any) -> dict[str, Any]:
    """vLLM's counters of speculative decoding so far; zero where it has none."""
    found: dict[str, Any] = {name: 0 for name in COUNTERS.values()} | {"accepted_per_position": []}
    for metric in llm.get_metrics():
        if metric.name in COUNTERS:
            found[COUNTERS[metric.name]] = list(metric.values) if hasattr(metric, "values") else metric.value
    return found


def _difference(after: Any, before: Any) -> Any:
    if isinstance(after, list):
        return [a - b for a, b in zip(after, before or [0] * len(after), strict=True)]
    return after - before


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    kill_but_trackers(os.getpgrp())
    os._exit(1)


if __name__ == "__main__":
    main()
