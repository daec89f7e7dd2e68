set -uo pipefail
python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site .whl/*.whl || exit
unset PYTHONDONTWRITEBYTECODE
export PYTHONPATH=/tmp/site:src:tests HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONPYCACHEPREFIX=/tmp/pyc
nvidia-smi -L
python3 -c "import torch, transformers, torch._inductor.compile_fx; print(torch.__version__, transformers.__version__)"
timeout 250 python3 -m glowplug starts glm-4.7 --device cuda --dtype float32 --experts opaque --json $OUT/glm-4.7-starts-tiny-gpu.json 2>&1 | grep -v shards | tail -40
timeout 330 python3 -m glowplug starts glm-4.7 --depth 24 --width full --device cuda --experts opaque --json $OUT/glm-4.7-starts-full-gpu.json 2>&1 | grep -v shards | tail -40
