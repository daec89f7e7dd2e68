#!/usr/bin/env bash
# Starts on a GPU, and the tests that need one: benchmarks/gpu_starts.sh OUTPUT_FOLDER
set -uo pipefail
out=${1:-benchmarks}
# Where Python may write no bytecode, every process imports torch for half a minute.
unset PYTHONDONTWRITEBYTECODE
export HF_HUB_OFFLINE=1 PYTHONPATH=src:tests${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONPYCACHEPREFIX=${TMPDIR:-/tmp}/glowplug-bytecode
python3 -c "import torch, transformers; print(torch.__version__, transformers.__version__, torch.cuda.get_device_name())"
timeout 540 python3 -m pytest -q -p no:cacheprovider tests/test_cuda.py tests/test_warm.py tests/test_elsewhere.py 2>&1 | tail -8
# In bfloat16 92 layers of random weights round to anything; float32 shows that the tokens are eager's.
timeout 300 python3 -m glowplug starts glm-4.7 --device cuda --dtype float32 --experts opaque --json "$out/glm-4.7-starts-tiny-gpu.json" 2>&1 | tail -40
