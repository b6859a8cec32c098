"""What a training measures of its previews. A measure that fails is told as an event; the training goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .adherence import adherence, pick_frames
from .run import Run
from .run_status import mean_measures
from .video_measures import Frames, measure


class PreviewMeasures:
    """The measures of one step's previews: `add` each video, then `finish`."""

    def __init__(self, run: Run, step: int, clip_folder: str | None) -> None:
        self.by_file: dict[str, dict[str, float]] = {}
        self._run, self._step = run, step
        self._clip_folder = Path(clip_folder) if clip_folder is not None else None
        self._shown: dict[str, tuple[str, Frames]] = {}

    def add(self, file: str, prompt: str, frames_FHWC: Frames) -> None:
        """Measures a video by itself, and keeps the few of its frames that are compared with its prompt."""
        with self._going_on(file):
            self.by_file[file] = measure(frames_FHWC)
        if self._clip_folder is not None:
            self._shown[file] = prompt, pick_frames(frames_FHWC)

    def finish(self) -> dict[str, dict[str, float]]:
        """{file: {measure: value}}; compares all videos with their prompts, for which the CLIP model is loaded once."""
        if self._clip_folder is not None and self._shown:
            with self._going_on("how the previews fit their prompts"):
                values = adherence(self._clip_folder, list(self._shown.values()))
                for file, value in zip(self._shown, values, strict=True):
                    self.by_file.setdefault(file, {})["adherence"] = value
        self._shown = {}
        return self.by_file

    @property
    def means(self) -> dict[str, float]:
        """Each measure, mean over the videos."""
        return mean_measures(self.by_file)

    @contextmanager
    def _going_on(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever OpenCV, transformers or a drive may raise: no training ends by it
            told = f"{what} cannot be measured ({type(error).__name__}: {error}); training goes on without it"
            self._run.event("sample", step=self._step, files=[], message=told)
