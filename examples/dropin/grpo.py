"""Sample from q* inside TRL's GRPOTrainer: a teacher helps the policy to explore, and importance weights correct for it.

    python -m examples.dropin.grpo --student PATH --teacher PATH [--steps 3] [--cpu]

GRPO weights its loss by the ratio of the policy to the distribution that drew a token (`vllm_importance_sampling_correction`,
meant for vLLM's rounding). OSDGeneration returns the exact log q*, so the ratio is π_θ/q* and the gradient is that of the
policy's own return. Here the ratio is of whole completions, and truncated.
"""

import argparse

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from examples.dropin import CPU_ENGINE, GPU_ENGINE, ROWS
from osd import MixingConfig, OSDGeneration
from osd.engine.engine import PairConfig


class OptimalSamplingGRPO(GRPOTrainer):
    def __init__(self, *args, pair, **kwargs):
        super().__init__(*args, **kwargs)
        model, length = self.model, self.max_completion_length
        osd = OSDGeneration(model, self.accelerator, self.processing_class, pair=pair, max_completion_length=length)
        osd.attach(self)

    def _generate_and_score_completions(self, inputs):
        alpha = None if self.model.training else 0.0  # evaluation samples from the student alone
        with self.vllm_generation.teacher_reads([row["teacher_prompt"] for row in inputs], alpha=alpha):
            return super()._generate_and_score_completions(inputs)


def names_the_answer(completions: list[str], answer: list[str], **_: object) -> list[float]:
    return [float(a.lower() in completion.lower()) for completion, a in zip(completions, answer, strict=True)]


def main(argv: list[str] | None = None) -> OptimalSamplingGRPO:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, help="path or model id")
    parser.add_argument("--teacher", required=True, help="path or model id")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--output", default="outputs/dropin")
    parser.add_argument("--cpu", action="store_true", help="float32 on the CPU")
    flags = parser.parse_args(argv)

    args = GRPOConfig(
        flags.output,
        max_steps=flags.steps,
        learning_rate=flags.learning_rate,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=32,
        vllm_importance_sampling_mode="sequence_truncate",
        vllm_importance_sampling_clip_max=2.0,
        logging_steps=1,
        report_to="none",
        use_cpu=flags.cpu,
        bf16=not flags.cpu,
    )
    pair = PairConfig(
        teacher=flags.teacher,
        student=flags.student,
        mixing=MixingConfig(alpha_max=0.3),  # near the policy, so that the ratios are not all 0
        engine_kwargs=CPU_ENGINE if flags.cpu else GPU_ENGINE,
    )
    trainer = OptimalSamplingGRPO(
        model=flags.student, reward_funcs=names_the_answer, args=args, train_dataset=Dataset.from_list(ROWS), pair=pair
    )
    with trainer.vllm_generation:
        trainer.train()
        trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
