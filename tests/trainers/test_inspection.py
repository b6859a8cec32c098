from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest
import torch
from model_files import T2V_1_3B, T2V_14B, VAE, entries, fp8_entries, shapes_of, tiny_transformer, tiny_vae, write_header_only
from safetensors.torch import save_file

from trainers.errors import CheckpointError
from trainers.families.wan import FAMILY
from trainers.inspection import inspect_file


def test_a_28_gb_file_takes_no_time_and_no_memory(tmp_path: Path) -> None:
    path = write_header_only(tmp_path / "wan.safetensors", entries(shapes_of(T2V_14B), torch.bfloat16))
    inspect_file(path)
    process, start = psutil.Process(), time.process_time()
    before_bytes = process.memory_info().rss
    report = inspect_file(path)
    assert time.process_time() - start < 1.0
    assert process.memory_info().rss - before_bytes < 20 * 2**20
    assert path.stat().st_size > 28e9
    assert (report.kind, report.family, report.variants) == ("transformer", "wan", ("wan2.1-t2v-14b", "wan2.2-t2v-a14b"))
    assert report.parameters == 14_288_491_584
    assert report.nbytes == 2 * report.parameters
    assert report.config["num_layers"] == 40


def test_the_table_for_people(tmp_path: Path) -> None:
    found = fp8_entries(shapes_of(T2V_1_3B), torch.float8_e4m3fn, "scale_weight")
    text = str(inspect_file(write_header_only(tmp_path / "wan2.1_1.3B.safetensors", found)))
    assert text.split("\n") == [
        "wan2.1_1.3B.safetensors",
        "  what        transformer: Wan 2.1 T2V 1.3B",
        "  family      wan",
        "  variant     wan2.1-t2v-1.3b",
        "  told by     16 channels in, 16 out, 30 blocks of width 1536, no image embedder",
        "  parameters  1.42 billion",
        "  size        1.35 GiB in 825 tensors",
        "  stored as   float8_e4m3fn 98.1 %, float16 1.904 %",
        "  quantised   fp8_scaled",
        "  config      attention_head_dim 128, eps 1e-06, qk_norm rms_norm_across_heads, rope_max_seq_len 1024, patch_size (1, 2, 2), "
        "num_attention_heads 12, in_channels 16, out_channels 16, text_dim 4096, freq_dim 256, ffn_dim 8960, num_layers 30, "
        "cross_attn_norm True",
    ]


def test_says_why_a_known_model_cannot_be_used(tmp_path: Path) -> None:
    report = inspect_file(write_header_only(tmp_path / "flf2v.safetensors", entries(shapes_of("wan2.1_flf2v_14B"), torch.float16)))
    assert (report.kind, report.family, report.variants) == ("transformer", "wan", ())
    assert "flf2v.safetensors is Wan 2.1 FLF2V (first and last frame); trained are Wan 2.1 T2V and I2V, Wan 2.2" in str(report)


def test_says_what_the_tensors_cannot_tell(tmp_path: Path) -> None:
    path = write_header_only(tmp_path / "model.safetensors", entries(shapes_of(T2V_14B), torch.float16))
    assert "note        The tensors are also those of Wan 2.2 T2V A14B" in str(inspect_file(path))


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_a_vae(tmp_path: Path, prefix: str) -> None:
    report = inspect_file(write_header_only(tmp_path / "vae.safetensors", entries(shapes_of(VAE), torch.float16, prefix)))
    assert (report.kind, report.title, report.family) == ("VAE", "Wan 2.1 VAE", "wan")
    assert report.config == {"base_dim": 96, "z_dim": 16}


def test_a_diffusers_folder_and_its_parts(tmp_path: Path) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae")
    assert inspect_file(tmp_path).kind == "VAE"
    tiny_transformer().save_pretrained(tmp_path / "transformer")
    assert inspect_file(tmp_path).variants == ("wan2.1-t2v", "wan2.2-t2v")
    assert inspect_file(tmp_path / "vae").kind == "VAE"


@pytest.mark.parametrize(
    ("key", "kind", "title"),
    [
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "text encoder", "T5"),
        ("model.layers.0.self_attn.q_proj.weight", "text encoder", "language model"),
        ("text_model.encoder.layers.0.self_attn.q_proj.weight", "text encoder", "CLIP"),
        ("vision_model.encoder.layers.0.self_attn.q_proj.weight", "image encoder", "CLIP vision"),
        ("strange.weight", "unknown", "it begins with strange.weight"),
    ],
)
def test_encoders_and_what_is_not_known(tmp_path: Path, key: str, kind: str, title: str) -> None:
    save_file({key: torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    report = inspect_file(tmp_path / "model.safetensors")
    assert report.kind == kind
    assert title in report.title + "".join(report.problems)
    assert bool(report.problems) == (kind == "unknown")


def test_a_lora(tmp_path: Path) -> None:
    module = "diffusion_model.blocks.0.self_attn.q"
    save_file(
        {f"{module}.lora_A.weight": torch.zeros(4, 256), f"{module}.lora_B.weight": torch.zeros(256, 4)}, tmp_path / "lora.safetensors"
    )
    report = inspect_file(tmp_path / "lora.safetensors")
    assert report.kind == "LoRA"
    assert "LoRA for Wan, native form" in str(report)
    assert "MiB in" in str(report)
    assert "LoRA for Wan, native form" in str(inspect_file(tmp_path)), "the folder of one LoRA too"
    assert "rank 4" in str(report)


def test_a_lora_of_no_known_model(tmp_path: Path) -> None:
    save_file({"strange.lora_A.weight": torch.zeros(4, 8), "strange.lora_B.weight": torch.zeros(8, 4)}, tmp_path / "lora.safetensors")
    report = inspect_file(tmp_path / "lora.safetensors")
    assert report.kind == "LoRA"
    assert "strange" in report.problems[0]


@pytest.mark.parametrize("content", [b"", b"12"])
def test_a_damaged_file_is_an_error_that_names_it_once(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="Download it again") as caught:
        inspect_file(tmp_path / "model.safetensors")
    assert str(caught.value).count("model.safetensors") == 1


def test_the_tables_of_all_families_are_asked() -> None:
    """`inspect` speaks of a family by its own names, so it needs no change for a new one."""
    assert "wan" not in (Path(__file__).parents[2] / "trainers" / "inspection.py").read_text().lower().replace("wan's own layout", "")
    assert FAMILY.title == "Wan"
