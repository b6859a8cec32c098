"""Encoding through ComfyUI's queue: once, with a cancel that keeps what is done, and warm without loading a model."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfy_server import GraphError, Server

from trainers.data.encoded import Encoded
from trainers.demo import demo, world

TINY, VAE = "tiny Wan (built in)", "tiny.safetensors"
CLIPS = 5
VAE_LOADED, CLIP_LOADED = "VAE load device", "CLIP/text encoder model load device"
"""What ComfyUI's log says when it loads one."""

Graph = dict[str, dict[str, Any]]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def graph(clips: Path, **changes: Any) -> Graph:
    """Encodes a folder of clips, and two prompts; the VAE and CLIP by Load Encoders."""
    size = {"width": 64, "height": 64, "num_frames": 9} | changes
    both = {"base": ["base", 0], "clip": ["encoders", 0]}
    return {
        "base": node("VideoTrainer_BaseModel", transformer=TINY, variant="read from the file", vae=TINY, text_encoder=TINY),
        "encoders": node("VideoTrainer_LoadEncoders", base=["base", 0]),
        "clips": node("VideoTrainer_DatasetFromFolder", folder="moving shapes (built in)", path=str(clips), repeats=1, held_out=0.0),
        "encoded": node(
            "VideoTrainer_EncodeDataset",
            dataset=["clips", 0],
            vae=["encoders", 1],
            **both,
            **{"fps": 0.0, "bucketing": True, "clip_mode": "first", "clips_per_video": 0},
            **size,
        ),
        "previews": node(
            "VideoTrainer_Previews",
            **both,
            prompts="a red circle (large) moving left\n\n  a star  \n",
            negative="blurred",
            **{"every_steps": 50, "sampling_steps": 8, "cfg": 3.0, "shift": 0.0, "seed": 0},
            **size,
        ),
        "shown": node("PreviewAny", source=["encoded", 0]),
        "previews shown": node("PreviewAny", source=["previews", 0]),
    }


def with_core_vae(wired: Graph) -> Graph:
    """The graph with the VAE by core's own loader."""
    encoded = wired["encoded"] | {"inputs": wired["encoded"]["inputs"] | {"vae": ["core", 0]}}
    return wired | {"encoded": encoded, "core": node("VAELoader", vae_name=VAE)}


def with_last_layer(wired: Graph) -> Graph:
    """The graph with a node between the loader and the CLIP, of which nothing is known."""
    encoded = wired["encoded"] | {"inputs": wired["encoded"]["inputs"] | {"clip": ["layer", 0]}}
    return wired | {"encoded": encoded, "layer": node("CLIPSetLastLayer", clip=["encoders", 0], stop_at_clip_layer=-1)}


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    world.write_clips(tmp_path / "clips", world.random_scenes(CLIPS, 1, ("left", "right")))
    return tmp_path / "clips"


def run(server: Server, wired: Graph) -> tuple[str, str]:
    """(What Encode Dataset reports, what ComfyUI logged meanwhile)."""
    before = len(server.log)
    outputs = server.prompt(wired)["outputs"]
    return outputs["encoded"]["text"][0], server.log[before:]


def state_folder(server: Server) -> Path:
    return server.base_directory / "user" / "__video_trainer"


def loaded(log: str) -> list[str]:
    return [name for name, sign in (("VAE", VAE_LOADED), ("CLIP", CLIP_LOADED)) if sign in log]


def all_there(texts: int, latents: int = CLIPS) -> str:
    return f"clips: 0 encoded, {latents} already there; texts: 0 encoded, {texts} already there"


@pytest.mark.slow
def test_once_encoded_nothing_is_loaded_again_even_after_a_restart(make_server: Callable[..., Server], clips: Path):
    server = make_server()
    own_vae = server.base_directory / "models" / "vae" / VAE
    own_vae.parent.mkdir(exist_ok=True)
    shutil.copy(demo.VAE, own_vae)
    texts = len({caption.read_text().strip() for caption in clips.glob("*.txt")}) + 1
    with pytest.raises(GraphError, match=r"num_frames is 8; this model needs 4n\+1\. Use 5 or 9"):
        server.prompt(graph(clips, num_frames=8))
    assert loaded(server.log) == [], "problems of size are said before anything is loaded"

    told, log = run(server, graph(clips))
    assert f"clips: {CLIPS} encoded, 0 already there" in told
    assert loaded(log) == ["VAE", "CLIP"]
    check_files(server, texts)

    server.restart()
    told, log = run(server, graph(clips))
    assert all_there(texts) in told
    assert loaded(log) == []

    told, log = run(server, with_core_vae(graph(clips)))
    assert (all_there(texts) in told, loaded(log)) == (True, ["VAE"]), "the same VAE from a loader that was not known"

    server.restart()
    told, log = run(server, with_core_vae(graph(clips)))
    assert (all_there(texts) in told, loaded(log)) == (True, []), "a core loader is known by its file"
    os.utime(own_vae)
    copy_clip(clips, "000", "more")
    told, log = run(server, with_core_vae(graph(clips)))
    assert f"clips: 0 encoded, {CLIPS + 1} already there" in told, "the same bytes under another name"
    assert loaded(log) == ["VAE"], "a file that was written again is looked at"
    world.write_clip(clips / "more.mp4", world.render(world.random_scenes(1, 77)[0]))
    told, log = run(server, with_core_vae(graph(clips)))
    assert f"clips: 1 encoded, {CLIPS} already there; texts: 0 encoded, {texts} already there" in told
    assert CLIP_LOADED not in log


def copy_clip(clips: Path, name: str, other: str) -> None:
    for suffix in (".mp4", ".txt"):
        shutil.copy(clips / (name + suffix), clips / (other + suffix))


def check_files(server: Server, texts: int) -> None:
    """What a training will read is there."""
    encoded = Encoded.open(state_folder(server) / "encoded")
    assert (len(encoded.items), encoded.problems(), encoded.variant) == (CLIPS, [], "wan2.1-t2v")
    assert {item.num_frames for item in encoded.items} == {9}
    assert len({item.text for item in encoded.items} | set(encoded.prompts.values())) == texts
    for item in encoded.items:
        assert encoded.latents_CFHW(item).shape == (16, 3, 8, 8)
        assert 1 < len(encoded.text(item.text).embeds_LD) < 20


def test_what_is_wired_through_an_unknown_node_is_looked_at(server: Server, clips: Path):
    run(server, with_last_layer(graph(clips, num_frames=5)))
    server.restart()
    _, log = run(server, with_last_layer(graph(clips, num_frames=5)))
    assert CLIP_LOADED in log


def test_what_a_user_has_deleted_is_encoded_again(server: Server, clips: Path):
    server.prompt(graph(clips))
    server.prompt(graph(clips))
    shutil.rmtree(state_folder(server) / "encoded")
    told, _ = run(server, graph(clips))
    assert f"clips: {CLIPS} encoded, 0 already there" in told


def test_cancelling_keeps_what_is_done(server: Server, clips: Path):
    latents = state_folder(server) / "encoded" / "cache" / "latents"
    before = len(list(latents.rglob("*.safetensors")))
    prompt = server.queue(graph(clips, width=128, height=128))
    until(lambda: len(list(latents.rglob("*.safetensors"))) > before)
    server.interrupt()
    with pytest.raises(GraphError, match="execution_interrupted"):
        server.wait(prompt)
    done = len(list(latents.rglob("*.safetensors"))) - before
    assert 0 < done < CLIPS
    told, _ = run(server, graph(clips, width=128, height=128))
    assert f"clips: {CLIPS - done} encoded, {done} already there" in told


def until(true: Callable[[], bool], patience_seconds: float = 60) -> None:
    give_up = time.monotonic() + patience_seconds
    while not true():
        assert time.monotonic() < give_up, f"not within {patience_seconds:.0f} s"
        time.sleep(0.02)


def test_an_encoder_that_is_not_chosen_is_told(server: Server, clips: Path):
    wired = graph(clips, num_frames=13)
    wired["base"]["inputs"]["vae"] = "none"
    with pytest.raises(GraphError, match="no vae is chosen; a node is wired to its output"):
        server.prompt(wired)


def test_a_clip_that_cannot_be_used_is_told_with_its_reason(server: Server, clips: Path):
    world.write_clip(clips / "000.mp4", world.render(world.random_scenes(1, 5)[0])[:3])
    told, _ = run(server, graph(clips))
    assert f"{CLIPS - 1} clips for wan2.1-t2v" in told
    assert "Not used (1):\n000.mp4: 0.19 seconds are 3 frames at 16 per second; the shortest video has 5. Use a longer clip" in told


def test_previews_say_all_that_is_wrong_at_once(server: Server, clips: Path):
    wired = graph(clips)
    wired["previews"]["inputs"] |= {"prompts": " \n ", "num_frames": 8, "width": 72, "clip_folder": str(clips)}
    with pytest.raises(GraphError) as caught:
        server.prompt({name: wired[name] for name in ("base", "encoders", "previews", "previews shown")})
    told = str(caught.value)
    assert "4 problems" in told
    assert all(part in told for part in ("num_frames is 8", "width is 72", "prompts is empty", "it has no config.json that can be read"))
