"""Write examples/tutorial.ipynb from examples/tutorial.py: `python docs/make_notebook.py`.

tests/test_docs.py fails when the notebook is not what this would write.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT, NOTEBOOK = ROOT / "examples" / "tutorial.py", ROOT / "examples" / "tutorial.ipynb"


def notebook() -> str:
    """Return the notebook: a cell for each `# %%` of the script."""
    _, *parts = re.split(r"^# %%(.*)$\n", SCRIPT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    cells = [_cell(number, *pair) for number, pair in enumerate(zip(parts[::2], parts[1::2], strict=True))]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return (
        json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}, indent=1, ensure_ascii=False)
        + "\n"
    )


def _cell(number: int, kind: str, text: str) -> dict[str, object]:
    text = text.strip("\n")
    if "[markdown]" in kind:
        return {
            "cell_type": "markdown",
            "id": f"cell-{number}",
            "metadata": {},
            "source": re.sub(r"^# ?", "", text, flags=re.M),
        }
    return {"cell_type": "code", "execution_count": None, "id": f"cell-{number}", "metadata": {}, "outputs": [], "source": text}


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook(), encoding="utf-8")
