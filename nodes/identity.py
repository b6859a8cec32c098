"""What a VAE, CLIP or CLIP_VISION object is, as a hash: the object has no name, and what it encoded is found again by this.

It changes with the weights (sampled), their precision, patches such as LoRAs, and what the tokenizer does; it is the same
after a restart, on another device, and whether or not the patches are applied right now.
"""

from __future__ import annotations

from typing import Any

from ..trainers.content_hash import content_hash

# Characters, signs, runs of spaces, other scripts, weights in parentheses: what tokenizers treat in ways of their own.
_PROBE = "A cat's 3 kittens, (playing:1.2) the piano -- 100% REAL!  naïve «éü» 北京 кот 🐈\n<extra_id_0> embedding \\(end\\)"


def identity_of_vae(vae: Any) -> str:
    """The hash of a VAE, in milliseconds."""
    return content_hash(["vae", _weights(vae.patcher), vae.vae_dtype])


def identity_of_clip(clip: Any) -> str:
    """The hash of a CLIP, in milliseconds; its tokenizer counts by its vocabulary's size and what it makes of a text."""
    options = [clip.layer_idx, clip.tokenizer_options, clip.use_clip_schedule, type(clip.tokenizer).__qualname__]
    return content_hash(["clip", _weights(clip.patcher), options, _tokenizer(clip)])


def identity_of_clip_vision(clip_vision: Any) -> str:
    """The hash of an image encoder, in milliseconds; how it prepares an image counts."""
    options = [clip_vision.image_size, clip_vision.image_mean, clip_vision.image_std, clip_vision.dtype]
    return content_hash(["clip_vision", _weights(clip_vision.patcher), options])


def _weights(patcher: Any) -> list[Any]:
    """The weights without patches, and the patches."""
    backup, hook_backup = dict(patcher.backup), dict(patcher.hook_backup)
    tensors = dict(patcher.model.named_parameters())
    tensors.update(patcher.model.named_buffers())
    for name in tensors:
        if name in backup:
            tensors[name] = backup[name].weight
        if name in hook_backup:
            tensors[name] = hook_backup[name][0]
    extra = [patcher.object_patches, patcher.weight_wrapper_patches, patcher.hook_patches, patcher.forced_hooks]
    return [type(patcher.model).__qualname__, tensors, patcher.patches, extra]


def _tokenizer(clip: Any) -> list[Any]:
    tokens = clip.tokenize(_PROBE)
    sizes = {name: len(part.inv_vocab) for name, part in vars(clip.tokenizer).items() if hasattr(part, "inv_vocab")}
    return [sizes, tokens]
