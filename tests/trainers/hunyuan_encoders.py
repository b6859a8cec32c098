"""Small text encoders of HunyuanVideo in transformers' classes, with the special tokens of the real ones in their places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

LLAMA = {
    "vocab_size": 128320,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}
CLIP = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SPECIAL = {
    "<|begin_of_text|>": 128000,
    "<|start_header_id|>": 128006,
    "<|end_header_id|>": 128007,
    "<|eot_id|>": 128009,
    "<image>": 128257,
    "<pad>": 128258,
}


def llama_tokenizer() -> Any:
    """Bytes, the merges that make a blank line 271 and `user` 882, and the special tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: index for index, letter in enumerate(letters)} | {"us": 256, "use": 257, "ĊĊ": 271, "user": 882}
    merges = [("Ċ", "Ċ"), ("u", "s"), ("us", "e"), ("use", "r")]
    tokenizer = Tokenizer(models.BPE(words | SPECIAL, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\n+"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    start = ("<|begin_of_text|>", SPECIAL["<|begin_of_text|>"])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start[0]} $A", special_tokens=[start])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=start[0], pad_token="<pad>")


def _random(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.1)
    return model.eval().requires_grad_(False)


def _llama_config() -> Any:
    from transformers import LlamaConfig

    rope = {"rope_type": "default", "rope_theta": 500000.0}
    return LlamaConfig(**LLAMA, head_dim=128, rms_norm_eps=1e-5, max_position_embeddings=8192, rope_parameters=rope, pad_token_id=128258)


def llama() -> Any:
    from transformers import LlamaModel

    return _random(LlamaModel(_llama_config()))


def llava() -> Any:
    """It sees 576 patches of an image of 336 pixels, as the real one does."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
    )
    config = LlavaConfig(vision_config=vision, text_config=_llama_config(), image_token_index=SPECIAL["<image>"])
    config.pad_token_id = SPECIAL["<pad>"]
    return _random(LlavaForConditionalGeneration(config))


def clip() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return _random(CLIPTextModel(CLIPTextConfig(**CLIP, vocab_size=49408, eos_token_id=49407, bos_token_id=49406, pad_token_id=49407)))


def image_processor() -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})


@dataclass(frozen=True)
class Folder:
    """A TextFolder of models that are in memory."""

    tokenizers: tuple[Any, Any]
    encoders: tuple[Any, Any]
    processor: Any = None

    def tokenizer(self, number: int = 1) -> Any:
        return self.tokenizers[number - 1]

    def text_encoder(self, number: int = 1) -> Any:
        return self.encoders[number - 1]

    def image_processor(self) -> Any:
        return self.processor

    def image_encoder(self) -> Any:
        raise NotImplementedError


def word_tokenizer() -> Any:
    """What stands for CLIP's tokenizer where ComfyUI's copy of the real one is not there."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["a", "red", "circle", "<unk>"])} | {"<start>": 49406, "<end>": 49407}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = [("<start>", 49406), ("<end>", 49407)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=marks)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<end>", eos_token="<end>", unk_token="<unk>")


def image() -> torch.Tensor:
    """An image (H, W, C) in 0..1."""
    return torch.rand(40, 56, 3, generator=torch.Generator().manual_seed(3))
