"""Sample from q* in a bare training loop, with accelerate and no trainer.

    python -m examples.dropin.bare_loop --student PATH --teacher PATH [--steps 3] [--cpu]
    accelerate launch -m examples.dropin.bare_loop ...

The loss is the reverse KL towards the teacher, whose distribution is in the record of each token.
"""

import argparse

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.dropin import CPU_ENGINE, GPU_ENGINE, ROWS
from osd import OSDGeneration
from osd.engine.engine import PairConfig


def reverse_kl(model, prompt_ids, completion, head, bias):
    """KL(student ‖ teacher) summed over the tokens of one completion, in nats, each side after its own prompt."""
    ids = torch.tensor([prompt_ids + completion.token_ids], device=head.device)
    student_TV = model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1].float()
    teacher_TV = torch.nn.functional.linear(completion.record.teacher_hidden_TH.to(head), head, bias).float()
    shared = min(student_TV.size(-1), teacher_TV.size(-1))  # one tokenizer, padded to different sizes
    student_TV, teacher_TV = (logits_TV[:, :shared].log_softmax(-1) for logits_TV in (student_TV, teacher_TV))
    return (student_TV.exp() * (student_TV - teacher_TV)).sum()


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, help="path or model id")
    parser.add_argument("--teacher", required=True, help="path or model id")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--output", default="outputs/dropin")
    parser.add_argument("--cpu", action="store_true", help="float32 on the CPU")
    flags = parser.parse_args(argv)

    accelerator = Accelerator(cpu=flags.cpu, mixed_precision="no" if flags.cpu else "bf16")
    tokenizer = AutoTokenizer.from_pretrained(flags.student)
    model = AutoModelForCausalLM.from_pretrained(flags.student, dtype=torch.float32)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=flags.learning_rate))
    student = accelerator.unwrap_model(model)
    pair = PairConfig(teacher=flags.teacher, student=flags.student, engine_kwargs=CPU_ENGINE if flags.cpu else GPU_ENGINE)
    generation = OSDGeneration(student, accelerator, tokenizer, pair=pair, hidden=True, max_completion_length=32)
    head, bias = generation.engine.teacher_lm_head()

    prompts = [tokenizer(row["prompt"])["input_ids"] for row in ROWS]
    losses = []
    with generation:
        for step in range(flags.steps):
            generation.sync_weights()
            with generation.teacher_reads([row["teacher_prompt"] for row in ROWS]):
                generation.generate(prompts, None, 1)
            completions = generation.last_batch.completions
            total = sum(reverse_kl(model, ids, c, head, bias) for ids, c in zip(prompts, completions, strict=True))
            loss = total / sum(len(c.token_ids) for c in completions)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
            accelerator.print(f"step {step}: {losses[-1]:.3f} nats per token")
        if accelerator.is_main_process:
            student.save_pretrained(flags.output)
    return losses


if __name__ == "__main__":
    main()
