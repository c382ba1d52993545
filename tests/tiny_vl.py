"""A tiny random vision-language target of a family, with tokenizer, chat template and image processor made here: nothing comes from a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.tiny import WORDS

CONTROL = ("<unk>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<image>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% elif part['type'] == 'video' %}VIDEO{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava")


def save_vl_tokenizer(folder: Path, *, image: str) -> Any:
    """Byte-level BPE with the control tokens of these families, and a ChatML template that writes ``image`` for an image."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=list(CONTROL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = TEMPLATE.replace("IMAGE", image).replace("VIDEO", "<|vision_start|><|video_pad|><|vision_end|>")
    fast.save_pretrained(folder)
    return fast


def save_vl_target(folder: Path, family: str = "qwen2_5_vl", *, layers: int = 8, hidden: int = 128, dtype: torch.dtype = torch.float32) -> Path:
    """Random weights; images of about 32 x 32 to 128 x 128 pixels become 1 to 16 tokens (Llava: always 16)."""
    import transformers as t

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tokenizer = save_vl_tokenizer(folder, image="<image>" if family == "llava" else "<|vision_start|><|image_pad|><|vision_end|>")
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in CONTROL}
    text: dict[str, Any] = {
        "vocab_size": (len(tokenizer) + 63) // 64 * 64, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024, "initializer_range": 0.1,
        "bos_token_id": ids["<|im_start|>"], "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|im_end|>"], "tie_word_embeddings": False,
    }  # fmt: skip
    special = {
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
    }  # fmt: skip
    mrope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [16, 8, 8]}
    config: Any
    processor: Any
    match family:
        case "qwen2_vl":
            vision = {"depth": 2, "embed_dim": 64, "hidden_size": hidden, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14, "spatial_merge_size": 2}
            config = t.Qwen2VLConfig(text_config={**text, "rope_parameters": mrope}, vision_config=vision, **special)
            config.architectures = ["Qwen2VLForConditionalGeneration"]
        case "qwen2_5_vl":
            vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": hidden, "patch_size": 14}
            vision |= {"spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [1], "tokens_per_second": 2}
            config = t.Qwen2_5_VLConfig(text_config={**text, "rope_parameters": mrope}, vision_config=vision, **special)
            config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
        case "qwen3_vl":
            vision = {"depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": hidden, "patch_size": 16}
            vision |= {"spatial_merge_size": 2, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
            interleaved = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [16, 8, 8], "mrope_interleaved": True}
            config = t.Qwen3VLConfig(text_config={**text, "head_dim": 64, "rope_parameters": interleaved}, vision_config=vision, **special)
            config.architectures = ["Qwen3VLForConditionalGeneration"]
        case "llava":
            vision = {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
            vision |= {"image_size": 56, "patch_size": 14, "projection_dim": 64}
            config = t.LlavaConfig(
                text_config={"model_type": "llama", **text, "head_dim": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
                vision_config=vision, image_token_index=ids["<image>"], vision_feature_layer=-2, vision_feature_select_strategy="default",
            )  # fmt: skip
            config.architectures = ["LlavaForConditionalGeneration"]
        case _:
            raise AssertionError(family)
    if family == "llava":
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        images = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
        processor = t.LlavaProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1)
        images.save_pretrained(folder)
        processor.save_pretrained(folder)
    else:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        side = 32 if family == "qwen3_vl" else 28
        pixels = {"shortest_edge": side * side, "longest_edge": 16 * side * side}
        Qwen2VLImageProcessorPil(patch_size=side // 2, merge_size=2, temporal_patch_size=2, size=pixels).save_pretrained(folder)
    t.AutoModelForImageTextToText.from_config(config).to(dtype).save_pretrained(folder)
    return folder


def save_image(file: Path, *, width: int = 60, height: int = 90, seed: int = 0) -> Path:
    """Random colours."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file
