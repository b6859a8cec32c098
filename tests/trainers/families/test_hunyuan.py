"""HunyuanVideo's files: what they are, and that every tensor finds its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from closeness import assert_near
from hunyuan_files import FILE_NAMES, I2V_V1, I2V_V2, T2V, original_state, random_transformer, write_transformer
from model_files import Shapes, entries, shapes_of, write_header_only
from safetensors.torch import load_file, save_file

from trainers.checkpoint import Checkpoint
from trainers.errors import CheckpointError, KeyTableError
from trainers.families.hunyuan import FAMILY, KEYS, VAE_KEYS
from trainers.family import VaeDetection, detect, detect_vae, families
from trainers.load import load_transformer, load_vae, native_state

T2V_KEYS, I2V_V1_KEYS, VAE = "hunyuan_video_t2v__i2v_v2", "hunyuan_video_i2v_v1", "vae_hunyuan_video"
PUBLISHED = {  # config.json of the published diffusers folders
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 20,
    "num_single_layers": 40,
    "num_refiner_layers": 2,
    "mlp_ratio": 4.0,
    "patch_size": 2,
    "patch_size_t": 1,
    "qk_norm": "rms_norm",
    "guidance_embeds": True,
    "text_embed_dim": 4096,
    "pooled_projection_dim": 768,
    "rope_theta": 256.0,
    "rope_axes_dim": (16, 56, 56),
    "image_condition_type": None,
}
CHANGES = {
    T2V: {},
    I2V_V1: {"in_channels": 33, "guidance_embeds": False, "image_condition_type": "latent_concat"},
    I2V_V2: {"image_condition_type": "token_replace"},
}
REAL_FILES = [
    ("hunyuan_video_t2v_720p_bf16.safetensors", T2V_KEYS, T2V),
    ("hunyuan_video_720_cfgdistill_fp8_e4m3fn.safetensors", T2V_KEYS, T2V),
    ("hunyuan_video_image_to_video_720p_bf16.safetensors", I2V_V1_KEYS, I2V_V1),
    ("hunyuan_video_I2V_fp8_e4m3fn.safetensors", I2V_V1_KEYS, I2V_V1),
    ("hunyuan_video_v2_replace_image_to_video_720p_bf16.safetensors", T2V_KEYS, I2V_V2),
    ("hunyuan_video_I2V_720_fixed_fp8_e4m3fn.safetensors", T2V_KEYS, I2V_V2),
    ("hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.safetensors", T2V_KEYS, T2V),
    ("hunyuan-video-i2v-720p/transformers/mp_rank_00_model_states.safetensors", T2V_KEYS, I2V_V2),
]
NAMINGS = ["ComfyUI's", "original", "diffusers'"]


def renamed(shapes: Shapes, naming: str) -> Shapes:
    """The shapes of a native file under the names of another naming."""
    if naming == "ComfyUI's":
        return shapes
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    tensors = {name: place.cut(tensors[place.name]) for name, place in KEYS.map_file(tensors).items()}
    tensors = original_state(tensors) if naming == "original" else tensors
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def header(path: Path, shapes: Shapes, prefix: str = "") -> Checkpoint:
    path.parent.mkdir(parents=True, exist_ok=True)
    return Checkpoint.open(write_header_only(path, entries(shapes, torch.bfloat16, prefix)))


# Detection


@pytest.mark.parametrize(("file_name", "keys", "variant"), REAL_FILES)
def test_real_file_names_tell_the_variant(tmp_path: Path, file_name: str, keys: str, variant: str) -> None:
    detection = detect(header(tmp_path / file_name, shapes_of(keys), "model.model."))
    assert detection.variant.id == variant
    assert detection.config == PUBLISHED | CHANGES[variant]
    assert bool(detection.notes) == ("720_cfg" in file_name)


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize(("keys", "variant"), [(T2V_KEYS, T2V), (I2V_V1_KEYS, I2V_V1)])
def test_every_naming_tells_the_whole_config(tmp_path: Path, naming: str, keys: str, variant: str) -> None:
    detection = detect(header(tmp_path / "model.safetensors", renamed(shapes_of(keys), naming)))
    assert detection.variant.id == variant
    assert detection.config == PUBLISHED | CHANGES[variant]


def test_a_chosen_variant_has_its_own_config(tmp_path: Path) -> None:
    checkpoint = header(tmp_path / "hunyuan_video_t2v_720p_bf16.safetensors", shapes_of(T2V_KEYS))
    assert [variant.id for variant in detect(checkpoint).variants] == [T2V, I2V_V2]
    assert detect(checkpoint, I2V_V2).config == PUBLISHED | CHANGES[I2V_V2]
    assert detect(checkpoint, T2V).config == PUBLISHED
    with pytest.raises(CheckpointError, match=r"'hunyuan-i2v-v1'; hunyuan_video_t2v_720p_bf16\.safetensors can only be hunyuan-t2v"):
        detect(checkpoint, I2V_V1)


def test_says_that_only_a_name_tells_v2_from_t2v(tmp_path: Path) -> None:
    assert "HunyuanVideo I2V v2; only a name can tell" in detect(header(tmp_path / "model.safetensors", shapes_of(T2V_KEYS))).notes[0]


@pytest.mark.parametrize(("kind", "variant"), [(None, T2V), ("token_replace", I2V_V2)])
def test_a_config_json_tells_what_shapes_do_not(tmp_path: Path, kind: str | None, variant: str) -> None:
    config = {"_class_name": "HunyuanVideoTransformer3DModel", "image_condition_type": kind, "rope_axes_dim": [32, 48, 48]}
    (tmp_path / "i2v").mkdir()
    (tmp_path / "i2v/config.json").write_text(json.dumps(config))
    detection = detect(header(tmp_path / "i2v/diffusion_pytorch_model.safetensors", renamed(shapes_of(T2V_KEYS), "diffusers'")))
    assert [found.id for found in detection.variants] == [variant]
    assert detection.config == PUBLISHED | CHANGES[variant] | {"rope_axes_dim": (32, 48, 48)}


@pytest.mark.parametrize("naming", NAMINGS)
def test_without_a_guidance_embedder_it_is_another_model(tmp_path: Path, naming: str) -> None:
    shapes = {name: shape for name, shape in shapes_of(T2V_KEYS).items() if not name.startswith("guidance_in.")}
    with pytest.raises(CheckpointError, match="without a guidance embedder; only HunyuanVideo T2V"):
        detect(header(tmp_path / "hunyuan_video_t2v.safetensors", renamed(shapes, naming)))


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({"img_in.proj.weight": (3072, 32, 1, 2, 2)}, "SkyReels I2V"),
        ({"img_in.proj.weight": (2048, 65, 1, 1, 1), "vision_in.proj.0.weight": (1152,)}, "HunyuanVideo 1.5"),
        ({"img_in.proj.weight": (2048, 65, 1, 1, 1), "cond_type_embedding.weight": (3, 2048)}, "HunyuanVideo 1.5"),
        ({"img_in.proj.weight": (3584, 64, 1, 1), "byt5_in.fc1.weight": (1, 1)}, "HunyuanImage"),
        ({"img_in.proj.weight": (3072, 20, 1, 2, 2)}, "a HunyuanVideo with 20 channels in and 16 out"),
    ],
)
def test_relatives_are_refused_by_name(tmp_path: Path, changes: Shapes, title: str) -> None:
    with pytest.raises(CheckpointError, match=rf"model\.safetensors is {title}; only HunyuanVideo T2V, I2V v1 and I2V v2 are trained"):
        detect(header(tmp_path / "model.safetensors", shapes_of(T2V_KEYS) | changes))


@pytest.mark.parametrize("naming", NAMINGS)
def test_an_unknown_key_is_an_error(tmp_path: Path, naming: str) -> None:
    shapes = renamed(shapes_of(T2V_KEYS), naming) | {"strange.weight": (4, 4)}
    with pytest.raises(KeyTableError, match=r"no place for strange\.weight"):
        detect(header(tmp_path / "model.safetensors", shapes))


@pytest.mark.parametrize(
    "missing", ["txt_in.individual_token_refiner.blocks.0.norm1.weight", "img_in.proj.weight", "final_layer.linear.weight"]
)
def test_half_a_model_is_none(tmp_path: Path, missing: str) -> None:
    shapes = shapes_of(T2V_KEYS)
    del shapes[missing]
    with pytest.raises(CheckpointError, match="is no model that is known here"):
        detect(header(tmp_path / "model.safetensors", shapes))


@pytest.mark.parametrize(
    "name", ["ltxv_2B", "mochi_preview", "wan2.1_t2v_1.3B", "wan2.1_i2v_14B", VAE, "vae_wan2.1", "vae_ltx_0.9.5", "vae_mochi"]
)
def test_is_not_fooled_by_other_models(tmp_path: Path, name: str) -> None:
    checkpoint = header(tmp_path / "hunyuan_video_i2v.safetensors", shapes_of(name))
    assert FAMILY.detect(checkpoint) is None
    assert (FAMILY.detect_vae(checkpoint) is not None) == (name == VAE)


@pytest.mark.parametrize("name", [T2V_KEYS, I2V_V1_KEYS, VAE])
def test_other_families_are_not_fooled(tmp_path: Path, name: str) -> None:
    checkpoint = header(tmp_path / "model.safetensors", shapes_of(name))
    for family in families().values():
        if family.id != FAMILY.id:
            assert family.detect(checkpoint) is None
            assert family.detect_vae(checkpoint) is None


# Names


@pytest.mark.parametrize("naming", ["ComfyUI's", "original"])
@pytest.mark.parametrize(("keys", "variant"), [(T2V_KEYS, T2V), (T2V_KEYS, I2V_V2), (I2V_V1_KEYS, I2V_V1)])
def test_the_table_names_every_tensor_of_the_transformer(naming: str, keys: str, variant: str) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in FAMILY.build(PUBLISHED | CHANGES[variant]).state_dict().items()}
    native = renamed(shapes_of(keys), naming)
    assert {name: place.shape(native[place.name]) for name, place in KEYS.map_file(native).items()} == expected
    assert {KEYS.to_native(name).name for name in expected} == shapes_of(keys).keys()


def test_the_table_names_every_tensor_of_the_vae() -> None:
    expected = {name: tuple(t.shape) for name, t in FAMILY.build_vae(VaeDetection(FAMILY, FAMILY.vaes[0], {})).state_dict().items()}
    native = shapes_of(VAE)
    assert {name: place.shape(native[place.name]) for name, place in VAE_KEYS.map_file(native).items()} == expected
    assert {VAE_KEYS.to_native(name).name for name in expected} == native.keys()


def test_rows_agree_with_the_converter_of_diffusers() -> None:
    """It reads the original names only, and the width is written into it: one column of each matrix stands for all."""
    from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers

    shapes = {name: shape for name, shape in shapes_of(T2V_KEYS).items() if "blocks." not in name or "blocks.0." in name}
    original = {name: torch.randn(shape[0], *(1 for _ in shape[1:])) for name, shape in renamed(shapes, "original").items()}
    ours = {name: place.cut(original[place.name]) for name, place in KEYS.map_file(original).items()}
    theirs = convert_hunyuan_video_transformer_to_diffusers(dict(original))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("variant", [T2V, I2V_V1])
def test_native_to_diffusers_to_native_is_equal_in_bytes(tmp_path: Path, variant: str) -> None:
    state = random_transformer(variant).state_dict()
    for write, name in ((lambda found: native_state(found, KEYS), "native"), (original_state, "original")):
        first = write(state)
        again = write({ours: place.cut(first[place.name]) for ours, place in KEYS.map_file(first).items()})
        save_file(first, tmp_path / name)
        save_file(again, tmp_path / f"{name} again")
        assert (tmp_path / name).read_bytes() == (tmp_path / f"{name} again").read_bytes()


# Loading


def load(path: Path, variant: str | None = None) -> torch.nn.Module:
    checkpoint = Checkpoint.open(path)
    return load_transformer(checkpoint, detect(checkpoint, variant), "cpu", torch.float32)


def equal(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("variant", [T2V, I2V_V1, I2V_V2])
def test_every_form_of_a_file_is_the_same_model(tmp_path: Path, variant: str) -> None:
    expected = random_transformer(variant)
    write_transformer(tmp_path, variant)
    original = original_state(expected.state_dict())
    torch.save({"module": original}, tmp_path / FILE_NAMES[variant].replace("safetensors", "pt"))
    save_file(original, tmp_path / f"original_{FILE_NAMES[variant]}")
    expected.save_pretrained(tmp_path / "folder" / "transformer")
    for path in [*tmp_path.iterdir()]:
        found = load(path)
        assert equal(found, expected), path.name
        assert found.config.image_condition_type == expected.config.image_condition_type, path.name


@pytest.mark.parametrize(("naming", "spelling", "per_row"), [("ComfyUI's", "scale_weight", True), ("original", "weight_scale", False)])
def test_scales_reach_the_slices_of_fused_and_swapped_weights(tmp_path: Path, naming: str, spelling: str, per_row: bool) -> None:
    state = random_transformer(T2V).state_dict()
    native = native_state(state, KEYS) if naming == "ComfyUI's" else original_state(state)
    dense = dict(native)
    for name in [name for name, tensor in native.items() if tensor.ndim == 2]:
        scale = native[name].abs().amax(dim=1, keepdim=True) / 448 if per_row else native[name].abs().max() / 448
        native[name] = (dense[name] / scale).to(torch.float8_e4m3fn)
        native[name.removesuffix("weight") + spelling] = scale
        dense[name] = native[name].float() * scale
    save_file(
        {"model.model.scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)} | {f"model.model.{k}": v for k, v in native.items()},
        tmp_path / "t2v.safetensors",
    )
    save_file(dense, tmp_path / "dense_t2v.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "t2v.safetensors")
    assert checkpoint.quantisation == "fp8_scaled"
    found = load_transformer(checkpoint, detect(checkpoint), "cpu", torch.float32, keep_stored=False)
    assert equal(found, load(tmp_path / "dense_t2v.safetensors"))
    kept = load(tmp_path / "t2v.safetensors")
    assert kept.get_submodule("single_transformer_blocks.1.proj_mlp").weight.dtype == torch.float8_e4m3fn
    x = torch.randn(2, 128)
    for name in ("single_transformer_blocks.1.proj_mlp", "transformer_blocks.0.attn.add_k_proj"):
        assert_near(kept.get_submodule(name)(x), found.get_submodule(name)(x))


def test_a_cut_model_is_named_tensor_by_tensor(tmp_path: Path) -> None:
    state = load_file(write_transformer(tmp_path, T2V))
    del state["model.model.double_blocks.1.img_attn.qkv.bias"]
    save_file(state, tmp_path / "t2v.safetensors")
    with pytest.raises(CheckpointError, match=r"3 tensors are missing \(transformer_blocks\.1\.attn\.to_q\.bias"):
        load(tmp_path / "t2v.safetensors")


# The VAE


def small_vae() -> torch.nn.Module:
    """A random AutoencoderKLHunyuanVideo of few channels."""
    from diffusers import AutoencoderKLHunyuanVideo

    torch.manual_seed(0)
    return AutoencoderKLHunyuanVideo(block_out_channels=(8, 8, 16, 16), norm_num_groups=4).eval().requires_grad_(False)


def test_the_vae_goes_to_native_names_and_back_equal_in_bytes(tmp_path: Path) -> None:
    first = native_state(small_vae().state_dict(), VAE_KEYS)
    assert first["decoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1, 1)
    again = native_state({name: place.cut(first[place.name]) for name, place in VAE_KEYS.map_file(first).items()}, VAE_KEYS)
    save_file(first, tmp_path / "first")
    save_file(again, tmp_path / "again")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "again").read_bytes()


def test_native_vae_file_and_diffusers_folder_give_the_same_module(tmp_path: Path) -> None:
    from diffusers import AutoencoderKLHunyuanVideo

    with torch.device("meta"):
        vae = AutoencoderKLHunyuanVideo(block_out_channels=(32, 32, 64, 64))
    vae = vae.to_empty(device="cpu").eval()
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    vae.save_pretrained(tmp_path / "vae")
    save_file(native_state(vae.state_dict(), VAE_KEYS), tmp_path / "vae.safetensors")
    save_file(vae.state_dict(), tmp_path / "unpacked.safetensors")
    for path in tmp_path.iterdir():
        checkpoint = Checkpoint.open(path, "vae")
        detection = detect_vae(checkpoint, FAMILY, FAMILY.variants[1], to_encode=True)
        assert detection.config["block_out_channels"] == (32, 32, 64, 64)
        assert equal(load_vae(checkpoint, detection, "cpu"), vae)


@pytest.mark.parametrize("naming", ["native", "diffusers"])
def test_half_a_vae(tmp_path: Path, naming: str) -> None:
    shapes = shapes_of(VAE)
    if naming == "diffusers":
        shapes = {name: place.shape(shapes[place.name]) for name, place in VAE_KEYS.map_file(shapes).items()}
    decoder = {name: shape for name, shape in shapes.items() if not name.startswith("encoder.")}
    checkpoint = header(tmp_path / "decoder.safetensors", decoder)
    assert not detect_vae(checkpoint, FAMILY).encodes
    with pytest.raises(CheckpointError, match="decoder only"):
        detect_vae(checkpoint, FAMILY, to_encode=True)
    encoder = {name: shape for name, shape in shapes.items() if name.startswith("encoder.")}
    with pytest.raises(CheckpointError, match=r"encoder\.safetensors is no VAE that is known here; HunyuanVideo needs its own"):
        detect_vae(header(tmp_path / "encoder.safetensors", encoder), FAMILY)


@pytest.mark.parametrize("name", ["vae_wan2.1", "vae_wan2.2", T2V_KEYS])
def test_the_vae_of_another_family_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"vae\.safetensors is .*Give the file or folder of the HunyuanVideo VAE"):
        detect_vae(header(tmp_path / "vae.safetensors", shapes_of(name)), FAMILY)


def test_a_vae_of_32_latent_channels_is_another(tmp_path: Path) -> None:
    shapes = shapes_of(VAE) | {"decoder.conv_in.conv.weight": (512, 32, 3, 3, 3)}
    assert FAMILY.detect_vae(header(tmp_path / "hunyuan_1.5_vae.safetensors", shapes)) is None
