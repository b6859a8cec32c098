"""The kernels that training rests on: which ones run, whether they are right, and how long one launch of them is."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import conv3d, rms_norm, scaled_dot_product_attention

from ..family import Family, Trial, families
from ..machine import size_text
from ..offload.packing import dequantise
from ..quantise import fp8_by_rows
from ..rates import finish, seconds_of
from .lines import Bench, Check, Line, State

_GROUP = "kernels"
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of the largest value."""
_FEW_TOKENS, _MOST_TOKENS = 128, 4096
_UNHURRIED_SECONDS = 0.03
_PIXELS, _FRAMES = 768, 81


def _attention(bench: Bench) -> Iterator[Line]:
    for family in families().values():
        for masked in (False, True) if family.trial.masked else (False,):
            yield _attention_of(bench, family, masked)


def _attention_of(bench: Bench, family: Family, masked: bool) -> Line:
    device, dtype = bench.device, bench.dtypes_of(family)[0]
    name = f"attention {family.id}{', mask' if masked else ''}"
    tokens = _affordable_tokens(family.trial, device, dtype)
    parts = _parts(family.trial, tokens, device, dtype)
    mask = torch.arange(tokens, device=device).view(1, 1, 1, -1) < 7 * tokens // 8 if masked else None
    error = _attention_error(parts, mask)
    query, key, value = parts
    output = scaled_dot_product_attention(query, key, value, mask)
    gradient = torch.ones_like(output)
    forward = seconds_of(lambda: scaled_dot_product_attention(query, key, value, mask), device)
    backward = seconds_of(lambda: torch.autograd.grad(output, parts, gradient, retain_graph=True), device)
    if not error <= _TOLERANCE[dtype]:
        return Line(name, "failed", f"off by {error:.1%} of the largest value", 'Update PyTorch, or set speed.attention to "xformers".')
    largest = _tokens_of(family)
    launch = backward * (largest / tokens) ** 2
    kernel = _kernel(query, key, value, mask)
    text = f"{kernel}, right to {error:.1e}, {1000 * (forward + backward):.3g} ms for {tokens} tokens"
    if bench.on_gpu and not masked:
        text += f"; one launch of {largest} tokens {launch:.2g} s"
    state: State = "slow" if bench.on_gpu and kernel == "math" else "ok"
    remedy = "This PyTorch has no fast attention for this GPU, which needs memory for all pairs of tokens: install another PyTorch."
    return Line(name, state, text, remedy)


def _parts(trial: Trial, tokens: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key and value."""
    shape, generator = (1, trial.heads, tokens, trial.head_width), torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)]


def _affordable_tokens(trial: Trial, device: torch.device, dtype: torch.dtype) -> int:
    """As many as a device attends to in a moment: a multiple of 128."""
    query, key, value = _parts(trial, _FEW_TOKENS, device, dtype)
    seconds = seconds_of(lambda: scaled_dot_product_attention(query, key, value), device, at_least=0.0)
    times = int((_UNHURRIED_SECONDS / seconds) ** 0.5)
    return min(max(times, 1) * _FEW_TOKENS, _MOST_TOKENS)


def _attention_error(parts: list[torch.Tensor], mask: torch.Tensor | None) -> float:
    """Output and gradients beside float32's, relative to the largest value: of a few heads, since all pairs of tokens are there."""
    few = [part[:, :2, :1024].detach().requires_grad_() for part in parts]
    exact = [part.detach().float().requires_grad_() for part in few]
    mask = None if mask is None else mask[..., -few[0].shape[2] :]  # its end, where some is masked
    found = scaled_dot_product_attention(few[0], few[1], few[2], mask)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = scaled_dot_product_attention(exact[0], exact[1], exact[2], mask)
    pairs = [(found, wanted)]
    weights = torch.linspace(-1, 1, wanted.numel(), device=wanted.device).view(wanted.shape)
    gradients = torch.autograd.grad((found.float() * weights).sum(), few), torch.autograd.grad((wanted * weights).sum(), exact)
    pairs += zip(*gradients, strict=True)
    return max(_error(one, other) for one, other in pairs)


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, of the largest value; infinite for not-a-number."""
    difference = float((found.float() - wanted.float()).abs().max() / wanted.abs().max())
    return difference if difference == difference else float("inf")


def _kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> str:
    """Which of PyTorch's kernels takes it."""
    try:
        chosen = torch._fused_sdp_choice(query, key, value, mask, 0.0, False)
        return SDPBackend(chosen).name.lower().replace("_attention", "").replace("_", " ")
    except (RuntimeError, ValueError, AttributeError):
        return "a kernel of its own"


def _tokens_of(family: Family) -> int:
    """Of a clip of 768x768 pixels and 81 frames, or what of it the model takes."""
    spec = family.latent(family.variants[0])
    side = _PIXELS // spec.spatial_step * spec.spatial_step
    return spec.tokens(spec.floor_num_frames(_FRAMES), side, side)


def _quantised(bench: Bench) -> Iterator[Line]:
    device, dtype = bench.device, bench.dtype
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(1))
    stored, scale = fp8_by_rows(weight)
    wanted = dequantise(stored, scale, dtype)
    on_device = stored.to(device), scale.to(device)
    found = dequantise(*on_device, dtype)
    same = torch.equal(found.cpu(), wanted)
    rate = weight.numel() / seconds_of(lambda: dequantise(*on_device, dtype), device)
    text = f"{'as on the CPU' if same else 'other bits than on the CPU'}, {rate / 1e9:.3g} billion weights a second"
    yield Line("fp8 weights", "ok" if same else "failed", text, "Train on the bf16 file.")


def _norm(bench: Bench) -> Iterator[Line]:
    device, dtype = bench.device, bench.dtype
    rows = torch.randn(256, 2048, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    wanted = rows.float() * torch.rsqrt(rows.float().square().mean(-1, keepdim=True) + 1e-6)
    error = _error(rms_norm(rows, (2048,), eps=1e-6), wanted)
    fused = "one kernel" if hasattr(torch.ops.aten, "_fused_rms_norm") else "several kernels"
    right = error <= _TOLERANCE[dtype]
    yield Line("RMS norm", "ok" if right else "failed", f"{fused}, right to {error:.1e}", "Update PyTorch.")


def _convolution(bench: Bench) -> Iterator[Line]:
    """The widest layer of a VAE's decoder, in float32 as previews are decoded; what cuDNN takes beside its input and output."""
    device, (channels, side) = bench.device, (384, 64) if bench.on_gpu else (16, 16)
    generator = torch.Generator().manual_seed(3)
    video = torch.randn(1, channels, 3, side, side, generator=generator).to(device)
    weight = (torch.randn(channels, channels, 3, 3, 3, generator=generator) / (27 * channels) ** 0.5).to(device)
    if bench.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if bench.on_gpu else 0
    found = conv3d(video, weight, padding=1)
    finish(device)
    beside = torch.cuda.max_memory_allocated(device) - before - found.nbytes if bench.on_gpu else 0
    middle = slice(side // 2 - 1, side // 2 + 2)
    wanted = (video[0, :, :, middle, middle].cpu().double() * weight.cpu().double()).sum((1, 2, 3, 4))
    error = _error(found[0, :, 1, side // 2, side // 2].cpu(), wanted)
    text = f"right to {error:.1e}" + (f", takes {size_text(max(beside, 0))} beside its output" if bench.on_gpu else "")
    yield Line("Conv3d float32", "ok" if error <= 1e-2 else "failed", text, "Leave previews out (previews.every_steps = 0), and report it.")


CHECKS = (
    Check(_GROUP, "attention", _attention, needs_seconds=3.0),
    Check(_GROUP, "fp8 weights", _quantised),
    Check(_GROUP, "RMS norm", _norm),
    Check(_GROUP, "Conv3d float32", _convolution),
)
