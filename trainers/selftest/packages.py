"""Optional packages: each is used once as a training uses it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import BytesIO, StringIO

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from ..attention import BACKENDS, Backend, missing_library
from ..errors import MissingPackage
from ..job import OptimizerSpec
from ..offload.compiled import compiled
from ..offload.linear import FrozenLinear
from ..optimizers import build_optimizer, load_optimizer_state
from ..quantise import check_quantiser, quantised
from .lines import Bench, Check, Line, error_text

_GROUP = "optional packages"
_SIDE = 256
_OTHER_OPTIMIZER = 'Set optimizer.kind to "adamw", or update the package.'
_OTHER_ATTENTION = 'Set speed.attention to "auto".'


def _optimizers(bench: Bench) -> Iterator[Line]:
    """One step, then its state saved and loaded into another, then a second step of both."""
    for kind in ("adamw8bit", "prodigy", "adamw_kahan"):
        try:
            with redirect_stdout(StringIO()):  # one of them talks
                line = _optimizer(bench, kind)
        except MissingPackage as error:
            line = Line(kind, "skipped", "is not installed", str(error).rpartition(". ")[2])
        except Exception as error:  # the others may work
            line = Line(kind, "failed", error_text(error), _OTHER_OPTIMIZER)
        yield line


def _optimizer(bench: Bench, kind: str) -> Line:
    spec = OptimizerSpec.model_validate({"kind": kind, "learning_rate": 1.0 if kind == "prodigy" else 1e-2})
    start, device = torch.randn(_SIDE, _SIDE, generator=torch.Generator().manual_seed(0)), bench.device

    def stepped(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        parameter.grad = 0.1 * parameter.detach() + 0.01
        optimizer.step()

    first = nn.Parameter(start.to(device, copy=True))
    optimizer = build_optimizer(spec, [first])
    stepped(first, optimizer)
    file = BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = nn.Parameter(first.detach().clone())
    resumed = build_optimizer(spec, [second])
    load_optimizer_state(resumed, torch.load(file, map_location="cpu", weights_only=True))
    stepped(first, optimizer)
    stepped(second, resumed)
    moved = bool((first.detach().cpu() != start).any())
    same = torch.equal(first, second)
    text = f"{'continues from its saved state' if same else 'differs after loading its saved state'}{'' if moved else ', changes nothing'}"
    return Line(kind, "ok" if same and moved else "failed", text, _OTHER_OPTIMIZER)


def _nf4(bench: Bench) -> Iterator[Line]:
    try:
        check_quantiser("nf4")
    except MissingPackage as error:
        yield Line("nf4 weights", "skipped", "bitsandbytes is not installed", str(error).rpartition(". ")[2])
        return
    weight = torch.randn(_SIDE, _SIDE, generator=torch.Generator().manual_seed(4))
    linear = quantised(weight.to(bench.device), None, "nf4", bench.device)
    dense = linear(torch.eye(_SIDE, device=bench.device)).T.float().cpu()
    off = float((dense - weight).norm() / weight.norm())
    yield Line("nf4 weights", "ok" if off < 0.12 else "failed", f"off by {off:.1%} (9.2 % are usual)", "Update bitsandbytes, or use fp8.")


def _attention_libraries(bench: Bench) -> Iterator[Line]:
    """Those of `speed.attention` that are installed, beside PyTorch's own."""
    found = torch.cuda.get_device_capability(bench.device)
    for name, backend in BACKENDS.items():
        if found < backend.capability:
            needed, here = (".".join(map(str, version)) for version in (backend.capability, found))
            yield Line(name, "skipped", f"needs compute capability {needed}; this GPU has {here}")
        elif missing_library(backend) is not None:
            yield Line(name, "skipped", "is not installed, or not for this GPU", f"Only if you want it: {backend.install}.")
        else:
            try:
                yield _attention_library(bench, name, backend)
            except Exception as error:  # the others may work
                yield Line(name, "failed", error_text(error), _OTHER_ATTENTION)


def _attention_library(bench: Bench, name: str, backend: Backend) -> Line:
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    query, key, value = torch.randn(3, 1, 256, 4, 64, generator=torch.Generator().manual_seed(5)).to(bench.device, bench.dtype)
    wanted = scaled_dot_product_attention(*(part.transpose(1, 2) for part in (query, key, value))).transpose(1, 2)
    found = dispatch_attention_fn(query, key, value, backend=AttentionBackendName(backend.diffusers_name))
    error = float((found - wanted).abs().max() / wanted.abs().max())
    return Line(name, "ok" if error < 3e-2 else "failed", f"as PyTorch's own to {error:.1e}", _OTHER_ATTENTION)


class _Block(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.linear = FrozenLinear(weight)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.nn.functional.gelu(self.linear(rows))
        return result


def _compile(bench: Bench) -> Iterator[Line]:
    """Streamed blocks are given other weights at every call: nothing may be compiled again for that."""
    if find_spec("triton") is None:
        yield Line(
            "compiled blocks", "skipped", "Triton is not installed", "Only if you want speed.compile: pip install triton (triton-windows)"
        )
        return
    from torch._dynamo.utils import counters

    blocks = [_Block(torch.full((64, 64), 0.01 * (number + 1), device=bench.device)) for number in range(3)]
    rows = torch.ones(8, 64, device=bench.device)
    run = [compiled(block) for block in blocks]
    with torch.no_grad():
        first = [float((call(rows) - block(rows)).abs().max()) for call, block in zip(run[:1], blocks[:1], strict=True)]
        compiled_once = counters["stats"]["unique_graphs"]
        others = [float((call(rows) - block(rows)).abs().max()) for call, block in zip(run[1:], blocks[1:], strict=True)]
    again = counters["stats"]["unique_graphs"] - compiled_once
    right = max(first + others) < 1e-3 and not again
    text = f"{again} compilations more for other weights, right to {max(first + others):.1e}"
    yield Line("compiled blocks", "ok" if right else "failed", text, "Leave speed.compile false.")


CHECKS = (
    Check(_GROUP, "optimizers", _optimizers, needs_seconds=3.0),
    Check(_GROUP, "nf4 weights", _nf4),
    Check(_GROUP, "attention libraries", _attention_libraries, gpu_only=True),
    Check(_GROUP, "compiled blocks", _compile, gpu_only=True, needs_seconds=15.0),
)
