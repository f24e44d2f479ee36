"""PairEngine: the front end of the paired engine, and the only thing outside ``osd.engine`` that talks to vLLM."""

from __future__ import annotations

import gc
import itertools
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

from tqdm.auto import tqdm

from osd.core import MixingConfig
from osd.engine.backend.versions import check_vllm, setting

check_vllm()
# The pair drives vLLM's V1 model runner; V2 is another seam. It must be said before vLLM reads its environment.
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"

import torch  # noqa: E402
from vllm import LLM, SamplingParams, envs  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.v1.engine import core  # noqa: E402

from osd.engine.closing import workers  # noqa: E402
from osd.engine.config import PairConfig, student_vllm_config  # noqa: E402
from osd.engine.output_layer import output_layer  # noqa: E402
from osd.engine.record import RequestRecord, load_records  # noqa: E402
from osd.engine.request import (  # noqa: E402
    PairCompletion,
    PairOptions,
    PairPrompt,
    RequestChecks,
    checked_params,
    one_each,
)
from osd.engine.validate_models import check_models  # noqa: E402
from osd.engine.weights import dump_weights  # noqa: E402

__all__ = ["PairCompletion", "PairConfig", "PairEngine", "PairPrompt", "checked_params"]


class PairEngine:
    """Two models decoded together inside one vLLM engine, every token drawn from q*.

    Usable as a context manager. One per process unless vLLM runs its engine core in another
    (``VLLM_ENABLE_V1_MULTIPROCESSING=1``, its default).

    Raises:
        ValueError: models that are missing or have different tokenizers, or engine arguments the pair cannot take; before
            any weights load.
        RuntimeError: another pair lives in this process.
        ImportError: a vLLM outside the supported range.
    """

    _in_this_process: weakref.ref[PairEngine] | None = None

    def __init__(self, config: PairConfig) -> None:
        self._check_alone()
        check_models(config)
        self._check_can_sleep(config)
        self.config = config
        _keep_torch_threads()
        self.asleep = False
        self._groups_are_ours = not torch.distributed.is_initialized()
        try:
            self._start()
        except BaseException:
            self._give_up()
            raise

    def _start(self) -> None:
        self.llm = LLM(**self.config.teacher_engine_args())
        self._engine = self.llm.llm_engine
        self._student_config = student_vllm_config(self._engine.vllm_config)
        self._check_active()
        skipped = self._engine.vllm_config.model_config.skip_tokenizer_init
        self.tokenizer: Any = None if skipped else self.llm.get_tokenizer()
        self.weights_version = 0
        self.mixing = self.config.mixing
        self._request_number = itertools.count()
        self._stale: str | None = None
        self._caches_in_doubt = False
        if self._worker() is not None:
            PairEngine._in_this_process = weakref.ref(self)

    def _give_up(self) -> None:
        """Give back what an engine that did not start has taken: whoever reads the error tries again in this process."""
        with suppress(Exception):  # the error that is on its way says more
            self.close()
        if left := list(workers):
            for worker in left:
                with suppress(Exception):
                    worker.shutdown()
            self._clean_up()

    def _clean_up(self) -> None:
        """Free what nobody refers to any more, and vLLM's process groups, unless there were some before this engine: then they
        are a trainer's, or another engine's."""
        gc.collect()
        if self._groups_are_ours:
            cleanup_dist_env_and_memory()
        elif torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    @classmethod
    def _check_alone(cls) -> None:
        """Two engines in one process would share vLLM's process groups, and the first would break without a word."""
        other = cls._in_this_process and cls._in_this_process()
        if other is not None and hasattr(other, "llm"):
            raise RuntimeError("another PairEngine lives in this process; close() it first, or use it")

    @staticmethod
    def _check_can_sleep(config: PairConfig) -> None:
        if config.engine_kwargs.get("enable_sleep_mode") and not current_platform.is_cuda():
            raise ValueError("engine_kwargs['enable_sleep_mode']=True: vLLM's sleep mode needs an NVIDIA GPU; leave it out")

    def _check_active(self) -> None:
        """vLLM logs and goes on when a plug-in is not used: make sure that both of ours are."""
        if self.llm.collective_rpc("pair_active") != [True] * self._engine.vllm_config.parallel_config.world_size:
            raise RuntimeError("vLLM did not start the paired worker; sampling would be from the teacher alone")

    def set_mixing(self, mixing: MixingConfig) -> None:
        """From now on, choose α and mix like this (``self.mixing``); requests in flight go on with it too."""
        self._check_open()
        if mixing != self.mixing:
            self.llm.collective_rpc("set_mixing", args=(mixing.to_dict(),))
            self.mixing = mixing

    # -- sampling ---------------------------------------------------------------------------------------------------

    def check(self, prompts: Sequence[PairPrompt], *, sampling: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
        """Raise the ValueError that ``generate`` would raise for these prompts; samples nothing."""
        self._check_open()
        self._sampling_params(prompts, sampling, PairOptions())

    def generate(
        self,
        prompts: Sequence[PairPrompt],
        *,
        sampling: dict[str, Any] | Sequence[dict[str, Any]],
        alpha: float | Sequence[float | None] | None = None,
        mix_tokens: int | None = None,
        teacher_only: bool = False,
        record: bool = True,
        hidden: bool = False,
        progress: bool = False,
        on_finished: Callable[[int], None] | None = None,
    ) -> list[PairCompletion]:
        """Sample one completion per prompt, in the order of the prompts.

        Args:
            prompts: token ids of both sides.
            sampling: keyword arguments of ``vllm.SamplingParams`` for all prompts, or one dict per prompt. ``n`` must be 1:
                repeat the prompt instead, it is in the prefix cache.
            alpha: the teacher's weight for these requests, in [0, 1] (0 samples from the student), one for all or one per
                prompt; None: as configured.
            mix_tokens: after that many tokens sample from the student alone; None: no limit.
            teacher_only: sample from the teacher, and leave the student idle.
            record: return the per-token record.
            hidden: with the teacher's final hidden state.
            progress: show a progress bar.
            on_finished: called with the number of tokens of every completion that finishes, while the others go on.

        Raises:
            ValueError: an empty prompt, one too long for either model, another number of α; nothing has been sampled then.
            RuntimeError: the last weight sync failed, so the student's weights are not to be sampled from.
        """
        self._check_awake()
        if self._stale is not None:
            raise RuntimeError(f"the student's weights are not to be sampled from ({self._stale}); sync them first")
        options = [
            PairOptions(alpha=a, mix_tokens=mix_tokens, teacher_only=teacher_only, record=record, hidden=hidden)
            for a in one_each("alpha", alpha, len(prompts))
        ]
        params = self._sampling_params(prompts, sampling, options)
        if self._caches_in_doubt:
            self._forget_caches()
        ids: dict[str, str] = {}
        try:
            self._submit(prompts, params, ids)
            outputs = self._run(len(ids), progress, on_finished)
        except BaseException:
            self._abandon(ids)
            raise
        records = self._take_records() if record else {}
        # A request that was refused was never scheduled, and has no record of its own.
        empty = self._no_record() if record else None
        return [
            self._completion(prompt, outputs[name], records.get(internal, empty))
            for prompt, (name, internal) in zip(prompts, ids.items(), strict=True)
        ]

    def _sampling_params(self, prompts: Sequence[PairPrompt], sampling: Any, options: Any) -> list[SamplingParams]:
        checks = RequestChecks(
            teacher=self._engine.vllm_config, student=self._student_config, weights_version=self.weights_version
        )
        return checks.sampling_params(prompts, sampling, options)

    def _submit(
        self, prompts: Sequence[PairPrompt], params: Sequence[SamplingParams], ids: dict[str, str] | None = None
    ) -> dict[str, str]:
        """Queue the requests; puts vLLM's internal id of each (the records' key) into ``ids`` by the id its outputs carry."""
        ids = {} if ids is None else ids
        for prompt, param in zip(prompts, params, strict=True):
            name = f"osd-{next(self._request_number)}"
            ids[name] = self._engine.add_request(name, {"prompt_token_ids": list(prompt.teacher_token_ids)}, param)
        return ids

    def _run(self, total: int, progress: bool, on_finished: Callable[[int], None] | None = None) -> dict[str, Any]:
        outputs: dict[str, Any] = {}
        with tqdm(total=total, desc="sampling", unit="completion", delay=2, disable=not progress) as bar:
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    if output.finished:
                        outputs[output.request_id] = output
                        bar.update()
                        if on_finished is not None:
                            on_finished(len(output.outputs[0].token_ids))
                            self._check_open()
        return outputs

    def _completion(self, prompt: PairPrompt, output: Any, record: RequestRecord | None) -> PairCompletion:
        completion = output.outputs[0]
        error = None
        if completion.finish_reason == "error":
            reason = completion.stop_reason or "vLLM gives no reason; a grammar that no token can continue is one"
            error = str(reason).removeprefix("osd: ")
        return PairCompletion(
            token_ids=list(completion.token_ids),
            text=completion.text,
            finish_reason=completion.finish_reason,
            stop_reason=None if error else completion.stop_reason,
            error=error,
            record=None if record is None else record.of_tokens(len(completion.token_ids)),
            weights_version=self.weights_version,
            teacher_prompt_tokens=len(prompt.teacher_token_ids),
            student_prompt_tokens=len(prompt.student_token_ids),
            teacher_cached_tokens=0 if record is None else record.teacher_cached_tokens,
            student_cached_tokens=0 if record is None else record.student_cached_tokens,
        )

    def _no_record(self) -> RequestRecord:
        return RequestRecord(values_TR=torch.empty(0), hidden_TH=None, weights_version=self.weights_version)

    def _take_records(self) -> dict[str, RequestRecord]:
        if (worker := self._worker()) is not None:
            return worker.collect_records()
        [data] = [data for data in self.llm.collective_rpc("take_records") if data is not None]
        return load_records(data)

    def _abandon(self, ids: dict[str, str]) -> None:
        """After an exception in mid-run: leave no request behind, no record of one, and no cached block that was not computed.

        vLLM puts a block into the prefix cache when it schedules it, and a step that failed never filled it.
        """
        self._caches_in_doubt = True  # until they are reset, whatever ends this
        self._engine.abort_request(list(ids.values()), internal=True)
        if (worker := self._worker()) is not None and (scheduler := self._scheduler()) is not None:
            scheduler.tell_again_who_ended(worker.model_runner.requests, worker.student_runner.requests)
        self._take_records()
        self._forget_caches()

    def _forget_caches(self) -> None:
        if not self.reset_prefix_cache():
            raise RuntimeError("a run failed, and blocks it left in the prefix cache are in use; let the other requests finish")
        self._caches_in_doubt = False

    # -- the student's weights --------------------------------------------------------------------------------------

    def load_student_weights(
        self,
        named_tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        partial: bool = False,
        adapter: Iterable[tuple[str, torch.Tensor]] = (),
        at_once: bool = False,
    ) -> int:
        """Push a live student into the engine; returns the new ``weights_version``.

        Args:
            named_tensors: every parameter of the student under its Hugging Face name.
            partial: some of them; the others stay as the sync before left them (under LoRA most never change).
            adapter: a LoRA adapter on top of them, if ``student_kwargs`` have ``enable_lora`` and ``lora_target_modules``: of
                each of its layers, by the Hugging Face name, ``NAME.lora_A.weight`` [r, in] and ``NAME.lora_B.weight``
                [out, r], the scaling multiplied into B. The adapter of the sync before is gone in any case.
            at_once: check them all, then copy them all in a few launches. Only for tensors that keep their values until this
                returns; else each is copied before the next is asked for.

        The student's prefix cache is reset (the teacher's survives): at once, or with the next request of ``generate`` where
        the engine core is another process. If this raises, the engine refuses to sample until a sync succeeds.

        Raises:
            ValueError: parameters missing from ``named_tensors``; ``partial`` without a whole sync before it; an adapter that
                the engine has no place for.
        """
        self._check_awake()
        self._stale = "the last sync did not finish"
        try:
            args = (self._sendable(named_tensors), partial, self._sendable(adapter), at_once)
            versions = self.llm.collective_rpc("load_student_weights", args=args)
        except Exception as error:
            self._stale = f"the last sync failed: {error}"
            raise
        assert len(set(versions)) == 1, f"workers disagree on the student's weights version: {versions}"
        self.weights_version, self._stale = versions[0], None
        if (scheduler := self._scheduler()) is not None:
            scheduler._adopt_weights_version(self.weights_version)  # elsewhere it learns it from the next request
        return self.weights_version

    @property
    def student_is_whole(self) -> bool:
        """No weight sync was made, or the last one succeeded."""
        return self._stale is None

    def _scheduler(self) -> Any | None:
        """The scheduler, where it lives in this process, else None."""
        return getattr(getattr(self._engine.engine_core, "engine_core", None), "scheduler", None)

    def _sendable(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]] | bytes:
        """One worker in this process takes the tensors as they come; others need them all in one message."""
        return named_tensors if self._worker() is not None else dump_weights(named_tensors)

    def _worker(self) -> Any | None:
        """The worker, where it lives in this process (``VLLM_ENABLE_V1_MULTIPROCESSING=0`` and one rank), else None."""
        core = getattr(self._engine.engine_core, "engine_core", None)
        wrapper = getattr(getattr(core, "model_executor", None), "driver_worker", None)
        return getattr(wrapper, "worker", None)

    def teacher_lm_head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The teacher's own output layer: weight [V, H] and bias [V] or None. By reference, or a copy if the engine can sleep.

        Raises:
            RuntimeError: the worker is not in this process, or the vocabulary is sharded over several.
            ValueError: as :func:`osd.engine.output_layer.output_layer`.
        """
        self._check_awake()
        worker = self._worker()
        if worker is None or worker.parallel_config.world_size != 1:
            raise RuntimeError(
                "the teacher's output layer can be shared only with an engine in this process on one device: set "
                "VLLM_ENABLE_V1_MULTIPROCESSING=0 and tensor_parallel_size=1"
            )
        head, bias = output_layer(worker.model_runner.get_model(), worker.model_config)
        vocab_size = worker.model_config.get_vocab_size()
        weight, bias = head.weight[:vocab_size], None if bias is None else bias[:vocab_size]
        if self._can_sleep:
            return weight.clone(), None if bias is None else bias.clone()
        return weight, bias

    # -- the rest of its life ---------------------------------------------------------------------------------------

    @property
    def _can_sleep(self) -> bool:
        return self._engine.vllm_config.model_config.enable_sleep_mode

    def sleep(self) -> None:
        """Give back the GPU memory of both sides' weights and KV caches; needs ``engine_kwargs={"enable_sleep_mode": True}``.

        Both models are kept in host memory; both prefix caches are forgotten. Until :meth:`wake_up`, nothing can be sampled or
        pushed.

        Raises:
            RuntimeError: the engine was not started with sleep mode, or has unfinished requests.
        """
        self._check_open()
        if not self._can_sleep:
            raise RuntimeError("this engine cannot sleep: start it with engine_kwargs={'enable_sleep_mode': True}")
        if self._engine.has_unfinished_requests():
            raise RuntimeError("this engine has unfinished requests; let them finish before it sleeps")
        if not self.asleep:
            self.asleep = True
            self.llm.sleep(level=1)

    def wake_up(self) -> None:
        """Take the memory again: both models as they were, at the same addresses, and empty caches.

        If this raises (there is not enough memory), the engine stays asleep.
        """
        self._check_open()
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def _check_awake(self) -> None:
        self._check_open()
        if self.asleep:
            raise RuntimeError("this engine is asleep; wake_up() first")

    def reset_prefix_cache(self) -> bool:
        """Forget both sides' prefix caches; False if unfinished requests use them, and nothing was done."""
        self._check_open()
        return self.llm.reset_prefix_cache()

    def _check_open(self) -> None:
        if not hasattr(self, "llm"):
            raise RuntimeError("this engine is closed; start another PairEngine")

    def close(self) -> None:
        """Shut the engine down and give its memory back. Idempotent."""
        if (llm := getattr(self, "llm", None)) is None:
            return
        try:
            if self.asleep:
                llm.wake_up()  # vLLM's allocator cannot free memory that it has unmapped
        finally:
            try:
                with setting(core, cleanup_dist_env_and_memory=lambda: None):  # it asks nobody whose groups they are
                    self._engine.engine_core.shutdown()
            finally:
                del self.llm, self._engine, llm
                self._clean_up()

    def __enter__(self) -> PairEngine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _keep_torch_threads() -> None:
    """Keep vLLM on a CPU from leaving this process's torch, and a trainer in it, with one thread.

    Its worker sets torch to one thread for serving unless OMP_NUM_THREADS says otherwise, and then makes
    ``torch.set_num_threads`` do nothing.
    """
    if current_platform.is_cpu() and not envs.VLLM_ENABLE_V1_MULTIPROCESSING:
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
