"""Makes `torch.cuda` answer for the simulated GPU. Call `insert()` before torch is imported.

Environment: SIMULATED_DEVICES (1), SIMULATED_GIB of each (8), SIMULATED_CAPABILITY (80: compute capability 8.0).
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from .build import NAME, library

module: Any = None
"""The C++ part, once it is loaded."""
total_bytes = 0
capability = (8, 0)
name = "Simulated GPU"
_WARMED = ("bitsandbytes", "peft", "accelerate", "transformers", "diffusers")
"""Look for CUDA libraries when they are imported; done while torch still says it has no CUDA."""
_WHOLE = ("quantize_4bit", "dequantize_4bit")
"""Of bitsandbytes: one kernel each on a GPU, which takes nothing but what it gives. Its portable ones take four times the weights."""


def insert() -> None:
    """Adds the simulated GPUs to this process. Raises CannotBuildError, or RuntimeError when torch was asked for CUDA before."""
    global module, total_bytes
    if module is not None:
        return
    path, count = library(), int(os.environ.get("SIMULATED_DEVICES", "1"))
    total_bytes = int(float(os.environ.get("SIMULATED_GIB", "8")) * 2**30)
    ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # before torch, which asks only once whether there is CUDA
    import torch

    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not module.there():
        raise RuntimeError("torch was asked for CUDA before the simulated GPU was inserted")
    module.set_devices(count)
    for name in _WARMED:
        if importlib.util.find_spec(name):
            __import__(name)
    for operator in _WHOLE if "bitsandbytes" in sys.modules else ():
        module.run_whole("bitsandbytes", operator)
    if "diffusers" in sys.modules:  # imports its parts lazily, by name
        from diffusers import AutoencoderKLWan, WanTransformer3DModel  # noqa: F401
    _replace_torch_cuda(torch, count)
    torch.cuda.manual_seed_all(0)
    reset()


def pretend_to_be(new_name: str, new_capability: tuple[int, int]) -> None:
    """The GPU of that name and compute capability answers, until `reset`. It computes as before."""
    global name, capability
    name, capability = new_name, new_capability


def reset() -> None:
    """Clears the report, injected failures, limits and `pretend_to_be`. Memory that is in use stays in use."""
    pretend_to_be("Simulated GPU", divmod(int(os.environ.get("SIMULATED_CAPABILITY", "80")), 10))
    module.clear_report()
    module.fail_allocations(-1, 0)
    module.limit_pinned(sys.maxsize)
    module.grow_context({})
    set_total(int(float(os.environ.get("SIMULATED_GIB", "8")) * 2**30))


def set_total(nbytes: int) -> None:
    """Gives every GPU another size, until `reset`."""
    global total_bytes
    total_bytes = nbytes
    for index in range(module.devices()):
        module.set_total(nbytes, index)
        module.cap(nbytes, index)


@dataclass(frozen=True)
class Report:
    """What happened since `reset`. The dictionaries count by what and where ("aten::equal @trainer.py:120")."""

    races: list[str]
    """Accesses that no event orders, memory freed while a stream uses it, host writes under a copy."""
    misplaced: list[str]
    """Operators on a device that is not the thread's current one."""
    host_waits: dict[str, int]
    copies: dict[str, int]
    """All copies between host and GPUs."""
    pageable: dict[str, int]
    """Copies that cannot be asynchronous: from memory that is not pinned, strided, or with a change of dtype."""
    operators: dict[str, int]
    contexts: dict[str, int]
    """Uses of each device, each of which makes a CUDA context there."""
    streams_made: int


def report() -> Report:
    return Report(**module.report())


def live_bytes(device: int = 0) -> int:
    """Bytes allocated on a device now."""
    return int(module.memory(device)[0])


def peak_bytes(device: int = 0) -> int:
    """The most bytes allocated on a device since `torch.cuda.reset_peak_memory_stats`."""
    return int(module.memory(device)[1])


def registered_bytes() -> int:
    """Host memory pinned by cudaHostRegister and not yet unregistered."""
    return int(module.pinned()[0])


def pinned_by_torch_bytes() -> int:
    """Host memory in torch's own cache of pinned memory, used or kept for the next tensor."""
    return int(module.pinned()[1])


def registrations() -> int:
    """How often cudaHostRegister pinned memory since `reset`."""
    return int(module.pinned()[2])


def most_registered_bytes() -> int:
    """The most that was pinned by cudaHostRegister at once since `reset`."""
    return int(module.pinned()[3])


def limit_pinned(nbytes: int) -> None:
    """Refuses to pin more host memory than this. A refused cudaHostRegister returns its error again at the next launch and wait."""
    module.limit_pinned(nbytes)


def grow_context(bytes_of: Mapping[str, int]) -> None:
    """Takes bytes of the GPU for good, beside the allocator, at the first use of each operator ("attention", "aten::convolution")."""
    module.grow_context(dict(bytes_of))


def context_bytes(device: int = 0) -> int:
    """What `grow_context` took until now."""
    return int(module.context(device))


def cap_bytes(device: int = 0) -> int:
    """The limit that was set by torch.cuda.set_per_process_memory_fraction."""
    return int(module.memory(device)[2])


def fail_allocations(after: int, count: int = 1) -> None:
    """Counts allocations from now on and lets those numbered after + 1 to after + count fail with out of memory."""
    module.fail_allocations(after, count)


def _index(device: Any = None) -> int:
    """The number of a device; None or a device without index is the thread's current one."""
    import torch

    if device is None or isinstance(device, int):
        return int(module.get_device()) if device is None or device < 0 else device
    return _index(torch.device(device).index)


class Stream:
    """torch.cuda.Stream as a vector clock."""

    def __init__(self, device: Any = None, priority: int = 0, **given: Any) -> None:
        import torch

        self.stream_id = self.cuda_stream = given["stream_id"] if "stream_id" in given else module.new_stream(_index(device))
        self.device_index, self.device_type, self.priority = module.stream_device(self.stream_id), 1, priority
        self.device = torch.device("cuda", self.device_index)

    def wait_event(self, event: Event) -> None:
        if event.clock is not None:
            module.wait(self.stream_id, event.clock)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        (event := event or Event()).record(self)
        return event

    def synchronize(self) -> None:
        self.record_event().synchronize()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.stream_id == self.stream_id

    def __hash__(self) -> int:
        return hash(self.stream_id)


class Event:
    """torch.cuda.Event: a copy of a stream's clock. One that was never recorded counts as done, as in CUDA."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.clock: list[int] | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.clock = module.record(stream.stream_id if stream else module.get_stream(module.get_device()))

    def wait(self, stream: Stream | None = None) -> None:
        (stream or Stream(stream_id=module.get_stream(module.get_device()))).wait_event(self)

    def synchronize(self) -> None:
        if self.clock is not None:
            module.host_waits_event(self.clock)

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds; nothing takes time on a simulated GPU, and a caller may divide by it."""
        return 1.0


def _replace_torch_cuda(torch: Any, count: int) -> None:
    for place, answers in (
        (torch._C, _core_answers()),
        (torch.cuda, _device_answers(torch, count) | _memory_answers(torch) | _random_answers(torch, count)),
        (torch.cuda.memory, _memory_answers(torch)),
        (torch.cuda.random, _random_answers(torch, count)),
    ):
        for name, answer in answers.items():
            setattr(place, name, answer)
    torch.cuda.memory._lazy_init = torch.cuda.random._lazy_init = torch.cuda._lazy_init
    torch._C._cuda_getDeviceCount = lambda: count
    _replace_storage_copies(torch)


def _exchange_device(device: int) -> int:
    before = int(module.get_device())
    module.set_device(device)
    return before


def _maybe_exchange_device(device: int) -> int:
    """Back to the device of before: no context is made there, if there is none."""
    before = int(module.get_device())
    module.maybe_set_device(device)
    return before


def _core_answers() -> dict[str, Callable[..., Any]]:
    return {
        "_cuda_getCurrentStream": lambda device: (module.get_stream(_index(device)), _index(device), 1),
        "_cuda_getDefaultStream": lambda device: (device, device, 1),
        "_cuda_getCurrentRawStream": module.get_stream,
        "_cuda_setStream": lambda stream_id, device_index, device_type: module.set_stream(stream_id),
        "_cuda_setDevice": module.set_device,
        "_cuda_getDevice": module.get_device,
        "_cuda_exchangeDevice": _exchange_device,
        "_cuda_maybeExchangeDevice": _maybe_exchange_device,
        "_cuda_isCurrentStreamCapturing": lambda: False,
        "_host_emptyCache": module.empty_host_cache,
    }


def _allocator_settings() -> str:
    """As torch 2.13 reads them: the first that is set."""
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    return next((os.environ[name] for name in names if name in os.environ), "")


def _memory_answers(torch: Any) -> dict[str, Callable[..., Any]]:
    refuse_device_without_index = torch.cuda._utils._get_device_index
    return {
        "memory_allocated": lambda device=None: live_bytes(_index(device)),
        "memory_reserved": lambda device=None: live_bytes(_index(device)),
        "max_memory_allocated": lambda device=None: peak_bytes(_index(device)),
        "max_memory_reserved": lambda device=None: peak_bytes(_index(device)),
        "reset_peak_memory_stats": lambda device=None: module.reset_peak(_index(device)),
        "mem_get_info": lambda device=None: (
            total_bytes - live_bytes(_index(device)) - context_bytes(_index(device)),
            total_bytes,
        ),
        "set_per_process_memory_fraction": lambda share, device=None: module.cap(
            int(share * total_bytes), refuse_device_without_index(device)
        ),
        "empty_cache": lambda: None,
        "get_allocator_backend": lambda: "cudaMallocAsync" if "cudaMallocAsync" in _allocator_settings() else "native",
        "memory_snapshot": lambda *_: [{"is_expandable": "expandable_segments:True" in _allocator_settings()}],
    }


def _random_answers(torch: Any, count: int) -> dict[str, Callable[..., Any]]:
    def seed(number: int, *indices: int) -> None:
        for index in indices or range(count):
            module.set_rng(torch.Generator().manual_seed(number).get_state(), index)

    return {
        "get_rng_state": lambda device="cuda": module.rng(_index(device)),
        "set_rng_state": lambda state, device="cuda": module.set_rng(state, _index(device)),
        "manual_seed_all": seed,
        "manual_seed": lambda number: seed(number, module.get_device()),
    }


def _device_answers(torch: Any, count: int) -> dict[str, Any]:
    def properties(device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(
            name=name,
            total_memory=total_bytes,
            major=capability[0],
            minor=capability[1],
            uuid=f"GPU-simulated-{_index(device)}",
            multi_processor_count=10,
        )

    def check_error(code: int) -> None:
        if code:
            raise RuntimeError(f"CUDA error {code} (simulated GPU)")

    cudart = SimpleNamespace(  # CUDA's error codes: 2 no memory, 712 already registered, 713 never registered
        cudaHostRegister=lambda pointer, size, flags: module.register_host(pointer, size),
        cudaHostUnregister=lambda pointer: module.unregister_host(pointer),
    )
    return {
        "_lazy_init": lambda: None,
        "_is_compiled": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "_exchange_device": _exchange_device,
        "_maybe_exchange_device": _maybe_exchange_device,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: capability >= (8, 0),
        "device_count": lambda: count,
        "current_device": module.get_device,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: properties().name,
        "get_device_properties": properties,
        "synchronize": lambda device=None: module.host_waits_all(_index(device)),
        "Stream": Stream,
        "Event": Event,
        "cudart": lambda: cudart,
        "check_error": check_error,
    }


def _replace_storage_copies(torch: Any) -> None:
    """torch.save and torch.load move storages through these."""
    usual_cpu, usual_to = torch.UntypedStorage.cpu, torch.UntypedStorage.to

    def as_bytes(storage: Any) -> Any:
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))

    def cpu(storage: Any) -> Any:
        return as_bytes(storage).cpu().untyped_storage() if storage.device.type == "cuda" else usual_cpu(storage)

    def to(storage: Any, *, device: Any, non_blocking: bool = False) -> Any:
        usual = torch.device(device).type != "cuda"
        return usual_to(storage, device=device, non_blocking=non_blocking) if usual else as_bytes(storage).to(device).untyped_storage()

    torch.UntypedStorage.cpu, torch.UntypedStorage.to = cpu, to
