"""Tests of the documents: code blocks run, links resolve, quoted messages exist in the code, translations agree.

The blocks of a page run in order, in one folder and (Python) one namespace. Documented models are replaced by tiny ones,
and lengths, batches and steps are reduced (see `tiny_world`). Flags, keys and names stay as written.
"""

from __future__ import annotations

import ast
import json
import re
import statistics
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from tests.documents import (
    LANGUAGES,
    LINKED,
    PAGES,
    ROOT,
    Block,
    anchor,
    blocks,
    check_make,
    check_pip,
    commands,
    headings,
    links,
    script_main,
)
from tests.tiny import tiny_engine_kwargs

ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
BY_NAME = [pytest.param(path, id=str(path.relative_to(ROOT))) for path in PAGES]
# One run per page and language: Python blocks, and shell blocks with their files. The shell run of the usage page is slow.
RUNS = [
    pytest.param(path, languages, id=f"{path.stem}-{languages[0]}", marks=[pytest.mark.slow] if path.stem == slow else [])
    for languages, slow in ((("python",), ""), (("bash", "yaml", "json"), "usage"))
    for path in PAGES
    if path.stem != "serving"  # tests/test_serve.py runs its blocks
    if any(block.language in languages for block in blocks(path.read_text()))
]


# -- static checks ----------------------------------------------------------------------------------------------------------


LINKING = sorted(
    path for folder in (".", "docs", "theory", "benchmarks", ".github/ISSUE_TEMPLATE") for path in (ROOT / folder).glob("*.md")
)


@pytest.mark.parametrize("path", [pytest.param(path, id=str(path.relative_to(ROOT))) for path in LINKING])
def test_links_resolve(path):
    text = path.read_text()
    assert "<<<<<<<" not in text
    for target in links(text):
        if re.match(r"https?://", target):
            continue
        name, _, fragment = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), f"{path.name} links to {target}"
        if fragment:
            assert fragment in {anchor(title) for _, title in headings(linked.read_text())}, f"{path.name} links to {target}"


@pytest.mark.parametrize("path", BY_NAME)
def test_every_block_has_a_tested_language(path):
    for block in blocks(path.read_text()):
        assert block.language in LANGUAGES, f"{path.name}:{block.line}: {block.language!r}"


def test_skipped_blocks_are_few_and_state_a_reason():
    marked = [(path.name, block) for path in PAGES for block in blocks(path.read_text()) if block.not_run]
    assert len(marked) <= 6, [(name, block.line) for name, block in marked]
    for name, block in marked:
        assert len(block.not_run) > 15, f"{name}:{block.line}"


def test_chinese_readme_matches_the_english_one():
    english, chinese = ENGLISH.read_text(), CHINESE.read_text()
    assert [level for level, _ in headings(english)] == [level for level, _ in headings(chinese)]
    assert [(b.language, b.text) for b in blocks(english)] == [(b.language, b.text) for b in blocks(chinese)]
    other = {ENGLISH.name, CHINESE.name}
    assert [link for link in links(english) if link not in other] == [link for link in links(chinese) if link not in other]
    tables = [[line.count("|") for line in text.splitlines() if line.startswith("|")] for text in (english, chinese)]
    assert tables[0] == tables[1]
    numbers = [set(re.findall(r"\d+\.\d+", text)) for text in (english, chinese)]
    assert numbers[0] == numbers[1]


def test_readme_is_short():
    text = ENGLISH.read_text()
    assert len(text.split()) < 1200
    assert len(text[: text.index("from datasets import")].split()) <= 250


def test_readme_has_the_committed_results():
    """Write the rows of its tables again: cost from benchmarks/results, quality from the generated page evidence.md."""

    def result(name):
        return json.loads((ROOT / "benchmarks" / "results" / name).read_text())

    text, evidence = ENGLISH.read_text(), (ROOT / "docs" / "evidence.md").read_text()
    sampling = result("speculation_3B+1.5B_512_nvidia-h200_2026-12-01.json")["systems"]
    for alone, pair in zip(sampling["teacher"]["rows"], sampling["0"]["rows"], strict=True):
        ms = [alone["ms_per_step"], pair["ms_per_step"]]
        assert f"| {alone['batch_size']} | {ms[0]:.2f} | {ms[1]:.2f} | {ms[1] / ms[0]:.2f} |" in text
    drafts = result("speculation_14B+1.5B_nvidia-h200_2026-12-01.json")["systems"]
    ms = {(s, r["batch_size"], r["acceptance"]): r["ms_per_step"] for s, system in drafts.items() for r in system["rows"]}
    performance = (ROOT / "docs" / "performance.md").read_text()
    for size in (8, 32):
        alone, paired = ms["teacher", size, None], [ms["0", size, None], ms["4", size, 0.9], ms["4", size, 0.7]]
        cells = " | ".join(f"{time:.2f} ({time / alone:.2f} ×)" for time in paired)
        assert f"| {size} | {alone:.2f} | {cells} |" in text
        for rate in (0.7, 0.8, 0.9, 0.95):
            ratios = " | ".join(f"{ms[k, size, rate] / alone:.2f}" for k in ("1", "2", "3", "4", "5", "6", "auto"))
            assert f"| {size}, {rate} | {ratios} |" in performance
    steps = result("train_step_3B+0.5B_256_nvidia-h200_2026-11-28.json")["systems"]
    ours, trls = (statistics.median(steps[system]["step_s"]) for system in ("osd", "trl_autocast"))
    assert f"took {ours:.1f} s (vLLM 0.26, the previous engine); TRL's took {trls:.1f} s" in " ".join(text.split())
    [learnt] = re.findall(r"^### bookings.*?(^\| sampled from.*?)^$", evidence, flags=re.DOTALL | re.MULTILINE)[:1]
    known = {row[0]: row for row in table(learnt)}
    quality = [row for row in table(text) if len(row) == 4 and "±" in row[1]]
    assert len(quality) == 4
    for name, *cells in quality:
        arm = {"student (on-policy)": "student", "linear mixture, 0.5": "linear 0.5"}.get(name, name)
        final, mean, difference = (known[arm][column] for column in (2, 4, 5))
        assert cells == [final, mean, difference], name


def table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_memory_page_follows_the_formula_of_osd_check():
    """Compute the table again: parameters by transformers, caches from the shapes, training bytes from osd.check."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    from benchmarks.shapes import SHAPES, config
    from osd.check import TRAINING_BYTES

    text = (ROOT / "docs" / "memory.md").read_text()
    assert f"training = {TRAINING_BYTES} bytes" in text
    rows = re.findall(r"^\| (\S+B) \| ([\d.]+) \| (\d+) \| ([\d.]+) \|$", text, flags=re.MULTILINE)
    assert len(rows) == 6
    for name, weights, kv_cache, training in rows:
        fields = {key: value for key, value in config(name).items() if key not in ("architectures", "model_type", "dtype")}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(Qwen2Config(**fields))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        hidden, _, layers, heads, kv_heads, _ = SHAPES[name]
        assert f"{2 * parameters / 2**30:.1f}" == weights
        assert 2 * layers * kv_heads * (hidden // heads) * 2 // 1024 == int(kv_cache)
        assert f"{TRAINING_BYTES * parameters / 2**30:.1f}" == training


def test_scaling_page_has_the_memory_that_osd_check_computes():
    import runpy

    from osd.check import Wanted

    made = runpy.run_path(str(ROOT / "docs" / "make_scaling.py"))
    assert (text := made["PAGE"].read_text()) == made["page"](), "run `python docs/make_scaling.py`"
    for pair, gpus, requests in (("8B + 0.6B", 1, 32), ("32B + 7B", 4, 128)):
        wanted = Wanted(gpus=gpus, max_model_len=1536, max_num_seqs=requests)
        weights, request = made["checked"](*made["PAIRS"][pair], wanted).needed()
        assert re.search(rf"--max_num_seqs {requests}`, [^.]* {(weights + requests * request) / 2**30:.1f} GiB", text)


def test_the_commands_of_the_scaling_page_parse(monkeypatch):
    """Those of servers and of several nodes, which no test runs: by vLLM's parser, accelerate's, and training's own."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    from osd.engine.backend.arguments import given, pair_config, parser
    from osd.launch import _accelerate_flags, _split
    from osd.train.train_osd import parse

    monkeypatch.chdir(ROOT)
    seen = set()
    for block in blocks((ROOT / "docs" / "scaling.md").read_text()):
        for words, _ in commands(block.text):
            if words[0].startswith("CUDA_VISIBLE_DEVICES="):
                words = [word for word in words[1:] if word != "&"]
            if words[:2] == ["osd", "serve"]:
                assert pair_config(parser().parse_args(words[2:]), given(words[2:])).engine_kwargs["weight_transfer_config"]
            elif words[:2] == ["osd", "train"]:
                launch, rest = _split(words[2:])
                parse([*rest, "--use_cpu", "--bf16", "false"])  # for this machine
                flags = [*_accelerate_flags(launch, use_cpu=False), "-m", "osd.train.train_osd"]
                args, *_ = _validate_launch_command(launch_command_parser().parse_args(flags))
                assert args.use_fsdp == (launch.accelerate_config == "fsdp2")
                assert args.num_processes == int(getattr(launch, "num_processes", 1))
                assert args.num_machines == int(getattr(launch, "num_machines", 1))
            seen.add(" ".join(words[:2]))
    assert {"osd serve", "osd train"} <= seen


def test_performance_page_has_short_lines():
    assert max(map(len, (ROOT / "docs" / "performance.md").read_text().splitlines())) <= 120


def test_structure_page_lists_every_module():
    text = (ROOT / "docs" / "structure.md").read_text()
    for folder in ("osd", "trainers", "benchmarks", "studies"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "__init__.py":
                assert f"`{path.relative_to(ROOT)}`" in text or re.search(rf"`{path.name}`", text), path
    for name in re.findall(r"`((?:osd|trainers|benchmarks|studies|theory)/[\w/]+\.\w+)`", text):
        assert (ROOT / name).is_file(), name


CLAUSE = re.compile(r"(What|Whatever|How|Whether|Where|Which|Who|That|Those|If|When|As|Of|It|They)\b")


def test_no_docstring_begins_with_a_clause():
    """A first line is a verb or a noun (CONTRIBUTING.md), not "What `f` returns"."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    sources = sorted(path for folder in ("osd", "trainers") for path in (ROOT / folder).rglob("*.py"))
    nodes = [(path, node) for path in sources for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
    texts = [(path, text) for path, node in nodes if (text := ast.get_docstring(node))]
    assert len(texts) > 500
    assert not [(path.name, text.splitlines()[0]) for path, text in texts if CLAUSE.match(text)]
    assert CLAUSE.match("What `update_from_output` comes to for requests that neither stop nor stream")


@cache
def messages_of_the_code() -> str:
    """Return all string constants of the code, one per line, with … in place of the values of f-strings."""

    def flat(node: ast.expr) -> str | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join("…" if isinstance(part, ast.FormattedValue) else str(part.value) for part in node.values)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = flat(node.left), flat(node.right)
            return None if left is None or right is None else left + right
        return None

    sources = [path for folder in ("osd", "trainers") for path in (ROOT / folder).rglob("*.py")]
    trees = (ast.parse(path.read_text()) for path in sources)
    return "\n".join(text for tree in trees for node in ast.walk(tree) if isinstance(node, ast.expr) and (text := flat(node)))


def in_the_code(message: str) -> bool:
    """Return True if the code contains each part of a message that is split at …."""
    return all(piece.strip() in messages_of_the_code() for piece in re.split(r"…", message) if len(piece.strip()) > 1)


def test_quoted_messages_exist_in_the_code():
    quoted = [block.text for block in blocks((ROOT / "docs" / "troubleshooting.md").read_text()) if block.language == "text"]
    assert len(quoted) > 20
    missing = [message for message in quoted if not in_the_code(message)]
    assert not missing
    assert not in_the_code("the student's prompt has … tokens, which nobody says")


# -- running the blocks -------------------------------------------------------------------------------------------------------


class Engines:
    """Starter of engine pairs that reuses a running pair of the same models."""

    def __init__(self):
        from osd.engine.engine import PairEngine

        self.start_pair, self.close_pair = PairEngine.__init__, PairEngine.close
        self.running = None

    def start(self, engine, config):
        """Replace `PairEngine.__init__`."""
        from osd.validate_models import check_models

        check_models(config)
        old = self.running
        same = old is not None and (old.config.teacher, old.config.student) == (config.teacher, config.student)
        if same and old.weights_version == 0:  # a trained student differs from the documented model
            engine.__dict__ = old.__dict__
        else:
            self.close()
            self.start_pair(engine, config)
            self.running = engine
        engine.set_mixing(config.mixing)

    def close(self):
        if self.running is not None:
            self.close_pair(self.running)
            self.running = None


@pytest.fixture(scope="module")
def engines():
    started = Engines()
    yield started
    started.close()


@pytest.fixture
def tiny_world(tiny_pair, tmp_path, monkeypatch, engines):
    """Working folder like a clone, with short runs. Returns a function that replaces model names by tiny models."""
    from osd.engine.engine import PairConfig, PairEngine
    from osd.train import OSDConfig

    for name in LINKED:
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    teacher, student = map(str, tiny_pair)
    models = {
        "Qwen/Qwen2.5-7B-Instruct": teacher,
        "Qwen/Qwen2.5-3B-Instruct": teacher,
        "Qwen/Qwen2.5-1.5B-Instruct": student,
        "Qwen/Qwen2.5-0.5B-Instruct": student,
        "models/SmolLM2-135M-Instruct": student,
    }
    tiny = tiny_engine_kwargs(max_model_len=512)
    check_pair, check_args = PairConfig.__post_init__, OSDConfig.__post_init__

    def tiny_pair_config(self):
        check_pair(self)  # validates the documented settings before they are changed
        self.engine_kwargs.update({**tiny, "seed": self.engine_kwargs.get("seed", 0)})

    def short_run(self):
        self.max_steps, self.max_completion_length, self.warmup_steps = 2, min(8, self.max_completion_length), 0
        self.use_cpu, self.bf16, self.report_to = not torch.cuda.is_available(), False, "none"
        check_args(self)

    monkeypatch.setattr(PairEngine, "__init__", lambda engine, config: engines.start(engine, config))
    monkeypatch.setattr(PairEngine, "close", lambda engine: None)
    monkeypatch.setattr(PairConfig, "__post_init__", tiny_pair_config)
    monkeypatch.setattr(OSDConfig, "__post_init__", short_run)
    _short_trl(monkeypatch)

    def substituted(text: str) -> str:
        for name, path in models.items():
            text = text.replace(name, path)
        return text

    (tmp_path / "configs").mkdir()
    for path in (ROOT / "configs").glob("*.yaml"):
        (tmp_path / "configs" / path.name).write_text(substituted(path.read_text()))
    (tmp_path / "configs" / "accelerate").symlink_to(ROOT / "configs" / "accelerate")
    monkeypatch.setattr("osd.data.configs.ROOT", tmp_path / "configs")
    return substituted


def _short_trl(monkeypatch):
    from trl import DistillationConfig

    check_args = DistillationConfig.__post_init__

    def short_run(self):
        self.max_steps, self.max_completion_length, self.report_to = 2, min(8, self.max_completion_length), "none"
        self.use_cpu, self.bf16 = not torch.cuda.is_available(), False
        check_args(self)

    monkeypatch.setattr(DistillationConfig, "__post_init__", short_run)


@pytest.mark.parametrize(("path", "languages"), RUNS)
def test_blocks_of_a_page_run(path, languages, tiny_world, monkeypatch):
    runner = Runner(tiny_world, monkeypatch)
    for block in (block for block in blocks(path.read_text()) if block.language in languages):
        try:
            runner.run(block)
        except Exception as error:
            error.add_note(f"in {path.name}, line {block.line}")
            raise


class Runner:
    """Runner of the blocks of one page."""

    def __init__(self, substituted, monkeypatch):
        self.substituted, self.monkeypatch = substituted, monkeypatch
        self.namespace = {"__name__": "__main__"}

    def run(self, block: Block) -> None:
        text = self.substituted(block.text)
        if block.language == "python" and not block.not_run:
            exec(compile(text, f"line {block.line}", "exec"), self.namespace)
            if ".train()" in text:  # a data set smaller than a batch would silently train zero steps
                assert self.namespace["trainer"].state.global_step == 2
        elif block.language == "yaml":
            check_yaml(text)
            if block.file:  # remove filters: completions of tiny models are wrong and reach the length limit
                Path(block.file).write_text(re.sub(r"^filter_.*$", "", text, flags=re.MULTILINE))
        elif block.language == "json":
            assert json.loads(text), "one object on one line"
            Path(str(block.file)).write_text(text + "\n")
        elif block.language == "bash":
            for words, body in commands(text):
                self.command(words, body, parse_only=block.not_run is not None)

    def command(self, words: list[str], body: str | None, parse_only: bool = False) -> None:
        while re.match(r"[A-Z_0-9]+=", words[0]):
            name, value = words.pop(0).split("=", 1)
            self.monkeypatch.setenv(name, value)
        program, *rest = words
        if parse_only and program != "python":
            return  # a server, or another project's program
        if program == "cat" and body is not None:
            Path(rest[rest.index(">") + 1]).write_text(body)
        elif program == "echo":
            text, arrow, file = rest
            assert arrow == ">"
            Path(file).write_text(text + "\n")
        elif program == "make":
            check_make(words)
        elif program in ("pip", "uv"):
            check_pip(words)
        elif program == "source":
            assert rest == [".venv/bin/activate"]
        elif program == "bash":
            assert (ROOT / rest[0]).is_file()
        elif program == "osd":
            run_osd(rest)
        elif program == "accelerate":
            run_accelerate(rest)
        elif program == "python":
            run_script(rest, parse_only)
        else:
            raise AssertionError(f"tests/test_docs.py cannot run the command {program!r}")


def run_osd(arguments: list[str]) -> None:
    from osd.cli import main

    if arguments[0] == "train":
        return run_train(arguments[1:])
    try:
        main(cut(arguments))
    except SystemExit as end:
        if end.code:
            raise AssertionError(f"osd {arguments}: {end.code}") from end


def run_train(arguments: list[str]) -> None:
    """Train in this process. tests/test_commands.py checks what `osd train` launches."""
    from osd.data.configs import find
    from osd.launch import _split

    launch, rest = _split(arguments)
    if "accelerate_config" in launch:
        find(launch.accelerate_config, folder="accelerate")
    run_accelerate(["launch", "trainers/train_osd.py", *rest])


def cut(arguments: list[str]) -> list[str]:
    """Add a length limit to a sampling command: tiny models never emit the end of sequence."""
    return arguments if arguments[0] not in ("generate", "compare") else [*arguments, "--max_completion_length", "8"]


def run_accelerate(arguments: list[str]) -> None:
    """Run the training script in this process. tests/test_entry_points.py tests a real `accelerate launch`."""
    from accelerate.commands.launch import launch_command_parser

    from osd.train.train_osd import main, parse

    assert arguments[0] == "launch"
    launch = launch_command_parser().parse_args(arguments[1:])
    assert launch.config_file is None or Path(launch.config_file).is_file(), launch.config_file
    assert launch.training_script == "trainers/train_osd.py"
    config = launch.training_script_args[launch.training_script_args.index("--config") + 1]
    name = yaml.safe_load(Path(config).read_text())["dataset_name"]
    if Path(name).is_file():
        main(launch.training_script_args)
    else:  # a dataset of the Hub
        parse(launch.training_script_args)


SCRIPTS_PARSED = (
    "benchmarks/sampling.py",
    "benchmarks/mixing.py",
    "examples/smollm2.py",
    "examples/demo.py",
    "studies/quality/run.py",
    "studies/quality/report.py",
)


def run_script(arguments: list[str], parse_only: bool) -> None:
    script, *flags = arguments
    if script == "-m":  # tests/test_dropin.py runs the modules
        script, parse_only = flags.pop(0).replace(".", "/") + ".py", True
    assert (ROOT / script).is_file(), script
    if parse_only or script in SCRIPTS_PARSED:
        check_flags(script, flags)
    else:
        script_main(script)([*flags, *(["--cpu"] if "--cpu" in (ROOT / script).read_text() and "--cpu" not in flags else [])])


def check_flags(script: str, flags: list[str]) -> None:
    """Check that the script defines every flag."""
    text = (ROOT / script).read_text()
    for flag in flags:
        assert not flag.startswith("-") or f'"{flag}"' in text, f"{script} has no {flag}"


def check_yaml(text: str) -> None:
    """Check that training and the data commands accept a YAML file, and reject an unknown key."""
    from osd.data.parse import parse as parse_data
    from osd.data.settings import CompareConfig, GenerateConfig
    from osd.train.train_osd import parse, training_keys

    path = Path("documented.yaml")
    path.write_text(text)
    flags = ["--config", str(path), "--dataset_name", "problems.jsonl"]
    parse(flags)
    for settings in (GenerateConfig, CompareConfig):
        parse_data(settings, [*flags, "--output", "anywhere"], training_keys=training_keys)
    path.write_text(f"{text}\nnever_heard_of_it: 1\n")
    with pytest.raises(ValueError, match="never_heard_of_it"):
        parse_data(GenerateConfig, [*flags, "--output", "anywhere"], training_keys=training_keys)


# -- tests of the checks ----------------------------------------------------------------------------------------------------


def test_wrong_blocks_fail(tiny_world, monkeypatch):
    runner = Runner(tiny_world, monkeypatch)
    for language, text, error in (
        ("python", "from osd import OptimalSamplingV2", ImportError),
        ("bash", "osd generate --no_such_flag 1", AssertionError),
        ("bash", "make no-such-target", AssertionError),
        ("bash", "curl https://example.com", AssertionError),
        ("bash", "pip install -e '.[no_such_extra]'", AssertionError),
        ("bash", "python benchmarks/sampling.py --no_such_flag", AssertionError),
        ("yaml", "model_name_or_path: a\ndataset_name: b\nalpha_metod: fixed", ValueError),
    ):
        with pytest.raises(error):
            runner.run(Block(language, text, 1))


def test_documented_settings_are_validated_before_they_are_reduced(tiny_world):
    from osd.engine.config import PairConfig

    with pytest.raises(ValueError, match="is not an engine argument"):
        PairConfig(teacher="t", student="s", engine_kwargs={"max_model_length": 1})


# -- the generated page and the tutorial ------------------------------------------------------------------------------------


def test_api_page_is_up_to_date():
    import runpy

    made = runpy.run_path(str(ROOT / "docs" / "make_api.py"))
    assert made["PAGE"].read_text() == made["page"](), "run `python docs/make_api.py`"


def test_notebook_is_up_to_date():
    import runpy

    made = runpy.run_path(str(ROOT / "docs" / "make_notebook.py"))
    text = made["notebook"]()
    assert made["NOTEBOOK"].read_text() == text, "run `python docs/make_notebook.py`"
    cells = json.loads(text)["cells"]
    code = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    assert len(code) == 7
    for source in code:
        compile(source, "cell", "exec")


@pytest.mark.slow
def test_tutorial_trains_a_student(tiny_world, tiny_pair, monkeypatch, capfd):
    import runpy

    for name, value in {"MODEL_TEACHER": tiny_pair[0], "MODEL_STUDENT": tiny_pair[1], "OSD_TUTORIAL_OUTPUT": "out"}.items():
        monkeypatch.setenv(name, str(value))
    cells = runpy.run_path(str(ROOT / "examples" / "tutorial.py"), run_name="__main__")
    assert cells["trainer"].state.global_step == 2
    assert len(cells["alone"].generated_texts) == len(cells["FACTS"])
    assert (Path("out") / "model.safetensors").is_file()
    assert "largest |KL" in capfd.readouterr().out
