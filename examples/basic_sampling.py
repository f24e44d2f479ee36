"""Sample from the optimal mixture of two models that read the same prompts.

python examples/basic_sampling.py --teacher Qwen/Qwen2.5-3B-Instruct --student Qwen/Qwen2.5-1.5B-Instruct
"""

import argparse

from osd import OptimalSamplingV1

CPU_ENGINE = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 1 << 28, "max_model_len": 512}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="path or model id")
    parser.add_argument("--student", required=True, help="path or model id with the same tokenizer")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--cpu", action="store_true", help="float32 on the CPU")
    flags = parser.parse_args(argv)

    prompts = ["Why is the sky blue?", "Name three prime numbers.", "Write a sentence about the sea."]
    with OptimalSamplingV1(
        model_teacher=flags.teacher,
        model_theta=flags.student,
        enable_chat_template=True,
        track_alpha_stats=True,
        **(CPU_ENGINE if flags.cpu else {}),
    ) as sampler:
        output = sampler.generate(prompts, max_tokens=flags.max_tokens, seed=0)

    assert output.alpha_stats is not None
    for prompt, text, stats in zip(prompts, output.generated_texts, output.alpha_stats, strict=True):
        print(f"\n{prompt}\n  {text.strip()}")
        print("  α from {min:.2f} to {max:.2f}, mean {mean:.2f}, over {count} tokens".format(**stats))


if __name__ == "__main__":
    main()
