"""A tiny random target with a real tokenizer and chat template, made in a second; shared by tests that need a whole model directory."""

from __future__ import annotations

import json
from pathlib import Path

import torch

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "the a cat dog runs sleeps over under big small red blue and or is not where when why because it we you they one two three".split()


def save_tokenizer(folder: Path) -> int:
    """Byte-level BPE over a small text, ChatML template; returns the vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<unk>", "<|im_start|>", "<|im_end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return len(fast)


def save_target(
    folder: Path,
    *,
    layers: int = 8,
    hidden: int = 128,
    heads: int = 2,
    tie: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    spread: float = 0.1,
) -> Path:
    """A random Llama of a few hundred kilobytes (head_dim 64, which vLLM's CPU build takes)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    vocab = save_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=(vocab + 63) // 64 * 64,
        max_position_embeddings=1024,
        tie_word_embeddings=tie,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        rope_theta=10000.0,
        initializer_range=spread,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def save_conversations(file: Path, rows: int, *, seed: int = 0, turns: int = 1) -> Path:
    """Random sentences as conversations, one JSON line each."""
    generator = torch.Generator().manual_seed(seed)

    def sentence(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(WORDS[int(i)] for i in torch.randint(0, len(WORDS), (length,), generator=generator))

    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as handle:
        for row in range(rows):
            messages = [
                message for _ in range(turns) for message in ({"role": "user", "content": sentence(2, 8)}, {"role": "assistant", "content": sentence(3, 24)})
            ]
            handle.write(json.dumps({"id": f"row-{row}", "conversations": messages}) + "\n")
    return file
