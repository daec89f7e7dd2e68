"""Recognises, before any trace, models that can't be compiled at all."""

from __future__ import annotations

from torch import nn

_QUANTIZED = "torch.ao.nn."
"""Package of the modules that `torch.ao.quantization` substitutes. Checked on torch 2.11 and 2.13."""


def unfit(model: nn.Module) -> str | None:
    """Why a model can't be compiled, in one sentence; None if there is no known obstacle."""
    for name, module in model.named_modules():
        where = name or "the model"
        if "_hf_hook" in module.__dict__:  # accelerate's; checked on 1.15
            return (
                "accelerate moves weights or values between devices while the model runs (offloading, or a device_map "
                "of several devices), which a compiled program can't follow; load the model onto one device"
            )
        if type(module).__module__.startswith(_QUANTIZED) and ".quantized" in type(module).__module__:
            return (
                f"{where} was quantized by torch.ao.quantization, whose kernels torch.compile does not trace; quantize "
                "with torchao's quantize_ instead"
            )
        if any(tensor is not None and tensor.is_meta for tensor in module._parameters.values()):
            return f"the weights of {where} are on the meta device and have no values; load the model with its weights"
    return None
