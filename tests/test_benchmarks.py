"""Tests of the benchmarks: their arithmetic, saved partial results, and short runs of every system. No test asserts a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import async_step, process, sampling, scaling, stopwatch, summary, train_step, train_worker, worker
from benchmarks.shapes import config, parse_pair
from benchmarks.stopwatch import Stopwatch

ROOT = Path(__file__).parent.parent


def row(ms: float, *, kind: str = "batch", batch_size: int = 8, prompt_tokens: int = 16, record: bool = True) -> dict[str, Any]:
    shape = dict(kind=kind, batch_size=batch_size, prompt_tokens=prompt_tokens, new_tokens=4, record=record)
    return {**shape, "ms_per_step": ms, "ms_per_step_median": 2 * ms, "ms_with_prefill": ms, "ms_with_prefill_median": ms}


def system(*rows: dict[str, Any], ready: float = 10.0) -> dict[str, Any]:
    return {"status": "ok", "error": None, "start": {"ready_s": ready}, "settings": {}, "rows": list(rows)}


def result(**systems: dict[str, Any]) -> summary.Result:
    versions = {"torch": "0", "vllm": "0"}
    return {"pair": "a+b", "hardware": {"device": "x"}, "versions": versions, "runs": [{}], "systems": systems, "summary": {}}


MEASURED = result(
    teacher=system(row(4), row(6, batch_size=32), row(4, kind="context"), row(8, kind="context", prompt_tokens=64), ready=20),
    student=system(row(2), row(3, batch_size=32)),
    paired=system(row(9), row(6, record=False), row(8, kind="context"), row(20, kind="context", prompt_tokens=64), ready=45),
    nested=system(row(80)),
)


def test_summary_contains_every_ratio():
    found = summary.summarise(MEASURED)
    [first] = [r for r in found["ratios"] if r["statistic"] == "ms_per_step" and r["batch_size"] == 8]
    assert first["over_teacher"] == {"teacher": 1, "student": 0.5, "paired": 2.25, "nested": 20}
    assert first["paired_over_sum"] == 1.5
    [growth] = found["context_growth"]
    assert growth["growth"] == {"teacher": 2, "paired": 2.5}
    assert growth["paired_beyond_teacher"] == 1.25
    assert found["record_on_over_off"] == [{"batch_size": 8, "prompt_tokens": 16, "ratio": 1.5, "ratio_median": 1.5}]
    assert found["start"]["cold"]["paired_over_sum"] == 1.5


def test_tables_show_failures_and_missing_measurements():
    failed = result(teacher=system(row(4)), paired={**process.nothing("out of memory")})
    text = summary.tables(failed)
    assert "OSD pair FAILED: out of memory" in text
    assert "20.0×" in summary.tables(MEASURED)


def test_merge_adds_systems_and_replaces_shapes():
    merged = summary.merge([MEASURED, result(paired=system(row(5)), transformers=system(row(60)))])
    assert summary.rows(merged, "paired", "batch")[8, 16]["ms_per_step"] == 5
    assert summary.rows(merged, "paired", "batch", record=False)[8, 16]["ms_per_step"] == 6
    assert set(merged["systems"]) == {"teacher", "student", "paired", "nested", "transformers"}
    assert len(merged["runs"]) == 2
    with pytest.raises(ValueError, match="device is 'x' in one and 'y' in another"):
        summary.merge([MEASURED, {**MEASURED, "hardware": {"device": "y"}}])


def test_failed_run_does_not_replace_a_finished_one():
    merged = summary.merge([MEASURED, result(paired=process.nothing("crashed"))])
    assert merged["systems"]["paired"] == MEASURED["systems"]["paired"]


def test_step_time_is_the_difference_between_n_tokens_and_one():
    times = {"fresh": [2.0, 1.6], "first": [0.2, 0.1], "seen": [1.1, 1.3]}
    found = worker.step_times(times, new_tokens=11)
    assert found["ms_per_step"] == pytest.approx(100)
    assert found["ms_per_step_median"] == pytest.approx(105)
    assert found["ms_with_prefill"] == pytest.approx(1600 / 11)
    assert worker.step_times({"fresh": [], "first": [1.0], "seen": [0.9]}, new_tokens=4)["ms_per_step"] is None


class Counting:
    """Fake system that records its calls. Its sequences are ``short`` tokens too short."""

    settings: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, short: int = 0) -> None:
        self.short = short
        self.calls: list[tuple[int, bool]] = []
        self.prompts: list[list[int]] = []

    def generate(self, prompts: list[list[int]], new_tokens: int, *, record: bool = True) -> list[list[int]]:
        self.calls.append((new_tokens, record))
        self.prompts.append(prompts[0])
        return [[0] * (new_tokens - self.short) for _ in prompts]

    def observed(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


SHAPE = dict(kind="batch", batch_size=2, prompt_tokens=3, new_tokens=6, record_off_too=True)


def test_variants_alternate_on_fresh_prompts():
    counting = Counting()
    rows = worker.measure(counting, SHAPE, vocab_size=500, repeats=2, shape_seconds=60)
    assert [r["record"] for r in rows] == [True, False]
    one_round = [(6, True), (1, True), (6, True), (1, False), (1, False), (6, False)]
    assert counting.calls == [(6, True), (6, False), *one_round, *one_round]
    assert len({tuple(prompt) for prompt in counting.prompts}) == 2 + 4  # warm-ups; two variants in two rounds
    assert [len(r["seconds"]["seen"]) for r in rows] == [2, 2]


def test_short_sequences_are_an_error():
    with pytest.raises(RuntimeError, match=r"got 2 sequences of lengths \[5\]"):
        worker.measure(Counting(short=1), SHAPE, vocab_size=500, repeats=1, shape_seconds=60)


def test_worker_writes_its_error():
    written: list[dict[str, Any]] = []
    job = dict(teacher="t", student="s", dtype="float32", random_weights=True, gpu=False, max_model_len=16, max_num_seqs=1)
    spec = {"system": "nonsense", "job": job, "shapes": [], "repeats": 1, "shape_seconds": 1}
    assert worker.run(spec, written.append)["status"] == "failed"
    assert "nonsense" in written[-1]["error"]


def test_result_is_written_after_each_system(tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.json"
    seen = []

    def run_worker(spec, env, folder, seconds):
        seen.append(json.loads(path.read_text())["systems"].keys() if path.exists() else None)
        if spec["system"] == "paired":
            return process.nothing("the worker process ended with exit code -9")
        return {**system(row(4)), "start": {"ready_s": 1.0}}

    monkeypatch.setattr(sampling, "run_worker", run_worker)
    monkeypatch.setattr(sampling, "_try_plot", lambda result, path: None)
    options = ["--pair", "small+tiny", "--no-prime", "--systems", "teacher", "paired", "student", "--output", str(path)]
    assert sampling.main(options) == 1
    assert [list(names) if names else None for names in seen] == [None, ["teacher"], ["teacher", "paired"]]
    assert json.loads(path.read_text())["systems"]["student"]["status"] == "ok"
    assert "exit code -9" in capsys.readouterr().out


def test_time_limit_keeps_partial_results(tmp_path, monkeypatch):
    slow = "import sys, time, pathlib; pathlib.Path(sys.argv[2]).write_text(sys.argv[1]); time.sleep(60)"
    kept = {"status": "failed", "error": None, "start": None, "settings": None, "rows": [row(4)]}
    popen = subprocess.Popen

    def start(command, **kwargs):
        return popen([sys.executable, "-c", slow, json.dumps(kept), command[-1]], **kwargs)

    monkeypatch.setattr(subprocess, "Popen", start)
    found = process.run_worker({"system": "teacher"}, dict(os.environ), tmp_path, seconds=3)
    assert found["rows"] == [row(4)]
    assert found["error"] == "stopped at the time limit"


def test_shapes_of_each_system():
    """Only the pair is also timed without its record. The slow systems are not timed at the contexts."""
    args = sampling.parse_args(["--batch-sizes", "8", "32", "--contexts", "256", "4096"])
    assert {s["new_tokens"] for s in sampling.shapes("nested", args)} == {64}
    assert [s["prompt_tokens"] for s in sampling.shapes("teacher", args) if s["kind"] == "context"] == [256, 4096]
    assert not any(s["record_off_too"] for s in sampling.shapes("teacher", args))
    assert [s["kind"] for s in sampling.shapes("paired", args) if s["record_off_too"]] == ["batch", "batch"]


def test_single_models_keep_vllm_defaults_and_own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv(process.MULTIPROCESSING, "0")
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    args = sampling.parse_args(["--in-process", "paired"])
    teacher, paired = (sampling.environment(name, args, tmp_path / name) for name in ("teacher", "paired"))
    assert "VLLM_USE_V2_MODEL_RUNNER" not in teacher
    assert process.MULTIPROCESSING not in teacher
    assert paired[process.MULTIPROCESSING] == "0"
    assert teacher["VLLM_CACHE_ROOT"] != paired["VLLM_CACHE_ROOT"]


def test_pair_option_takes_two_known_shapes():
    assert parse_pair("14B+1.5B") == ("14B", "1.5B")
    assert config("7B")["vocab_size"] == 152064
    for wrong in ("3B", "3B+2B", "3B+1.5B+0.5B"):
        with pytest.raises(ValueError, match=r"pair|shape"):
            parse_pair(wrong)


@pytest.mark.parametrize(("name", "parameters"), [("Qwen3.5-0.8B", 752_393_024), ("Qwen3.5-4B", 4_205_751_296)])
def test_hybrid_shapes_are_three_delta_nets_to_one_attention(name, parameters):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config(name)))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert type(model).__name__ == config(name)["architectures"][0]
    assert Counter(model.config.layer_types) == {
        "linear_attention": 3 * model.config.num_hidden_layers // 4,
        "full_attention": model.config.num_hidden_layers // 4,
    }


def test_plot_draws_one_panel_per_pair(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.plot import curves, plot

    assert curves(MEASURED)["sum"] == [(8, 1.5), (32, 1.5)]
    assert curves(MEASURED)["paired"] == [(8, 2.25)]
    paths = plot([MEASURED, {**MEASURED, "pair": "c+d"}], tmp_path / "out.json")
    assert [path.suffix for path in paths] == [".svg", ".png"]
    assert all(path.stat().st_size > 5000 for path in paths)


def test_plot_draws_drafts_with_the_line_of_the_theory(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.plot import break_even_line, over_teacher, plot_drafts

    drafts = json.loads(next((ROOT / "benchmarks" / "results").glob("speculation_14B+1.5B_*h200*.json")).read_text())
    assert break_even_line(0.1, 0.9, 10)[10] == (10, pytest.approx(0.306, abs=5e-4))  # theory, section 9
    points = over_teacher(drafts)
    assert dict(points[8][0.9])[4] == pytest.approx(0.59, abs=5e-3)  # docs/performance.md
    assert points[8][None] == [(0, pytest.approx(1.13, abs=5e-3))]
    assert all(path.stat().st_size > 5000 for path in plot_drafts(drafts, tmp_path / "drafts.svg"))


def benchmark(script: str, folder: Path, *options: str, seconds: float = 300) -> dict[str, Any]:
    """Run a benchmark script and return its result."""
    path = folder / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks" / script), *options, "--output", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, timeout=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())


@pytest.mark.slow
def test_five_sampling_systems_run_on_a_tiny_pair(tmp_path):
    path = tmp_path / "out.json"
    options = "--pair small+tiny --batch-sizes 3 --prompt-tokens 16 --new-tokens 6 --slow-tokens 4 --contexts 16 32 --no-prime"
    options += " --context-batch 2 --context-tokens 4 --repeats 2"
    engine = json.dumps({"kv_cache_memory_bytes": 64 << 20, "block_size": 32})
    command = [sys.executable, str(ROOT / "benchmarks" / "sampling.py"), *options.split()]
    command += ["--engine-kwargs", engine, "--output", str(path)]
    env = {**os.environ, "TORCH_COMPILE_DISABLE": "1"}  # times are not asserted, and compilation dominates the run
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    assert set(found["systems"]) == set(summary.SYSTEMS)
    assert found["hardware"]["device"]
    assert found["versions"]["torch"]
    assert found["runs"][0]["configuration"]["new_tokens"] == 6
    for name, measured in found["systems"].items():
        # A worker fails on any sequence of the wrong length, so status "ok" implies the right lengths.
        assert measured["status"] == "ok"
        assert measured["start"]["ready_s"] > 0
        assert measured["settings"]
        batch = [(r["batch_size"], r["new_tokens"], r["record"]) for r in measured["rows"] if r["kind"] == "batch"]
        assert batch == [(3, 4 if name in sampling.SLOW else 6, True), *([(3, 6, False)] if name == "paired" else [])]
        contexts = [r["prompt_tokens"] for r in measured["rows"] if r["kind"] == "context"]
        assert contexts == ([] if name in sampling.SLOW else [16, 32])
        assert all(len(r["seconds"]["seen"]) == 2 for r in measured["rows"])
    assert found["systems"]["paired"]["settings"]["enable_prefix_caching"]
    # The two policies differ. Unscaled dummy weights of vLLM would make both uniform, and alpha would be undefined.
    assert all(r["observed"]["kl_theta"] > 0.1 for r in found["systems"]["paired"]["rows"] if r["record"])
    assert found["systems"]["nested"]["settings"]["student_logprobs"] == 20
    assert found["summary"]["start"]["cold"]["paired_over_sum"] > 0
    for title in ("Decode, ms per step", "Growth", "Per-token record", "Start"):
        assert title in done.stdout


@pytest.mark.slow
def test_speculation_benchmark_sets_the_acceptance(tmp_path):
    options = (
        "--pair small+tiny --batch-sizes 4 --prompt-tokens 16 --new-tokens 65 --drafts 0 2 --acceptances 0.5 0.9 --repeats 1"
    )
    engine = json.dumps({"kv_cache_memory_bytes": 64 << 20, "block_size": 32})
    found = benchmark("speculation.py", tmp_path, *options.split(), "--engine-kwargs", engine)
    assert list(found["systems"]) == ["teacher", "student", "0", "2"]
    assert all(system["status"] == "ok" for system in found["systems"].values())
    observed = {row["acceptance"]: row["observed"] for row in found["systems"]["2"]["rows"]}
    for rate, values in observed.items():
        assert abs(values["draft_acceptance"] - rate) < 0.15
        assert values["tokens_per_cycle"] == pytest.approx(1 + rate + rate**2, rel=0.15)
    assert "draft_acceptance" not in found["systems"]["0"]["rows"][0]["observed"]


@pytest.mark.slow
def test_speculation_benchmark_measures_a_real_pairs_acceptance(tmp_path, tiny_pair):
    options = "--pair healed --layers 1 --heal-steps 2 --batch-sizes 8 --new-tokens 33 --drafts 0 2 auto --repeats 4"
    engine = json.dumps({"kv_cache_memory_bytes": 64 << 20, "block_size": 32, "max_model_len": 512})
    found = benchmark("speculation.py", tmp_path, *options.split(), "--model", str(tiny_pair[0]), "--engine-kwargs", engine)
    assert list(found["systems"]) == ["teacher", "student", "0", "2", "auto"]
    assert found["healing"]["layers"] == 1
    rows = {name: system["rows"][0] for name, system in found["systems"].items()}
    assert all(row["acceptance"] is None and len(row["seconds"]["seen"]) == 4 for row in rows.values())
    seen = rows["2"]["observed"]
    # Two estimates of 1 - TV(q*, π_θ), each with a standard error of 0.5 / sqrt(n) at most; 5 of them are a chance of 1e-6.
    error = 0.5 / seen["drafts_verified"] ** 0.5
    assert error < 0.02
    assert abs(seen["draft_acceptance"] - seen["record_acceptance"]) < 5 * 2**0.5 * error
    assert 0.2 < seen["draft_acceptance"] < 0.95
    for name in ("2", "auto"):
        low, high = rows[name]["over_no_drafts"]["interval"]
        assert low <= rows[name]["over_no_drafts"]["ratio"] <= high


@pytest.mark.slow
def test_weight_sync_benchmark_runs(tmp_path):
    found = benchmark("weight_sync.py", tmp_path, "--pair", "small+tiny", "--repeats", "2")
    ways = {name: [row["way"] for row in system["rows"]] for name, system in found["systems"].items()}
    raw = ["raw, at once", "raw copy"]
    assert ways == {"osd": ["sync", "engine", "load_weights", "per tensor", *raw], "trl": ["trl", *raw]}
    for system in found["systems"].values():
        assert system["settings"]["tensors"] == 26
        assert system["rows"][-1]["over_raw_copy"] == 1
        assert all(len(row["all_ms"]) == 2 and 0 < row["host_ms"] <= row["ms"] for row in system["rows"])


# -- a training step ----------------------------------------------------------------------------------------------------


def test_stopwatch_counts_each_second_to_the_innermost_part(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(clock))
    drains = []
    watch = Stopwatch(lambda: drains.append(1))

    class Trainer:
        def teacher(self, model):
            return model

        def loss(self):
            return self.teacher("student") + self.teacher("teacher")

    trainer = Trainer()
    watch.around(trainer, "loss", "student")
    watch.around(trainer, "teacher", lambda model: "teacher" if model == "teacher" else None)
    assert trainer.loss() == "studentteacher"
    assert not drains, "a stopwatch that is off must not drain the device"
    watch.start()
    trainer.loss()
    assert watch.lap() == {"other": 2, "student": 2, "teacher": 1}
    with pytest.raises(ZeroDivisionError), watch.part("sync"):
        _ = 1 / 0
    assert watch.lap() == {"other": 2, "sync": 1}


def training(step: float, **parts: float) -> dict[str, Any]:
    whole = dict.fromkeys(stopwatch.PARTS, 0.0) | parts
    memory = {"allocated_peak": 2e9, "allocated_between_steps": 1e9}
    job = {"completions": 4, "new_tokens": 8}
    return {"status": "ok", "step_s": [step, 9 * step, step], "parts_s": [whole] * 2, "memory_bytes": memory, "trainer": job}


def test_training_summary_compares_medians():
    systems = {"trl": training(2.0, generate=1.0, teacher=0.5), "osd": training(1.0, generate=1.5)}
    summary = train_step.summarise(systems)
    assert summary["trl"]["tokens_per_s"] == 16
    assert summary["trl"]["instrumented_step_s"] == 1.5
    assert summary["osd"]["allocated_peak_gb"] == 2
    assert summary["osd_over_trl"]["step_s"] == 0.5
    assert summary["osd_over_trl"]["teacher_s"] == 0
    assert "sync_s" not in summary["osd_over_trl"], "a ratio over zero must be left out"
    assert "generate_s" in train_step.table(summary)
    assert set(train_step.summarise({**systems, "osd": process.nothing("crashed")})) == {"trl"}


def test_short_completions_of_a_trainer_are_an_error():
    logs = [{"loss": 1.0, "completions/min_length": 8, "completions/max_length": 8}, {"train_runtime": 1.0}]
    train_worker.check_lengths(logs, 8)
    with pytest.raises(RuntimeError, match=r"must have 8 tokens; the shortest and longest have \[7, 8\]"):
        train_worker.check_lengths([*logs, {**logs[0], "completions/min_length": 7}], 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--pair 3B+7B", "two models of one vocabulary size"),
        ("--completions 12 --micro-batch 8", "must be a multiple of --micro-batch 8"),
        ("--steps 0", "at least 1"),
    ],
)
def test_incomparable_training_options_are_rejected(options, message, capsys):
    with pytest.raises(SystemExit):
        train_step.parse_args(options.split())
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_both_trainers_run_on_a_tiny_pair(tmp_path):
    options = "--pair tiny+tiny --prompt-tokens 8 --new-tokens 6 --completions 4 --micro-batch 2 --steps 2 --warm-up 1"
    found = benchmark("train_step.py", tmp_path, *options.split(), "--engine-kwargs", json.dumps({"block_size": 32}))
    for name, system in found["systems"].items():
        # A worker fails on any completion of the wrong length, so status "ok" implies the right lengths.
        assert system["status"] == "ok"
        assert len(system["step_s"]) == len(system["parts_s"]) == 2
        assert {tuple(parts) for parts in system["parts_s"]} == {stopwatch.PARTS}
        assert all(seconds > 0 for parts in system["parts_s"] for seconds in parts.values())
        assert len(system["loss"]) == 5
        assert all(loss > 0 for loss in system["loss"])
        assert {side["kv_cache_tokens"] for side in system["settings"].values()} == {
            288
        }  # whole blocks of 32 in 4 * (8 + 6 + ROOM)
        assert set(system["settings"]) == ({"teacher", "student"} if name == "osd" else {"student"})
    assert all(0 < alpha < 1 for alpha in found["systems"]["osd"]["alpha"])
    assert all(found["summary"][f"osd_over_{name}"]["step_s"] > 0 for name in ("trl", "trl_autocast"))
    assert found["versions"]["trl"]


def test_a_server_has_the_engine_arguments_of_its_trainer(tmp_path, tiny_pair):
    options = "--pair tiny+tiny --prompt-tokens 8 --new-tokens 6 --completions 4 --micro-batch 2 --dtype float32"
    args = async_step.parse_args([*options.split(), "--engine-kwargs", '{"enforce_eager": true}'])
    job = train_worker.TrainJob(**train_step.job(args, tiny_pair[0].parent, tmp_path))
    pair, alone = (async_step.engine_kwargs(system, job) for system in ("osd_async", "trl_server"))
    assert pair["kv_cache_memory_bytes"] == 2 * alone["kv_cache_memory_bytes"] > 0, "two models of one shape"
    assert pair | alone == {**pair, "kv_cache_memory_bytes": alone["kv_cache_memory_bytes"]}
    assert (alone["max_model_len"], alone["max_num_seqs"], alone["enforce_eager"]) == (14, 4, True)
    assert alone["weight_transfer_config"] == {"backend": "nccl" if process.GPU else "http"}


@pytest.mark.parametrize(
    ("options", "message"),
    [("--sleep", "a server does not sleep"), ("--systems osd_async trl_server", "TRL moves weights by NCCL")],
)
def test_options_that_a_server_cannot_have_are_rejected(options, message, capsys, monkeypatch):
    monkeypatch.setattr(async_step, "GPU", False)
    with pytest.raises(SystemExit):
        async_step.parse_args(options.split())
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_against_a_server_runs_with_and_without_overlap(tmp_path):
    options = "--pair tiny+tiny --prompt-tokens 8 --new-tokens 6 --completions 4 --micro-batch 2 --steps 2 --warm-up 1"
    options += " --systems osd_server osd_async osd_running"
    found = benchmark("async_step.py", tmp_path, *options.split(), "--engine-kwargs", json.dumps({"block_size": 32}))
    for name, system in found["systems"].items():
        assert system["status"] == "ok", system
        assert len(system["step_s"]) == len(system["parts_s"]) == 2
        assert len(system["loss"]) == 5
        if name == "osd_running":
            assert all(0 <= age <= 2 for age in system["staleness"])
        else:
            assert system["staleness"] == ([0, 1, 1, 1, 1] if name == "osd_async" else [0] * 5)
    assert found["summary"]["osd_async_over_osd_server"]["step_s"] > 0


@pytest.mark.slow
def test_lora_sync_benchmark_runs(tmp_path):
    path = tmp_path / "lora.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "lora_sync.py"), "--pair", "small+tiny", "--repeats", "2"]
    command += ["--sequences", "2", "--tokens", "4", "--rank", "4", "--output", str(path)]
    subprocess.run(command, check=True, timeout=300)
    rows = json.loads(path.read_text())["rows"]
    assert set(rows) == {"merged"}
    assert all(value > 0 for row in rows.values() for value in row.values())


# -- several GPUs -------------------------------------------------------------------------------------------------------


def test_scaling_compares_the_pair_with_teacher_only():
    rows = {"teacher": 10.0, "student": 3.0, "0": 14.0, "2": 7.0, "3": 6.0, "auto": 1.0}
    measured = [{"batch_size": 32, "ms_per_step": 0.0}, {"batch_size": 128, "ms_per_step": None}]
    systems = {name: {"rows": [{**measured[0], "ms_per_step": ms}, measured[1]]} for name, ms in rows.items()}
    assert scaling.over_teacher(systems) == {"32": {"teacher_ms": 10.0, "0": 1.4, "best": "3", "at_best": 0.6}}


def test_a_part_of_scaling_that_takes_too_long_is_ended(tmp_path):
    part = scaling.run(["-c", "print('begun', flush=True); import time; time.sleep(600)"], tmp_path / "part.json", 2.0)
    assert part["status"] == "stopped at the time limit"
    assert part["result"] is None
    assert "begun" in part["log"]
    assert scaling.run(["-c", "raise SystemExit(3)"], tmp_path / "part.json", 60.0)["status"] == "exit code 3"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--gpus 3", "--gpus 3: give an even number from 2 on"),
        ("--gpus 8", "--gpus 8 must divide the 28 attention heads of 7B"),
    ],
)
def test_a_scaling_that_cannot_run_is_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        scaling.parse_args(options.split())
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_scaling_runs_in_two_processes_on_a_cpu(tmp_path):
    options = "--gpus 2 --pair tiny+tiny --prompt-tokens 8 --new-tokens 6 --completions 4 --micro-batch 1 --steps 1 --repeats 1"
    options += " --batch-sizes 2 --drafts 0 1 --time-limit 900 --parts sampling colocate sync"
    found = benchmark("scaling.py", tmp_path, *options.split(), "--engine-kwargs", json.dumps({"block_size": 32}), seconds=960)
    assert {name: part["status"] for name, part in found["parts"].items()} == dict.fromkeys(found["parts"], "ok")
    summary = found["summary"]
    assert summary["sampling"]["2"]["0"] > 0
    assert summary["colocate"]["osd"]["step_s"] > 0
    [ranks] = summary["colocate"]["memory_bytes_of_ranks"]
    assert len(ranks) == 2
    assert {"osd: sync", "osd: raw copy", "http: server", "http: raw copy"} <= summary["sync"].keys()
