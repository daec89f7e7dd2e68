"""A build in a process of its own: `python -m glowplug.hf.build_process '<json>'`. Leaves `result.json` in the folder
that it is given, beside the model's configuration and the switches of the process that asks for it.
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from glowplug.compilers.environment import set_switches
from glowplug.hf.background import CONFIG, SWITCHES, attempt
from glowplug.hf.bake import bake
from glowplug.hf.build import Builder
from glowplug.hf.weightless import read_config, weightless_model
from glowplug.options import Options


def main(arguments: list[str]) -> int:
    """Build what the one argument asks for."""
    asked = json.loads(arguments[0])
    logging.set_verbosity_error()
    folder = Path(asked["folder"])

    def build() -> Builder:
        set_switches((folder / SWITCHES).read_bytes())
        model = weightless_model(
            _config(folder),
            dtype=getattr(torch, asked["dtype"]),
            device=torch.device(asked["device"]),
            **asked["settings"],
        )
        return bake(model, Options(**asked["options"]), bodies=False)

    attempt(build, folder)
    return 0


def _config(folder: Path) -> PreTrainedConfig:
    try:
        found: PreTrainedConfig = pickle.loads((folder / CONFIG).read_bytes())
        return found
    except Exception:  # its class is not to be had here, or it has no such form
        return read_config(folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
