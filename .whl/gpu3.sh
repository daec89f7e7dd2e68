set -uo pipefail
python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site .whl/*.whl || exit
unset PYTHONDONTWRITEBYTECODE
export PYTHONPATH=/tmp/site:src:tests HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONPYCACHEPREFIX=/tmp/pyc
nvidia-smi -L
timeout 185 python3 -m pytest -q -p no:cacheprovider -p no:benchmark --tb=short -rf -n 12 tests/test_cuda.py tests/test_elsewhere.py tests/test_by_pieces.py tests/test_insides.py tests/test_generate.py > $OUT/tests.log 2>&1
grep -v Warning $OUT/tests.log | tail -12 | cut -c1-300
timeout 290 python3 -m glowplug starts glm-4.7 --device cuda --experts opaque --ways eager,cold,warm,background,load,from_pretrained --json $OUT/starts.json 2>&1 | grep -v shards | tail -40
