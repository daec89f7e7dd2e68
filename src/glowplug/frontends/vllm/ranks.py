"""The ranks that run a decoder together: all of them serve it by a program, or none."""

from __future__ import annotations

from typing import Any

import torch

from glowplug.frontends.vllm.private import vllm
from glowplug.verify.check import Agree


def agreement(config: Any) -> Agree | None:
    """Makes the reason of one rank that of all; None for a decoder that one rank runs alone."""
    if config.parallel_config.tensor_parallel_size == 1:
        return None
    group = vllm().get_tp_group()

    def agree(reason: str | None) -> str | None:
        reasons: list[Any] = [None] * group.world_size
        torch.distributed.all_gather_object(reasons, reason, group=group.cpu_group)
        found = [(rank, text) for rank, text in enumerate(reasons) if text is not None]
        return next((text if rank == group.rank_in_group else f"{text} (rank {rank})" for rank, text in found), None)

    return agree
