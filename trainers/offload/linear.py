"""A Linear that is frozen and kept in the bytes it is stored in: 16 bit, fp8 with its scale, or packed.

Shape suffixes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from .packing import AS_STORED, Packing, known
from .product import FrozenProduct, define_operators, opaque_product
from .unread import are_outputs_unread


class FrozenLinear(nn.Linear):
    """y = x W^T + b with a weight that is never trained, and is dequantised for each use and dropped again.

    Nothing is saved for the backward pass, neither the input nor the weight: the gradient of the input reads the tensors
    that the module has by then (they may have been streamed out and in, by `bind`). It is bit for bit that of an nn.Linear
    that holds the dequantised weight. Computes in the dtype of the input, or of autocast.

    The weight keeps its stored dtype through `.to(dtype)`, `.half()` and the like; its device and the bias move. What lies
    beside the weight (scales) is no part of the state dict: a state dict holds what is stored, and is not the way to copy
    this module. An adapter must not take its dtype from `weight`: peft does, so its parameters must be made float32 afterwards.
    """

    ends_block = False
    """Whether nothing asks for the product when nobody reads what the block returns."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None, scale: torch.Tensor | None = None) -> None:
        """Takes the tensors as they are, without a copy; `scale` is float32, one number or (O, 1)."""
        number = scale.detach().reshape(()).to("cpu", torch.float32) if scale is not None and scale.numel() == 1 else None
        beside = {} if scale is None or number is not None else {"scale": scale}
        self._begin({"weight": weight_OI, **beside}, (weight_OI.shape[0], weight_OI.shape[1]), AS_STORED, bias_O, number)

    @classmethod
    def packed(
        cls, tensors: Mapping[str, torch.Tensor], shape_OI: tuple[int, int], packing: Packing, bias_O: torch.Tensor | None = None
    ) -> FrozenLinear:
        """A Linear whose "weight" in `tensors` is bytes of which `packing` makes the dense (O, I), with all `tensors` in their order."""
        linear = cls.__new__(cls)
        linear._begin(tensors, shape_OI, packing, bias_O, None)
        return linear

    def _begin(
        self,
        tensors: Mapping[str, torch.Tensor],
        shape_OI: tuple[int, int],
        packing: Packing,
        bias_O: torch.Tensor | None,
        number: torch.Tensor | None,
    ) -> None:
        define_operators()  # before any compiler runs: none can do it while it traces
        super().__init__(shape_OI[1], shape_OI[0], bias=bias_O is not None, device="meta")
        self.weight = nn.Parameter(tensors["weight"], requires_grad=False)
        if bias_O is not None:
            self.bias = nn.Parameter(bias_O, requires_grad=False)
        self._beside = {name: tensor for name, tensor in tensors.items() if name != "weight"}
        self._number = number
        self._packing = known(packing)

    @property
    def scale(self) -> float | torch.Tensor | None:
        """What the stored weight is multiplied with: one number, or (O, 1)."""
        return self._beside.get("scale") if self._number is None else float(self._number)

    def stored_tensors(self) -> dict[str, torch.Tensor]:
        """By name, every tensor that must be on the device for the product (the bias apart): `bind` takes the like."""
        return {"weight": self.weight.data, **self._beside}

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes other tensors of the same names, shapes and dtypes in place of the present ones, without a copy.

        They may be parts of a buffer that is filled again later: a write to one part does not count as a change of the others.
        """
        self._parameters["weight"] = nn.Parameter(tensors["weight"].data, requires_grad=False)
        for name in self._beside:
            self._beside[name] = tensors[name].data

    def operands(self) -> list[torch.Tensor]:
        """What the packing decodes: the stored tensors, and a scale that is one number, as a tensor on the CPU."""
        return [self.weight.detach(), *self._beside.values(), *(() if self._number is None else (self._number,))]

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The dequantised weight (O, I): a new tensor, or the stored one when it needs no change."""
        return self._packing.decode(self.operands(), (self.out_features, self.in_features), dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        device = input.device.type
        is_autocast = device != "meta" and torch.is_autocast_enabled(device)  # which torch cannot tell of meta
        dtype = torch.get_autocast_dtype(device) if is_autocast else input.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        if torch.compiler.is_compiling():
            return opaque_product(input.to(dtype), self.operands(), bias, self._packing.name, (self.out_features, self.in_features))
        unread = self.out_features if self.ends_block and are_outputs_unread() else None
        output: torch.Tensor = FrozenProduct.apply(input.to(dtype), self.dense_weight, bias, unread)  # type: ignore[no-untyped-call]
        return output

    def extra_repr(self) -> str:
        kept = self._packing.name if self.weight.dtype == torch.uint8 else self.weight.dtype
        return f"{super().extra_repr()}, stored={kept}, scale={'no' if self.scale is None else 'yes'}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FrozenLinear:
        """Moves the stored tensors where `fn` moves tensors, in their own dtypes."""
        weight = self._parameters["weight"]
        assert weight is not None
        self._parameters["weight"] = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0, device=weight.device)).device
        moved = _moved(weight, device)
        self._parameters["weight"] = weight if moved is weight else nn.Parameter(moved, requires_grad=False)
        self._beside = {name: _moved(tensor, device) for name, tensor in self._beside.items()}
        return self


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
