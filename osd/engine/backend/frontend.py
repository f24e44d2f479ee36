"""Frontend: the vLLM engine that a pair runs in, as `PairEngine` sees it."""

from __future__ import annotations

import gc
import queue
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any
from unittest import mock

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory, get_tp_group
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.utils.network_utils import zmq_socket_ctx
from vllm.v1.engine import core
from vllm.v1.engine import utils as engine_utils

from osd.engine.backend import cpu
from osd.engine.backend.configuration import check_engine_args, refusal, side_limits, student_vllm_config
from osd.engine.backend.language_model import as_text
from osd.engine.backend.layers import without_cached_states
from osd.engine.backend.two_models import workers
from osd.engine.config import PairConfig
from osd.interrupts import kept_interrupts

_DIED = "the engine's process has ended; close this engine and start another"
_POLL_SECONDS = 0.5  # how often a wait for another process looks whether it is alive


class EngineDied(RuntimeError):
    """Raised when the engine's process has ended."""


class Frontend:
    """One vLLM engine, started for a pair.

    Raises:
        RuntimeError: another one lives in this process; vLLM starts without the pair's worker.
    """

    _in_this_process: Any = None  # a weak reference

    def __init__(self, config: PairConfig) -> None:
        self._check_alone()
        cpu.keep_torch_threads()
        self._groups_are_ours = not torch.distributed.is_initialized()
        self.llm: LLM | None = None
        try:
            arguments = as_text(without_cached_states(config).teacher_engine_args())
            check_engine_args(EngineArgs(**arguments))
            with interruptible_start():
                self.llm = LLM(**arguments)
            self._watch_outputs()
            self._guard_steps()
            if not all(self.call("pair_active")):  # vLLM says nothing if it ignores a worker class
                raise RuntimeError("vLLM did not start the paired worker; sampling would be from the teacher alone")
            self.limits = side_limits(self.engine.vllm_config, student_vllm_config(self.engine.vllm_config))
        except BaseException:
            self._give_up()
            raise
        if self.worker is not None:
            Frontend._in_this_process = weakref.ref(self)

    @classmethod
    def _check_alone(cls) -> None:
        """Raise if another engine is open here: they would share vLLM's process groups, and the first would break silently."""
        other = cls._in_this_process and cls._in_this_process()
        if other is not None and other.llm is not None:
            raise RuntimeError("another PairEngine lives in this process; close() it first, or use it")

    @property
    def engine(self) -> Any:
        assert self.llm is not None, "this engine is closed"
        return self.llm.llm_engine

    @property
    def model_config(self) -> Any:
        """vLLM's configuration of the teacher."""
        return self.engine.vllm_config.model_config

    @property
    def _core(self) -> Any | None:
        """vLLM's engine core if it is in this process, else None."""
        return getattr(self.engine.engine_core, "engine_core", None)

    @property
    def scheduler(self) -> Any | None:
        """The scheduler if it is in this process, else None."""
        return getattr(self._core, "scheduler", None)

    @property
    def worker(self) -> Any | None:
        """This rank's worker if it is in this process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``, one rank each), else None."""
        executor = getattr(self._core, "model_executor", None)
        return getattr(getattr(executor, "driver_worker", None), "worker", None)

    @property
    def rank_group(self) -> Any | None:
        """The CPU process group of this pair's ranks if a launcher started a process for each of them, else None."""
        parallel = self.engine.vllm_config.parallel_config
        if parallel.distributed_executor_backend != "external_launcher" or parallel.tensor_parallel_size == 1:
            return None
        return get_tp_group().cpu_group

    # -- requests ---------------------------------------------------------------------------------------------------

    def add(self, name: str, prompt_token_ids: Sequence[int], params: SamplingParams) -> str:
        """Queue a request; return vLLM's internal id of it, which is the key of its record."""
        return self.engine.add_request(name, {"prompt_token_ids": list(prompt_token_ids)}, params)

    def finished(self) -> Iterator[Any]:
        """Run the engine until no request is left; yield vLLM's outputs as they finish."""
        while self.engine.has_unfinished_requests():
            yield from (output for output in self.engine.step() if output.finished)

    @property
    def busy(self) -> bool:
        return self.engine.has_unfinished_requests()

    def abort(self, internal_ids: Iterable[str]) -> None:
        """End these requests, and report the ended ones again: a step that failed may not have reached the runners."""
        self.engine.abort_request(list(internal_ids), internal=True)
        if (worker := self.worker) is not None and (scheduler := self.scheduler) is not None:
            runners = worker.model_runner, worker.student_runner
            scheduler.report_finished(*(runner.req_states.req_id_to_index for runner in runners))

    # -- calls ------------------------------------------------------------------------------------------------------

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker; return their answers."""
        return self.ask("collective_rpc", method, args=args)

    def ask(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of vLLM's ``LLM``, and raise if the engine's process ends meanwhile: vLLM would wait for it forever.

        Raises:
            EngineDied: the engine's process ended before it answered.
        """
        function = getattr(self.llm, name)
        if self._core is not None:
            return function(*args, **kwargs)
        answer: Future[Any] = Future()

        def wait() -> None:
            try:
                answer.set_result(function(*args, **kwargs))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=wait, daemon=True).start()
        while not futures.wait([answer], _POLL_SECONDS).done:
            if not self.alive and not answer.done():
                raise EngineDied(_DIED)
        return answer.result()

    def _watch_outputs(self) -> None:
        """Stop waiting for a step of the engine's process when that process ends; vLLM would wait forever."""
        if self._core is not None:
            return
        outputs = self.engine.engine_core.outputs_queue
        get = outputs.get

        def watched() -> Any:
            while True:
                try:
                    return get(timeout=_POLL_SECONDS)
                except queue.Empty:
                    if not self.alive:
                        raise EngineDied(_DIED) from None

        outputs.get = watched

    def _guard_steps(self) -> None:
        """Make a step that fails end every request, and empty both prefix caches.

        The scheduler counts the tokens of such a step as computed, and has put their blocks into the prefix caches. An engine
        in another process ends with the step.
        """
        if (scheduler := self.scheduler) is None:
            return
        step = self.engine.step

        def guarded() -> list[Any]:
            try:
                return step()
            except BaseException:
                with self.cleaning_up():
                    self.abort(scheduler.requests)
                    assert self.engine.reset_prefix_cache(), "no request is left"
                raise

        self.engine.step = guarded

    @contextmanager
    def cleaning_up(self) -> Iterator[None]:
        """Run a body that cleans up after an exception. If the body fails too, close the engine and let that exception go on.

        Ctrl-C reaches the whole process group, so the engine's process may be ending while it still looks alive.
        """
        try:
            yield
        except BaseException as error:
            with suppress(Exception):
                self.close()
            if not isinstance(error, Exception):  # a second Ctrl-C
                raise

    @property
    def alive(self) -> bool:
        """True while the engine can answer: it is in this process, or its process runs."""
        if self.llm is None:
            return False
        return self._core is not None or not self.engine.engine_core.resources.engine_dead

    # -- the end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Shut the engine down and free its memory. Idempotent."""
        llm, self.llm = self.llm, None
        if llm is None:
            return
        try:
            # vLLM's shutdown would destroy process groups that are a trainer's or another engine's.
            with mock.patch.object(core, "cleanup_dist_env_and_memory"):
                llm.llm_engine.engine_core.shutdown()
        finally:
            del llm
            self._clean_up()

    def _give_up(self) -> None:
        """Free what an engine that did not start has taken, so that the caller can start another in this process."""
        with suppress(Exception):  # the error being raised says more
            self.close()
        if left := list(workers):
            for worker in left:
                with suppress(Exception):
                    worker.shutdown()
            self._clean_up()

    def _clean_up(self) -> None:
        """Free unreferenced memory and vLLM's process groups, unless there were some before this engine."""
        gc.collect()
        if self._groups_are_ours:
            cleanup_dist_env_and_memory()
        elif torch.accelerator.is_available():
            torch.accelerator.empty_cache()


@contextmanager
def interruptible_start() -> Iterator[None]:
    """Let Ctrl-C, and a server's SIGTERM, end the start of the engines' processes.

    Symptom: a start that was interrupted waits for up to VLLM_ENGINE_READY_TIMEOUT_S, and then goes on. Cause: `zmq_socket_ctx`
    swallows KeyboardInterrupt. Versions: 0.32, 0.33. To be removed when it does not (tests/test_ctrl_c.py, test_serve.py).
    """
    with kept_interrupts(), mock.patch.object(engine_utils, "zmq_socket_ctx", _handshake):
        yield


@contextmanager
def _handshake(*args: Any, **kwargs: Any) -> Iterator[Any]:
    """Open vLLM's socket for starting its engines' processes, and let an interrupt through."""
    interrupt = None
    with zmq_socket_ctx(*args, **kwargs) as socket:
        try:
            yield socket
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def is_cuda() -> bool:
    """Return whether vLLM runs on an NVIDIA GPU here."""
    return current_platform.is_cuda()


def checked_params(kwargs: dict[str, Any]) -> SamplingParams:
    """Return vLLM's sampling parameters.

    Raises:
        ValueError: parameters that vLLM refuses, by whatever exception.
    """
    if isinstance(grammar := kwargs.get("structured_outputs"), Mapping):
        kwargs = {**kwargs, "structured_outputs": StructuredOutputsParams(**grammar)}
    try:
        # Each request has its own parameters, which vLLM need not copy.
        return SamplingParams(**{"output_kind": RequestOutputKind.FINAL_ONLY, "skip_clone": True, **kwargs})
    except (AssertionError, TypeError, ValueError, VLLMValidationError) as error:
        raise ValueError(f"sampling: {refusal(error)}" if str(error) else f"sampling {kwargs}: {refusal(error)}") from error
