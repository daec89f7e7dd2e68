#!/usr/bin/env bash
# Starts on a GPU, with the tests that need one: benchmarks/gpu_starts.sh OUTPUT_FOLDER
set -uo pipefail
out=${1:-benchmarks}
export HF_HUB_OFFLINE=1 PYTHONPATH=src:tests
python3 -c "import torch, transformers; print(torch.__version__, transformers.__version__, torch.cuda.get_device_name())"
timeout 200 python3 -m pytest -q -p no:cacheprovider -n 0 tests/test_elsewhere.py tests/test_cuda.py 2>&1 | tail -15
timeout 330 python3 -m glowplug starts glm-4.7 --depth 12 --width full --device cuda --experts opaque --json "$out/glm-4.7-starts-gpu.json" 2>&1 | tail -40
