#!/usr/bin/env bash
# What a CPU cannot say about families of models, on one GPU: `bash scripts/gpu_models.sh [FOLDER]`. Each part has a time limit,
# 8 minutes for the tests and 5 for the speed of the hybrid pair; logs and results go to FOLDER (default: outputs/gpu_models).
# The families with experts need vLLM's _moe_C_stable_libtorch.abi3.so and are skipped without.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-outputs/gpu_models}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# Engines are tiny and eager; half a minute each, most of it the host's. What no CPU runs comes first.
timeout 480 python -m pytest -v -m gpu -n 5 --tb=short --durations=0 -p no:cacheprovider tests/test_families.py 2>&1 | tee "$out/families.log"
tests=${PIPESTATUS[0]}

# Three engines that take turns: the pair, and each of its models alone. A request's states are 50 MB. Without FlashInfer vLLM
# needs to be told.
python -c "import flashinfer" 2>/dev/null && kernel=auto || kernel=triton
kwargs="{\"gdn_prefill_backend\": \"$kernel\", \"kv_cache_memory_bytes\": 17179869184}"
timeout 330 python benchmarks/speculation.py --pair Qwen3.5-4B+Qwen3.5-0.8B --drafts 0 --batch-sizes 8 32 128 \
  --new-tokens 256 --repeats 3 --engine-kwargs "$kwargs" --output "$out" 2>&1 | tee "$out/speed.log"
speed=${PIPESTATUS[0]}
echo "families: exit status $tests; speed: exit status $speed"
exit $((tests || speed))
