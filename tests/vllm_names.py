"""The names of vLLM that osd/engine/backend uses, found in its source, and the names that a class of vLLM has."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import textwrap
from argparse import Action, ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
BACKEND = ROOT / "osd/engine/backend"


def imports() -> set[tuple[str, str]]:
    """Return (module, name) of everything that the backend imports from vLLM."""
    found = set()
    for _, tree in _sources(BACKEND):
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                found |= {(node.module, alias.name) for alias in node.names}
    return found


def _load(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:  # of another version or platform
        return None


class Names:
    """Attributes of vLLM's objects in the backend.

    Args:
        owners: classes by the name of a variable, of which the attribute must be in one.
        fields: classes of attributes, by "class.attribute".

    Attributes:
        used: the class and the attribute of everything that has an owner.
        unowned: file, expression and attribute of what has none and is neither ours, torch's nor Python's.
    """

    def __init__(self, owners: dict[str, tuple[Any, ...]], fields: dict[str, type], bases: dict[str, type]) -> None:
        imported = {name: (cls,) for module, name in imports() if isinstance(cls := _load(module, name), type)}
        self.owners, self.fields, self.bases = imported | owners, fields, bases
        self.used: set[tuple[Any, str]] = set()
        self.missing: set[str] = set()
        self.unowned: set[tuple[str, str, str]] = set()
        self.ours = _defined(ROOT / "osd") | _known_elsewhere()
        for file, tree in _sources(BACKEND):
            for top in tree.body:
                base = bases.get(getattr(top, "name", ""))
                for node in ast.walk(top):
                    if isinstance(node, ast.Attribute):
                        self._note(file, node, base)

    def _note(self, file: str, node: ast.Attribute, base: type | None) -> None:
        classes = self._types(node.value, base)
        if not classes:
            if node.attr not in self.ours:
                self.unowned.add((file, ast.unparse(node.value), node.attr))
            return
        having = [cls for cls in classes if node.attr in attributes(cls)]
        if having:
            self.used.add((having[0], node.attr))
        elif node.attr not in self.ours:
            self.missing.add(f"{file}: {ast.unparse(node)}, of {' or '.join(cls.__name__ for cls in classes)}")

    def _types(self, node: ast.expr, base: type | None) -> tuple[Any, ...]:
        """Return the classes of vLLM that an expression may be of; none if it is not of vLLM."""
        match node:
            case ast.Name("self" | "cls") | ast.Call(ast.Name("super")):
                return () if base is None else (base,)
            case ast.Name(name):
                return self.owners.get(name, ())
            case ast.Attribute(value, attr):
                found = tuple(t for cls in self._types(value, base) if (t := self._field(cls, attr)))
                return found or self.owners.get(attr, ())
            case ast.Call(ast.Name(function)):
                return self.owners.get(f"{function}()") or self.owners.get(function, ())
            case ast.Subscript(value) | ast.Call(value):
                return self._types(value, base)
        return ()

    def _field(self, cls: Any, attr: str) -> type | None:
        return next(
            (self.fields[key] for c in getattr(cls, "__mro__", ()) if (key := f"{c.__name__}.{attr}") in self.fields), None
        )


@functools.cache
def attributes(cls: Any) -> frozenset[str]:
    """Return every name that a class has (in its body, as a field, or assigned in any of its methods), or a module."""
    if not isinstance(cls, type):
        return frozenset(dir(cls))
    found = set(dir(cls)) | set(getattr(cls, "__dataclass_fields__", ())) | set(getattr(cls, "__struct_fields__", ()))
    for base in cls.__mro__:
        if not base.__module__.startswith("vllm"):
            continue
        found |= set(inspect.get_annotations(base)) | set(_assigned(ast.parse(textwrap.dedent(inspect.getsource(base)))))
    return frozenset(found)


def _assigned(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def _sources(folder: Path) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(folder.rglob("*.py")):
        yield path.name, ast.parse(path.read_text())


def _defined(folder: Path) -> set[str]:
    """Return the names that our own classes and modules define or assign."""
    found = set()
    for _, tree in _sources(folder):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
            elif isinstance(node, ast.Assign):
                found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
                found.add(node.attr)
    return found


def _known_elsewhere() -> set[str]:
    """Return names of Python, torch, numpy and the HTTP framework that need no contract."""
    import asyncio
    import ctypes
    import gc
    import itertools
    import json
    import os
    import queue
    import random
    import signal
    import sys
    import threading
    import weakref
    from contextlib import ExitStack
    from http import HTTPStatus
    from importlib import metadata
    from unittest import mock

    import yaml
    from fastapi import FastAPI
    from starlette.exceptions import HTTPException
    from starlette.requests import Request

    owners: list[Any] = [
        dict,
        list,
        set,
        str,
        int,
        bytes,
        np.ndarray,
        np,
        np.ctypeslib,
        torch,
        torch.Tensor,
        torch.nn,
        torch.nn.Module,
        torch.cuda,
        torch.cpu,
    ]
    owners += [
        torch.accelerator,
        torch.distributed,
        gc,
        itertools,
        json,
        os,
        Path,
        ArgumentParser(),
        Action([], ""),
        queue,
        random,
        random.Random,
        sys,
        threading,
        threading.Thread,
        weakref,
    ]
    owners += [
        asyncio,
        asyncio.Task,
        ctypes,
        ExitStack,
        itertools,
        HTTPStatus,
        HTTPException(404),
        FastAPI(),
        Request({"type": "http"}),
    ]
    owners += [signal, yaml, metadata, mock, mock.patch, type, weakref.WeakSet, torch.cuda.Stream]
    # "osd" is ours, on vLLM's SchedulerOutput; quantisation methods make a layer's weight; "arg_names" is of Triton's kernels.
    return {"osd", "weight", "arg_names", "wait_stream", "language", *(name for owner in owners for name in dir(owner))}
