"""`osd check`: verdicts, memory against independent counts, settings, and its command. No engine starts."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from vllm import ModelRegistry
from vllm.model_executor.models import registry

from osd import cli
from osd.check import TRAINING_BYTES, Wanted, check, size, stored_bytes
from osd.data.settings import GenerateConfig
from osd.engine.backend.arguments import server_arguments
from osd.engine.config import PairConfig
from osd.engine.engine import PairEngine
from osd.engine.multimodal import text_config
from osd.train.config import OSDConfig
from osd.train.validation import planned_pair
from osd.validate_models import end_ids
from osd.weight_files import check_weights
from tests.architectures import WINDOW, save_model, save_multimodal
from tests.tiny import save_tokenizer, spoil_weights, tiny_model

FLOAT32 = Wanted(dtype="float32")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the folder of a tiny model of a kind, saved once."""
    root = tmp_path_factory.mktemp("kinds")
    return lambda kind: root / kind if (root / kind).exists() else save_model(root / kind, kind)


@pytest.fixture
def run(capsys):
    """Run the command; return its status and its lines by what stands before the first colon."""

    def run(*argv):
        status = 0
        try:
            cli.main(["check", *map(str, argv)])
        except SystemExit as ended:
            status = ended.code
        printed = capsys.readouterr()
        lines = dict(line.split(": ", 1) for line in printed.out.partition("\n\n")[0].splitlines())
        return Namespace(status=status, lines=lines, out=printed.out, err=printed.err)

    return run


def edit(folder: Path, file: str, **changes) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# -- memory ---------------------------------------------------------------------------------------------------------------


def cached(path: Path, length: int, wanted: Wanted = FLOAT32) -> int | None:
    return check(str(path), str(path), wanted).sides["student"].request_bytes(length)


@pytest.mark.parametrize("kind", ["Mamba-2 and attention", "sliding window and full", "experts", "soft-capped logits"])
def test_weights_are_those_of_the_files(kind, saved):
    side = check(str(saved(kind)), str(saved(kind)), FLOAT32).sides["teacher"]
    header = 40_000  # of safetensors: names and shapes
    assert 0 <= stored_bytes(str(saved(kind))) - side.weights < header
    assert side.weights == 4 * side.parameters


def test_shared_embeddings_are_counted_once(tmp_path):
    tied = tiny_model(tmp_path / "tied", vocab=1000, tie_word_embeddings=True)
    loose = tiny_model(tmp_path / "loose", vocab=1000)
    counts = [check(str(path), str(path), FLOAT32).sides["teacher"].parameters for path in (tied, loose)]
    assert counts[1] - counts[0] == 1000 * 64


def test_a_quantized_teacher_weighs_what_its_files_do(tmp_path, tiny_pair):
    teacher = tiny_model(tmp_path / "fp8")
    edit(teacher, "config.json", quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"})
    (teacher / "consolidated.safetensors").write_bytes(b"0" * 1000)  # a second copy, which is not loaded
    report = check(str(teacher), str(tiny_pair[1]), Wanted())
    assert report.sides["teacher"].weights == (teacher / "model.safetensors").stat().st_size
    assert "fp8 quantized" in "\n".join(report.lines())
    assert report.status == 0
    swapped = check(str(tiny_pair[1]), str(teacher), Wanted())
    assert (swapped.sampling, swapped.status) == ("", 3)
    assert "is quantized" in swapped.training


def test_a_llama_caches_every_token(tiny_pair):
    layers, heads, head_size = 2, 2, 32
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        per_token = layers * 2 * heads * head_size * itemsize
        assert [cached(tiny_pair[0], n, Wanted(dtype=dtype)) for n in (1, 500)] == [per_token, 500 * per_token]


def test_kv_heads_are_split_over_gpus_and_at_least_one_is_left(tiny_pair):
    one, two, four = (cached(tiny_pair[0], 10, Wanted(gpus=gpus)) for gpus in (1, 2, 4))
    assert (two, four) == (one // 2, one // 2)


def test_a_window_caches_its_tokens(saved):
    per_layer = 2 * 2 * 32 * 4
    assert cached(saved("sliding window and full"), 8) == 4 * 8 * per_layer
    assert cached(saved("sliding window and full"), 300) == 2 * (300 + WINDOW) * per_layer
    assert cached(saved("sliding window everywhere"), 300) == 4 * WINDOW * per_layer


def test_states_do_not_grow(saved):
    config = AutoConfig.from_pretrained(saved("Mamba-2 and attention"))
    inner = config.mamba_expand * config.hidden_size
    convolution = (inner + 2 * config.mamba_n_groups * config.mamba_d_state) * (config.mamba_d_conv - 1)
    state = 4 * (convolution + config.mamba_n_heads * config.mamba_d_head * config.mamba_d_state)
    assert cached(saved("Mamba-2 and attention"), 300) == 2 * state + 2 * 300 * 2 * 2 * 32 * 4
    assert cached(saved("Mamba-2 everywhere"), 300) == cached(saved("Mamba-2 everywhere"), 8) > 0


@pytest.mark.parametrize(
    ("kind", "per_token"),
    [
        ("latent attention", 4 * (512 + 64) * 4),  # one latent vector and its rotary part, in 4 layers
        ("shared KV caches", 2 * 2 * 32 * 4),  # of 4 layers, 2 share; of the other 2, one has a window
        # Two full layers of heads of 512; slow to save.
        pytest.param("head sizes that differ by layer", 2 * 2 * 2 * 512 * 4, marks=pytest.mark.slow),
        ("short convolution", 2 * 2 * 2 * 32 * 4),
        ("gated delta net and attention", 2 * 2 * 2 * 32 * 4),
    ],
)
def test_caches_of_other_kinds(kind, per_token, saved):
    assert cached(saved(kind), 301) - cached(saved(kind), 300) == per_token


def test_totals_add_up(tiny_pair):
    wanted = Wanted(dtype="float32", max_model_len=100, max_num_seqs=7, gpus=2, gpu_memory=2**30)
    report = check(str(tiny_pair[0]), str(tiny_pair[1]), wanted)
    weights, request = report.needed()
    assert weights * 2 == sum(side.weights for side in report.sides.values())
    assert request == 2 * 100 * 2 * 2 * 1 * 32 * 4
    text = "\n".join(report.lines())
    assert f"weights {size(weights)} + 7 requests of 100 tokens {size(7 * request)} = {size(weights + 7 * request)}" in text
    assert f"{size(0.9 * 2**30 - weights - 7 * request)} left on each GPU" in text
    assert f"memory, training: {size(TRAINING_BYTES * report.sides['student'].parameters)}" in text


def test_too_little_memory_is_told(run, tiny_pair):
    flags = (*tiny_pair, "--dtype", "float32", "--max_model_len", "512")
    weights, request = check(*map(str, tiny_pair), Wanted(dtype="float32", max_model_len=512)).needed()
    memory = (weights + 5.5 * request) / 0.9 / 2**30
    assert "short; 5 such requests fit" in run(*flags, "--gpu_memory", memory).lines["memory, both"]
    assert "the weights alone do not fit" in run(*flags, "--gpu_memory", memory / 100).lines["memory, both"]


# -- verdicts -------------------------------------------------------------------------------------------------------------


def test_a_pair_that_works(run, tiny_pair):
    done = run(*tiny_pair)
    assert (done.status, done.lines["sampling"], done.lines["training"]) == (0, "yes", "yes")
    assert "2 x full attention; dense; not quantized" in done.lines["teacher"]


def test_tokenizers_that_differ_are_refused(run, tmp_path, tiny_pair):
    other = tiny_model(tmp_path / "other", tokenizer_vocab=60)
    done = run(tiny_pair[0], other)
    assert done.status == 1
    assert done.lines["sampling"].startswith("no: teacher and student have different tokenizers: id 60")
    assert done.lines["training"] == "no: the pair cannot be sampled"
    assert "memory, student" in done.lines
    assert "model_name_or_path" not in done.out


def test_experts(run, saved):
    dense, experts = saved("sliding window and full"), saved("experts")
    both = run(experts, experts)
    assert (both.status, both.lines["sampling"], both.lines["training"]) == (0, "yes", "yes")
    assert "4 experts" in both.lines["student"]
    beside_dense = run(dense, experts)
    assert beside_dense.status == 1
    assert "mixture of experts" in beside_dense.lines["sampling"]
    assert run(experts, dense).status == 0


def test_kinds_of_cache_are_named(run, saved):
    done = run(saved("Mamba-2 and attention"), saved("sliding window and full"))
    assert "2 x recurrent state, 2 x full attention" in done.lines["teacher"]
    assert f"2 x sliding window of {WINDOW} tokens, 2 x full attention" in done.lines["student"]
    assert "4 x latent attention" in run(saved("latent attention"), saved("sliding window and full")).lines["teacher"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "3"], "tensor_parallel_size=3 does not divide the 2 attention heads of teacher="),
        (["--max_model_len", "513"], "max_model_len=513 is over the teacher's context of 512 tokens"),
    ],
)
def test_what_does_not_fit_the_pair_is_refused(flags, message, run, tiny_pair):
    done = run(*tiny_pair, *flags)
    assert done.status == 1
    assert message in done.lines["sampling"]


def test_a_missing_model_is_refused(run, tiny_pair):
    done = run(tiny_pair[0], "no/such-model")
    assert (done.status, done.err) == (1, "")
    assert "student model 'no/such-model': no config.json could be loaded" in done.lines["sampling"]
    assert "student" not in done.lines


@pytest.mark.parametrize(
    ("student", "message"),
    [("", "student='': the path is empty"), ("/no/such/folder", "student='/no/such/folder': the folder does not exist")],
)
def test_paths_that_name_nothing_are_refused(student, message, run, tiny_pair):
    done = run(tiny_pair[0], student)
    assert done.status == 1
    assert message in done.lines["sampling"]


def test_a_multimodal_model_is_counted_without_its_encoders(run, tmp_path):
    path = save_multimodal(tmp_path / "whole", "Gemma 3")
    text_config(AutoConfig.from_pretrained(path)).save_pretrained(tmp_path / "text")
    save_tokenizer(tmp_path / "text", 64)
    spoil_weights(tmp_path / "text")
    done = run(path, tmp_path / "text", "--dtype", "float32")
    assert (done.status, done.lines["sampling"], done.lines["training"]) == (0, "yes", "yes")
    assert done.lines["memory, teacher"] == done.lines["memory, student"]
    assert f"2 x sliding window of {WINDOW} tokens, 2 x full attention" in done.lines["teacher"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": "LlamaForCausalLM"}, "architectures='LlamaForCausalLM' in config.json is no list; write"),
        ({"architectures": ["NoSuchForCausalLM"]}, "neither vLLM nor transformers .* has the class NoSuchForCausalLM"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "is a LlamaForSequenceClassification, which has no distribution",
        ),
    ],
)
def test_architectures_that_complete_no_text_are_refused(changes, message, tmp_path, tiny_pair):
    edit(tiny_model(tmp_path), "config.json", **changes)
    for pair in ((tmp_path, tiny_pair[1]), (tiny_pair[0], tmp_path)):
        report = check(*map(str, pair), Wanted())
        assert report.status == 1
        assert re.search(message, report.sampling)
        assert len(report.sampling) < 400


@pytest.mark.parametrize(
    "files", [[], ["adapter_model.safetensors"], ["optimizer.pt", "scaler.pt"], ["._model.safetensors"], ["x.safetensors/"]]
)
def test_a_folder_without_weights_is_refused(files, tmp_path, tiny_pair):
    (tiny_model(tmp_path) / "model.safetensors").unlink()
    for name in files:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_bytes(b"")
    refused_everywhere(tmp_path, tiny_pair[0], "the folder has no weights")


@pytest.mark.parametrize(
    ("file", "kept", "message"),
    [
        ("model.safetensors", 0, r"model.safetensors is no whole file of weights \(it is empty\)"),
        ("model.safetensors", 100, r"model.safetensors is no whole file of weights .100 bytes: .*header"),
        ("model.safetensors", -1, r"model.safetensors is no whole file .* not fully covered"),
        ("pytorch_model.bin", 0, r"pytorch_model.bin is no whole file of weights \(it is empty\)"),
        ("pytorch_model.bin", -30, r"pytorch_model.bin is no whole file .*its end is missing"),
        ("pytorch_model.bin", b"version https://git-lfs", r"pytorch_model.bin is no whole file .*begins with b'version https"),
        ("model.safetensors", None, r"model.safetensors is no whole file of weights \(it cannot be read: No such file"),
    ],
)
def test_weights_that_are_cut_short_or_of_another_kind_are_refused(file, kept, message, tmp_path, tiny_pair):
    whole = tiny_model(tmp_path) / "model.safetensors"
    if file == "pytorch_model.bin":
        torch.save(load_file(whole), tmp_path / file)
        whole.unlink()
    (tmp_path / "._model.safetensors").write_bytes(b"\0\5\26\7")  # of macOS; vLLM reads no hidden files
    (tmp_path / "folder.safetensors").mkdir()
    check_weights(PairConfig(teacher=str(tmp_path), student=str(tmp_path)))
    if kept is None:
        whole.unlink()
        whole.symlink_to("absent")
    else:
        (tmp_path / file).write_bytes(kept if isinstance(kept, bytes) else (tmp_path / file).read_bytes()[:kept])
    refused_everywhere(tmp_path, tiny_pair[0], message)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: next(folder.glob("*-00002-*")).unlink(),
            r"\S+.index.json names 1 of . files that are not there .model-00002-of",
        ),
        (
            lambda folder: next(folder.glob("*-00002-*")).write_bytes(b"version https://git-lfs"),
            "model-00002-of-00002.safetensors is no whole file",
        ),
        (
            lambda folder: [next(folder.glob(name)).unlink() for name in ("*-00002-*", "*.index.json")],
            "1 of the 2 files model-.*.safetensors are not there",
        ),
        *(
            (lambda folder, text=text: (folder / "model.safetensors.index.json").write_text(text), message)
            for text, message in [
                ("{", r"\S+.index.json cannot be read"),
                ("[]", r"\S+.index.json has no weight_map"),
                ('{"weight_map": {}}', r"\S+.index.json has no weight_map"),
                ('{"weight_map": {"a": null, "b": "x"}}', r"\S+.index.json has no weight_map"),
            ]
        ),
    ],
)
def test_shards_that_are_missing_or_damaged_are_refused(damage, message, tmp_path, tiny_pair):
    AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path)).save_pretrained(tmp_path, max_shard_size="200KB")
    check_weights(PairConfig(teacher=str(tmp_path), student=str(tmp_path)))
    (tmp_path / "unused.safetensors").write_bytes(b"")  # vLLM reads what the index names
    check_weights(PairConfig(teacher=str(tmp_path), student=str(tmp_path)))
    damage(tmp_path)
    refused_everywhere(tmp_path, tiny_pair[0], message)


def test_a_cached_model_is_refused_where_a_file_is_damaged(tmp_path):
    folder = tmp_path / "models--a--b" / "snapshots" / "0"
    folder.mkdir(parents=True)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text("0")
    pair = PairConfig(teacher="not/cached", student="a/b", engine_kwargs={"download_dir": str(tmp_path)})
    check_weights(pair)  # what is absent is downloaded
    file = tiny_model(folder) / "model.safetensors"
    (folder / "model-00001-of-00002.safetensors").symlink_to("absent")
    check_weights(pair)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"student='a/b': model.safetensors is no whole .*; delete '{file}', and it is down"):
        check_weights(pair)


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_a_dry_run_refuses_damaged_weights(command, tmp_path, tiny_pair, capsys):
    tiny_model(tmp_path / "student")
    (tmp_path / "in.jsonl").write_text('{"prompt": "w7"}\n')
    given = {"model_name_or_path": tmp_path / "student", "teacher_model_name_or_path": tiny_pair[0], "dry_run": "true"}
    given |= {"input": tmp_path / "in.jsonl", "max_completion_length": 2}
    argv = [command, *(text for name, value in given.items() for text in (f"--{name}", str(value)))]
    cli.main(argv)
    (tmp_path / "student" / "model.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit):
        cli.main(argv)
    err = capsys.readouterr().err.splitlines()[-1]
    assert "model.safetensors is no whole file of weights (it is empty); copy" in err


def refused_everywhere(student, teacher, message):
    """Check that `osd check`, the engine, the server and the trainer refuse the student's files before a model loads."""
    message = re.escape(f"student='{student}': ") + message
    assert re.match(message, check(str(teacher), str(student), Wanted()).sampling)
    pair = PairConfig(teacher=str(teacher), student=str(student))
    for entry in (
        lambda: PairEngine(pair),
        lambda: server_arguments(["--teacher", str(teacher), "--student", str(student), "--dtype", "float32"]),
        lambda: planned_pair(str(student), str(teacher), OSDConfig(str(student / "out"), use_cpu=True, bf16=False), None),
    ):
        with pytest.raises(ValueError, match=message):
            entry()
    check_weights(replace(pair, engine_kwargs={"load_format": "dummy"}))


def test_experts_that_no_layer_has_are_not_counted(run, tmp_path, saved):
    """A Nemotron-H declares them in every configuration."""
    dense = saved("Mamba-2, attention and MLP in layers of their own")
    assert AutoConfig.from_pretrained(dense).n_routed_experts > 1
    assert "; dense;" in run(dense, dense).lines["teacher"]
    assert run(saved("sliding window and full"), dense).status == 0
    assert "; 4 experts;" in run(*[save_model(tmp_path, "Nemotron 3")] * 2).lines["student"]


def test_qwen3_5_is_described_where_vllm_cannot_import_it(saved, monkeypatch):
    """Its class imports torchvision; vLLM may know a class from its cache without importing it."""
    path = saved("Qwen 3.5")
    inspect, load = registry._try_inspect_model_cls, registry._try_load_model_cls
    known = inspect("Qwen3NextForCausalLM", ModelRegistry.models["Qwen3NextForCausalLM"])
    monkeypatch.setattr(registry, "_try_inspect_model_cls", lambda name, m: known if "Qwen3_5" in name else inspect(name, m))
    monkeypatch.setattr(registry, "_try_load_model_cls", lambda name, m: None if "Qwen3_5" in name else load(name, m))
    side = check(str(path), str(path), FLOAT32).sides["teacher"]
    config = text_config(AutoConfig.from_pretrained(path))
    heads, size = config.linear_num_value_heads, config.linear_key_head_dim
    channels = 2 * config.linear_num_key_heads * size + heads * size
    state = 4 * (channels * (config.linear_conv_kernel_dim - 1) + heads * size * size)
    assert side.request_bytes(300) == 2 * state + 2 * 300 * 2 * 2 * 32 * 4
    assert "has recurrent layers" in side.facts.no_drafts


def test_a_class_that_cannot_be_imported_is_told_with_the_reason(monkeypatch, saved):
    path = saved("sliding window and full")
    missing = registry._LazyRegisteredModel(module_name="vllm.no_such_module", class_name="Gemma3ForCausalLM")
    monkeypatch.setitem(ModelRegistry.models, "Gemma3ForCausalLM", missing)
    monkeypatch.setattr(registry, "_try_inspect_model_cls", lambda *_: None)
    report = check(str(path), str(path), Wanted())
    assert "vLLM's Gemma3ForCausalLM cannot be imported here: No module named 'vllm.no_such_module'" in report.sampling


@pytest.mark.parametrize(
    ("changes", "context"),
    [
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, 2048),
        ({"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}}, 2048),
        ({"architectures": None}, 512),
        ({"architectures": []}, 512),
        ({"dtype": None, "torch_dtype": "bfloat16"}, 512),
        ({"quantization_config": None}, 512),
        ({"num_key_value_heads": None}, 512),
        ({"sliding_window": None}, 512),
        ({"tie_word_embeddings": True}, 512),
        ({"vocab_size": 80}, 512),
    ],
)
def test_odd_configurations_are_read(changes, context, tmp_path, tiny_pair, run):
    edit(tiny_model(tmp_path, vocab=changes.get("vocab_size", 64), tokenizer_vocab=64), "config.json", **changes)
    done = run(tiny_pair[0], tmp_path)
    assert (done.status, done.lines["sampling"], done.lines["training"]) == (0, "yes", "yes")
    assert "2 x full attention; dense; not quantized" in done.lines["student"]
    assert done.lines["context"] == f"512 tokens of the teacher, {context} of the student"
    parameters = 65_856 - 64 * 64 * ("tie_word_embeddings" in changes) + 2 * 16 * 64 * ("vocab_size" in changes)
    assert f"({parameters:,} parameters in bfloat16)" in done.lines["memory, student"]


QUANTIZED = {
    "fp8": {"activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "awq": {"bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    "gptq": {"bits": 4, "group_size": 32, "desc_act": False, "sym": True},
    "compressed-tensors": {"format": "int-quantized", "config_groups": {}, "ignore": ["lm_head"]},
    "mxfp4": {"modules_to_not_convert": ["lm_head"]},
    "modelopt": {"quant_algo": "NVFP4", "group_size": 16},
    "bitsandbytes": {"load_in_4bit": True},
}


@pytest.mark.parametrize("method", QUANTIZED)
def test_quantized_checkpoints(method, tmp_path, tiny_pair):
    path = tiny_model(tmp_path)
    edit(path, "config.json", quantization_config={"quant_method": method, **QUANTIZED[method]})
    as_teacher, as_student = (check(*map(str, pair), Wanted()) for pair in ((path, tiny_pair[1]), (tiny_pair[0], path)))
    assert "is quantized" in as_student.training
    if method == "bitsandbytes":  # vLLM no longer has it of its own
        assert "Unknown quantization method: bitsandbytes" in as_teacher.sampling
        return
    assert (as_teacher.sampling, as_teacher.training, as_student.sampling) == ("", "", "")
    side = as_teacher.sides["teacher"]
    assert method in side.facts.quantization
    assert side.weights == (path / "model.safetensors").stat().st_size


def test_a_recurrent_student_drafts_and_a_recurrent_teacher_verifies_nothing(run, saved, tiny_pair):
    stateful, plain = saved("Mamba-2 and attention"), tiny_pair[1]
    assert run(plain, plain).lines["drafts"] == "yes"
    assert "num_speculative_tokens: 4" in run(plain, plain, "--num_speculative_tokens", "4").out
    without, drafting = run(stateful, plain), run(stateful, plain, "--num_speculative_tokens", "auto")
    assert (without.status, drafting.status) == (0, 1)
    assert without.lines["drafts"] == drafting.lines["drafts"]
    assert drafting.lines["sampling"].startswith(f"no: the teacher {str(stateful)!r} has recurrent layers")


def test_each_draft_of_a_recurrent_student_takes_one_more_state(saved, tiny_pair):
    def request_bytes(drafts: int | str) -> int:
        report = check(str(tiny_pair[0]), str(saved("Mamba-2 and attention")), Wanted(num_speculative_tokens=drafts))
        assert not report.sampling
        return report.sides["student"].request_bytes(100)

    state = request_bytes(1) - request_bytes(0)
    assert state > 0
    assert request_bytes(3) == request_bytes(0) + 3 * state
    assert request_bytes("auto") == request_bytes(0) + 8 * state


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_speculative_tokens", "17"], "num_speculative_tokens='17' is not a whole number from 0 to 16"),
        (["--max_model_len", "0"], "max_model_len=0 must be at least 1"),
        (["--max_num_seqs", "-4"], "max_num_seqs=-4 must be at least 1"),
        (["--gpus", "0"], "gpus=0 must be at least 1"),
        (["--gpu_memory", "-1"], "gpu_memory=-1 must be above 0"),
        (["--gpu_memory", "nan"], "gpu_memory=nan must be above 0"),
        (["--gpus", "two"], "argument --gpus: invalid int value: 'two'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--max_len", "4"], "unrecognized arguments: --max_len 4"),
    ],
)
def test_wrong_flags_end_in_one_line(flags, message, run):
    done = run("a", "b", *flags)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert done.err.count("\n") == 1


# -- settings to start from -----------------------------------------------------------------------------------------------


@pytest.fixture
def declaring(tmp_path):
    """A pair whose generation configs declare several ends and sampling defaults."""
    teacher, student = tiny_model(tmp_path / "teacher"), tiny_model(tmp_path / "student", max_position_embeddings=300)
    GenerationConfig(eos_token_id=[2, 9], temperature=0.7, top_p=1.0, top_k=20, do_sample=True).save_pretrained(teacher)
    GenerationConfig(eos_token_id=5, repetition_penalty=1.05).save_pretrained(student)
    return teacher, student


def test_the_union_of_ends_is_that_of_both_and_of_the_teachers_tokenizer(declaring, run):
    save_tokenizer(declaring[0], 64, eos="w11")
    assert end_ids(PairConfig(teacher=str(declaring[0]), student=str(declaring[1]))) == [5, 2, 9, 11]
    told = run(*declaring).lines["end of a completion"]
    assert told == "ids [2, 9] by the teacher's files, [5] by the student's; any of [5, 2, 9, 11] ends it"


def test_sampling_defaults_are_shown_as_ignored(declaring, run):
    lines = run(*declaring).lines
    teacher, student = (lines[f"sampling defaults of the {side}'s generation_config.json"] for side in ("teacher", "student"))
    assert teacher.startswith("temperature=0.7, top_k=20; OSD ignores them")
    assert student.startswith("repetition_penalty=1.05; OSD ignores them")


def test_vllm_takes_ends_alone_from_a_generation_config():
    """The reason why the defaults are shown as ignored; requests reach vLLM with all of their own arguments."""
    from osd.engine.engine import checked_params

    params = checked_params({"max_tokens": 4})
    params.update_from_generation_config({"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05, "eos_token_id": [2, 9]})
    assert (params.temperature, params.top_k, params.repetition_penalty) == (1.0, 0, 1.0)
    assert {2, 9} <= set(params.stop_token_ids)


def test_contexts_and_the_default_length(declaring, run):
    done = run(*declaring)
    assert done.lines["context"] == "512 tokens of the teacher, 300 of the student"
    assert "vllm_max_model_length: 300" in done.out


def test_chat_templates_are_compared(declaring, run):
    student = declaring[1]
    assert run(*declaring).lines["chat templates"] == "the same on both sides"
    tokenizer = AutoTokenizer.from_pretrained(student)
    for template, told in (("{{ messages }}", "they differ"), (None, "the student has none")):
        tokenizer.chat_template = template
        (student / "chat_template.jinja").unlink()
        tokenizer.save_pretrained(student)
        done = run(*declaring)
        assert done.lines["chat templates"].startswith(told)
        assert ("enable_chat_template" in done.out) == (template is not None)
    assert run(student, student).lines["chat templates"].startswith("missing on both sides")


def test_the_settings_at_the_end_are_those_of_the_commands(declaring, run):
    teacher, student = declaring
    printed = run(*declaring, "--gpus", "2", "--dtype", "float32", "--max_num_seqs", "9").out.partition("\n\n")[2]
    settings = GenerateConfig(**yaml.safe_load(printed), input="x", output="y", max_completion_length=8)
    assert (settings.teacher_model_name_or_path, settings.model_name_or_path) == (str(teacher), str(student))
    kwargs = settings.pair_kwargs()["engine_kwargs"]
    assert {"dtype": "float32", "max_num_seqs": 9, "tensor_parallel_size": 2, "max_model_len": 300}.items() <= kwargs.items()
    PairConfig(teacher="t", student="s", **settings.pair_kwargs())
    assert "# temperature: 0.7  # the teacher's own default" in printed
