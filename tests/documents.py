"""Parser for the Markdown documents (headings, links, code blocks) and checks of shell commands.

tests/test_docs.py uses it to run the code blocks on tiny models.
"""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"python", "bash", "yaml", "json", "text", "bibtex"}
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->")
# Linked into the folder in which blocks run, so that relative paths of the repository work.
LINKED = ("examples", "trainers", "benchmarks", "requirements", "pyproject.toml", "Makefile", "scripts", "studies")


@dataclass(frozen=True)
class Block:
    """Fenced code block of a page.

    Attributes:
        language, text: as in the page.
        line: number of its first line.
        not_run: the stated reason for not running it, or None.
        file: name of the file that the block shows, if the text before the block names one.
    """

    language: str
    text: str
    line: int
    not_run: str | None = None
    file: str | None = None


def headings(text: str) -> list[tuple[int, str]]:
    """Return level and text of every heading outside code blocks."""
    bare = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [(len(marks), title) for marks, title in re.findall(r"^(#+) (.+)$", bare, flags=re.MULTILINE)]


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    found, lines, start = [], text.splitlines(), None
    for number, line in enumerate(lines):
        if line.startswith("```") and start is None:
            start = number
        elif line == "```" and start is not None:
            marker = NOT_RUN.search(lines[start - 1]) if start else None
            body = "\n".join(lines[start + 1 : number])
            named = re.match(r"`([\w.]+\.(?:yaml|jsonl))` ", lines[start - 2]) if start > 1 else None
            found.append(Block(lines[start][3:], body, start + 1, marker[1] if marker else None, named[1] if named else None))
            start = None
    assert start is None, f"the block that starts at line {start} has no end"
    return found


def links(text: str) -> list[str]:
    """Return the targets of the links and images of a page."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchor(title: str) -> str:
    """Return the anchor that a Markdown host generates for a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")


# -- shell ----------------------------------------------------------------------------------------------------------------


def commands(script: str) -> Iterator[tuple[list[str], str | None]]:
    """Yield the words of every command of a shell block, and its here-document or None."""
    lines = iter(script.replace("\\\n", " ").splitlines())
    for line in lines:
        heredoc = re.search(r"<<'(\w+)'", line)
        body = None
        if heredoc:
            end = heredoc[1]
            body = "".join(f"{part}\n" for part in iter(lambda: next(lines), end))
            line = line.replace(heredoc[0], "")
        if words := shlex.split(line, comments=True):
            yield words, body


def check_make(words: list[str]) -> None:
    """Check that the targets of a `make` command exist."""
    targets = [word for word in words[1:] if "=" not in word]
    known = re.findall(r"^(\S+):(?!=)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert targets
    assert set(targets) <= set(known), f"make {targets}: known targets are {known}"


def check_pip(words: list[str]) -> None:
    """Check a `pip install` or `uv pip install` command: requirements parse, extras and files exist."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    for word in words[words.index("install") + 1 :]:
        if word.endswith(".txt"):
            assert (ROOT / word).is_file(), word
        elif word.startswith("."):
            assert all(f"\n{extra} = [" in pyproject for extra in word[2:-1].split(",") if word != "."), word
        elif not word.startswith("-"):
            Requirement(word)


def script_main(path: str) -> Any:
    """Load a script of the repository as Python does when it runs it, and return its `main`."""
    return runpy.run_path(str(ROOT / path))["main"]
