#!/usr/bin/env bash
# Starts on a GPU, with the tests that need one: benchmarks/gpu_starts.sh OUTPUT_FOLDER
set -uo pipefail
out=${1:-benchmarks}
export HF_HUB_OFFLINE=1 PYTHONPATH=src:tests PYTHONUNBUFFERED=1
python3 -c "import torch, transformers; print(torch.__version__, transformers.__version__, torch.cuda.get_device_name())"
timeout 150 python3 -m pytest -q -p no:cacheprovider -n 0 tests/test_warm.py tests/test_elsewhere.py 2>&1 | tail -8
timeout 60 python3 -m pytest -q -p no:cacheprovider -n 0 tests/test_cuda.py 2>&1 | tail -4
timeout 330 python3 -m glowplug starts glm-4.7 --device cuda --experts opaque --json "$out/glm-4.7-starts-tiny-gpu.json" 2>&1 | tail -40
