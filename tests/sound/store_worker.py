"""Starts a tiny model with a store, in a process of its own: `python store_worker.py STORE LOG [OPTION]`."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import resource
import signal
import sys
from pathlib import Path

import torch

from families import build, prompt
from storing import PickleCompiler, Start


def main(store: str, log: str, *options: str) -> None:
    """Print what came of a start, as JSON."""
    torch.set_num_threads(1)
    print("ready", flush=True)
    if "small files" in options:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    ids = prompt(tokens=5)
    compiler = None if "slow" not in options else _Slow(Path(log))
    start = Start(build("qwen3"), store, ids, compiler=compiler or PickleCompiler(Path(log)))
    with torch.no_grad():
        eager = build("qwen3")(ids, use_cache=False).logits
    told = {"equal": torch.equal(start.logits, eager), "start": start.report.start, "problems": start.problems}
    print(json.dumps(told | {"compiled": start.compiler.compiled}), flush=True)


class _Slow(PickleCompiler):
    """Takes its time, so that another process meets it at work."""

    def compile(self, piece, inputs):  # type: ignore[no-untyped-def]
        import time

        time.sleep(0.5)
        return super().compile(piece, inputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
