import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from trainers.demo import native_files, pretrain, text
from trainers.demo.codec import ClipCodec
from trainers.demo.tiny_transformer import TextConditioned, TextTable, build_transformer
from trainers.demo.tiny_vae import build_vae, decode, encode, fold_constants, whole_clips

ASSETS = pretrain.ASSETS


@pytest.fixture(autouse=True)
def one_thread():
    """The weights that come with the package were made with one; other tests keep the number they were started with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_few_text_rows_stand_for_512() -> None:
    model = build_transformer(seed=0).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    records = [torch.randn(length, text.WIDTH) for length in (6, 1, 4)]
    x, sigma = torch.randn(3, 16, 3, 4, 4), torch.tensor([0.1, 0.5, 0.9])
    padded = torch.stack([F.pad(record, (0, 0, 0, text.TEXT_ROWS - len(record))) for record in records])
    with torch.no_grad():
        plain = model(hidden_states=x, timestep=1000 * sigma, encoder_hidden_states=padded, return_dict=False)[0]
        short = TextConditioned(model, TextTable(records)).velocity(x, sigma, torch.arange(3))
    assert (plain - short).abs().max() < 1e-4 * plain.abs().max()


def test_whole_clips_equal_the_class_own_chunks() -> None:
    vae = build_vae(seed=0)
    clips, latents = torch.rand(1, 3, 9, 32, 32) * 2 - 1, torch.randn(1, 16, 3, 4, 4)
    with torch.no_grad():
        chunked = vae.encode(clips).latent_dist.mode(), vae.decode(latents).sample
        with whole_clips(vae):
            whole = encode(vae, clips), decode(vae, latents).clamp(-1, 1)
    for ours, theirs in zip(whole, chunked, strict=True):
        assert (ours - theirs).abs().max() < 1e-5


def test_folding_brings_latents_into_wan_s_constants() -> None:
    vae = build_vae(seed=0)
    clips = torch.rand(1, 9, 32, 32, 3) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(clips.permute(0, 4, 1, 2, 3)).latent_dist.mode()
        back = vae.decode(latents).sample.permute(0, 2, 3, 4, 1)
    fold_constants(vae)
    assert (pretrain.encode_clips(vae, clips) - latents).abs().max() < 1e-5
    assert (pretrain.decode_clips(vae, latents) - back).abs().max() < 1e-4


def test_the_codec_s_latents_are_unit_and_keep_the_clip() -> None:
    clips = pretrain.as_floats(pretrain.draw_clips(200, seed=0)[0])
    codec = ClipCodec.fit(clips)
    latents = codec.encode(clips)
    assert latents.shape == (200, 16, 3, 8, 8)
    assert (latents.std((0, 2, 3, 4)) - 1).abs().max() < 0.1
    assert (codec.decode(latents) - clips).square().mean() < 4 * 10**-2.9


def test_both_tokenizers_agree(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    from transformers import AutoTokenizer

    text.write_tokenizer(tmp_path)
    ours = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    for line in ("a red circle moving diagonally", "", "  a  Fox's tail, 42 km/h "):
        assert ours(line).input_ids == [*theirs.encode(line), 1]
    assert len(ours("a red circle moving diagonally").input_ids) == 6
    assert 2 not in ours("an unheard-of word").input_ids


def test_the_shipped_files_are_small_and_have_wan_s_names(keys_of) -> None:
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 16_000_000
    assert keys_of(ASSETS / native_files.VAE_FILE)
    assert keys_of(ASSETS / native_files.TRANSFORMER_FILE)


@pytest.fixture
def keys_of():
    """Whether a file has exactly the names of the real model's list, for as many blocks as it has."""
    from safetensors import safe_open

    lists = Path(__file__).parents[2] / "assets" / "keys"

    def compare(path: Path) -> bool:
        listed = lists / ("vae_wan2.1.json" if "vae" in path.name else "wan2.1_t2v_1.3B.json")
        names = set(safe_open(str(path), "pt").keys())
        blocks = {name.split(".")[1] for name in names if name.startswith("blocks.")}
        wanted = {row[0].replace("{}", block) for row in json.loads(listed.read_text()) for block in blocks or {""}}
        return names == wanted

    return compare
