"""LiveStudent: the trainer's student, pushed into its engine: the half of TRL's generator contract that is `sync_weights()`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from trl.generation.vllm_generation import VLLMGeneration

from osd.live import adapter_parameters, adapter_ranks, checked, expected_shapes, frozen_state, lora_parameters

if TYPE_CHECKING:
    from osd.engine.pair import PairConfig, PairEngine


class LiveStudent(VLLMGeneration):
    """TRL's generator with its walk over the parameters (FSDP, DeepSpeed ZeRO-3), and a pair's engine at the end of it.

    Attributes:
        engine: the pair whose student follows `model`; `pair`: what it was started from, or the same engine.
        lora_sync: "merged" or "adapter", as in `osd.generation.OSDGeneration`.
        sync_seconds: of the syncs since somebody set it to 0.
    """

    engine: PairEngine
    pair: PairConfig | PairEngine
    lora_sync: str
    sync_seconds: float = 0.0
    _synced: bool = False
    _asked: tuple[Any, bool] = None, False  # a model, and whether it has an adapter
    _last_sync: tuple[int, list[tuple[int, int]]] | None = None  # weights version, and the frozen weights' state

    def sync_weights(self) -> None:
        """Push the live student into its engine, in one call; its prefix cache is reset, the teacher's is not.

        Of a student under LoRA, only the layers with an adapter are pushed again after the first sync, merged on the way; or
        its A and B alone, with `lora_sync="adapter"`. An engine that sleeps is woken first.
        The next batch says how long it took. If it fails, `generate` refuses to sample until a sync succeeds.

        Raises:
            ValueError: a parameter that the engine's student does not have, or in another shape; parameters missing.
        """
        start = time.perf_counter()
        self._synced = False
        self.engine.wake_up()
        partial = self._walks_adapter and self._only_adapter_moved()
        # Generators, so that sharded parameters are gathered one at a time while vLLM copies them.
        parameters = self._iter_lora_params(trained_only=True) if partial else self._iter_named_params()
        if self._shapes is not None:
            parameters = checked(parameters, self._shapes, self.engine.config.student)
        adapter = adapter_parameters(self.model) if self.lora_sync == "adapter" else ()
        stay = not (self._adapted or self._sharded)  # the others make each tensor as it is asked for
        try:
            version = self.engine.load_student_weights(parameters, partial=partial, adapter=adapter, at_once=stay)
        except BaseException:
            self._last_sync = None
            self._unmerge_adapter()
            raise
        if self._walks_adapter:
            self._last_sync = version, frozen_state(self.model)  # after it: merging may move what it puts back
        self._synced = True
        self.sync_seconds += time.perf_counter() - start

    @cached_property
    def _shapes(self) -> dict[str, torch.Size] | None:
        config = self.engine.config
        return expected_shapes(config.student, {**config.engine_kwargs, **config.student_kwargs})

    def _iter_named_params(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self._walks_adapter:
            return self._iter_lora_params()
        if self._sharded:
            return super()._iter_named_params()
        return ((self._fix_param_name_to_vllm(name), p.data) for name, p in self.model.named_parameters())

    def _iter_lora_params(self, *, trained_only: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        return lora_parameters(self.model, merged=self.lora_sync == "merged", trained_only=trained_only)

    def _iter_fsdp1_params(
        self, module: Any, prefix: str = "", visited: set[str] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        if visited is None:
            # FSDP takes the first module that is used for the root, and TRL's walk begins with the leaves: before the first
            # forward pass it would fail.
            with FSDP.summon_full_params(module, recurse=False, writeback=False):
                pass
        yield from super()._iter_fsdp1_params(module, prefix, visited)

    def _fix_param_name_to_vllm(self, name: str, extra_prefixes: list[str] | None = None) -> str:
        return super()._fix_param_name_to_vllm(name, [*(extra_prefixes or []), "_orig_mod."])  # torch.compile's

    def _only_adapter_moved(self) -> bool:
        """Since this object's last sync, nobody has pushed weights to the engine or written to the frozen ones."""
        engine = self.engine
        return engine.student_is_whole and self._last_sync == (engine.weights_version, frozen_state(self.model))

    @property
    def _walks_adapter(self) -> bool:
        """There is an adapter, and it is not merged by TRL's walk."""
        return self._adapted and not self._sharded

    @property
    def _adapted(self) -> bool:
        if self._asked[0] is not self.model:  # not every time: accelerate reads a package's metadata to answer, in about 1 ms
            self._asked = self.model, is_peft_model(self.model)
        return self._asked[1]

    @property
    def _sharded(self) -> bool:
        return self._dist.is_fsdp or self._dist.is_zero3

    def _unmerge_adapter(self) -> None:
        # TRL's walk merges LoRA before it and unmerges after it; a failure in between would leave the trained model merged.
        if self._adapted and self._sharded:
            self.model.unmerge_adapter()  # type: ignore[operator]

    def _adapter_kwargs(self) -> dict[str, Any]:
        """Engine arguments of a student that can hold the live one's adapter; a running engine must have them."""
        from osd.engine.adapter import adapter_kwargs, check_holds

        if not self._walks_adapter:
            raise ValueError("lora_sync='adapter' is for LoRA students (PEFT), not sharded (FSDP, ZeRO-3); use 'merged'")
        kwargs = adapter_kwargs(adapter_ranks(self.model))
        if (running := getattr(self.pair, "config", None)) is not None:
            check_holds(running.student_kwargs, kwargs)
        return kwargs
