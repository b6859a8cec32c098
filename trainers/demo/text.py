"""The tiny base's text side: a tokenizer of whole words with single characters as fallback, and a frozen random UMT5.

Random embeddings of width 4096 are all but orthogonal, so the transformer can tell the words apart; no training needed.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WIDTH = 4096  # of a text row
TEXT_ROWS = 512  # rows the transformer sees: the caption's, then zeros
VOCABULARY_SIZE = 128

SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2, as in T5
WORDS = (
    *("a", "the", "and", "of", "on", "video", "moving", "left", "right", "up", "down", "diagonally", "still"),
    *("red", "yellow", "green", "cyan", "blue", "magenta", "orange", "white", "black", "grey"),
    *("circle", "square", "triangle", "star", "shape", "ground", "plain", "striped", "checked"),
)
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"()-_/\\&+%#@=*"
SPACE = "\u2581"  # SentencePiece's sign for a space
CHARACTER_SCORE = -10.0  # against a word's 0: a word is never spelt out


def pieces() -> list[tuple[str, float]]:
    """All pieces with their unigram scores, in the order of their ids."""
    words = [(SPACE + word, 0.0) for word in WORDS]
    characters = [(character, CHARACTER_SCORE) for character in SPACE + CHARACTERS]
    return [(name, 0.0) for name in SPECIAL] + words + characters


def write_tokenizer(folder: Path) -> None:
    """Write the tokenizer for transformers (tokenizer.json) and, of the same pieces, one for SentencePiece."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.Unigram(pieces(), unk_id=SPECIAL.index("<unk>"), byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_ROWS,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(str(folder))
    _name_class_of_every_version(folder / "tokenizer_config.json")
    (folder / "spiece.model").write_bytes(_sentencepiece_model())


def _name_class_of_every_version(path: Path) -> None:
    """Transformers 5 writes a class name that transformers 4 does not know; both know this one."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _sentencepiece_model() -> bytes:
    """The pieces as a SentencePiece model that changes nothing but spaces."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    kinds = {
        "<unk>": model.SentencePiece.UNKNOWN,
        "<pad>": model.SentencePiece.CONTROL,
        "</s>": model.SentencePiece.CONTROL,
    }
    for name, score in pieces():
        model.pieces.add(piece=name, score=score, type=kinds.get(name, model.SentencePiece.NORMAL))
    trainer = model.trainer_spec
    trainer.model_type, trainer.vocab_size = trainer.UNIGRAM, len(model.pieces)
    trainer.pad_id, trainer.eos_id, trainer.unk_id, trainer.bos_id = 0, 1, 2, -1
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = True
    model.normalizer_spec.escape_whitespaces = True
    return bytes(model.SerializeToString())


def build_text_encoder(seed: int) -> UMT5EncoderModel:
    """A random encoder of one layer, frozen, rounded to fp16. Its residual branches change a row by a third."""
    config = UMT5Config(
        vocab_size=VOCABULARY_SIZE,
        d_model=WIDTH,
        d_kv=16,
        d_ff=16,
        num_layers=1,
        num_heads=1,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(seed)
    model = UMT5EncoderModel(config).eval().requires_grad_(False)
    chance = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.copy_((torch.randn(weight.shape, generator=chance) * _spread(name, config)).half())
    return model


def _spread(name: str, config: UMT5Config) -> float:
    """The standard deviation that a weight is drawn with."""
    if "relative_attention_bias" in name:
        return 0.5
    if ".q." in name:
        return float((config.d_model * config.d_kv) ** -0.5)
    if ".o." in name or ".wo." in name:
        return 0.3 * float(config.d_ff**-0.5)
    return 1.0 if "shared" in name or "embed_tokens" in name else float(config.d_model**-0.5)


def save_text_encoder(model: UMT5EncoderModel, folder: Path) -> None:
    """Write config.json and model.safetensors, fp16."""
    model.half().save_pretrained(str(folder))


def encode_captions(folder: Path, captions: Sequence[str]) -> list[torch.Tensor]:
    """Each caption's rows, (length with the end mark, 4096), float32, from the assets in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "tokenizer"), local_files_only=True)
    model = UMT5EncoderModel.from_pretrained(str(folder / "text_encoder"), local_files_only=True, dtype=torch.float32)
    records = []
    for caption in captions:
        tokens = tokenizer(caption, return_tensors="pt")
        with torch.no_grad():
            output = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        records.append(output.last_hidden_state[0])
    return records
