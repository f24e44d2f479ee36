"""Benchmark of drafts: time per token against the number of drafts and their acceptance, compared with teacher-only vLLM.

    python benchmarks/speculation.py --pair 14B+1.5B
    python benchmarks/speculation.py --pair small+tiny --batch-sizes 2 --new-tokens 16 --drafts 0 2   # short run on a CPU

Random weights have no meaningful acceptance, so a switch sets it: a draft is accepted with the given probability, whatever the
two policies say. Everything is computed as in a real run, and the tokens follow no distribution. The switch is a method of the
benchmark's own worker extension; the engine does not have it. Without drafts, and with "auto" and real weights, nothing is set.

Every number of drafts is an engine of its own, in a process of its own (see benchmarks/sampling.py, whose timing this uses: the
milliseconds are those of a token, of all sequences together). `theory` is (1 + (k + 1) c) / t(k) of Theorem 21, with c from the
measured student-only and teacher-only times. Prints a table and writes a JSON after each engine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Python adds only benchmarks/ to the path of a script

from benchmarks.process import GPU, MULTIPROCESSING, ROOT, environment, exit_on_sigterm, header, result_path, run_worker
from benchmarks.shapes import parse_pair, write_model
from benchmarks.summary import Result, markdown
from osd.engine.speculation import expected_tokens


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pair", default="14B+1.5B", help="TEACHER+STUDENT as Qwen2.5 shapes with random weights (default: %(default)s)")
    add("--drafts", nargs="+", default=["0", "1", "2", "3", "4", "5", "6", "auto"], metavar="K")
    add("--acceptances", type=float, nargs="+", default=[0.7, 0.8, 0.9, 0.95])
    add("--batch-sizes", type=int, nargs="+", default=[8, 32])
    add("--prompt-tokens", type=int, default=256)
    add("--new-tokens", type=int, default=256)
    add("--repeats", type=int, default=3)
    add("--shape-seconds", type=float, default=40, help="start no further repeat of a shape after this many seconds")
    add("--in-process", action="store_true", default=not GPU, help="run the engine cores in the worker processes")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16" if GPU else "float32")
    add("--engine-kwargs", type=json.loads, default={}, metavar="JSON", help="vLLM engine arguments for every engine")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder, or the path of the JSON")
    args = parser.parse_args(argv)
    parse_pair(args.pair)
    if args.new_tokens < 2:
        parser.error("--new-tokens must be at least 2: one-token runs are subtracted")
    return args


def spec(system: str, args: argparse.Namespace, models: tuple[str, str], drafts: str = "0") -> dict[str, Any]:
    """Return the job of a worker (see benchmarks.worker): every batch size at every acceptance that the drafts can have."""
    rates: list[float | None] = [None] if system != "paired" or drafts == "0" else args.acceptances
    return {
        "system": system,
        "shapes": [
            {
                "kind": "batch",
                "batch_size": batch,
                "prompt_tokens": args.prompt_tokens,
                "new_tokens": args.new_tokens,
                "record_off_too": False,
                "acceptance": rate,
            }
            for batch in args.batch_sizes
            for rate in rates
        ],
        "repeats": args.repeats,
        "shape_seconds": args.shape_seconds,
        "job": {
            "teacher": models[0],
            "student": models[1],
            "dtype": args.dtype,
            "random_weights": True,
            "gpu": GPU,
            "max_model_len": args.prompt_tokens + args.new_tokens,
            "max_num_seqs": max(args.batch_sizes),
            "engine_kwargs": args.engine_kwargs,
            "num_speculative_tokens": drafts,
        },
    }


def table(result: Result) -> str:
    """Return ms per token by batch size, drafts and acceptance, the ratio to teacher-only, and what the theory says."""
    systems = result["systems"]
    alone = {
        name: {row["batch_size"]: row["ms_per_step"] for row in systems.get(name, {}).get("rows", [])}
        for name in ("teacher", "student")
    }
    body = []
    for name, system in systems.items():
        for row in system["rows"] if name not in alone else []:
            batch, rate, ms = row["batch_size"], row["acceptance"], row["ms_per_step"]
            teacher, student = (alone[side].get(batch) for side in ("teacher", "student"))
            theory = None
            if teacher and student and name.isdecimal() and (rate is not None or name == "0"):
                theory = (1 + (int(name) + 1) * student / teacher) / expected_tokens(rate or 0.0, int(name))
            ratio = ms / teacher if ms and teacher else None
            cells = [ms, ratio, theory, row["observed"].get("tokens_per_cycle")]
            body.append([str(batch), name, str(rate or "–"), *("–" if cell is None else f"{cell:.2f}" for cell in cells)])
    body.sort(key=lambda line: (int(line[0]), line[2], line[1]))
    return markdown(["sequences", "drafts", "acceptance", "ms per token", "/ teacher-only", "theory", "tokens per cycle"], body)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    command = ["python", "benchmarks/speculation.py", *(sys.argv[1:] if argv is None else argv)]
    result: Result = {"pair": args.pair, **header(command, vars(args)), "systems": {}}
    path = result_path(args.output, f"speculation_{args.pair}", result["hardware"]["device"])
    with tempfile.TemporaryDirectory(prefix="osd-bench-") as scratch:
        folder = Path(scratch)
        teacher, student = (str(write_model(name, folder / "models")) for name in parse_pair(args.pair))
        jobs = {name: spec(name, args, (teacher, student)) for name in ("teacher", "student")}
        jobs |= {drafts: spec("paired", args, (teacher, student), drafts) for drafts in args.drafts}
        for name, job in jobs.items():
            env = environment(folder / "caches") | {"HF_HUB_OFFLINE": "1"}
            env.pop(MULTIPROCESSING, None)
            if args.in_process:
                env[MULTIPROCESSING] = "0"
            result["systems"][name] = found = run_worker(job, env, folder, None)
            path.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{name}: {found['error'] or 'done'}", flush=True)
    print(f"\n{table(result)}\n\nwritten to {path}")
    return int(any(system["status"] != "ok" for system in result["systems"].values()))


if __name__ == "__main__":
    exit_on_sigterm()
    sys.exit(main())
