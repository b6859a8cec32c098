"""Threads of Python at the simulated GPU: one frees tensors that Python knows while others ask for clocks."""

from __future__ import annotations

import faulthandler
import threading

import torch

from trainers.quantise import quantised

GPU = torch.device("cuda", 0)


def test_a_tensor_is_freed_while_another_thread_asks() -> None:
    """The one had the simulator's lock and waited for Python's, the other the other way round: one run of the tests in several stood."""
    layer = quantised(torch.zeros(64, 64, device=GPU), None, "nf4", GPU)
    row = torch.zeros(1, 64, device=GPU)
    faulthandler.dump_traceback_later(120, exit=True)
    over = threading.Event()

    def ask() -> None:
        event, stream = torch.cuda.Event(), torch.cuda.Stream(GPU)
        while not over.is_set():
            event.record(stream)
            stream.wait_event(event)

    askers = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
    for asker in askers:
        asker.start()
    try:
        for _ in range(300):
            layer(row)  # decodes its weights by a Python operator
    finally:
        over.set()
        for asker in askers:
            asker.join(60)
        faulthandler.cancel_dump_traceback_later()
    assert not any(asker.is_alive() for asker in askers)
