"""Matrix products that keep bf16 fast on processors without bf16 units.

PyTorch multiplies bf16 matrices on such a CPU with a scalar loop, some thirty times slower than fp32. A bf16
product accumulates in fp32 and rounds once anyway, so there the operands are widened, multiplied in fp32 and
the result is rounded to bf16: the same mathematics at the speed of fp32. Wherever the hardware multiplies bf16
(GPUs, CPUs with AVX-512 or AMX) nothing is widened.

Axis letters (the legend of the whole project): T tokens, D model width, F expert FFN width, G = 2F (gate beside
value), E experts of all kinds (in the weights of FFN experts, those), J constant experts, K chosen per token, N
= T*K assignments, R those of them that FFN experts keep, Q the rows that a rank's FFN experts work on (R where
it owns all), C seats per expert, M places in a token's list of experts (K, or E with a threshold), L MoE
layers, P ranks that share experts, V vocabulary, B rows, S sequence, H heads, A head width. X, Y and O stand
for any width (O goes out). A digit is an axis of that length; S1 is S + 1.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moepp_ds.blocks import row_blocks


@lru_cache(maxsize=None)
def _cpu_multiplies_bf16() -> bool:
    """A fact about the processor; cached because asking costs more than a small product."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@lru_cache(maxsize=None)
def _cpu_is_amd() -> bool:
    """Likewise."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which products of `tensor` are fastest without losing precision: its own, or fp32."""
    slow = tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16 and not _cpu_multiplies_bf16()
    return torch.float32 if slow else tensor.dtype


def multiply(left_XY: Tensor, right_YO: Tensor, *, out: Tensor | None = None) -> Tensor:
    """left @ right for operators that know their own gradients, rounded into `out` if it is given; there is no graph.

    PyTorch multiplies fp32 on a CPU with MKL, whose fastest kernels are for Intel's processors. On AMD's oneDNN, which
    PyTorch brings as well, is 1.2 to 1.4 times as fast, three times for some tens of rows (two cores of Zen 4).
    """
    is_fp32_on_cpu = left_XY.device.type == "cpu" and left_XY.dtype == right_YO.dtype == torch.float32
    if is_fp32_on_cpu and _cpu_is_amd() and torch.backends.mkldnn.enabled and left_XY.numel() and right_YO.numel():
        product_XO = torch.ops.mkldnn._linear_pointwise(left_XY, right_YO.t(), None, "none", [], "")
    elif out is not None and out.dtype == left_XY.dtype:
        return torch.mm(left_XY, right_YO, out=out)
    else:
        product_XO = left_XY @ right_YO
    return product_XO if out is None else out.copy_(product_XO)


def linear(x: Tensor, weight_OX: Tensor) -> Tensor:
    """x [..., X] times weight [O, X] transposed, in the dtype of x; widened where that is faster."""
    dtype = product_dtype(x)
    return torch.nn.functional.linear(x.to(dtype), weight_OX.to(dtype)).to(x.dtype)


def wide_linear(x_TX: Tensor, weight_OX: Tensor) -> Tensor:
    """x weight^T in fp32 at least, also under autocast, [T, O]; what is kept of x is x, not its wide copy."""
    return _WideLinear.apply(x_TX, weight_OX)


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TX: Tensor, weight_OX: Tensor) -> Tensor:
        ctx.save_for_backward(x_TX, weight_OX)
        dtype = torch.promote_types(x_TX.dtype, torch.float32)
        wide_OX, out_TO = weight_OX.to(dtype), x_TX.new_empty(len(x_TX), len(weight_OX), dtype=dtype)
        with torch.autocast(x_TX.device.type, enabled=False):
            for at in row_blocks(x_TX.shape, x_TX.device):
                torch.mm(x_TX[at].to(dtype), wide_OX.t(), out=out_TO[at])
        return out_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TO,) = gradients
        x_TX, weight_OX = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad
        wide_OX = weight_OX.to(grad_TO.dtype)
        of_x_TX = torch.empty_like(x_TX) if of_x else None
        of_weight_OX = torch.zeros_like(wide_OX) if of_weight else None
        with torch.autocast(x_TX.device.type, enabled=False):
            for at in row_blocks(x_TX.shape, x_TX.device):
                if of_x_TX is not None:
                    of_x_TX[at] = grad_TO[at] @ wide_OX
                if of_weight_OX is not None:
                    of_weight_OX.addmm_(grad_TO[at].t(), x_TX[at].to(grad_TO.dtype))
        return of_x_TX, None if of_weight_OX is None else of_weight_OX.to(weight_OX.dtype)
