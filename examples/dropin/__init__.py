"""OSDGeneration in other people's trainers."""

CPU_ENGINE = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "kv_cache_memory_bytes": 1 << 28}
GPU_ENGINE = {"dtype": "bfloat16", "max_model_len": 256, "gpu_memory_utilization": 0.5}
# What the student reads, what the teacher reads, and the answer.
ROWS = [
    {
        "prompt": "What is the capital of France?",
        "teacher_prompt": "The capital of France is Paris.",
        "answer": "Paris",
    },
    {"prompt": "How many legs has a spider?", "teacher_prompt": "A spider has eight legs.", "answer": "eight"},
    {"prompt": "Which planet is the largest?", "teacher_prompt": "Jupiter is the largest planet.", "answer": "Jupiter"},
    {"prompt": "What is seven times six?", "teacher_prompt": "Seven times six is 42.", "answer": "42"},
]
