"""StudentWeights: loads of a live student's weights into its engine's model, and the version that they have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import Any

import torch
from vllm.config import VllmConfig

from osd.engine.backend import cpu
from osd.engine.backend.experts import loading_experts
from osd.engine.backend.language_model import reads_text_names
from osd.engine.multimodal import text_weights
from osd.engine.weights import WeightLoad, load_weights


class StudentWeights:
    """Loads weights, whole or not at all: no step runs from the start of a load until one succeeds.

    Args:
        runner, config: the student's model runner and its configuration.
        as_student: makes the worker the student's while its body runs.

    Attributes:
        version: 0 for the weights on disk, one more with each load, failed ones included.
        whole: the last load succeeded, or there was none.
    """

    def __init__(self, runner: Any, config: VllmConfig, as_student: Callable[[], AbstractContextManager[None]]) -> None:
        self._runner, self._config, self._as_student = runner, config, as_student
        self.version, self.whole = 0, True
        self._load: WeightLoad | None = None
        self._loading = ExitStack()  # closed when the current load ends
        self._cache = -1, 0  # how often the KV cache was emptied, and the version that its blocks are of

    def load(self, named_tensors: Iterable[tuple[str, torch.Tensor]] | bytes, *, partial: bool) -> int:
        """Replace every weight, or with ``partial`` those given; return the new version."""
        self.begin(partial=partial)
        try:
            self.add(load_weights(named_tensors) if isinstance(named_tensors, bytes) else named_tensors)
        except BaseException:
            self._give_up()
            raise
        return self.end()

    def begin(self, *, partial: bool) -> None:
        """Begin a load; give up one that never ended."""
        if partial and not (self.whole and self.version):
            raise ValueError("partial=True: no sync of every weight came before, or the last one failed; push them all once")
        self.whole = False
        self.version += 1  # on every rank, also one that fails: their versions must stay equal
        self._give_up()
        model = self._runner.get_model()
        with self._as_student(), torch.no_grad():
            cpu.unpack_weights(model)
            self._loading.enter_context(loading_experts(model, self._config.model_config, partial=partial))
        self._load = WeightLoad(model, partial=partial)

    def add(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load some weights of the load that was begun."""
        assert self._load is not None, "a load has begun"
        if reads_text_names(self._config):
            named_tensors = text_weights(named_tensors)
        with self._as_student():
            self._load.add(named_tensors)

    def end(self) -> int:
        """End a load; return the version.

        Raises:
            ValueError: parameters are missing.
        """
        assert self._load is not None, "a load has begun"
        load, self._load = self._load, None
        with self._as_student(), torch.no_grad(), self._loading:
            load.check_complete()
            cpu.pack_weights(load.model)
        self.whole = True
        return self.version

    def _give_up(self) -> None:
        """End a load that did not finish, if there is one."""
        self._load = None
        with suppress(ValueError), self._as_student(), torch.no_grad():
            self._loading.close()

    def check(self, version: int | None) -> None:
        """Raise a RuntimeError unless the weights are whole and of this version; None: any version."""
        if not self.whole:
            raise RuntimeError("the last weight sync of the student failed half way; sync again before sampling")
        if version not in (None, self.version):
            raise RuntimeError(f"a request names the student's weights version {version}, and version {self.version} is loaded")

    def check_cache(self, resets: int) -> None:
        """Raise a RuntimeError if blocks of the student's KV cache, emptied ``resets`` times, are of other weights."""
        if resets != self._cache[0]:
            self._cache = resets, self.version
        if self._cache[1] != self.version:
            raise RuntimeError(
                f"the student's KV cache is of its weights version {self._cache[1]}, and version {self.version} is loaded; "
                "name it in PairOptions(weights_version=...) of a request, or reset the prefix cache"
            )
