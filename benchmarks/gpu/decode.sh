#!/usr/bin/env bash
# Decode steps at full width on a GPU: benchmarks/gpu/decode.sh OUTPUT_FOLDER [MODEL...]
# Writes OUTPUT_FOLDER/MODEL-GPU.json, such as gpt-oss-20b-h200.json, after each measurement.
set -uo pipefail
out=${1:?usage: benchmarks/gpu/decode.sh OUTPUT_FOLDER [MODEL...]}
shift
models=("$@")
[ ${#models[@]} -gt 0 ] || models=(gpt-oss-20b qwen3-30b-a3b glm-4.7)
mkdir -p "$out" || exit
# Where Python may write no bytecode, every process imports torch for half a minute.
unset PYTHONDONTWRITEBYTECODE
export HF_HUB_OFFLINE=1 PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONPYCACHEPREFIX=${TMPDIR:-/tmp}/glowplug-bytecode
gpu=$(python3 -c "import torch; print(torch.cuda.get_device_name().split()[1].lower())") || exit
status=0
for model in "${models[@]}"; do
    strategies=torch-static,stamped-launches,stamped
    [ "$model" != gpt-oss-20b ] || strategies=eager,$strategies
    python3 -m glowplug bench "$model" --device cuda --width full --strategies "$strategies" --timeout "${TIMEOUT_S:-200}" \
        --json "$out/$model-$gpu.json" || status=1
done
exit $status
