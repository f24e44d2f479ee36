"""Data made up for the tests of the pages: completions with their records, and the metrics of a demo run."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from osd.core import RECORD_FIELDS
from osd.data.samples import SCHEMA
from osd.data.writer import _json_line

ANSWER = '{"guest": "Kate Murphy", "city": "London", "date": "2026-08-03"}'
WORDS = [" the", " sum", "\n", " is", ".", " ähm", " 数", ' "quoted"', " </script><script>alert(1)</script>", " &amp;", " 7"]


def samples(count, *, seed=0, longest=30):
    """Return completions as `osd generate` writes them, with random records and with markup in their tokens."""
    chance = np.random.default_rng(seed)
    made = []
    for i in range(count):
        length = int(chance.integers(1, longest + 1))
        record = {name: chance.random(length).tolist() for name in RECORD_FIELDS}
        record["logp_theta"] = (-5 * chance.random(length)).tolist()
        record["logp_teacher"] = (-3 * chance.random(length)).tolist()
        tokens = [WORDS[j] for j in chance.integers(len(WORDS), size=length)]
        made.append(
            {
                "id": f"row{i}",
                "sample": 0,
                "student_prompt": "<b>student</b>",
                "teacher_prompt": "teacher",
                "completion": "".join(tokens),
                "finish_reason": "stop" if i % 4 else "length",
                "num_tokens": length,
                "tokens": tokens,
                "teacher_model": "big",
                "student_model": "small",
                "config_hash": "abc",
                **record,
            }
        )
    return made


def save(path, rows):
    """Write completions to a Parquet or JSONL file and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_bytes(b"".join(map(_json_line, rows)))
    else:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    return path


def demo_metrics():
    """Return the contents of a metrics.json of the demo, with markup in it."""
    token = {"alpha": 0.25, "logq": -0.5, "logp_theta": -1.25, "logp_teacher": -0.125}
    tokens = [{**token, "token": text} for text in ('{"', "gu", "\n", "<|im_end|>")]
    step = {"loss": 0.5, "osd/alpha/mean": 0.4, "osd/alpha/std": 0.1, "osd/alpha/min": 0.2, "osd/alpha/max": 0.7}
    counts = {"valid_json": 63, "values_anywhere": 51, "total": 64}
    other = {"arm": "student", "after": 31 / 64, "counts": {"after": {**counts, "correct": 31}}, "history": []}
    return {
        "arm": "q*",
        "others": [other],
        "prompts": {"student": "<|im_start|>Extract", "teacher": "<|im_start|>Extract, and the answer"},
        "before": 3 / 64,
        "after": 47 / 64,
        "metric": "exact",
        "counts": {"before": {**counts, "correct": 3}, "after": {**counts, "correct": 47}},
        "steps": 2,
        "seconds": 321.5,
        "seed": 0,
        "timing": {"train": 300.0},
        "setup": {"model": "a-model", "per_device_train_batch_size": 8, "max_completion_length": 40},
        "versions": {"torch": "9.8.7"},
        "history": [{**step, "step": n, "osd/q/kl_student": 0.1 / n, "osd/q/kl_teacher": math.nan} for n in (1, 2)],
        "probes": [{"step": 0, "arm": "", "message": "a message", "tokens": tokens}],
        "examples": [{"message": "<b>M&M</b>", "answer": ANSWER, "before": "no", "after": ANSWER, "correct": True}],
    }
