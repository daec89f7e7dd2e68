set -uo pipefail
python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site .whl/*.whl || exit
export PYTHONPATH=/tmp/site:src:tests HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
nvidia-smi -L; python3 -c "import torch, transformers; print(torch.__version__, transformers.__version__)"
t0=$(date +%s)
python3 -c "
from glowplug.bench.starts import model_folder; from pathlib import Path
model_folder('glm-4.7', 92, 'tiny', 'cuda', Path('/tmp/m'))"
echo "model $(( $(date +%s)-t0 )) s"
for way in eager cold warm background from_pretrained load; do
  store=$way; [ $way = warm ] && store=cold
  t0=$(date +%s)
  GLOWPLUG_CACHE=/tmp/store-$store TORCHINDUCTOR_CACHE_DIR=/tmp/ti-$way TRITON_CACHE_DIR=/tmp/tr-$way timeout -s ABRT 75 \
    python3 -X faulthandler -m glowplug.bench.start_worker "{\"folder\":\"/tmp/m\",\"way\":\"$way\",\"experts\":\"opaque\",\"device\":\"cuda\",\"dtype\":\"bfloat16\"}" > $OUT/$way.log 2>&1
  echo "== $way rc $? $(( $(date +%s)-t0 )) s"; grep -v '^ *File' $OUT/$way.log | tail -1 | cut -c1-700
done
timeout 190 python3 -m pytest -q -p no:cacheprovider -n 14 tests/test_cuda.py tests/test_warm.py tests/test_elsewhere.py tests/test_store_faults.py tests/test_starts.py tests/test_ends.py tests/test_insides.py tests/test_attention_insides.py tests/test_generate.py 2>&1 | tail -40 | tee $OUT/tests.log
