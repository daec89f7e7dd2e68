"""Which decoders glowplug serves. Where an option changes what a compiled decoder is, vLLM compiles it."""

from __future__ import annotations

from typing import Any

from glowplug.frontends.vllm.private import vllm


def why_left_alone(decoder: Any) -> str | None:
    """Why a decoder is left to vLLM from the start, in one sentence; None if it is served."""
    config = decoder.vllm_config
    compilation, parallel = config.compilation_config, config.parallel_config
    modes = vllm().CompilationMode
    if compilation.mode not in (modes.DYNAMO_TRACE_ONCE, modes.VLLM_COMPILE):
        return f"it is compiled in mode {compilation.mode!r}"
    if compilation.backend != "inductor":
        return f"its compiler is {compilation.backend!r}"
    if decoder._is_encoder:
        return "encoders are short, and their calls differ in more than the number of tokens"
    if compilation.use_inductor_graph_partition:
        return "Inductor partitions its graph (use_inductor_graph_partition)"
    if compilation.mode == modes.VLLM_COMPILE and not compilation.splitting_ops:
        return "it is compiled as one graph (splitting_ops is empty)"
    if compilation.cudagraph_copy_inputs:
        return "its inputs are copied for CUDA graphs (cudagraph_copy_inputs)"
    shapes = compilation.dynamic_shapes_config
    types = vllm().DynamicShapesType
    if shapes.type not in (types.BACKED, types.BACKED_SIZE_OBLIVIOUS) or shapes.evaluate_guards:
        return "its dynamic_shapes_config is not the default"
    if decoder.layerwise_nvtx_tracing_enabled:
        return "its layers are traced by NVTX"
    if config.lora_config is not None:
        return "LoRA adapters can't be compared on a dummy batch, on which they do nothing"
    for name, what in (("pipeline_parallel_size", "pipeline stages"), ("data_parallel_size", "data parallel ranks")):
        if getattr(parallel, name) > 1:
            return f"it runs in {getattr(parallel, name)} {what}"
    if getattr(parallel, "enable_eplb", False):
        return "expert parallel load balancing moves its experts"
    return None
