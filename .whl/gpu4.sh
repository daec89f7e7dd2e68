set -uo pipefail
python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site .whl/*.whl || exit
unset PYTHONDONTWRITEBYTECODE
export PYTHONPATH=/tmp/site:src:tests HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONPYCACHEPREFIX=/tmp/pyc
nvidia-smi -L
for i in 1 2; do time python3 -c "import torch, transformers, torch._inductor.compile_fx; print(torch.__version__, transformers.__version__)"; done
timeout 500 python3 -m glowplug starts glm-4.7 --device cuda --experts opaque --rounds 3 --json $OUT/starts.json 2>&1 | grep -v shards | tail -40
