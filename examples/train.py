"""Minimal training run in which only the teacher reads the reference answer.

    python examples/train.py --student PATH [--teacher PATH] [--data train.jsonl] [--steps 3] [--cpu]

Each line of the data is {"prompt": ..., "privileged_context": ...}. Without --data, four built-in examples are used.
"""

import argparse

from datasets import Dataset, load_dataset

from osd import OSDConfig, OSDTrainer

EXAMPLES = [
    {"prompt": "What is the capital of France?", "privileged_context": "Paris"},
    {"prompt": "How many legs does a spider have?", "privileged_context": "Eight"},
    {"prompt": "Which planet is the largest?", "privileged_context": "Jupiter"},
    {"prompt": "What is seven times six?", "privileged_context": "42"},
]
GPU_ENGINE = {"dtype": "bfloat16", "max_model_len": 256}
CPU_ENGINE = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "kv_cache_memory_bytes": 1 << 28}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, help="path or model id")
    parser.add_argument("--teacher", help="path or model id (default: the initial student)")
    parser.add_argument("--data", help="a .jsonl file")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps")
    parser.add_argument("--output", default="outputs/example")
    parser.add_argument("--cpu", action="store_true", help="float32 on the CPU")
    flags = parser.parse_args(argv)

    data = load_dataset("json", data_files=flags.data)["train"] if flags.data else Dataset.from_list(EXAMPLES * 4)
    args = OSDConfig(
        output_dir=flags.output,
        teacher_model_name_or_path=flags.teacher or flags.student,
        privileged_template="{prompt}\n\nThe answer is: {privileged_context}",
        enable_chat_template=True,
        max_completion_length=32,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=flags.steps,
        learning_rate=1e-5,
        logging_steps=1,
        report_to="none",
        use_cpu=flags.cpu,
        bf16=not flags.cpu,
        engine_kwargs=CPU_ENGINE if flags.cpu else GPU_ENGINE,
    )
    trainer = OSDTrainer(model=flags.student, args=args, train_dataset=data)
    trainer.train()
    trainer.save_model()
    trainer.close()


if __name__ == "__main__":
    main()
