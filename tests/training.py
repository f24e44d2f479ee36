"""A trainer of tiny models on a running engine, and helpers of its tests."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = [{"prompt": f"w{i} w{i + 1} w{i + 2}", "teacher_prompt": f"w50 w{i} w51"} for i in range(7, 23)]


STUDENT_PROMPTS = [[1, 5, 7, 8], [1, 5, 9], [10, 11, 12, 13, 14]]
NOISE = 1e-3  # float32 engine against float32 transformers; measured 5e-6


def build_trainer(
    engine,
    student,
    output_dir,
    rows=ROWS,
    *,
    model=None,
    processing_class=None,
    trainer_class=None,
    eval_dataset=None,
    callbacks=None,
    peft_config=None,
    **fields,
):
    from osd.train import OSDConfig, OSDTrainer

    settings = {
        "output_dir": str(output_dir),
        "use_cpu": DEVICE == "cpu",
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "max_steps": 3,
        "max_completion_length": 8,
        "per_device_train_batch_size": 4,
        **fields,
    }
    data = Dataset.from_list(rows) if isinstance(rows, list) else rows
    return (trainer_class or OSDTrainer)(
        model=model or str(student),
        processing_class=processing_class,
        args=OSDConfig(**settings),
        train_dataset=data,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
        peft_config=peft_config,
        engine=engine,
    )


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def watch(trainer, look):
    """Call `look(student_prompts)` after every `generate`."""
    generate = trainer.vllm_generation.generate

    def watched(prompts, *args, **kwargs):
        result = generate(prompts, *args, **kwargs)
        look(prompts)
        return result

    trainer.vllm_generation.generate = watched


def logp(model, prompt_ids, token_ids):
    """Log-probabilities of a completion by transformers, [T]."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + token_ids], device=model.device)).logits[0, len(prompt_ids) - 1 : -1].cpu()
    return logits.log_softmax(-1).gather(-1, torch.tensor(token_ids)[:, None])[:, 0]


def disagreement(model, prompts, completions, column):
    """Largest difference between a recorded column and transformers' log-probabilities of the same tokens."""
    return max(
        (logp(model, prompt, c.token_ids) - getattr(c.record, column)).abs().max().item()
        for prompt, c in zip(prompts, completions, strict=True)
    )


def gaps_over_training(trainer):
    """Train; after every sampling, how far the recorded log π_θ is from the live student's."""
    gaps = []

    def look(prompts):
        trainer.model.eval()
        gaps.append(disagreement(trainer.model, prompts, trainer.vllm_generation.last_batch.completions, "logp_theta"))
        trainer.model.train()

    watch(trainer, look)
    trainer.train()
    return gaps


def perturb(model, seed=0, by=0.3):
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng) * by * parameter.std().clamp(min=0.1))


def weights_after(trainer):
    trainer.train()
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def sampled(trainer, rows=ROWS[:8]):
    """A batch as the loss sees it, and the records of its completions."""
    trainer.model.train()
    trainer._last_loaded_step = -1
    batch = trainer._generate_and_score_completions(rows)
    return batch, [c.record for c in trainer.vllm_generation.last_batch.completions]


def loss_and_gradient(trainer, batch):
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def compare_supervision(engine, student, output_dir, tolerance=1e-3):
    """Compare loss and gradient of recorded supervision with those of a teacher in transformers, on the same completions.

    ``tolerance`` is relative, of the loss; the gradient has ten times as much.
    """
    eager = {"attn_implementation": "eager"}  # no other one of transformers' caps Gemma 2's attention
    fields = {"model_init_kwargs": eager}, {"model_init_kwargs": eager, "teacher_model_init_kwargs": eager}
    recorded, recompute = (
        build_trainer(engine, student, output_dir, teacher_signal=signal, **given)
        for signal, given in zip(("recorded", "recompute"), fields, strict=True)
    )
    batch, _ = sampled(recorded, ROWS[:4])
    loss, gradient = loss_and_gradient(recorded, batch)
    completions = recorded.vllm_generation.last_batch.completions
    prompts = recorded._renderer.teacher_ids(ROWS[:4])
    columns = recompute._teacher.columns(completions, prompts, batch["completion_mask"])
    again, gradient_again = loss_and_gradient(recompute, batch | columns)
    assert loss > 0.01
    assert again == pytest.approx(loss, rel=tolerance)
    assert (gradient_again - gradient).norm() < 10 * tolerance * gradient.norm()
    other = [[*ids, 9, 33, 20, 41] for ids in prompts]  # planted: a teacher that reads another prompt
    _, planted = loss_and_gradient(recompute, batch | recompute._teacher.columns(completions, other, batch["completion_mask"]))
    assert (planted - gradient).norm() > max(0.05, 10 * tolerance) * gradient.norm()
