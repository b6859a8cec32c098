from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from model_files import TINY, tiny_transformer, tiny_vae
from safetensors.torch import save_file
from torch import nn

from trainers.checkpoint import Checkpoint
from trainers.errors import CheckpointError, KeyTableError
from trainers.families.wan import FAMILY
from trainers.family import detect, detect_vae
from trainers.load import load_transformer, load_vae, native_state, under_native_names
from trainers.offload.linear import FrozenLinear

State = dict[str, torch.Tensor]


def load(path: Path, dtype: torch.dtype = torch.float32, keep_stored: bool | None = None) -> nn.Module:
    checkpoint = Checkpoint.open(path)
    return load_transformer(checkpoint, detect(checkpoint), "cpu", dtype, keep_stored)


def native_file(path: Path, state: State, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata)
    return path


def transformer_state(dtype: torch.dtype = torch.float32) -> State:
    state = native_state(tiny_transformer().state_dict(), FAMILY.keys)
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def fp8_scaled_state(spelling: str = "scale_weight", marker: bool = True) -> tuple[State, State]:
    """A native fp8_scaled file, every matrix scaled, and the float32 weights it stands for."""
    state, dense = transformer_state(), transformer_state()
    for name in [name for name, tensor in state.items() if tensor.ndim == 2]:
        scale = state[name].abs().max() / 448
        state[name] = (state[name] / scale).to(torch.float8_e4m3fn)
        state[name.removesuffix("weight") + spelling] = scale
        dense[name] = state[name].float() * scale
    return state | ({"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)} if marker else {}), dense


def equal(ours: nn.Module, theirs: nn.Module) -> bool:
    left, right = ours.state_dict(), theirs.state_dict()
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def forward(transformer: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 16, 2, 4, 4, generator=generator), torch.randn(1, 8, TINY["text_dim"], generator=generator)
    with torch.no_grad():
        output: torch.Tensor = transformer(latents.to(dtype), torch.tensor([500.0]), text.to(dtype)).sample
    return output


# Names and values


def test_rows_agree_with_the_converters_of_diffusers() -> None:
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers

    transformer = tiny_transformer(image_dim=64, added_kv_proj_dim=256)
    for model, table, convert in (
        (transformer, FAMILY.keys, convert_wan_transformer_to_diffusers),
        (tiny_vae(), FAMILY.vaes[0].keys, convert_wan_vae_to_diffusers),
    ):
        native = native_state(model.state_dict(), table)
        theirs = convert(dict(native))
        ours = {name: place.cut(native[place.name]) for name, place in table.map_file(native).items()}
        assert ours.keys() == theirs.keys() == model.state_dict().keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("changes", [{}, {"image_dim": 64, "added_kv_proj_dim": 256, "pos_embed_seq_len": 6}])
def test_native_to_diffusers_to_native_is_equal_in_bytes(tmp_path: Path, changes: dict[str, int]) -> None:
    native = native_state(tiny_transformer(**changes).state_dict(), FAMILY.keys)
    names = FAMILY.keys.map_file(native)
    again = native_state({name: place.cut(native[place.name]) for name, place in names.items()}, FAMILY.keys)
    save_file(native, tmp_path / "first.safetensors")
    save_file(again, tmp_path / "second.safetensors")
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "second.safetensors").read_bytes()


def test_native_names_stay_and_those_of_diffusers_become_native() -> None:
    for model, table in ((tiny_transformer(), FAMILY.keys), (tiny_vae(), FAMILY.vaes[0].keys)):
        state = model.state_dict()
        native = under_native_names(state, table)
        assert native.keys() != state.keys()
        assert all(torch.equal(tensor, native_state(state, table)[name]) for name, tensor in native.items())
        assert all(under_native_names(native, table)[name] is tensor for name, tensor in native.items())
    with pytest.raises(KeyTableError, match=r"no place for.*unknown\.weight"):
        under_native_names({**tiny_transformer().state_dict(), "unknown.weight": torch.zeros(1)}, FAMILY.keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_native_file_shards_pickle_and_diffusers_folder_give_the_same_module(tmp_path: Path, dtype: torch.dtype) -> None:
    transformer = tiny_transformer().to(dtype)
    state = native_state(transformer.state_dict(), FAMILY.keys)
    transformer.save_pretrained(tmp_path / "model" / "transformer")
    torch.save({"module": state}, tmp_path / "model.pth")
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    for number in range(2):
        native_file(tmp_path / f"model-{number + 1:05}-of-00002.safetensors", dict(list(state.items())[number::2]))
    paths = [
        native_file(tmp_path / "native.safetensors", state),
        native_file(tmp_path / "prefixed.safetensors", prefixed),
        tmp_path / "model-00001-of-00002.safetensors",
        tmp_path / "model.pth",
        tmp_path / "model",
    ]
    for path in paths:
        assert equal(load(path, dtype), load(paths[0], dtype))
    if dtype == torch.float32:
        assert equal(load(paths[0]), tiny_transformer())
        assert torch.equal(forward(load(paths[0])), forward(tiny_transformer()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_and_output_are_those_of_from_pretrained(tmp_path: Path, dtype: torch.dtype) -> None:
    """What the class keeps in float32 (times, modulation, norms) is float32 here too."""
    tiny_transformer().save_pretrained(tmp_path)
    theirs = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=dtype, local_files_only=True)
    ours = load(tmp_path, dtype)
    assert equal(ours, theirs)
    dtypes = {tensor.dtype for tensor in ours.state_dict().values()}
    assert dtypes == {torch.float32, dtype}
    if dtype == torch.bfloat16:
        assert torch.equal(forward(ours, dtype), forward(theirs, dtype))


def test_the_module_is_frozen_and_no_random_number_was_drawn(tmp_path: Path) -> None:
    path = native_file(tmp_path / "native.safetensors", transformer_state())
    state = torch.get_rng_state()
    module = load(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_unchanged_tensors_are_mapped_not_copied(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(native_file(tmp_path / "native.safetensors", transformer_state()))
    module = load_transformer(checkpoint, detect(checkpoint), "cpu", torch.float32)
    for name, tensor in module.state_dict().items():
        assert tensor.data_ptr() == checkpoint.tensor(FAMILY.keys.to_native(name).name).data_ptr()


# What is kept as stored


def kinds(module: nn.Module) -> dict[str, type]:
    return {name: type(child) for name, child in module.named_modules() if isinstance(child, nn.Linear)}


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_fp8_scaled_stays_fp8_in_the_blocks_and_computes_as_its_dense_form(tmp_path: Path, spelling: str, prefix: str) -> None:
    state, dense = fp8_scaled_state(spelling, marker=spelling == "scale_weight")
    module = load(native_file(tmp_path / "scaled.safetensors", {prefix + name: tensor for name, tensor in state.items()}))
    expected = load(native_file(tmp_path / "dense.safetensors", dense))
    for name, kind in kinds(module).items():
        assert kind is (FrozenLinear if name.startswith("blocks.") else nn.Linear)
    assert module.get_parameter("blocks.1.ffn.net.2.weight").dtype == torch.float8_e4m3fn
    assert torch.equal(forward(module), forward(expected))


def test_fp8_without_a_scale(tmp_path: Path) -> None:
    state = {name: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor for name, tensor in transformer_state().items()}
    module = load(native_file(tmp_path / "fp8.safetensors", state))
    expected = load(native_file(tmp_path / "dense.safetensors", {name: tensor.float() for name, tensor in state.items()}))
    assert kinds(module)["blocks.0.attn1.to_q"] is FrozenLinear
    assert torch.equal(forward(module), forward(expected))


@pytest.mark.parametrize(("keep_stored", "kind"), [(None, nn.Linear), (False, nn.Linear), (True, FrozenLinear)])
def test_16_bit_on_the_cpu_is_dense_unless_asked(tmp_path: Path, keep_stored: bool | None, kind: type) -> None:
    module = load(native_file(tmp_path / "fp16.safetensors", transformer_state(torch.float16)), keep_stored=keep_stored)
    expected = load(
        native_file(tmp_path / "dense.safetensors", {name: tensor.half().float() for name, tensor in transformer_state().items()})
    )
    assert {kind for name, kind in kinds(module).items() if name.startswith("blocks.")} == {kind}
    assert torch.equal(forward(module), forward(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_linears_of_the_blocks_can_be_frozen_ones(tmp_path: Path, dtype: torch.dtype) -> None:
    path = native_file(tmp_path / "bf16.safetensors", transformer_state(torch.bfloat16))
    checkpoint = Checkpoint.open(path)
    module = load_transformer(checkpoint, detect(checkpoint), "cpu", dtype, all_frozen=True)
    for name, kind in kinds(module).items():
        assert kind is (FrozenLinear if name.startswith("blocks.") else nn.Linear)
    assert equal(module, load(path, dtype))
    assert torch.equal(forward(module, dtype), forward(load(path, dtype), dtype))


def test_fp8_can_be_made_dense(tmp_path: Path) -> None:
    state, dense = fp8_scaled_state()
    module = load(native_file(tmp_path / "scaled.safetensors", state), keep_stored=False)
    assert equal(module, load(native_file(tmp_path / "dense.safetensors", dense)))


def test_fp8_scaled_runs_in_bfloat16_on_the_cpu(tmp_path: Path) -> None:
    state, dense = fp8_scaled_state()
    module = load(native_file(tmp_path / "scaled.safetensors", state), torch.bfloat16)
    expected = load(native_file(tmp_path / "dense.safetensors", dense), torch.bfloat16)
    assert forward(module, torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(forward(module, torch.bfloat16), forward(expected, torch.bfloat16))


# What is refused


def test_every_misfit_is_listed_at_once(tmp_path: Path) -> None:
    state = transformer_state()
    del state["blocks.1.ffn.2.bias"]
    state["blocks.0.ffn.0.bias"] = torch.zeros(65)
    state["blocks.0.cross_attn.k_img.bias"] = torch.zeros(256)
    with pytest.raises(CheckpointError) as error:
        load(native_file(tmp_path / "model.safetensors", state))
    for sentence in (
        "model.safetensors: 3 problems",
        "1 tensors are missing (blocks.1.ffn.net.2.bias)",
        "1 tensors are not of this model (blocks.0.attn2.add_k_proj.bias)",
        "1 tensors have another shape (blocks.0.ffn.net.0.proj.bias is [65], not [64])",
    ):
        assert sentence in str(error.value)


def test_unknown_keys_are_named_with_the_file(tmp_path: Path) -> None:
    path = native_file(tmp_path / "model.safetensors", transformer_state() | {"blocks.0.strange.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"no place for blocks\.0\.strange\.weight"):
        load(path)


# The VAE


def opened_vae(path: Path) -> torch.nn.Module:
    checkpoint = Checkpoint.open(path, "vae")
    return load_vae(checkpoint, detect_vae(checkpoint, FAMILY), "cpu")


def test_native_vae_file_and_diffusers_folder_give_the_same_module(tmp_path: Path) -> None:
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "model" / "vae")
    state = native_state(vae.state_dict(), FAMILY.vaes[0].keys)
    torch.save(state, tmp_path / "vae.pth")
    native_file(tmp_path / "prefixed.safetensors", {f"first_stage_model.{name}": tensor for name, tensor in state.items()})
    paths = [native_file(tmp_path / "vae.safetensors", state), tmp_path / "vae.pth", tmp_path / "prefixed.safetensors", tmp_path / "model"]
    pixels = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    for path in paths:
        loaded = opened_vae(path)
        assert isinstance(loaded, AutoencoderKLWan)
        assert not loaded.training
        assert equal(loaded, vae)
        assert torch.equal(FAMILY.encode_video(loaded, pixels), FAMILY.encode_video(vae, pixels))


def test_a_half_precision_vae_runs_in_float32(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in native_state(tiny_vae().state_dict(), FAMILY.vaes[0].keys).items()}
    loaded = opened_vae(native_file(tmp_path / "vae.safetensors", state))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_a_transformer_is_no_vae(tmp_path: Path) -> None:
    path = native_file(tmp_path / "native.safetensors", transformer_state())
    with pytest.raises(CheckpointError, match=r"native\.safetensors is no VAE that is known here; Wan needs its own"):
        opened_vae(path)
