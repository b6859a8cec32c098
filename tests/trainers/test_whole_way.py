"""From clips that no one here made to a LoRA file: scanned, encoded with the tiny base's VAE and text encoder, trained by
the real worker, which must not open a socket.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from guarded_worker import EXIT_CODE
from real_clips import write_real_clips

from trainers.data.buckets import Geometry
from trainers.data.encoded import Encoded
from trainers.data.scan import scan_folder
from trainers.demo.demo import BASE, TRANSFORMER, VAE
from trainers.encoders import encode_dataset
from trainers.family import families
from trainers.folder_encoder import EncoderFiles, FolderEncoder
from trainers.job import Job, parse_job
from trainers.lora_format import read_lora
from trainers.run import Run
from trainers.training import lora_path

HERE = Path(__file__).parent
WAN = families()["wan"]


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    folder = tmp_path_factory.mktemp("real")
    write_real_clips(folder / "clips")
    encoder = FolderEncoder(WAN, WAN.variants[-1], EncoderFiles.find(BASE, vae=VAE), "cpu")
    geometry = Geometry(width=96, height=96, num_frames=9, clip_mode="spread", clips_per_video=2)
    dataset = scan_folder(folder / "clips", held_out=0.2)
    encode_dataset(dataset, geometry, encoder, folder / "encoded", prompts=["a rabbit"])
    return parse_job(
        {
            "name": "real",
            "base": {"transformer": str(TRANSFORMER), "vae": str(VAE)},
            "encoded": str(folder / "encoded"),
            "runs_folder": str(folder / "runs"),
            "loras_folder": str(folder / "loras"),
            "device": "cpu",
            "steps": 3,
            "held_out": {"every_steps": 3, "sigmas": [0.5]},
            "previews": {
                "every_steps": 3,
                "prompts": ["a rabbit"],
                "width": 64,
                "height": 64,
                "num_frames": 9,
                "sampling_steps": 2,
                "before_training": False,
            },
        }
    )


def test_real_clips_train_without_a_socket(job):
    encoded = Encoded.open(Path(job.encoded))
    assert {item.num_frames for item in encoded.items} == {9}
    assert len({(item.height, item.width) for item in encoded.items}) > 1, "the clips' shapes are kept"
    run = Run.create(job)
    command = [sys.executable, str(HERE / "guarded_worker.py"), str(run.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + str(run.read_events())
    assert [event["event"] for event in run.read_events()][-1] == "done"
    assert [line["step"] for line in run.read_metrics()] == [1, 2, 3]
    assert "held_out_loss" in run.read_metrics()[-1]
    assert (run.samples_folder / "step-000003-0.mp4").stat().st_size > 500
    assert list((run.folder / "tensorboard").rglob("events.out.tfevents*"))
    adapter = read_lora(lora_path(run, 3), WAN)
    assert len(adapter.modules) == 4 * 10
    assert all(pair.up_OR.abs().max() > 0 for pair in adapter.modules.values())


def test_the_guard_sees_a_socket():
    code = "import guarded_worker, socket; guarded_worker.forbid_network(); socket.socket()"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, check=False).returncode == EXIT_CODE
