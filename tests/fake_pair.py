"""A pair without models, whose draws depend on the seed and the prompts alone and take microseconds.

``python -m tests.fake_pair generate --flags`` is `osd generate` with it, for tests that start and kill processes.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch

from osd.core import TokenRecord
from tests.draws import draw
from tests.tiny import save_tokenizer

LONGEST_PROMPT = 40


@cache
def tokenizer():
    with tempfile.TemporaryDirectory() as folder:
        return save_tokenizer(Path(folder), 64)


class FakePair:
    """Replaces `osd.data.pair.EnginePair`; `started` counts the calls of `sample`."""

    started = 0

    def __init__(self, settings, seconds=0.0, fails=()):
        self.settings, self.seconds, self.fails = settings, seconds, fails
        self.teacher_tokenizer, self.student_tokenizer = (copy.copy(tokenizer()) for _ in range(2))
        self.sizes = []

    def refusal(self, request, sampling):
        longest = max(len(request.teacher.token_ids), len(request.student.token_ids))
        return f"the prompt has {longest} tokens" if longest > LONGEST_PROMPT else None

    def sample(self, requests, sampling, *, alpha=None, mixing=None, on_finished=None):
        FakePair.started += 1
        self.sizes.append(len(requests))
        time.sleep(self.seconds)
        completions = []
        for request in requests:
            completion = self._completion(request, sampling, alpha, mixing)
            completions.append(completion)
            if on_finished is not None:
                on_finished(len(completion.token_ids))
        return completions

    def _completion(self, request, sampling, alpha, mixing):
        ids, rows = draw(request.seed, request.teacher.token_ids, request.student.token_ids, sampling["max_tokens"])
        return SimpleNamespace(
            token_ids=ids,
            text=self.teacher_tokenizer.decode(ids),
            finish_reason="length" if len(ids) == sampling["max_tokens"] else "stop",
            error="NaN in the student's logits" if request.row.id in self.fails else None,
            record=TokenRecord(values_TR=torch.tensor(rows), teacher_hidden_TH=None, weights_version=0),
            weights_version=0,
        )

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        pass


if __name__ == "__main__":
    from osd import cli
    from osd.data import pair

    pair.EnginePair = lambda settings: FakePair(settings, seconds=float(os.environ.get("FAKE_SECONDS", "0")))  # type: ignore
    cli.main(sys.argv[1:])
