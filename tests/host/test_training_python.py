"""The worker trains under ComfyUI's own Python."""

from __future__ import annotations

from by_path import train_by_path


def test_the_worker_trains_under_comfyuis_python(comfyui, own_temporary_folder, tmp_path):
    train_by_path(tmp_path, comfyui.python, "-I", environment=comfyui.environment)
