"""Seconds of one start, from `glowplug.compile` to the second token, and its phases, in a fresh process.

    python benchmarks/gpu/start.py gpt-oss-20b                              # cold: full width, nothing stored
    python benchmarks/gpu/start.py glm-4.7 --width tiny --store FOLDER      # cold, then warm

Give each process empty caches (`TORCHINDUCTOR_CACHE_DIR`, `TRITON_CACHE_DIR`), and compare versions in turns on one
host. Eager has run before, as in `glowplug bench`, unless `--fresh`.
"""

from __future__ import annotations

import argparse
import time

import torch

import glowplug
from glowplug.bench.presets import build_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", help="a name of `glowplug bench`")
    parser.add_argument("--width", choices=("tiny", "full"), default="full")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--store", default="off", help="a folder for the artifact store")
    parser.add_argument("--fresh", action="store_true", help="run nothing before")
    args = parser.parse_args()
    dtype = torch.float32 if args.width == "tiny" else torch.bfloat16
    model = build_model(args.preset, width=args.width, device=torch.device(args.device), dtype=dtype)
    ids = torch.randint(200, (1, 16), generator=torch.Generator().manual_seed(0)).to(args.device)

    def two_tokens() -> None:
        model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        torch.accelerator.synchronize() if args.device == "cuda" else None

    if not args.fresh:
        two_tokens()
    begin = time.perf_counter()
    glowplug.compile(model, cache_dir=args.store)
    two_tokens()
    seconds, report = time.perf_counter() - begin, glowplug.report(model)
    phases = ", ".join(f"{name} {spent:.2f}" for name, spent in report.phases.items() if spent >= 0.05)
    print(f"{args.preset}, {args.width}: {report.start} start, {seconds:.2f} s ({phases})")


if __name__ == "__main__":
    main()
