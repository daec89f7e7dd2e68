"""A build in a process of its own: `python -m glowplug.hf.build_process '<json>'`. Leaves `result.json` in the folder
that it is given, beside the model's configuration.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers.utils import logging

from glowplug.compilers.fork import leave
from glowplug.hf.background import RESULT, attempt
from glowplug.hf.bake import bake
from glowplug.hf.weightless import read_config, weightless_model
from glowplug.options import Options
from glowplug.report import Report


def main(arguments: list[str]) -> int:
    """Build what the one argument asks for."""
    asked = json.loads(arguments[0])
    logging.set_verbosity_error()
    folder = Path(asked["folder"])

    def build() -> Report:
        model = weightless_model(
            read_config(folder),
            dtype=getattr(torch, asked["dtype"]),
            device=torch.device(asked["device"]),
            **asked["settings"],
        )
        return bake(model, Options(**asked["options"]), insides=False)

    leave(folder / RESULT, attempt(build).to_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
