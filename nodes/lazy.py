"""Which models a node that encodes asks for: those that something lacks, or of which nothing is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..trainers.data.cache import Cache
from ..trainers.encoders import all_shots_cached, all_texts_cached
from ..trainers.encoding import IMAGE_KINDS, TEXT_KINDS, VAE_KINDS, Shot
from ..trainers.errors import DatasetError, Problem
from ..trainers.family import family_of
from . import loaders
from .graph_encoder import GraphEncoder, Known
from .prompt import inputs_of, is_link
from .records import Base

_WHAT_FOR = {"vae": "encodes first frames", "clip": "encodes captions and prompts", "clip_vision": "looks at first frames"}
_LOADERS = {"vae": "Load VAE", "clip": "Load CLIP", "clip_vision": "Load CLIP Vision"}


def known_encoder(hidden: Any, base: Base) -> GraphEncoder:
    """The encoder before anything is loaded: what the loaders before the node gave when they last ran."""
    return GraphEncoder(base, known=_known(hidden))


def encoder_of(hidden: Any, base: Base, vae: Any, clip: Any, clip_vision: Any) -> GraphEncoder:
    """The encoder of what is wired to the node; what its loaders gave is noted, so that they can be spared next time."""
    encoder = GraphEncoder(base, vae, clip, clip_vision, _known(hidden))
    for input_id, identity in (("vae", encoder.own.vae), ("clip", encoder.own.text), ("clip_vision", encoder.own.image)):
        if identity:
            loaders.note_identity(_loader(hidden, input_id), identity)
    return encoder


def needed_inputs(hidden: Any, base: Base, encoder: GraphEncoder, texts: Sequence[str], shots: Sequence[Shot], cache: Cache) -> list[str]:
    """The inputs that these texts and windows are to be encoded with; none when all of them are cached.

    Raises DatasetError with every one of them that nothing is wired to.
    """
    known = encoder.known

    def lacks(kinds: frozenset[str], *identities: str | None) -> bool:
        wanted = [shot for shot in shots if shot.kinds & kinds]
        return bool(wanted) and (None in identities or not all_shots_cached(wanted, kinds, encoder, cache))

    with_image = lacks(TEXT_KINDS, known.text, known.image)
    lacks_text = bool(texts) and (known.text is None or not all_texts_cached(texts, encoder.identity_text, cache))
    lacking = {
        "vae": lacks(VAE_KINDS, known.vae),
        "clip": with_image or lacks_text,
        "clip_vision": with_image or lacks(IMAGE_KINDS, known.image),
    }
    return _wired(hidden, base, [name for name, lacks_any in lacking.items() if lacks_any])


def _wired(hidden: Any, base: Base, names: list[str]) -> list[str]:
    _, variant = family_of(base.variant)
    inputs = inputs_of(hidden.prompt, str(hidden.unique_id))
    problems = [
        Problem(f"no {name} is wired", f"for {variant.title} it {_WHAT_FOR[name]}", f"Wire {_LOADERS[name]}, or Load Encoders.")
        for name in names
        if not is_link(inputs.get(name))
    ]
    if problems:
        raise DatasetError(problems)
    return names


def _known(hidden: Any) -> Known:
    return Known(*(loaders.known_identity(_loader(hidden, name)) for name in ("vae", "clip", "clip_vision")))


def _loader(hidden: Any, input_id: str) -> str | None:
    return loaders.fingerprint(hidden.prompt, str(hidden.unique_id), input_id)
