"""Small encoders in the classes of the real ones, as folders that `FolderEncoder` reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hunyuan_encoders
import torch
from tiny_families import tiny_config

from trainers.family import Family, Variant, families

WORDS = ("<pad>", "</s>", "<unk>", "a", "cat", "dog", "walks", "clip")


def write_models(folder: Path) -> None:
    from diffusers import AutoencoderKLWan
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    AutoencoderKLWan(base_dim=8).save_pretrained(folder / "vae")
    config = UMT5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder / "tokenizer")


@dataclass(frozen=True)
class Whole:
    """A model of a variant with its encoders, by `write`; `in_place`: its first frame is latent 0."""

    family: Family
    variant: Variant
    config: dict[str, Any]
    write: Callable[[Path], None]
    in_place: bool


def write_umt5_and_clip(folder: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    write_models(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(image_size=28, patch_size=14, **sizes)).save_pretrained(folder / "image_encoder")
    (folder / "image_processor").mkdir()
    (folder / "image_processor/preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor"}))


def write_llava_and_clip(folder: Path) -> None:
    hunyuan_encoders.llava().save_pretrained(folder / "text_encoder")
    hunyuan_encoders.llama_tokenizer().save_pretrained(folder / "tokenizer")
    hunyuan_encoders.clip().save_pretrained(folder / "text_encoder_2")
    hunyuan_encoders.word_tokenizer().save_pretrained(folder / "tokenizer_2")
    hunyuan_encoders.image_processor().save_pretrained(folder / "image_processor")


def whole(variant_id: str) -> Whole:
    family = next(family for family in families().values() if any(variant.id == variant_id for variant in family.variants))
    variant = next(variant for variant in family.variants if variant.id == variant_id)
    widths = {
        "wan": {"text_dim": 16} | ({"image_dim": 16} if variant_id == "wan2.1-i2v" else {}),
        "ltx": {"caption_channels": 16},
        "hunyuan": {"text_embed_dim": 64, "pooled_projection_dim": 64},
        "mochi": {"text_embed_dim": 16},
    }[family.id]
    write = write_llava_and_clip if family.id == "hunyuan" else write_umt5_and_clip
    in_place = variant_id in ("wan2.2-ti2v", "ltxv-2b-0.9.5", "hunyuan-i2v-v2")
    return Whole(family, variant, tiny_config(family, variant) | widths, write, in_place)
