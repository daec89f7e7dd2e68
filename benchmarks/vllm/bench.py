"""Starts of vLLM with and without glowplug's plug-in, on dummy weights at real width.

    python benchmarks/vllm/bench.py glm-4.7 qwen3-30b-a3b gpt-oss-120b --json records.json
    SCALE=0.3 python benchmarks/vllm/bench.py qwen3-moe-tiny --starts vllm,glowplug,eager --settings \
        '{"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "gpu_memory_utilization": 0.2}'

Each start is a fresh process: "cold" with empty caches, "warm" with those of the cold start before it. On a CPU vLLM
does not say how long it compiled: take the difference of `ready_s` and that of the eager start.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from models import write_folder

HERE = Path(__file__).parent
TIMEOUT_S = 900
"""How long a start may take."""
LINES = {
    "dynamo_s": r"Dynamo bytecode transform time: ([\d.]+) s",
    "graph_compile_s": r"Compiling a graph for compile range .* takes ([\d.]+) s",
    "profiling_run_s": r"Initial profiling/warmup run took ([\d.]+) s",
    "capture_s": r"Graph capturing finished in ([\d.]+) secs",
    "capture_gib": r"Graph capturing finished in [\d.]+ secs, took (-?[\d.]+) GiB",
    "kv_cache_tokens": r"GPU KV cache size: ([\d,]+) tokens",
    "engine_s": r"init engine .* took ([\d.]+) s",
}
SAID = re.compile(r"glowplug: .*")


def start(folder: Path, caches: Path, *, plugin: bool, settings: dict[str, Any], log: Path) -> dict[str, Any]:
    """One start in a fresh process."""
    environment = os.environ | {
        "GLOWPLUG_VLLM": "1" if plugin else "0",
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    command = [sys.executable, str(HERE / "worker.py"), str(folder), json.dumps(settings)]
    begin = time.perf_counter()
    with log.open("w") as output:  # no pipe: a process that vLLM leaves behind would keep it open
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    record: dict[str, Any] = {"process_s": round(time.perf_counter() - begin, 1)}
    printed = log.read_text()
    for name, pattern in LINES.items():
        found = re.findall(pattern, printed)
        if found:
            record[name] = float(found[-1].replace(",", ""))
    record["said"] = SAID.findall(printed)
    result = re.findall(r"^RECORD (.*)$", printed, re.MULTILINE)
    if not result:
        return record | {"failed": printed[-1500:]}
    return record | json.loads(result[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="+", help="glm-4.7, qwen3-30b-a3b, gpt-oss-120b or gpt-oss-20b")
    parser.add_argument("--depth", type=int, help="number of layers, in the place of the preset's")
    parser.add_argument("--ways", default="cold,warm", help="cold, warm, or both")
    parser.add_argument("--starts", default="vllm,glowplug", help="of vllm, glowplug, and eager (--enforce-eager)")
    parser.add_argument("--settings", default="{}", help="JSON of further engine arguments")
    parser.add_argument("--json", type=Path, help="file for the records")
    parser.add_argument("--logs", type=Path, help="folder for the logs")
    args = parser.parse_args()
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        logs = args.logs or Path(temporary)
        logs.mkdir(parents=True, exist_ok=True)
        for preset in args.presets:
            folder = write_folder(preset, args.depth, Path(temporary))
            for choice in args.starts.split(","):
                caches = Path(temporary) / f"{preset}-{choice}"
                for way in args.ways.split(","):
                    log = logs / f"{preset}-{choice}-{way}.log"
                    settings = {"enforce_eager": choice == "eager", **json.loads(args.settings)}
                    record = start(folder, caches, plugin=choice == "glowplug", settings=settings, log=log)
                    records.append({"preset": preset, "start": choice, "way": way, **record})
                    shown = {name: value for name, value in records[-1].items() if name != "tokens_of_prompts"}
                    print(json.dumps(shown), flush=True)
                    if args.json is not None:
                        args.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
