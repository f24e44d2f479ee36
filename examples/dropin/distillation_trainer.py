"""Sample from q* inside TRL's DistillationTrainer: a subclass of ten lines, without OSD's trainer.

    python -m examples.dropin.distillation_trainer --student PATH --teacher PATH [--steps 3] [--cpu]

Completions are drawn from q*, and the teacher reads its own prompt. The loss is TRL's, with its teacher in transformers.
"""

import argparse

from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer

from examples.dropin import CPU_ENGINE, GPU_ENGINE, ROWS
from osd import OSDGeneration
from osd.engine.engine import PairConfig


class OptimalSampling(DistillationTrainer):
    def __init__(self, *args, pair, **kwargs):
        super().__init__(*args, **kwargs)
        model, length = self.model, self.max_completion_length
        osd = OSDGeneration(model, self.accelerator, self.processing_class, pair=pair, max_completion_length=length)
        osd.attach(self)

    def _generate_and_score_completions(self, inputs):
        alpha = None if self.model.training else 0.0  # evaluation samples from the student alone
        with self.vllm_generation.teacher_reads([row["teacher_prompt"] for row in inputs], alpha=alpha):
            return super()._generate_and_score_completions(inputs)


def main(argv: list[str] | None = None) -> OptimalSampling:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, help="path or model id")
    parser.add_argument("--teacher", required=True, help="path or model id")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--output", default="outputs/dropin")
    parser.add_argument("--cpu", action="store_true", help="float32 on the CPU")
    flags = parser.parse_args(argv)

    args = DistillationConfig(
        flags.output,
        max_steps=flags.steps,
        learning_rate=flags.learning_rate,
        per_device_train_batch_size=4,
        max_completion_length=32,
        logging_steps=1,
        report_to="none",
        use_cpu=flags.cpu,
        bf16=not flags.cpu,
    )
    engine = CPU_ENGINE if flags.cpu else GPU_ENGINE
    trainer = OptimalSampling(
        model=flags.student,
        teacher_model=flags.teacher,
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        pair=PairConfig(teacher=flags.teacher, student=flags.student, engine_kwargs=engine),
    )
    with trainer.vllm_generation:
        trainer.train()
        trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
