"""Host memory is watched in every test of this folder: nobody writes or closes it while a queue may still copy from or to it."""

from __future__ import annotations

import pytest
import torch
from adversary import refuse_unfinished

from trainers.offload.layout import Flat
from trainers.offload.pinned import Buffer, warn_once


@pytest.fixture(autouse=True)
def host_memory_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    write, close = Flat.write, Buffer.close

    def watched_write(layout: Flat, run: torch.Tensor, *how: bool) -> None:
        refuse_unfinished(run)
        write(layout, run, *how)

    def watched_close(buffer: Buffer) -> None:
        refuse_unfinished(buffer.bytes)
        close(buffer)

    monkeypatch.setattr(Flat, "write", watched_write)
    monkeypatch.setattr(Buffer, "close", watched_close)


@pytest.fixture(autouse=True)
def nothing_was_told() -> None:
    warn_once.cache_clear()
