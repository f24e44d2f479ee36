"""Sync the trainer's live student into its engine: the `sync_weights()` half of TRL's generator contract."""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from trl.generation.vllm_generation import VLLMGeneration

from osd.adapters import Weight, check_mergeable, plain_weights
from osd.engine.remote import RemoteEngine, ServerLost
from osd.engine.served import ServedPair
from osd.sync_check import check_same_student
from osd.validate_models import StudentLayout

if TYPE_CHECKING:
    from osd.engine.engine import PairConfig, PairEngine

_SYNC_ATTEMPTS = 3  # where a server goes away meanwhile


def checked(
    named_tensors: Iterable[tuple[str, Tensor]], shapes: dict[str, torch.Size], student: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors, and stop at the first that the engine's student does not have.

    vLLM drops some names that it does not know without a word (an untied `lm_head` of a model that ties it).

    Raises:
        ValueError: naming the parameter, and what the engine has instead.
    """
    for name, tensor in named_tensors:
        if name not in shapes:
            close = difflib.get_close_matches(name, shapes, n=1)
            raise ValueError(
                f"the live student's parameter {name!r} is not one of {student!r}, which its engine was started with"
                f"{f' (which has {close[0]!r})' if close else ''}: a wrapper has renamed it, or the architectures differ. Give "
                "OSDGeneration the model that the wrapper wraps, and start the engine from the model that is trained"
            )
        shape = getattr(tensor, "ds_shape", tensor.shape)  # ZeRO-3 leaves a placeholder of no elements
        if shape != shapes[name]:
            raise ValueError(
                f"the live student's parameter {name!r} has shape {list(shape)}, and {list(shapes[name])} in "
                f"{student!r}, which its engine was started with. Start the engine from the model that is trained (save it "
                "first, if its embeddings were resized or its layers changed)"
            )
        yield name, tensor


def frozen_state(weights: Iterable[Weight]) -> list[tuple[int, int]]:
    """Return a value that changes when a frozen parameter is replaced or written to, except through `.data`."""
    return [(w.parameter.data_ptr(), w.parameter._version) for w in weights if not w.parameter.requires_grad]


class LiveStudent(VLLMGeneration):
    """TRL's generator, whose iteration over a live model's parameters (FSDP, DeepSpeed ZeRO-3) feeds a pair's engine.

    Attributes:
        engine: the pair whose student follows `model`; `pair`: the configuration that it was started from, or the same engine.
        check_sync: compare log π_θ of the engine and of `model` after the syncs number 1, 2, 4, 8, ...
        sync_seconds: time of the syncs since it was last set to 0.
        waited_seconds: time that syncs waited for a batch in the background, since it was last set to 0.
        updates: optimizer updates of `model` so far, as the trainer counts them.
    """

    engine: PairEngine | RemoteEngine
    pair: PairConfig | PairEngine | ServedPair
    check_sync: bool
    sync_seconds: float = 0.0
    waited_seconds: float = 0.0
    updates: int = 0
    _layout: StudentLayout | None = None
    _synced: bool = False
    _syncs: int = 0
    _asked: tuple[Any, bool] = None, False  # a model, and whether it has an adapter
    _last_sync: tuple[int, list[tuple[int, int]]] | None = None  # weights version, and the frozen weights' state

    def sync_weights(self) -> None:
        """Push the live student into its engine, in one call; its prefix cache is reset, the teacher's is not.

        Of a student under LoRA, only the layers with an adapter are pushed again after the first sync, merged on the way. An
        engine that sleeps is woken first. The next batch reports the duration. If a sync fails, `generate` refuses to sample
        until one succeeds. A server that goes away meanwhile is waited for, and gets every parameter. A batch that it samples
        in the background is waited for first, and kept; with `async_weight_updates="running"`, batches go on with the new
        weights instead.

        Raises:
            ValueError: a parameter that the engine's student does not have, or in another shape; parameters missing.
            RuntimeError: the engine's student and the live one do not agree on log π_θ after it; a server keeps going away.
        """
        start = time.perf_counter()
        if isinstance(self.engine, RemoteEngine):
            self.engine.settle()
            self.engine.updates = self.updates
            self.waited_seconds += (now := time.perf_counter()) - start
            start = now
        self._synced = False
        for attempt in range(_SYNC_ATTEMPTS):
            try:
                self._sync()
                break
            except ServerLost:
                if attempt + 1 == _SYNC_ATTEMPTS:
                    raise
        self._synced = True
        self.sync_seconds += time.perf_counter() - start

    def _sync(self) -> None:
        self.engine.wake_up()
        weights = plain_weights(self.model) if self._walks_adapter else []
        partial = bool(weights) and self._only_adapter_moved(weights)
        # Generators, so that sharded parameters are gathered one at a time while vLLM copies them.
        parameters = self._named(w for w in weights if w.changes or not partial) if weights else self._iter_named_params()
        try:
            version = self.engine.load_student_weights(self._as_on_disk(parameters), partial=partial)
            self._last_sync = (version, frozen_state(weights)) if weights else None  # after it: PEFT's merge writes
            self._check_after_sync()
        except BaseException:
            self._last_sync = None
            self._unmerge_adapter()
            raise

    def _check_after_sync(self) -> None:
        # Again after 2, 4, 8, ...: an adapter that the engine does not follow is zero at first.
        self._syncs += 1
        if self.check_sync and self._syncs & (self._syncs - 1) == 0:
            check_same_student(self.engine, self.model, self.accelerator)

    def check_live_student(self) -> None:
        """Check before an engine starts that the live student's parameters are those of the student that it will load.

        Raises:
            ValueError: a parameter that is missing, unknown or of another shape; an adapter that unties shared embeddings, or
                that PEFT cannot merge; quantized weights.
        """
        if self._adapted and self._dist.fsdp_version == 1:
            raise ValueError(
                "fsdp_version=1 with a PEFT adapter: FSDP1's flat shards cannot be merged with it, so the engine would never "
                "get the trained student; use fsdp_version=2"
            )
        self._check_not_quantized()
        weights = self._plain_parameters()
        if self._adapted:
            self._check_tied(weights)
            self._check_shards(weights)
            check_mergeable(self.model)
        if self._layout is None or self._dist.fsdp_version == 1:
            return
        student = self._pair_config.student
        given = {name for name, _ in checked(weights.items(), self._layout.shapes, student)}
        if missing := sorted(self._layout.shapes.keys() - given):
            raise ValueError(
                f"the live student lacks {len(missing)} parameters of {student!r}, which its engine is started with: "
                f"{missing[:3]} ...; save the model that is trained and start the engine from it"
            )

    def _plain_parameters(self) -> dict[str, Tensor]:
        """The parameters without adapters, as they are: in shards, on any device."""
        if self._adapted:
            return {self._fix_param_name_to_vllm(w.name): w.parameter for w in plain_weights(self.model)}
        return {self._fix_param_name_to_vllm(name): parameter for name, parameter in self.model.named_parameters()}

    def _check_not_quantized(self) -> None:
        packed = next((name for name, p in self.model.named_parameters() if not p.is_floating_point()), None)
        if packed or getattr(self.model, "is_loaded_in_8bit", False):
            raise ValueError(
                f"the live student is quantized ({packed or '8 bits'}): its engine cannot be given weights from it. Load it "
                "without quantization_config (LoRA on bfloat16 weights needs little more memory)"
            )

    def _check_tied(self, weights: dict[str, Tensor]) -> None:
        base: Any = self.model.get_base_model()  # type: ignore[operator]
        if not base.config.get_text_config().tie_word_embeddings or not self._layout:
            return
        if untied := [name for name in weights if name not in self._layout.shapes and name.endswith("lm_head.weight")]:
            raise ValueError(
                f"the adapter unties the student's {untied[0]} from its input embeddings, which share one matrix "
                "(tie_word_embeddings): the engine has one matrix for both, and would sample from another student. In "
                "LoraConfig, set ensure_weight_tying=True with modules_to_save=['embed_tokens'], or leave 'embed_tokens' and "
                "'lm_head' out of target_modules, modules_to_save and trainable_token_indices"
            )

    def _check_shards(self, weights: dict[str, Tensor]) -> None:
        """Refuse adapters that TRL's walk over a sharded model names otherwise: some tokens, an adapter not named "default"."""
        if not self._sharded:
            return
        prefix = str(self.model.prefix)
        kept = [n for n, _ in self.model.named_parameters() if prefix not in n and "original_module" not in n]
        names = (n.removeprefix("base_model.model.").replace(".base_layer", "") for n in kept)
        if odd := {self._fix_param_name_to_vllm(n, ["modules_to_save.default."]) for n in names} - weights.keys():
            raise ValueError(
                f"the adapter's {min(odd)} cannot be synced from a sharded student (FSDP, ZeRO-3): use an adapter named "
                "'default', without trainable_token_indices, or train without sharding"
            )

    @property
    def _pair_config(self) -> PairConfig:
        config: Any = getattr(self.pair, "config", self.pair)
        return config

    def _as_on_disk(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Check each tensor and give it the form and the name that vLLM reads in a checkpoint."""
        if self._layout is None:
            return iter(named_tensors)
        layout = self._layout
        known = checked(named_tensors, layout.shapes, self.engine.config.student)
        return (stored for name, tensor in known for stored in layout.as_on_disk(name, tensor).items())

    def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
        if self._walks_adapter:
            return self._named(plain_weights(self.model))
        if self._sharded:
            for module in self.model.modules():
                # A forward pass without a backward one, as in evaluation, leaves FSDP2's outermost parameters whole.
                if isinstance(module, FSDPModule):
                    module.reshard()
            return super()._iter_named_params()
        return ((self._fix_param_name_to_vllm(name), p.data) for name, p in self.model.named_parameters())

    def _named(self, weights: Iterable[Weight]) -> Iterator[tuple[str, Tensor]]:
        return ((self._fix_param_name_to_vllm(w.name), w.merged()) for w in weights)

    def _iter_fsdp1_params(
        self, module: Any, prefix: str = "", visited: set[str] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        if visited is None:
            # FSDP makes the first module that is used its root. TRL's walk begins with the leaves, so before the first forward
            # pass a leaf would become the root.
            with FSDP.summon_full_params(module, recurse=False, writeback=False):
                pass
        yield from super()._iter_fsdp1_params(module, prefix, visited)

    def _fix_param_name_to_vllm(self, name: str, extra_prefixes: list[str] | None = None) -> str:
        return super()._fix_param_name_to_vllm(name, [*(extra_prefixes or []), "_orig_mod."])  # torch.compile's

    def _only_adapter_moved(self, weights: list[Weight]) -> bool:
        """True if neither the engine's weights nor the frozen ones changed since this object's last sync."""
        engine = self.engine
        return engine.student_is_whole and self._last_sync == (engine.weights_version, frozen_state(weights))

    @property
    def _walks_adapter(self) -> bool:
        """True if the student has an adapter; it is merged layer by layer, not by TRL."""
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
