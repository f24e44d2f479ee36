"""Three sources of the teacher's distribution for the loss: hidden states or top-k rows of the record, or a second teacher.

Each gives a tensor aligned to the completion's tokens, and what makes a distribution of it: the teacher's output layer, or
`TopK`. Shape suffixes: B completions, T completion tokens (padded), N tokens, H the teacher's hidden size, X numbers per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import AutoConfig
from trl.models import prepare_deepspeed
from trl.trainer.utils import create_model_from_path, pad

from osd.engine.topk import columns
from osd.train.divergence import token_logprobs
from osd.train.lm_head import Head, TopK, first_rows, head_of
from osd.train.losses import pad_rows
from osd.validate_models import shared_vocabulary

if TYPE_CHECKING:
    from osd.engine.engine import PairCompletion, PairEngine
    from osd.engine.remote import RemoteEngine
    from osd.train.config import OSDConfig
    from osd.train.trainer import OSDTrainer


_CHECKED_TOKENS = 64


class Teacher(Protocol):
    """A source of the teacher's distribution."""

    def columns(
        self, completions: list[PairCompletion], prompts: list[list[int]], completion_mask_BT: Tensor
    ) -> dict[str, Any]:
        """Return the columns that `supervision` reads: tensors, batch first, or lists. `prompts` are the teacher's."""

    def supervision(self, inputs: dict[str, Any]) -> tuple[Tensor, Head | TopK]:
        """Return the teacher [B, T, X] at a batch with these `columns`: hidden states and output layer, or top-k rows."""


class RecordedTeacher:
    """The hidden states that the engine computed to draw each token, and the engine's own output layer.

    Args:
        temperature: of both policies in sampling.
    """

    def __init__(self, engine: PairEngine | RemoteEngine, args: OSDConfig, temperature: float) -> None:
        config = AutoConfig.from_pretrained(
            engine.config.teacher, revision=args.teacher_model_revision, trust_remote_code=args.trust_remote_code
        )
        self.head = head_of(*engine.teacher_lm_head(), config)
        self._unchecked: tuple[int, float] | None = shared_vocabulary(engine.config), temperature or 1.0

    def columns(
        self, completions: list[PairCompletion], prompts: list[list[int]], completion_mask_BT: Tensor
    ) -> dict[str, Any]:
        if self._unchecked is not None:
            self._check(next((c for c in completions if not c.error and c.record is not None), None), *self._unchecked)
        # They stay on the host, each [T, H], until their pass: a whole optimizer step's may be gigabytes.
        return {"teacher_hidden": [None if c.error or c.record is None else c.record.teacher_hidden_TH for c in completions]}

    def _check(self, completion: PairCompletion | None, vocabulary: int, temperature: float) -> None:
        """Compare log π_t of one completion by this head with the engine's own, once per run.

        Raises:
            RuntimeError: they differ beyond rounding: the model does more to its logits than its configuration says.
        """
        if completion is None or completion.record is None or completion.record.teacher_hidden_TH is None:
            return
        self._unchecked = None
        hidden_NH = completion.record.teacher_hidden_TH[:_CHECKED_TOKENS].to(self.head.weight_VH)
        token_N = torch.tensor(completion.token_ids[:_CHECKED_TOKENS], device=hidden_NH.device)
        logp_N = token_logprobs(hidden_NH, first_rows(self.head, vocabulary), token_N, temperature).cpu()
        gap = (logp_N - torch.as_tensor(completion.record.logp_teacher)[:_CHECKED_TOKENS]).abs().mean().item()
        if gap > (0.03 if hidden_NH.dtype == torch.float32 else 0.3):
            raise RuntimeError(
                f"the teacher's recorded hidden states and its output layer give log-probabilities that differ from those it "
                f"sampled with by {gap:.3g} nats on average: its architecture changes the logits in a way that OSD does not "
                "know. Use teacher_signal='topk' or 'recompute'"
            )

    def supervision(self, inputs: dict[str, Any]) -> tuple[Tensor, Head]:
        completion_BT = inputs["completion_ids"]
        padded = pad_rows(inputs["teacher_hidden"], completion_BT.size(1), self.head.weight_VH, completion_BT.device)
        return padded, self.head


class TopKTeacher:
    """The k largest log-probabilities that the engine computed to draw each token, and the mass of the rest."""

    def __init__(self, engine: PairEngine | RemoteEngine, k: int) -> None:
        self.of = TopK(vocab_size=shared_vocabulary(engine.config))
        self.like_X = torch.empty(columns(k))

    def columns(
        self, completions: list[PairCompletion], prompts: list[list[int]], completion_mask_BT: Tensor
    ) -> dict[str, Any]:
        return {"teacher_topk": [None if c.error or c.record is None else c.record.teacher_topk_TX for c in completions]}

    def supervision(self, inputs: dict[str, Any]) -> tuple[Tensor, TopK]:
        completion_BT = inputs["completion_ids"]
        return pad_rows(inputs["teacher_topk"], completion_BT.size(1), self.like_X, completion_BT.device), self.of


class RecomputedTeacher:
    """A second teacher, in transformers, which reads the teacher's prompt and the completion again."""

    def __init__(self, trainer: OSDTrainer, path: str) -> None:
        self.trainer = trainer
        args = trainer.args
        kwargs = {"revision": args.teacher_model_revision, "trust_remote_code": args.trust_remote_code}
        if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            kwargs["device_map"] = None  # as in TRL: "auto" would spread it over every process's devices
        model = create_model_from_path(path, **kwargs | args.teacher_init_kwargs())
        if trainer.is_deepspeed_enabled:
            self.model = prepare_deepspeed(model, trainer.accelerator)
        else:
            self.model = trainer.accelerator.prepare_model(model, evaluation_mode=True)
        self.model.eval()

    def columns(
        self, completions: list[PairCompletion], prompts: list[list[int]], completion_mask_BT: Tensor
    ) -> dict[str, Any]:
        device = completion_mask_BT.device
        ids = [torch.tensor(prompt, device=device) for prompt in prompts]
        padding = self.trainer._tokenizer.pad_token_id
        return {
            "teacher_prompt_ids": pad(ids, padding_value=padding, padding_side="left"),
            "teacher_prompt_mask": pad([torch.ones_like(x) for x in ids], padding_value=0, padding_side="left"),
        }

    @torch.no_grad()
    def supervision(self, inputs: dict[str, Any]) -> tuple[Tensor, Head]:
        trainer = self.trainer
        teacher: Any = trainer.accelerator.unwrap_model(self.model)
        # Through its wrapper, as TRL does, so that FSDP and DeepSpeed gather its parameters first; and in its own dtype.
        with torch.autocast(inputs["completion_ids"].device.type, enabled=False):
            hidden_BTH = trainer._forward_redirection(
                self.model,
                teacher,
                trainer._get_last_hidden_state,
                teacher,
                torch.cat([inputs["teacher_prompt_ids"], inputs["completion_ids"]], dim=1),
                torch.cat([inputs["teacher_prompt_mask"], inputs["completion_mask"]], dim=1),
                inputs["completion_ids"].size(1),
            )
        lm_head = teacher.get_output_embeddings()
        return hidden_BTH, head_of(lm_head.weight, getattr(lm_head, "bias", None), teacher.config)


def start_teacher(trainer: OSDTrainer, engine: PairEngine | RemoteEngine) -> Teacher:
    """Return the source that `teacher_signal` names; the engine must be awake."""
    if trainer.args.teacher_signal == "recompute":
        return RecomputedTeacher(trainer, engine.config.teacher)
    if trainer.args.teacher_signal == "topk":
        return TopKTeacher(engine, trainer.args.teacher_topk)
    return RecordedTeacher(engine, trainer.args, trainer.vllm_generation.sampling_temperature)
