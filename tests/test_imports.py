"""Tests of the dependency order of the modules and of the imports of `import osd`."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each layer may import itself and the layers before it.
LAYERS = [
    "osd.terminal",
    "osd.interrupts",
    "osd.core",
    "osd.log_partition",
    "osd.alpha",
    "osd.mixing",
    "osd.kernels",
    "osd.sampling_args",
    "osd.prompt_checks",
    "osd.prompts",
    # They import each other: checks need PairConfig, PairEngine needs the checks.
    ("osd.validate_models", "osd.weight_files", "osd.engine"),
    "osd.check",
    "osd.adapters",
    "osd.sync_check",
    "osd.weight_sync",
    "osd.background",
    "osd.colocated",
    "osd.generation",
    "osd.output",
    "osd.sampler",
    "osd.report",
    "osd.data",
    "osd.train",
    "osd.environment",
    "osd.launch",
    "osd.cli",
    "osd.__main__",
]
IMPORT_TRL = ("osd.sync_check", "osd.weight_sync", "osd.colocated", "osd.train")
SOURCES = [p for folder in ("osd", "trainers") for p in sorted((ROOT / folder).rglob("*.py")) if p != ROOT / "osd/__init__.py"]


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return re.sub(r"^trainers\b", "osd.train", name)  # osd/train is a link to trainers/


def layer(module: str) -> int | None:
    names = [(i, name) for i, entry in enumerate(LAYERS) for name in ([entry] if isinstance(entry, str) else entry)]
    found = [i for i, name in names if module == name or module.startswith(name + ".")]
    return found[0] if found else None


def imports(path: Path) -> set[str]:
    """Return all modules that a file imports, including imports in functions and under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    named = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return named | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_dependencies_point_one_way(path):
    own = layer(module_name(path))
    assert own is not None, f"{path} belongs to no layer"
    for module in imports(path):
        other = layer(module)
        assert other is None or other <= own, f"{module_name(path)} imports {module}"
        top = module.split(".")[0]
        assert top != "vllm" or module_name(path).startswith("osd.engine.backend"), f"{path} imports vLLM"
        assert top != "trl" or LAYERS[own] in IMPORT_TRL, f"{path} imports TRL"


@pytest.mark.parametrize(
    ("module", "absent"),
    [("osd", {"vllm", "trl", "torch"}), ("osd.sampling_args", {"vllm", "trl", "torch"}), ("osd.prompts", {"vllm", "trl"})],
)
def test_light_modules_import_no_heavy_package(module, absent):
    code = f"import sys, {module}; sys.exit(bool({absent} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_both_import_paths_give_the_same_class():
    from optimal_sampling import OptimalSamplingV1 as older
    from osd import OptimalSamplingV1

    assert older is OptimalSamplingV1


def test_every_exported_name_is_there():
    import osd

    assert set(osd.__all__) == set(osd._HOME)
    assert all(getattr(osd, name).__name__ == name for name in osd.__all__)


def test_sampling_and_data_need_no_trl():
    code = """
import sys
sys.modules["trl"] = sys.modules["accelerate"] = None
import osd.sampler, osd.engine.engine, osd.cli, osd.check, osd.data.comparison, osd.data.generate, osd.data.inspection
from osd import OptimalSamplingV1
from osd.data.parse import _check_top
_check_top("f.yaml", {"num_samples": 1}, osd.cli._training_keys)
try:
    _check_top("f.yaml", {"num_samples": 1, "learning_rate": 1}, osd.cli._training_keys)
except ValueError as error:
    assert "'learning_rate'" in str(error) and "extra `train`" in str(error), error
else:
    sys.exit("a key that nobody could check was accepted")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_wheel_has_two_top_level_names():
    """`osd` and `optimal_sampling`, which users were promised; `trainers/` is installed as `osd.train`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert (ROOT / "osd" / "train").resolve() == ROOT / "trainers"
    packages = {name.split(".")[0] for name in project["packages"]}
    assert packages | set(project["py-modules"]) == {"osd", "optimal_sampling"}
    folders = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in (ROOT / "osd").rglob("*.py")}
    assert folders | {"osd.configs", "osd.train"} == set(project["packages"]), "a folder that the wheel would lack"


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("*.py")), ids=lambda path: path.name)
def test_no_module_imports_a_test_module(path):
    """Helpers of several tests live in modules without tests."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [f"{getattr(node, 'module', '')}.{alias.name}" for node in nodes for alias in node.names]
    found = [name for name in names if re.search(r"\b(test_\w+|conftest)\b", name)]
    assert not found, f"move what is shared to a helper module in tests/: {found}"
