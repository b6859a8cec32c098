from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from closeness import assert_near
from ltx_files import LTX, VAE_CONFIGS, VAE_HEADERS, native_vae, random_vae, vae_kind
from model_files import entries, shapes_of, write_header_only
from safetensors.torch import save_file

from trainers.checkpoint import Checkpoint
from trainers.errors import CheckpointError
from trainers.family import VaeDetection, detect_vae, family_of
from trainers.load import load_vae, native_state

STRIDED = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": (4, 3, 3, 3, 4),
    "spatio_temporal_scaling": (True, True, True, False),
}
TIMED = {
    "decoder_block_out_channels": (256, 512, 1024),
    "decoder_spatio_temporal_scaling": (True, True, True),
    "upsample_residual": (True, True, True),
    "upsample_factor": (2, 2, 2),
    "timestep_conditioning": True,
}
PUBLISHED: dict[str, dict[str, Any]] = {  # config.json of the published diffusers folders
    "ltx-0.9": STRIDED
    | {
        "decoder_block_out_channels": (128, 256, 512, 512),
        "decoder_layers_per_block": (4, 3, 3, 3, 4),
        "decoder_spatio_temporal_scaling": (True, True, True, False),
        "decoder_inject_noise": (False,) * 5,
        "upsample_residual": (False,) * 4,
        "upsample_factor": (1,) * 4,
        "timestep_conditioning": False,
    },
    "ltx-0.9.1": STRIDED | TIMED | {"decoder_layers_per_block": (5, 6, 7, 8), "decoder_inject_noise": (True, True, True, False)},
    "ltx-0.9.5": TIMED
    | {
        "block_out_channels": (128, 256, 512, 1024, 2048),
        "layers_per_block": (4, 6, 6, 2, 2),
        "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
        "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        "spatio_temporal_scaling": (True,) * 4,
        "decoder_layers_per_block": (5, 5, 5, 5),
        "decoder_inject_noise": (False,) * 4,
    },
}
COMMON = {"latent_channels": 128, "spatial_compression_ratio": 32, "temporal_compression_ratio": 8, "decoder_causal": False}
OF_COMFYUI = {"encoder_padding": "zeros", "decoder_padding": "reflect"}
UNUSED = {f"per_channel_statistics.{name}" for name in ("mean-of-stds", "mean-of-stds_over_std-of-means", "channel")}


def header_only(path: Path, vae_id: str, **changed: tuple[int, ...] | None) -> Checkpoint:
    shapes = {name: shape for name, shape in (shapes_of(f"vae_{vae_id.replace('-', '_')}") | changed).items() if shape is not None}
    return Checkpoint.open(write_header_only(path, entries(shapes, torch.bfloat16)), "vae")


@pytest.mark.parametrize("vae_id", PUBLISHED)
def test_shapes_tell_which_vae_it_is_and_its_whole_config(tmp_path: Path, vae_id: str) -> None:
    found = LTX.detect_vae(header_only(tmp_path / "vae.safetensors", vae_id))
    assert found is not None
    assert (found.vae.id, found.encodes) == (vae_id, True)
    assert found.config == PUBLISHED[vae_id] | COMMON | OF_COMFYUI


@pytest.mark.parametrize("vae_id", PUBLISHED)
def test_the_table_names_every_tensor(vae_id: str) -> None:
    vae = vae_kind(vae_id)
    module = LTX.build_vae(VaeDetection(LTX, vae, PUBLISHED[vae_id] | COMMON | OF_COMFYUI))
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    native = shapes_of(f"vae_{vae_id.replace('-', '_')}")
    assert {key: native[place.name] for key, place in vae.keys.map_file(native).items()} == expected
    assert {vae.keys.to_native(key).name for key in expected} == native.keys() - UNUSED


def test_each_variant_has_its_vae(tmp_path: Path) -> None:
    newer, older = (header_only(tmp_path / f"{vae_id}.safetensors", vae_id) for vae_id in ("ltx-0.9.5", "ltx-0.9.1"))
    for variant in LTX.variants:
        fitting, other = (older, newer) if variant.id == "ltxv-2b-0.9" else (newer, older)
        assert detect_vae(fitting, LTX, variant).vae.fits(variant)
        with pytest.raises(CheckpointError, match=r"is the LTX-Video VAE .*has another.*Give the file or folder of the LTX-Video VAE"):
            detect_vae(other, LTX, variant)


def test_vaes_of_other_families_are_refused_by_name(tmp_path: Path) -> None:
    wan, wan_variant = family_of("wan2.1-t2v-14b")
    with pytest.raises(CheckpointError, match=r"is the Wan 2\.1 VAE; LTX-Video needs its own"):
        detect_vae(
            Checkpoint.open(write_header_only(tmp_path / "a.safetensors", entries(shapes_of("vae_wan2.1"), torch.bfloat16)), "vae"), LTX
        )
    with pytest.raises(CheckpointError, match=r"is the LTX-Video VAE 0\.9; Wan needs its own"):
        detect_vae(header_only(tmp_path / "ltx.safetensors", "ltx-0.9"), wan, wan_variant)


def test_the_vae_of_ltx_2_and_one_without_encoder_are_refused(tmp_path: Path) -> None:
    shapes = shapes_of("vae_ltx_0.9.5")
    no_time = dict.fromkeys((name for name in shapes if "time" in name or "scale_shift" in name), None)
    with pytest.raises(CheckpointError, match="is the VAE of LTX-2"):
        LTX.detect_vae(header_only(tmp_path / "ltx2_vae.safetensors", "ltx-0.9.5", **no_time))
    no_encoder = dict.fromkeys((name for name in shapes if name.startswith("encoder.")), None)
    with pytest.raises(CheckpointError, match="without its encoder"):
        LTX.detect_vae(header_only(tmp_path / "decoder.safetensors", "ltx-0.9.5", **no_encoder))


def test_a_truncated_vae_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    checkpoint = header_only(tmp_path / "vae.safetensors", "ltx-0.9.5", **{"decoder.up_blocks.3.conv.conv.bias": None})
    found = LTX.detect_vae(checkpoint)
    assert found is not None
    with pytest.raises(CheckpointError, match=r"1 tensors are missing \(decoder\.up_blocks\.1\.upsamplers\.0\.conv\.conv\.bias\)"):
        load_vae(checkpoint, found, "cpu")


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small VAE 0.9.5 in an all-in-one checkpoint's header and names."""
    path = tmp_path_factory.mktemp("vae") / "ltx.safetensors"
    state = {f"vae.{name}": tensor for name, tensor in native_vae("ltx-0.9.5").items()}
    save_file(state, path, {"config": json.dumps({"vae": VAE_HEADERS["ltx-0.9.5"]})})
    return path


def loaded(path: Path) -> tuple[VaeDetection, torch.nn.Module]:
    checkpoint = Checkpoint.open(path, "vae")
    detection = detect_vae(checkpoint, LTX, to_encode=True)
    return detection, load_vae(checkpoint, detection, "cpu")


def test_native_to_diffusers_and_back_is_equal_in_bytes(vae_file: Path) -> None:
    detection, vae = loaded(vae_file)
    assert detection.config == VAE_CONFIGS["ltx-0.9.5"] | COMMON | OF_COMFYUI
    back, stored = native_state(vae.state_dict(), detection.vae.keys), native_vae("ltx-0.9.5")
    assert back.keys() == stored.keys() - UNUSED
    assert all(torch.equal(tensor, stored[name]) for name, tensor in back.items())


def test_a_diffusers_folder_gives_the_same_vae(vae_file: Path, tmp_path: Path) -> None:
    detection, vae = loaded(vae_file)
    vae.save_pretrained(tmp_path / "vae")
    again, same = loaded(tmp_path)
    assert again == detection
    assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in vae.state_dict().items())


def test_video_goes_through_in_latents_that_the_vae_s_own_statistics_normalise(vae_file: Path) -> None:
    _, vae = loaded(vae_file)
    pixels = torch.rand(1, 3, 9, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = LTX.encode_video(vae, pixels)
    assert latents.shape == (1, *LTX.latent(LTX.variants[1]).shape(9, 64, 96))
    mean, std = (statistics.view(1, -1, 1, 1, 1) for statistics in (vae.latents_mean, vae.latents_std))
    assert_near(latents * std + mean, vae.encode(pixels).latent_dist.mean)
    assert_near(LTX.encode_video(vae, pixels[:, :, :1]), latents[:, :, :1])


def test_decoding_is_the_same_every_time_and_moves_no_generator(vae_file: Path) -> None:
    _, vae = loaded(vae_file)
    latents = torch.randn(1, 128, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = LTX.decode_video(vae, latents)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(LTX.decode_video(vae, latents), first)
    assert first.shape == (1, 3, 9, 64, 64)


def test_a_header_says_how_convolutions_are_padded(vae_file: Path, tmp_path: Path) -> None:

    header = {"vae": VAE_HEADERS["ltx-0.9.5"] | {"spatial_padding_mode": "zeros", "causal_decoder": True}}
    save_file(native_vae("ltx-0.9.5"), tmp_path / "vae.safetensors", {"config": json.dumps(header)})
    detection, vae = loaded(tmp_path / "vae.safetensors")
    assert (detection.config["decoder_padding"], detection.config["decoder_causal"]) == ("zeros", True)
    assert {module.padding_mode for module in vae.modules() if isinstance(module, torch.nn.Conv3d)} == {"zeros"}
    _, other = loaded(vae_file)
    latents = torch.randn(1, 128, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(LTX.decode_video(vae, latents), LTX.decode_video(other, latents), atol=1e-3)


# Text


def tiny_t5() -> tuple[Any, torch.nn.Module]:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = ["<pad>", "</s>", "<unk>", "a", "red", "circle"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(words), d_model=32, num_layers=1, num_heads=2, d_kv=8, d_ff=16, feed_forward_proj="gated-gelu")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return fast, T5EncoderModel(config).double().eval()


def test_text_is_encoded_as_with_a_mask_over_the_padding_and_never_cut() -> None:
    tokenizer, encoder = tiny_t5()
    prompts = ["a red circle", "", "red " * 600]
    folder: Any = SimpleNamespace(tokenizer=lambda: tokenizer, text_encoder=lambda: encoder)
    records = LTX.encode_text(LTX.variants[0], folder, prompts)
    assert [len(record.embeds_LD) for record in records] == [4, 1, 601]
    padded = tokenizer(prompts[:2], padding="max_length", max_length=128, return_tensors="pt")
    hidden = encoder(padded.input_ids, padded.attention_mask).last_hidden_state
    for record, rows in zip(records, hidden, strict=False):
        assert_near(record.embeds_LD, rows[: len(record.embeds_LD)], share=1e-12)


def test_a_random_vae_is_what_its_config_says() -> None:
    """The random VAEs of these tests stand for their kinds."""
    vae = random_vae("ltx-0.9.1")
    assert vae.config.timestep_conditioning
    assert any("per_channel_scale1" in name for name in vae.state_dict())
