"""Which Wan a file is: by its header, and by its name where headers are alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_files import T2V_1_3B, T2V_14B, VAE, entries, fp8_entries, shapes_of, write_header_only

from trainers.checkpoint import Checkpoint
from trainers.errors import CheckpointError
from trainers.families.wan import FAMILY
from trainers.family import Detection, detect, detect_vae

I2V, I2V_A14B, TI2V_5B, VAE_2_2 = "wan2.1_i2v_14B", "wan2.2_i2v_A14B", "wan2.2_ti2v_5B", "vae_wan2.2"
PUBLISHED = {  # config.json of the published diffusers folders
    "patch_size": (1, 2, 2),
    "attention_head_dim": 128,
    "in_channels": 36,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
    "pos_embed_seq_len": None,
    "num_attention_heads": 40,
    "num_layers": 40,
    "ffn_dim": 13824,
}
CONFIGS = {
    I2V: PUBLISHED | {"image_dim": 1280, "added_kv_proj_dim": 5120},
    I2V_A14B: PUBLISHED,
    TI2V_5B: PUBLISHED | {"in_channels": 48, "out_channels": 48, "num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336},
}
PARAMETERS_BILLION = {I2V: 16.39, I2V_A14B: 14.29, TI2V_5B: 5.00}
FILES = [  # published files
    (T2V_1_3B, "wan2.1_t2v_1.3B_fp16.safetensors", "wan2.1-t2v-1.3b", None),
    (T2V_14B, "wan2.1_t2v_14B_fp8_scaled.safetensors", "wan2.1-t2v-14b", None),
    (I2V, "wan2.1_i2v_480p_14B_fp16.safetensors", "wan2.1-i2v-14b", None),
    (I2V, "wan2.1_i2v_720p_14B_fp8_e4m3fn.safetensors", "wan2.1-i2v-14b", None),
    (TI2V_5B, "wan2.2_ti2v_5B_fp16.safetensors", "wan2.2-ti2v-5b", None),
    (T2V_14B, "wan2.2_t2v_high_noise_14B_fp16.safetensors", "wan2.2-t2v-a14b", "high"),
    (T2V_14B, "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors", "wan2.2-t2v-a14b", "low"),
    (I2V_A14B, "wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors", "wan2.2-i2v-a14b", "high"),
    (I2V_A14B, "wan2.2_i2v_low_noise_14B_fp16.safetensors", "wan2.2-i2v-a14b", "low"),
    (T2V_14B, "Wan2_2-T2V-A14B-LOW_fp8_e4m3fn_scaled_KJ.safetensors", "wan2.2-t2v-a14b", "low"),
    (I2V_A14B, "Wan2_2-I2V-A14B-HIGH_bf16.safetensors", "wan2.2-i2v-a14b", "high"),
    (T2V_14B, "t2v_low_noise_model.safetensors", "wan2.2-t2v-a14b", "low"),
    (T2V_14B, "Wan22_T2V.safetensors", "wan2.2-t2v-a14b", None),
    (T2V_14B, "wan2.2_t2v_A14B_low_vram.safetensors", "wan2.2-t2v-a14b", None),
    (T2V_14B, "wan2.2_t2v_slow_motion.safetensors", "wan2.2-t2v-a14b", None),
]
NOT_TRAINED = {
    "wan2.1_flf2v_14B": "Wan 2.1 FLF2V",
    "wan2.1_fun_inp_1.3B": "Wan 2.1 Fun InP",
    "wan2.1_fun_control_1.3B": "Wan 2.1 Fun Control",
    "wan2.1_fun_control_v1.1_14B": "Wan 2.1 Fun Control",
    "wan2.2_fun_control_A14B": "Wan 2.2 Fun Control A14B",
}


def header_of(tmp_path: Path, name: str, file_name: str = "model.safetensors", component: str = "transformer") -> Checkpoint:
    return Checkpoint.open(write_header_only(tmp_path / file_name, entries(shapes_of(name), torch.bfloat16)), component)


@pytest.mark.parametrize(("name", "file_name", "variant", "expert"), FILES, ids=[file for _, file, _, _ in FILES])
def test_published_files_are_what_they_are_named(tmp_path: Path, name: str, file_name: str, variant: str, expert: str | None) -> None:
    found = detect(header_of(tmp_path, name, file_name))
    assert (found.variant.id, found.expert) == (variant, expert)
    assert ("does not say whether it is the high-noise or the low-noise" in str(found.notes)) == (variant[-4:] == "a14b" and not expert)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_whole_config_is_the_published_one_and_every_key_has_its_place(tmp_path: Path, name: str) -> None:
    config = detect(header_of(tmp_path, name)).config
    assert config == CONFIGS[name]
    model, native = FAMILY.build(config), shapes_of(name)
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert {key: native[place.name] for key, place in FAMILY.keys.map_file(native).items()} == expected
    assert {FAMILY.keys.to_native(key).name for key in expected} == native.keys()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert round(parameters / 1e9, 2) == PARAMETERS_BILLION[name]


@pytest.mark.parametrize("scale", [None, "scale_weight", "weight_scale"])
def test_the_same_in_fp8(tmp_path: Path, scale: str | None) -> None:
    stored = fp8_entries(shapes_of(I2V), torch.float8_e4m3fn, scale)
    assert detect(Checkpoint.open(write_header_only(tmp_path / "wan.safetensors", stored))).config == CONFIGS[I2V]


def a14b_or_2_1(tmp_path: Path, file_name: str, variant: str | None = None) -> Detection:
    return detect(header_of(tmp_path, T2V_14B, file_name), variant)


def test_2_1_and_2_2_of_one_size_are_candidates_of_each_other(tmp_path: Path) -> None:
    both = {"wan2.1-t2v-14b", "wan2.2-t2v-a14b"}
    for file_name in ("wan2.1_t2v_14B.safetensors", "wan2.2_t2v_high_noise_14B.safetensors", "model.safetensors"):
        assert {variant.id for variant in a14b_or_2_1(tmp_path, file_name).variants} == both
        for variant in both:
            assert a14b_or_2_1(tmp_path, file_name, variant).variant.id == variant, "the user decides"


def test_says_that_the_tensors_do_not_tell_2_1_from_2_2(tmp_path: Path) -> None:
    found = a14b_or_2_1(tmp_path, "model.safetensors")
    assert found.variant.id == "wan2.1-t2v-14b"
    assert found.notes == ("The tensors are also those of Wan 2.2 T2V A14B; only a name can tell, and this one does not.",)
    assert a14b_or_2_1(tmp_path, "wan2.1_t2v_14B.safetensors").notes == ()


def test_folders_tell_version_and_expert_when_the_file_does_not(tmp_path: Path) -> None:
    folder = tmp_path / "Wan2.2-T2V-A14B" / "low_noise_model"
    folder.mkdir(parents=True)
    found = detect(header_of(folder, T2V_14B, "diffusion_pytorch_model.safetensors"))
    assert (found.variant.id, found.expert) == ("wan2.2-t2v-a14b", "low")
    assert detect(header_of(folder, T2V_14B, "Wan2_1-T2V-14B_bf16.safetensors")).variant.id == "wan2.1-t2v-14b"


def test_two_transformers_of_a_diffusers_folder_are_the_experts(tmp_path: Path) -> None:
    for name in ("transformer", "transformer_2"):
        (tmp_path / name).mkdir()
        write_header_only(tmp_path / name / "diffusion_pytorch_model.safetensors", entries(shapes_of(I2V_A14B), torch.bfloat16))
    found = {name: detect(Checkpoint.open(tmp_path / name)) for name in ("", "transformer", "transformer_2")}
    assert {name: detection.expert for name, detection in found.items()} == {"": "high", "transformer": "high", "transformer_2": "low"}
    assert {detection.variant.id for detection in found.values()} == {"wan2.2-i2v-a14b"}


@pytest.mark.parametrize(("variant", "boundary"), [("wan2.2-t2v-a14b", 0.875), ("wan2.2-i2v-a14b", 0.9), ("wan2.2-ti2v-5b", None)])
def test_where_the_experts_meet(variant: str, boundary: float | None) -> None:
    assert {found.id: found.boundary for found in FAMILY.variants}[variant] == boundary


# What is refused


@pytest.mark.parametrize("name", NOT_TRAINED)
def test_refuses_other_wan_models_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"model.safetensors is {NOT_TRAINED[name]}.*; trained are Wan 2.1 T2V and I2V.*Give one"):
        detect(header_of(tmp_path, name))


@pytest.mark.parametrize(
    ("branch", "title"),
    [
        ("vace_patch_embedding.weight", "VACE"),
        ("control_adapter.conv.weight", "Camera"),
        ("face_adapter.x", "Animate"),
        ("casual_audio_encoder.x", "S2V"),
        ("audio_proj.audio_proj_glob_1.layer.bias", "HuMo"),
        ("ref_conv.weight", "no place for ref_conv"),
    ],
)
def test_refuses_a_wan_with_a_branch(tmp_path: Path, branch: str, title: str) -> None:
    shapes = shapes_of(T2V_1_3B) | {branch: (4, 4)}
    with pytest.raises(CheckpointError, match=title):
        detect(Checkpoint.open(write_header_only(tmp_path / "model.safetensors", entries(shapes, torch.bfloat16))))


def test_refuses_channels_that_no_model_has(tmp_path: Path) -> None:
    shapes = shapes_of(TI2V_5B) | {"patch_embedding.weight": (3072, 100, 1, 2, 2)}
    with pytest.raises(CheckpointError, match="a Wan with 100 channels in and 48 out; trained are"):
        detect(Checkpoint.open(write_header_only(tmp_path / "wan2.2_fun_5B.safetensors", entries(shapes, torch.bfloat16))))


@pytest.mark.parametrize(("name", "variant"), [(I2V, "wan2.1-i2v-14b"), (I2V_A14B, "wan2.2-i2v-a14b")])
def test_a_fun_model_with_the_tensors_of_i2v_is_the_user_s_to_name(tmp_path: Path, name: str, variant: str) -> None:
    checkpoint = header_of(tmp_path, name, "Wan2.2-Fun-InP.safetensors")
    with pytest.raises(CheckpointError, match=f"is a Wan Fun model, by its name; trained are .*or say variant {variant}"):
        detect(checkpoint)
    assert detect(checkpoint, variant).variant.id == variant
    (tmp_path / "fun").mkdir()
    assert detect(header_of(tmp_path / "fun", name)).variant.id == variant, "a folder of that name says nothing"


# The VAEs


def test_the_vae_of_2_2_is_its_own_kind(tmp_path: Path) -> None:
    found = FAMILY.detect_vae(header_of(tmp_path, VAE_2_2, component="vae"))
    assert found is not None
    assert found.vae.id == "wan2.2"
    native = shapes_of(VAE_2_2)
    expected = {key: tuple(tensor.shape) for key, tensor in FAMILY.build_vae(found).state_dict().items()}
    assert {key: native[place.name] for key, place in found.vae.keys.map_file(native).items()} == expected
    assert {found.vae.keys.to_native(key).name for key in expected} == native.keys()
    vae_config = FAMILY.build_vae(found).config
    published = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "patch_size": 2, "in_channels": 12, "out_channels": 12}
    published |= {"is_residual": True, "scale_factor_spatial": 16, "scale_factor_temporal": 4, "temperal_downsample": [False, True, True]}
    assert {name: vae_config[name] for name in published} == published


def test_each_variant_has_one_vae(tmp_path: Path) -> None:
    old, new = (header_of(tmp_path, name, f"{name}.safetensors", "vae") for name in (VAE, VAE_2_2))
    for variant in FAMILY.variants:
        own, other = (new, old) if "ti2v" in variant.id else (old, new)
        assert detect_vae(own, FAMILY, variant, to_encode=True).vae.fits(variant)
        with pytest.raises(CheckpointError, match=r"vae_wan2.*is the Wan 2\.[12] VAE.*has another.*Give the file or folder of the Wan 2\."):
            detect_vae(other, FAMILY, variant)
