"""Systems that sample from two models or from one, with one interface. Each process runs one of them.

Shape suffixes: B sequences, V ids that both models have.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from benchmarks.logits import Switches, spread, spread_logits
from osd.core import RECORD_FIELDS, TOKEN_ORIGINS, MixingConfig

ACCEPTED, CORRECTED = (TOKEN_ORIGINS.index(name) for name in ("accepted", "corrected"))


@dataclass(frozen=True, kw_only=True)
class Job:
    """Job of a system, the same for all systems.

    Attributes:
        teacher, student: path or model id.
        dtype: dtype of weights and activations, "bfloat16" or "float32".
        random_weights: True if the folders have no weights and no tokenizer.
        logit_std: standard deviation of the logits of random weights (see benchmarks.logits).
        gpu: run on CUDA. Passed in, because asking torch could initialise CUDA before vLLM forks its engine core.
        max_model_len, max_num_seqs: the longest sequence and the largest batch of the run.
        engine_kwargs: further ``vllm.LLM`` arguments for every vLLM engine.
        pair_kwargs: further engine arguments for the pair only.
        alpha_method: α method of the systems that mix.
        num_speculative_tokens: drafts of the pair.
    """

    teacher: str
    student: str
    dtype: str
    random_weights: bool
    gpu: bool
    max_model_len: int
    max_num_seqs: int
    engine_kwargs: dict[str, Any] = field(default_factory=dict)
    pair_kwargs: dict[str, Any] = field(default_factory=dict)
    alpha_method: str = "kl_symmetry"
    logit_std: float = 4.0
    num_speculative_tokens: int | str = 0

    def llm_kwargs(self) -> dict[str, Any]:
        """Return the arguments of every vLLM engine. On a GPU all other arguments keep vLLM's defaults."""
        kwargs: dict[str, Any] = dict(
            dtype=self.dtype,
            load_format="dummy" if self.random_weights else "auto",
            skip_tokenizer_init=self.random_weights,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            enable_prefix_caching=True,
            seed=0,
        )
        if self.gpu:
            kwargs["gpu_memory_utilization"] = 0.9
        else:
            kwargs |= dict(enforce_eager=True, kv_cache_memory_bytes=1 << 30)
        if self.random_weights or self.num_speculative_tokens == "auto":
            kwargs["worker_extension_cls"] = f"{Switches.__module__}.{Switches.__qualname__}"
        return kwargs | self.engine_kwargs

    def finish(self, llm: Any, models: int = 1) -> dict[str, Any]:
        """Scale the logits of an engine with random weights. Returns the settings that are in effect."""
        if self.random_weights:
            spread(llm, self.logit_std, models)
        return resolved(llm.llm_engine.vllm_config)

    def shared_vocab(self) -> int:
        """Return V. Ids from V on are padding in at least one of the two models."""
        from transformers import AutoConfig

        return min(AutoConfig.from_pretrained(model).vocab_size for model in (self.teacher, self.student))


class System(Protocol):
    """Interface of a system. The constructor makes it ready to sample."""

    settings: dict[str, Any]

    def generate(self, prompts: list[list[int]], new_tokens: int, *, record: bool = True) -> list[list[int]]:
        """Sample exactly ``new_tokens`` ids for each prompt at temperature 1."""

    def observed(self) -> dict[str, float]:
        """Return mean record values of the tokens last generated with the record on, or nothing."""

    def close(self) -> None: ...


def sampling_kwargs(new_tokens: int) -> dict[str, Any]:
    return dict(max_tokens=new_tokens, ignore_eos=True, temperature=1.0, detokenize=False)


def resolved(config: Any) -> dict[str, Any]:
    """Return the engine settings in effect, including vLLM's defaults."""
    scheduler, cache, compilation = config.scheduler_config, config.cache_config, config.compilation_config
    return {
        "async_scheduling": scheduler.async_scheduling,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "max_num_seqs": scheduler.max_num_seqs,
        "max_model_len": config.model_config.max_model_len,
        "dtype": str(config.model_config.dtype),
        "enforce_eager": config.model_config.enforce_eager,
        "compilation_mode": str(compilation.mode),
        "cudagraph_mode": str(compilation.cudagraph_mode),
        "cudagraph_capture_sizes": list(compilation.cudagraph_capture_sizes or []),
        "enable_prefix_caching": cache.enable_prefix_caching,
        "block_size": cache.block_size,
        "gpu_memory_utilization": cache.gpu_memory_utilization,
        "kv_cache_memory_bytes": cache.kv_cache_memory_bytes,
        "v2_model_runner": bool(getattr(config, "use_v2_model_runner", False)),
    }


class Single:
    """Plain vLLM with one model at vLLM's defaults."""

    def __init__(self, job: Job, model: str) -> None:
        from vllm import LLM

        self.llm = LLM(model=model, **job.llm_kwargs())
        self.settings = job.finish(self.llm)

    def generate(self, prompts: list[list[int]], new_tokens: int, *, record: bool = True) -> list[list[int]]:
        from vllm import SamplingParams

        requests: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(requests, SamplingParams(**sampling_kwargs(new_tokens)), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def observed(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def kept(values_NR: torch.Tensor) -> torch.Tensor:
    """Return min(1, π_θ/q*) of recorded tokens, float64 [N]."""
    theta_N, q_N = (values_NR[:, RECORD_FIELDS.index(name)].double() for name in ("logp_theta", "logq"))
    return (theta_N - q_N).exp().clamp(max=1)


class Paired:
    """OSD: both models in one vLLM engine, with α solved for every token over the whole vocabulary."""

    def __init__(self, job: Job) -> None:
        from osd.engine.engine import PairConfig, PairEngine

        self.engine = PairEngine(
            PairConfig(
                teacher=job.teacher,
                student=job.student,
                mixing=MixingConfig(alpha_method=job.alpha_method),
                num_speculative_tokens=job.num_speculative_tokens,
                engine_kwargs=job.llm_kwargs() | job.pair_kwargs,
            )
        )
        self.settings = job.finish(self.engine.llm, models=2)
        self.chooses_drafts = job.num_speculative_tokens == "auto"
        self.completions: list[Any] = []

    def generate(self, prompts: list[list[int]], new_tokens: int, *, record: bool = True) -> list[list[int]]:
        return self.generate_pairs([(prompt, prompt) for prompt in prompts], new_tokens, record=record)

    def generate_pairs(
        self, prompts: list[tuple[list[int], list[int]]], new_tokens: int, *, record: bool = True
    ) -> list[list[int]]:
        """Sample from pairs of prompts: the teacher's, the student's."""
        from osd.engine.engine import PairPrompt

        pairs = [PairPrompt(teacher_token_ids=teacher, student_token_ids=student) for teacher, student in prompts]
        completions = self.engine.generate(pairs, sampling=sampling_kwargs(new_tokens), record=record)
        if record:
            self.completions = completions
        return [c.token_ids for c in completions]

    def observed(self) -> dict[str, float]:
        """Return the means of the record columns, which show that the two policies differ.

        Asserts that the record has a row for every token.
        """
        assert all(len(c.record.values_TR) == len(c.token_ids) for c in self.completions), "incomplete record"
        values = torch.cat([c.record.values_TR for c in self.completions])
        means = dict(zip(RECORD_FIELDS, values.double().mean(0).tolist(), strict=True))
        # 1 - TV(q*, π_θ) is the mean of min(1, π_θ/q*) over tokens of q*. Whether a position has a draft that is verified is
        # known before its token, so the mean over such positions is their acceptance, too.
        means["record_acceptance"] = kept(values).mean().item()
        records = [c.record for c in self.completions if c.record.origin_T is not None]
        if records:
            origin_N = torch.cat([record.origin_T for record in records])
            drawn, accepted, corrected, bonus = origin_N.bincount(minlength=len(TOKEN_ORIGINS)).tolist()
            verified_N = (origin_N == ACCEPTED) | (origin_N == CORRECTED)
            if verified_N.any():
                means["record_acceptance"] = kept(torch.cat([r.values_TR for r in records])[verified_N]).mean().item()
                means["drafts_verified"] = float(accepted + corrected)
            means["draft_acceptance"] = accepted / max(accepted + corrected, 1)
            means["tokens_per_cycle"] = (drawn + accepted + corrected + bonus) / (drawn + corrected + bonus)
        return means

    def force_acceptance(self, rate: float) -> None:
        """Accept drafts with this probability, whatever the policies say: for speed only."""
        self.engine.llm.collective_rpc("force_acceptance", args=(rate,))

    def pin_drafts(self, drafts: int | None, acceptance: float | None) -> None:
        """Give every step this number of drafts; None: let the engine choose, by what it measured at this acceptance."""
        self.engine.llm.collective_rpc("pin_drafts", args=(drafts, acceptance))

    def close(self) -> None:
        self.engine.close()


class LockStep:
    """Two transformers models with KV caches, one step of each per token: a typical research implementation.

    It mixes with osd.mixing.mix and does not check for ended sequences.
    """

    def __init__(self, job: Job) -> None:
        self.device = "cuda" if job.gpu else "cpu"
        self.mixing = MixingConfig(alpha_method=job.alpha_method)
        self.shared_vocab = job.shared_vocab()
        self.teacher, self.student = self._load(job, job.teacher), self._load(job, job.student)
        self.settings = {"attention": self.teacher.config._attn_implementation, "cache": "DynamicCache", "dtype": job.dtype}

    def _load(self, job: Job, model: str) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        dtype = getattr(torch, job.dtype)
        with torch.device(self.device):
            if job.random_weights:
                random: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=dtype)
                spread_logits(random, job.logit_std)
                return random.eval()
            loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
            return loaded.to(self.device).eval()

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new_tokens: int, *, record: bool = True) -> list[list[int]]:
        from osd.mixing import mix

        ids = torch.tensor(prompts, device=self.device)
        caches: list[Any] = [None, None]
        drawn = []
        for _ in range(new_tokens):
            logits = []
            for side, model in enumerate((self.student, self.teacher)):
                output = model(input_ids=ids, past_key_values=caches[side], use_cache=True, logits_to_keep=1)
                caches[side] = output.past_key_values
                logits.append(output.logits[:, -1, : self.shared_vocab])
            logq_BV = mix(logits[0], logits[1], self.mixing).logq_BV
            ids = torch.multinomial(logq_BV.exp(), num_samples=1)
            drawn.append(ids)
        return torch.cat(drawn, dim=-1).tolist()

    def observed(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass
