"""The card of a data set (README.md beside the data), and the upload of a finished run to the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from osd.data.writer import RUN, SUMMARY, Counts

CARD = "README.md"
UPLOADED = ("data-*", CARD, RUN, SUMMARY)
COLUMNS = "https://github.com/optimal-sampling-distillation/osd/blob/main/docs/usage.md#generating-data"


def card(run: Mapping[str, Any], counts: Counts, name: str) -> str:
    """Return the card of a finished run in Markdown, with the metadata that the Hub reads.

    Args:
        run: the content of run.json.
        counts: those of all processes.
        name: title of the data set.
    """
    settings = run["settings"]
    data_files = [{"split": "train", "path": f"data-*.{settings['format']}"}]
    metadata = {
        "tags": ["osd", "distillation", "synthetic"],
        "configs": [{"config_name": "default", "data_files": data_files}],
    }
    removed = ", ".join(f"{count:,} by {name}" for name, count in counts.removed.items()) or "none"
    rows = {
        "student": _shown(settings["model_name_or_path"]),
        "teacher": _shown(settings["teacher_model_name_or_path"]),
        "α": alpha_of(settings),
        "prompts": f"{run['rows']:,} rows of {_shown(run['input'])}",
        "completions": f"{counts.kept:,} kept of {counts.drawn:,} drawn, {counts.tokens:,} tokens drawn",
        "removed by filters": removed,
        "rejected before sampling": f"{counts.rejected:,}",
        "seed, temperature": f"{settings['seed']}, {settings['temperature']}",
        "configuration": f"`{run['config_hash']}`, in {RUN}",
        "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
    }
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(metadata, sort_keys=False).rstrip()}\n---\n",
            f"# {name}\n",
            "Completions drawn token by token from q\\* ∝ π_θ^(1-α) · π_t^α, the mixture of a student π_θ and a teacher π_t,",
            f"with the record of every token. [The columns]({COLUMNS}). The teacher may have read more than the student:",
            "`teacher_prompt` has what it read.\n",
            "| | |\n|---|---|",
            *(f"| {key} | {value} |" for key, value in rows.items()),
            "",
        ]
    )


def alpha_of(settings: Mapping[str, Any]) -> str:
    """Return how α was chosen, in words."""
    method = f"{settings['alpha_method']}, {settings['mixture']} mixture"
    if settings["alpha_method"] == "fixed":
        return f"{method}, α = {settings['fixed_alpha']:g}"
    return f"{method}, α from {settings['alpha_min']:g} to {settings['alpha_max']:g}"


def _shown(name: str) -> str:
    """Return a model or data set as text: of a path only the last part."""
    return Path(name).name if Path(name).exists() else name


def push(folder: Path, repository: str) -> str:
    """Upload the files of a finished run to a dataset repository of the Hub, made private if it is new; return its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    address = api.create_repo(repository, repo_type="dataset", private=True, exist_ok=True)
    api.upload_folder(
        repo_id=repository,
        repo_type="dataset",
        folder_path=str(folder),
        allow_patterns=list(UPLOADED),
        commit_message="Upload completions drawn by OSD",
    )
    return str(address)
