"""OSDGeneration: TRL's generator contract, sampling from q* with a paired engine in the trainer's own process.

TRL's trainers call two methods of a generator, `sync_weights()` and `generate(...)`. This generator replaces TRL's
`VLLMGeneration` in any of its trainers; no OSDTrainer is needed:

    pair = PairConfig(teacher="...", student=trainer.model.name_or_path)
    with OSDGeneration(trainer.model, trainer.accelerator, trainer.processing_class, pair=pair).attach(trainer) as generation:
        with generation.teacher_reads(teacher_prompts):              # optional: prompts that only the teacher sees
            ...                                                      # TRL calls generate() in here
        generation.last_batch.completions                            # its completions, with per-token records
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from osd.background import BackgroundSampling, paired
from osd.colocated import start_engine
from osd.engine.remote import RemoteEngine
from osd.engine.remote_batch import Batch
from osd.engine.served import WEIGHT_UPDATES, ServedPair
from osd.prompt_checks import check_special_tokens, check_template_kwargs, forget_warnings
from osd.prompts import Prompt, encode_all
from osd.sampling_args import DROP_IN, FIELDS, as_vllm_arguments, checked_fields
from osd.validate_models import check_student_can_train, end_ids

if TYPE_CHECKING:
    from osd.engine.engine import PairCompletion, PairConfig, PairEngine, PairPrompt


@dataclass(frozen=True, kw_only=True)
class GeneratedBatch:
    """Completions of one `generate` call, in the order of its prompts.

    Attributes:
        completions: token ids, finish reason, error and per-token record of each; `text` only where `generation_kwargs` has
            `stop` strings (or `detokenize`).
        seconds: wall-clock time of the call; for a batch that was begun earlier, the time spent waiting for it.
        sync_seconds: time of the syncs since the previous call; 0 without one.
        weights_version: number of syncs before this call.
        staleness: optimizer updates between the weights that drew the oldest token of each completion and those of this call.
        staleness_T: the same of every token of each completion, int64 [T].
    """

    completions: list[PairCompletion]
    seconds: float
    sync_seconds: float
    weights_version: int
    staleness: list[int]
    staleness_T: list[torch.Tensor]


@dataclass
class _TeacherSide:
    """Arguments of `teacher_reads`, kept for the next `generate` call."""

    prompts: list[list[int]] | None
    alpha: float | Sequence[float | None] | None
    begun: bool = False
    used: bool = False


class OSDGeneration(BackgroundSampling):
    """Generator of completions from q*, which keeps the student's engine at the trainer's weights.

    Subclasses TRL's generator for its iteration over sharded parameters (FSDP, DeepSpeed ZeRO-3); engine, sync and generation
    are replaced. Usable as a context manager. Every process of a distributed run holds a pair. With
    `engine_kwargs["tensor_parallel_size"]=N`, each group of N consecutive ranks holds one together, a shard of both models per
    rank. The prompts of a group are sampled together, and each rank keeps its own completions and records.

    Args:
        model, accelerator, processing_class: the trainer's.
        pair: the two models and their mixing, to start an engine from; or a running engine, which the caller closes; or the
            `osd serve` process that samples (`osd.engine.served.ServedPair`).
        mix_tokens: draw the first so many tokens of a completion from q*, the rest from the student alone; None: no limit.
        check_sync: after the syncs number 1, 2, 4, 8, ... compare log π_θ of a few tokens, engine against `model`, and raise
            if they differ beyond the rounding of their dtypes. Some milliseconds each.
        enable_sleep_mode: free the GPU memory of both models and their caches after every `generate` call, and restore both
            with the next call or sync. Needs a GPU; both prefix caches are lost every time.
        hidden: record the teacher's final hidden states (recorded supervision needs them).
        topk: or so many of the teacher's largest log-probabilities and the mass of the rest (top-k supervision); 0: neither.
        max_staleness: the most optimizer updates between the weights that draw a token and those of the `generate` call that
            returns it. Above 0 only for batches of `begin`.
        async_weight_updates: "between" the batches of `begin`, for which a sync waits, or under their "running" requests, which
            go on with the new weights: a completion then has tokens of several versions, each with its own exact record.
        on_error: "raise" for a completion that ended in an error (NaN logits), or "keep" it for a caller that masks it (at
            least one token is returned, and its `error` is the reason).
        temperature, top_p, top_k, min_p, repetition_penalty, max_completion_length, generation_kwargs: as in TRL; they
            shape draws from q*. `generation_kwargs` are further `vllm.SamplingParams` arguments and win over the others.

    Raises:
        ValueError: before an engine starts: a pair that the processes cannot hold; a student that cannot be synced, by name
            (experts, quantized, an adapter under FSDP1 or that unties shared embeddings, weights unlike those of its files);
            and the errors of `PairEngine`.
    """

    def __init__(
        self,
        model: Any,
        accelerator: Any,
        processing_class: Any,
        *,
        pair: PairConfig | PairEngine | ServedPair,
        mix_tokens: int | None = None,
        check_sync: bool = True,
        enable_sleep_mode: bool = False,
        hidden: bool = False,
        topk: int = 0,
        max_staleness: int = 1,
        async_weight_updates: str = "between",
        on_error: str = "raise",
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        max_completion_length: int = 16,
        generation_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        own = (max_completion_length, temperature, top_p, top_k, min_p, repetition_penalty)
        extra = checked_fields(dict(zip(FIELDS, own, strict=True)), generation_kwargs or {}, refused=DROP_IN)
        forget_warnings()
        if on_error not in ("raise", "keep"):
            raise ValueError(f"on_error={on_error!r}: choose 'raise' or 'keep'")
        if async_weight_updates not in WEIGHT_UPDATES:
            raise ValueError(f"async_weight_updates={async_weight_updates!r}: choose {' or '.join(map(repr, WEIGHT_UPDATES))}")
        if not isinstance(max_staleness, int) or max_staleness < 0:
            raise ValueError(f"max_staleness={max_staleness!r} is not a number of updates, 0 or more")
        self.pair = pair
        self.mix_tokens = mix_tokens
        self.check_sync = check_sync
        self.hidden, self.topk = hidden, topk
        self.max_staleness, self.async_weight_updates = max_staleness, async_weight_updates
        self.on_error = on_error
        self.last_batch: GeneratedBatch | None = None
        self._stays_awake = False
        self._teacher_side: _TeacherSide | None = None
        super().__init__(
            model,
            accelerator,
            processing_class,
            mode="colocate",
            tensor_parallel_size=self._pair_config.engine_kwargs.get("tensor_parallel_size", 1),
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,  # type: ignore[arg-type]  # TRL's own trainer passes None for "off"
            repetition_penalty=repetition_penalty,
            max_completion_length=max_completion_length,
            enable_sleep_mode=enable_sleep_mode,
            generation_kwargs=extra,
        )

    def _init_vllm(self) -> None:
        """Check the student and start the pair; TRL's constructor calls this to build its `LLM`."""
        from osd.engine.engine import PairConfig

        self._layout = check_student_can_train(self._pair_config)
        self.check_live_student()
        if isinstance(self.pair, ServedPair):
            running = self.async_weight_updates == "running"
            rank, device = self.accelerator.process_index, self.accelerator.device
            self.engine = RemoteEngine(self.pair, rank=rank, device=device, running=running)
        elif isinstance(self.pair, PairConfig):
            self.engine = start_engine(self.pair, self.accelerator, enable_sleep_mode=self.enable_sleep_mode)
        else:
            self.engine = self.pair
        self._sleep()
        self.accelerator.wait_for_everyone()

    def attach(self, trainer: Any) -> OSDGeneration:
        """Make a trainer of TRL (one with `use_vllm`) sample with this generator from its next step on; returns self.

        Every token id that ends a completion, the teacher's too, becomes one of the student's: the trainer's metrics count it
        as an end, and the saved student's generation_config has it.
        """
        trainer.vllm_generation, trainer.use_vllm = self, True
        trainer._last_loaded_step = -1  # TRL syncs whenever this is not the current step
        ends = end_ids(self.engine.config)
        if hasattr(trainer, "eos_token_ids"):
            trainer.eos_token_ids = list(dict.fromkeys([*trainer.eos_token_ids, *ends]))
            ends = trainer.eos_token_ids
        saved = getattr(self.model, "generation_config", None)
        if ends and saved is not None:
            saved.eos_token_id = ends[0] if len(ends) == 1 else ends
        return self

    def __enter__(self) -> OSDGeneration:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Shut the engine down, if this object started it."""
        self._synced = False
        self.drop()
        if self.owns_engine:
            self.engine.close()

    @property
    def owns_engine(self) -> bool:
        """True if this object started its engine and closes it."""
        return self.engine is not self.pair

    # -- sleep --------------------------------------------------------------------------------------------------------

    def _sleep(self) -> None:
        if self.enable_sleep_mode and not self._stays_awake:
            self.engine.sleep()

    @contextmanager
    def stays_awake(self) -> Iterator[None]:
        """Keep the engine awake after `generate` in this block; with `enable_sleep_mode` it sleeps at the end."""
        self._stays_awake = True
        try:
            yield
        finally:
            self._stays_awake = False
            self._sleep()

    # -- completions --------------------------------------------------------------------------------------------------

    @contextmanager
    def teacher_reads(
        self,
        prompts: Iterable[Prompt] | None,
        *,
        alpha: float | Sequence[float | None] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        begun: bool = False,
    ) -> Iterator[None]:
        """Give the teacher its own prompts, and α if `alpha` is given, in the next `generate` call of this block.

        Args:
            prompts: one per student prompt, in the same order: text or messages (rendered with the teacher's tokenizer),
                or token ids. None, and no block at all: the teacher reads the student's prompts.
            alpha: the teacher's weight, one for all or one per prompt; 0 samples from the student alone, as evaluation
                should. None: the mixing's own.
            chat_template_kwargs: arguments of the teacher's chat template (give it those that the trainer gives the student's).
            begun: the call returns the batch that `begin` started, with the same prompts; `alpha` is the one given there.

        Raises:
            ValueError: a prompt that is empty or cannot be rendered.
        """
        if self._teacher_side is not None:
            raise RuntimeError("teacher_reads() is already in effect; it cannot be nested")
        check_template_kwargs(kwargs := dict(chat_template_kwargs or {}))
        teacher_ids = None if prompts is None else encode_all(self.engine.tokenizer, list(prompts), **kwargs)
        self._teacher_side = _TeacherSide(teacher_ids, alpha, begun)
        try:
            yield
        finally:
            self._teacher_side = None

    def generate(
        self,
        prompts: list[list[int]],
        images: list[list | None] | None,
        num_generations: int,
        profiler: Any = None,
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float]]], list[list[list[int]]]]:
        """Draw one completion per prompt from q*.

        Args:
            prompts: the student's prompts as token ids, repeated by the caller for several completions of one prompt.
            images: None, or no image for any prompt.
            num_generations: ignored, as in TRL's colocate mode, whose prompts are repeated already.
            profiler: context manager around the sampling.

        Returns:
            the prompts; completion ids; the exact log-probability of every draw, `[B][T][1]`, in nats, after top-k and the like
            (the behaviour policy's); and the token ids again, `[B][T][1]`.

        Raises:
            RuntimeError: no sync succeeded yet, or the last one failed; a completion in error with `on_error="raise"`.
            ValueError: images; another number of teacher prompts; a prompt too long for either side.
        """
        for index, given in enumerate(images or ()):
            if given:
                raise ValueError(f"prompts[{index}] has images, and OSD distils text; remove such rows, or the image columns")
        self._check_synced()
        check_special_tokens(self.processing_class, prompts)
        pair_prompts, alpha, begun = self._take_teacher_side(prompts)
        start = time.perf_counter()
        self.engine.wake_up()
        with profiler or nullcontext():
            completions = self._sampled(pair_prompts, begun, alpha=alpha, **self._options())
        staleness, staleness_T = self._staleness(begun, completions)
        self.last_batch = GeneratedBatch(
            completions=completions,
            seconds=self.waited_seconds + time.perf_counter() - start,
            sync_seconds=self.sync_seconds,
            weights_version=self.engine.weights_version,
            staleness=staleness,
            staleness_T=staleness_T,
        )
        self.sync_seconds = self.waited_seconds = 0.0
        self._sleep()
        self._check_errors(completions)
        # TRL reads the last token of every completion: one that failed before its first token gets the end token.
        token_ids = [c.token_ids or [self.engine.tokenizer.eos_token_id] for c in completions]
        logprobs = [[[lp] for lp in _logp_draw(c, len(ids))] for c, ids in zip(completions, token_ids, strict=True)]
        return prompts, token_ids, logprobs, [[[token] for token in ids] for ids in token_ids]

    def _take_teacher_side(
        self, prompts: list[list[int]]
    ) -> tuple[list[PairPrompt], float | Sequence[float | None] | None, Batch | None]:
        """Return the prompts of both sides, α, and the batch that was begun with them, if the caller asks for that."""
        side = self._teacher_side or _TeacherSide(None, None)
        if side.used:
            raise RuntimeError("teacher_reads() covers one generate() call, and this is the second one in its block")
        side.used = True
        if side.prompts is not None and len(side.prompts) != len(prompts):
            raise ValueError(f"{len(side.prompts)} teacher prompts were given for {len(prompts)} student prompts")
        pair_prompts = paired(prompts if side.prompts is None else side.prompts, prompts)
        return pair_prompts, side.alpha, self._take_begun(pair_prompts) if side.begun else None

    def _options(self) -> dict[str, Any]:
        return {"sampling": self._sampling(), "mix_tokens": self.mix_tokens, "hidden": self.hidden, "topk": self.topk}

    def _sampling(self) -> dict[str, Any]:
        text = bool(self.generation_kwargs.get("stop"))  # vLLM needs the text for stop strings alone
        return {"detokenize": text, **as_vllm_arguments(self, self.generation_kwargs)}

    @property
    def sampling_temperature(self) -> float:
        """The temperature of both policies; 0 samples greedily."""
        return self._sampling()["temperature"]

    def _check_errors(self, completions: list[PairCompletion]) -> None:
        failed = {i: c.error for i, c in enumerate(completions) if c.error}
        if failed and self.on_error == "raise":
            first = next(iter(failed))
            raise RuntimeError(f"{len(failed)} of {len(completions)} completions failed; number {first}: {failed[first]}")


def _logp_draw(completion: PairCompletion, length: int) -> list[float]:
    """Return log q of the drawn tokens; zeros for a completion in error, which the caller masks."""
    if completion.error or completion.record is None:
        return [0.0] * length
    return torch.as_tensor(completion.record.logp_draw).tolist()
