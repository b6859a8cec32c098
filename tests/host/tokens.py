"""Under ComfyUI's Python: what ComfyUI's tokenizers make of texts. They rest on transformers, whose upgrade must not change them."""

from __future__ import annotations

TEXTS = ("", "a photo of a cat", 'A "quoted" (weighted:1.2) prompt, ünïcode — 🐈, 12:34; it\'s  spaced.\nTwo lines')
"""Without Chinese letters: transformers 4 put spaces around them in CLIP's prompts where ftfy was missing, 5 does not."""


def main() -> dict[str, list[object]]:
    """Tokenizer -> the tokens of each text. Asked are those whose files come with ComfyUI's source."""
    from comfy import sd1_clip, sdxl_clip
    from comfy.text_encoders import cosmos, hunyuan_image, qwen_image, sd2_clip, sd3_clip, z_image

    kinds = {
        "CLIP-L": sd1_clip.SD1Tokenizer,
        "CLIP-G": sdxl_clip.SDXLTokenizer,
        "CLIP-H": sd2_clip.SD2Tokenizer,
        "T5": sd3_clip.T5XXLTokenizer,
        "old T5": cosmos.CosmosT5Tokenizer,
        "ByT5": hunyuan_image.ByT5SmallTokenizer,
        "Qwen 2.5": qwen_image.QwenImageTokenizer,
        "Qwen 3": z_image.ZImageTokenizer,
    }
    return {name: [_plain(kind().tokenize_with_weights(text)) for text in TEXTS] for name, kind in kinds.items()}


def _plain(tokens: object) -> object:
    """Tuples of JSON become lists; numbers of any kind become Python's."""
    if isinstance(tokens, dict):
        return {name: _plain(value) for name, value in tokens.items()}
    if isinstance(tokens, (list, tuple)):
        return [_plain(value) for value in tokens]
    return float(tokens)
