"""The paired engine of the data commands: models are checked first, weights load with the first request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from osd.data.requests import Request
from osd.data.settings import CompareConfig, GenerateConfig

if TYPE_CHECKING:
    from osd.core import MixingConfig, TokenRecord
    from osd.engine.engine import PairCompletion, PairConfig, PairEngine, PairPrompt


class Completion(Protocol):
    """A completion, as runs read it; attributes as in `osd.engine.request.PairCompletion`."""

    @property
    def token_ids(self) -> list[int]: ...
    @property
    def text(self) -> str: ...
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def error(self) -> str | None: ...
    @property
    def record(self) -> TokenRecord | None: ...
    @property
    def weights_version(self) -> int: ...


class Pair(Protocol):
    """Interface of the engine that runs need; `EnginePair` implements it, and `osd.data.remote.ServerPair`."""

    teacher_tokenizer: Any
    student_tokenizer: Any

    def refusal(self, request: Request, sampling: dict[str, Any]) -> str | None:
        """Return the reason why a request cannot be sampled (too long for a model, ...), or None."""

    def sample(
        self,
        requests: Sequence[Request],
        sampling: dict[str, Any],
        *,
        alpha: float | None = None,
        mixing: MixingConfig | None = None,
        on_finished: Callable[[int], None] | None = None,
    ) -> Sequence[Completion]:
        """Sample one completion per request, with its record, each from its own seed.

        Args:
            alpha: the teacher's weight; None lets `mixing` choose it.
            mixing: replaces the mixing of the settings.
            on_finished: called with the length of each completion when it is done.
        """


class EnginePair:
    """A `PairEngine` that starts when the first request needs it, or a running one.

    Args:
        settings: the models and their mixing.
        engine: a running engine of these models, whose mixing is set with every call; the caller closes it.

    Raises:
        ValueError: models that are missing, damaged or have different tokenizers, engine arguments that vLLM does not have.
    """

    def __init__(self, settings: GenerateConfig | CompareConfig, *, engine: PairEngine | None = None) -> None:
        from osd.engine.engine import PairConfig, checked_params
        from osd.validate_models import check_models, load_tokenizer
        from osd.weight_files import check_weights

        self.mixing, self.quiet = settings.mixing(), settings.quiet
        kwargs: dict[str, Any] = settings.pair_kwargs()
        kwargs["engine_kwargs"].setdefault("use_tqdm_on_load", False)  # these bars would break ours
        self.config: PairConfig = PairConfig(
            teacher=str(settings.teacher_model_name_or_path),
            student=str(settings.model_name_or_path),
            mixing=self.mixing,
            **kwargs,
        )
        checked_params(settings.sampling())
        check_models(self.config)
        if engine is None:
            check_weights(self.config)
        self._engine, self._owned = engine, engine is None
        self.teacher_tokenizer, self.student_tokenizer = (load_tokenizer(self.config, side) for side in ("teacher", "student"))

    @property
    def engine(self) -> PairEngine:
        """Return the engine, starting it if needed."""
        if self._engine is None:
            from osd.engine.engine import PairEngine
            from osd.terminal import Loading, models

            with Loading(models(teacher=self.config.teacher, student=self.config.student), quiet=self.quiet):
                self._engine = PairEngine(self.config)
        return self._engine

    def refusal(self, request: Request, sampling: dict[str, Any]) -> str | None:
        engine = self.engine  # outside of try: a failed start does not reject the request
        try:
            engine.check([_prompt(request)], sampling=sampling)
        except ValueError as error:
            return str(error).removeprefix("prompt 0: ")
        return None

    def sample(
        self,
        requests: Sequence[Request],
        sampling: dict[str, Any],
        *,
        alpha: float | None = None,
        mixing: MixingConfig | None = None,
        on_finished: Callable[[int], None] | None = None,
    ) -> list[PairCompletion]:
        self.engine.set_mixing(mixing or self.mixing)
        seeded = [{**sampling, "seed": request.seed} for request in requests]
        prompts = [_prompt(request) for request in requests]
        return self.engine.generate(prompts, sampling=seeded, alpha=alpha, on_finished=on_finished)

    def close(self) -> None:
        """Shut the engine down, if this object started it."""
        if self._engine is not None and self._owned:
            self._engine.close()

    def __enter__(self) -> EnginePair:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _prompt(request: Request) -> PairPrompt:
    from osd.engine.engine import PairPrompt

    return PairPrompt(teacher_token_ids=request.teacher.token_ids, student_token_ids=request.student.token_ids)
