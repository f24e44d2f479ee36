"""PairEngine: the front end of the paired engine, which the rest of OSD uses."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any

import torch
from tqdm.auto import tqdm

from osd.core import MixingConfig
from osd.engine.backend.frontend import Frontend, checked_params, is_cuda
from osd.engine.config import PairConfig
from osd.engine.group import RankGroup, Request
from osd.engine.record import RequestRecord, load_records
from osd.engine.request import PairCompletion, PairOptions, PairPrompt, SideLimits, check_request, draw_seeds, one_each
from osd.engine.weights import dump_weights
from osd.validate_models import check_models, load_tokenizer
from osd.weight_files import check_weights

__all__ = ["EngineState", "PairCompletion", "PairConfig", "PairEngine", "PairPrompt", "checked_params"]


class EngineState(Enum):
    """State of a :class:`PairEngine`."""

    OPEN = "open"  # samples
    ASLEEP = "asleep"  # has given its memory back, and can be woken
    STALE = "stale"  # must not sample until a weight sync succeeds
    CLOSED = "closed"


class PairEngine:
    """Two models decoded together inside one vLLM engine, every token drawn from q*.

    Usable as a context manager. One per process unless vLLM runs its engine core in another
    (``VLLM_ENABLE_V1_MULTIPROCESSING=1``, its default).

    With ``distributed_executor_backend="external_launcher"`` every rank of a tensor parallel group holds a `PairEngine`, and
    all ranks call its methods together. Each gives :meth:`generate` its own prompts and gets its own completions.

    Attributes:
        config: what it was started from.
        mixing: how α is chosen now.
        tokenizer, student_tokenizer: the teacher's and the student's, or None with ``skip_tokenizer_init``.
        limits: vocabulary and context of "teacher" and "student".
        weights_version: the version of the student's weights; 0 at the start, one more with each sync, failed ones included.

    Raises:
        ValueError: models that are missing or have different tokenizers, or engine arguments the pair cannot take; before
            any weights load.
        RuntimeError: another pair lives in this process.
        ImportError: a vLLM outside the supported range.
    """

    def __init__(self, config: PairConfig) -> None:
        Frontend._check_alone()
        check_models(config)
        check_weights(config)
        if config.engine_kwargs.get("enable_sleep_mode") and not is_cuda():
            raise ValueError("engine_kwargs['enable_sleep_mode']=True: vLLM's sleep mode needs an NVIDIA GPU; leave it out")
        self.config = config
        self.mixing = config.mixing
        self.weights_version = 0
        self._stale_reason = ""
        self._request_number = itertools.count()
        self._frontend = Frontend(config)
        self._state = EngineState.OPEN
        group = self._frontend.rank_group
        self._group = None if group is None else RankGroup(group)
        seed = self._frontend.model_config.seed
        self._seed = random.Random(str(seed) if self._group is None else f"{seed} rank {self._group.rank}").getrandbits(63)
        tokenized = not self._frontend.model_config.skip_tokenizer_init
        self.tokenizer: Any = load_tokenizer(config, "teacher") if tokenized else None
        self.student_tokenizer: Any = load_tokenizer(config, "student") if tokenized else None
        self.limits: dict[str, SideLimits] = self._frontend.limits

    @property
    def state(self) -> EngineState:
        """The engine's state."""
        return EngineState.CLOSED if self._frontend.llm is None else self._state

    @property
    def asleep(self) -> bool:
        return self.state is EngineState.ASLEEP

    @property
    def llm(self) -> Any:
        """The vLLM ``LLM`` inside, for what `PairEngine` does not offer.

        Where its engine core is another process, a request after a weight sync must name the weights:
        ``PairOptions(weights_version=engine.weights_version)``. The engine ends at a request that would meet older KV blocks.
        """
        self._check_open()
        return self._frontend.llm

    def set_mixing(self, mixing: MixingConfig) -> None:
        """Replace the mixing (``self.mixing``), also of requests in flight."""
        self._check_open()
        if mixing != self.mixing:
            self._frontend.call("set_mixing", mixing.to_dict())
            self.mixing = mixing

    # -- sampling ---------------------------------------------------------------------------------------------------

    def check(self, prompts: Sequence[PairPrompt], *, sampling: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
        """Raise the ValueError that ``generate`` would raise for these prompts; sample nothing."""
        self._check_open()
        self._params(prompts, sampling, PairOptions())

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
        topk: int = 0,
        progress: bool = False,
        on_finished: Callable[[int], None] | None = None,
    ) -> list[PairCompletion]:
        """Sample one completion per prompt, in the order of the prompts.

        Args:
            prompts: token ids of both sides.
            sampling: keyword arguments of ``vllm.SamplingParams`` for all prompts, or one dict per prompt. ``n`` must be 1:
                repeat the prompt instead, it is in the prefix cache. Penalties count the student's prompt and the completion.
            alpha: the teacher's weight for these requests, in [0, 1] (0 samples from the student), one for all or one per
                prompt; None: as configured.
            mix_tokens: after that many tokens sample from the student alone; None: no limit.
            teacher_only: sample from the teacher, and leave the student idle.
            record: return the per-token record.
            hidden: with the teacher's final hidden state.
            topk: or with so many of the teacher's largest log-probabilities and the mass of the rest; 0: without.
            progress: show a progress bar.
            on_finished: called with the number of tokens of every completion that finishes, while the others go on.

        Raises:
            ValueError: an empty prompt, one too long for either model, another number of α, a ``topk`` out of range; nothing
                has been sampled then.
            RuntimeError: the engine is asleep or closed, or the last weight sync failed; in a tensor parallel group, another
                rank's call failed, or the ranks drew different tokens.
        """

        def requests() -> list[Request]:
            self._check_samples()
            options = [
                PairOptions(alpha=a, mix_tokens=mix_tokens, teacher_only=teacher_only, record=record, hidden=hidden, topk=topk)
                for a in one_each("alpha", alpha, len(prompts))
            ]
            params = self._params(prompts, sampling, options)
            for param, seed in zip(params, draw_seeds([param.seed for param in params], self._seed), strict=True):
                param.seed = seed
            return list(zip(prompts, params, strict=True))

        shared, own = (requests(), slice(None)) if self._group is None else self._group.share(requests)
        ids: dict[str, str] = {}
        try:
            for prompt, param in shared:
                name = f"osd-{next(self._request_number)}"
                ids[name] = self._frontend.add(name, prompt.teacher_token_ids, param)
            outputs = self._run(len(ids), progress, on_finished)
            if self._group is not None:
                self._group.check_same([outputs[name].outputs[0] for name in ids])
        except BaseException:
            self._abandon(ids)
            raise
        records = self._take_records() if record else {}
        # A request that was refused was never scheduled, and has no record of its own.
        empty = RequestRecord(torch.empty(0), None, self.weights_version) if record else None
        return [
            self._completion(prompt, outputs[name], records.get(internal, empty))
            for prompt, (name, internal) in zip(prompts, list(ids.items())[own], strict=True)
        ]

    def _params(self, prompts: Sequence[PairPrompt], sampling: Any, options: Any) -> list[Any]:
        """Return vLLM's parameters of each request, with the pair's options in them."""
        params = []
        per_prompt = (one_each(name, given, len(prompts)) for name, given in (("sampling", sampling), ("options", options)))
        for index, (prompt, kwargs, option) in enumerate(zip(prompts, *per_prompt, strict=True)):
            ids = None if option.teacher_only else list(prompt.student_token_ids)
            option = replace(option, student_prompt_token_ids=ids, weights_version=self.weights_version)
            extra_args = {**(kwargs.get("extra_args") or {}), **option.to_extra_args()}
            params.append(checked_params({**kwargs, "extra_args": extra_args}))
            if (n := params[-1].n) != 1:
                raise ValueError(f"sampling n={n}: give each prompt {n} times instead")
            check_request(prompt, params[-1], self.limits, options=option, name=f"prompt {index}: ")
        return params

    def _run(self, total: int, progress: bool, on_finished: Callable[[int], None] | None) -> dict[str, Any]:
        outputs: dict[str, Any] = {}
        with tqdm(total=total, desc="sampling", unit="completion", delay=2, disable=not progress) as bar:
            for output in self._frontend.finished():
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

    def _take_records(self) -> dict[str, RequestRecord]:
        if (worker := self._frontend.worker) is not None:
            return worker.collect_records()
        [data] = [data for data in self._frontend.call("take_records") if data is not None]
        return load_records(data)

    def _abandon(self, ids: dict[str, str]) -> None:
        """End a run's requests after an exception, and drop their records."""
        if self.state is not EngineState.CLOSED:
            with self._frontend.cleaning_up():
                self._frontend.abort(ids.values())
                self._frontend.call("forget_records")

    # -- the student's weights --------------------------------------------------------------------------------------

    def load_student_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, partial: bool = False) -> int:
        """Push a live student into the engine; return the new ``weights_version``.

        The student's prefix cache is reset (the teacher's survives): at once, or with the next request of ``generate`` where
        the engine core is another process. If the load fails, the engine is stale: it refuses to sample until a sync succeeds.

        Args:
            named_tensors: every parameter of the student under its Hugging Face name.
            partial: some of them; the others stay as the sync before left them (under LoRA most never change).

        Raises:
            ValueError: parameters missing from ``named_tensors``; ``partial`` without a whole sync before it.
            RuntimeError: requests are running.
        """
        self._check_awake()
        if self._frontend.busy:
            raise RuntimeError("this engine has unfinished requests; let them finish before a weight sync")
        self._state, self._stale_reason = EngineState.STALE, "the last sync did not finish"
        # One worker in this process takes the tensors as they come; others need them all in one message.
        sent = named_tensors if self._frontend.worker is not None else dump_weights(named_tensors)
        try:
            versions = self._frontend.call("load_student_weights", sent, partial)
        except Exception as error:
            self._stale_reason = f"the last sync failed: {error}"
            raise
        assert len(set(versions)) == 1, f"workers disagree on the student's weights version: {versions}"
        self.weights_version, self._state = versions[0], EngineState.OPEN
        if (scheduler := self._frontend.scheduler) is not None:
            scheduler.adopt_weights_version(self.weights_version)  # elsewhere it learns it from the next request
        return self.weights_version

    @property
    def student_is_whole(self) -> bool:
        """True if no weight sync was made, or the last one succeeded."""
        return self._state is not EngineState.STALE

    def teacher_lm_head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the teacher's output layer, whole: weight [V, H] and bias [V] or None.

        A copy if the engine can sleep, or if a tensor parallel group holds the layer in shards; a collective operation then.

        Raises:
            RuntimeError: the worker is not in this process.
            ValueError: logits that are not one layer's product with the hidden state.
        """
        self._check_awake()
        worker = self._frontend.worker
        if worker is None:
            raise RuntimeError(
                "the teacher's output layer can be shared only with an engine in this process: set "
                "VLLM_ENABLE_V1_MULTIPROCESSING=0, and with tensor_parallel_size above 1 "
                "distributed_executor_backend='external_launcher' and a process per rank"
            )
        weight, bias = worker.teacher_lm_head()
        if self._frontend.model_config.enable_sleep_mode and self._group is None:
            return weight.clone(), None if bias is None else bias.clone()
        return weight, bias

    # -- sleep, caches, the end -------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Free the GPU memory of both sides' weights and KV caches; needs ``engine_kwargs={"enable_sleep_mode": True}``.

        Both models are kept in host memory; both prefix caches are forgotten. Until :meth:`wake_up`, nothing can be sampled or
        pushed.

        Raises:
            RuntimeError: the engine was not started with sleep mode, has unfinished requests, or is stale.
        """
        self._check_open()
        if not self._frontend.model_config.enable_sleep_mode:
            raise RuntimeError("this engine cannot sleep: start it with engine_kwargs={'enable_sleep_mode': True}")
        if self._frontend.busy:
            raise RuntimeError("this engine has unfinished requests; let them finish before it sleeps")
        if self._state is EngineState.STALE:
            raise RuntimeError(f"this engine is stale ({self._stale_reason}); sync the student before it sleeps")
        if self._state is EngineState.OPEN:
            self._state = EngineState.ASLEEP
            self._frontend.ask("sleep", level=1)

    def wake_up(self) -> None:
        """Take the memory again and restore both models at the same addresses, with empty caches.

        If this raises (there is not enough memory), the engine stays asleep.
        """
        self._check_open()
        if self._state is EngineState.ASLEEP:
            self._frontend.ask("wake_up")
            self._state = EngineState.OPEN

    def reset_prefix_cache(self) -> bool:
        """Clear both sides' prefix caches. Returns False, and changes nothing, if unfinished requests use them."""
        self._check_open()
        return self._frontend.ask("reset_prefix_cache")

    def _check_open(self) -> None:
        if self.state is EngineState.CLOSED:
            raise RuntimeError("this engine is closed; start another PairEngine")

    def _check_awake(self) -> None:
        self._check_open()
        if self._state is EngineState.ASLEEP:
            raise RuntimeError("this engine is asleep; wake_up() first")

    def _check_samples(self) -> None:
        self._check_awake()
        if self._state is EngineState.STALE:
            raise RuntimeError(f"the student's weights are not to be sampled from ({self._stale_reason}); sync them first")

    def close(self) -> None:
        """Shut the engine down and free its memory. Idempotent."""
        try:
            if self.state is EngineState.ASLEEP and self._frontend.alive:
                self._frontend.ask("wake_up")  # vLLM's allocator cannot free memory that it has unmapped
        finally:
            self._frontend.close()

    def __enter__(self) -> PairEngine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
