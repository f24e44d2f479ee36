"""Tests of the dependency order of the modules and of the imports of `import osd`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each layer may import itself and the layers before it.
LAYERS = [
    "osd.terminal",
    "osd.core",
    "osd.log_partition",
    "osd.alpha",
    "osd.mixing",
    "osd.kernels",
    "osd.sampling_args",
    "osd.prompt_checks",
    "osd.prompts",
    ("osd.validate_models", "osd.engine"),  # they import each other: checks need PairConfig, PairEngine needs the checks
    "osd.check",
    "osd.adapters",
    "osd.sync_check",
    "osd.weight_sync",
    "osd.generation",
    "osd.output",
    "osd.sampler",
    "osd.report",
    "osd.data",
    "trainers",
    "osd.environment",
    "osd.launch",
    "osd.cli",
    "osd.__main__",
]
IMPORT_TRL = ("osd.sync_check", "osd.weight_sync", "osd.generation", "trainers")
SOURCES = [p for folder in ("osd", "trainers") for p in sorted((ROOT / folder).rglob("*.py")) if p != ROOT / "osd/__init__.py"]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


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


def test_importing_osd_imports_neither_vllm_nor_trl():
    code = "import sys, osd; sys.exit(bool({'vllm', 'trl', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_both_import_paths_give_the_same_class():
    from optimal_sampling import OptimalSamplingV1 as older
    from osd import OptimalSamplingV1

    assert older is OptimalSamplingV1


def test_every_exported_name_is_there():
    import osd

    assert set(osd.__all__) == set(osd._HOME)
    assert all(getattr(osd, name).__name__ == name for name in osd.__all__)
