set -uo pipefail
python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site .whl/*.whl || exit
env | grep -i ^python; unset PYTHONDONTWRITEBYTECODE
export PYTHONPATH=/tmp/site:src:tests HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONPYCACHEPREFIX=/tmp/pyc
nvidia-smi -L; for i in 1 2; do time python3 -c "import torch, transformers, torch._inductor.compile_fx; print(torch.__version__, transformers.__version__)"; done
timeout 200 python3 -m pytest -q -p no:cacheprovider -p no:benchmark --tb=short -rf -n 14 tests/test_cuda.py tests/test_warm.py tests/test_elsewhere.py tests/test_store_faults.py tests/test_starts.py tests/test_ends.py tests/test_insides.py tests/test_attention_insides.py tests/test_generate.py > $OUT/tests.log 2>&1
grep -v Warning $OUT/tests.log | tail -25 | cut -c1-300
timeout 330 python3 -m glowplug starts glm-4.7 --device cuda --experts opaque --json $OUT/starts.json 2>&1 | grep -v shards | tail -40
