"""Semi-on-policy sampling: only the teacher reads the reference answer.

    python examples/semi_on_policy.py --model Qwen/Qwen2.5-1.5B-Instruct

Teacher and student are the same model here, so they differ only in their prompts. The prompts are sampled from the student,
from q*, and from the teacher. The log π_θ of the tokens shows how likely each text is for the student.
"""

import argparse

from osd import OptimalSamplingV1

CPU_ENGINE = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 1 << 28, "max_model_len": 512}
PROBLEMS = [
    ("A train travels 60 km in 45 minutes. What is its speed in km/h?", "60 km / 0.75 h = 80 km/h. The answer is 80."),
    ("What is 17 * 24?", "17 * 24 = 17 * 20 + 17 * 4 = 340 + 68 = 408. The answer is 408."),
]
TEACHER_PROMPT = "{problem}\n\nHere is a reference solution:\n{answer}\n\nSolve the problem in your own words."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="path or model id")
    parser.add_argument("--max-tokens", type=int, default=80)
    parser.add_argument("--cpu", action="store_true", help="float32 on the CPU")
    flags = parser.parse_args(argv)

    theta_prompts = [problem for problem, _ in PROBLEMS]
    teacher_prompts = [TEACHER_PROMPT.format(problem=problem, answer=answer) for problem, answer in PROBLEMS]
    for name, bounds in {"student": (0.0, 0.0), "q*": (0.0, 1.0), "teacher": (1.0, 1.0)}.items():
        with OptimalSamplingV1(
            model_teacher=flags.model,
            model_theta=flags.model,
            alpha_min=bounds[0],
            alpha_max=bounds[1],
            enable_chat_template=True,
            track_alpha_stats=True,
            **(CPU_ENGINE if flags.cpu else {}),
        ) as sampler:
            output = sampler.generate(teacher_prompts, theta_prompts, max_tokens=flags.max_tokens, seed=0)
        assert output.records is not None
        for problem, text, record in zip(theta_prompts, output.generated_texts, output.records, strict=True):
            print(f"\n[{name}] {problem}\n  {text.strip()}")
            means = [record.alpha.mean(), record.logp_theta.mean(), record.logp_teacher.mean()]
            print("  mean α {:.2f}, mean log π_θ {:.2f}, mean log π_t {:.2f}".format(*means))


if __name__ == "__main__":
    main()
