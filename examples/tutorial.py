# %% [markdown]
# # From two models to a trained student
#
# Run the cells in an editor that supports `# %%` (VS Code, Jupyter with jupytext), or run the whole file:
#
#     python examples/tutorial.py
#
# It takes some minutes on two CPU cores with SmolLM2-135M, which is installed from the package index. On a GPU set
# MODEL_TEACHER and MODEL_STUDENT to any two models with the same tokenizer.

# %%
import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # training needs the engine in this process
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from pathlib import Path

import torch
from datasets import Dataset

from osd import MixingConfig, OptimalSamplingV1, OSDConfig, OSDTrainer

ON_GPU = torch.cuda.is_available()
OUTPUT = Path(os.environ.get("OSD_TUTORIAL_OUTPUT", "outputs/tutorial"))
STEPS = int(os.environ.get("OSD_TUTORIAL_STEPS", "8"))
MODEL_STUDENT = os.environ.get("MODEL_STUDENT", "models/SmolLM2-135M-Instruct")
MODEL_TEACHER = os.environ.get("MODEL_TEACHER", MODEL_STUDENT)
if not Path(MODEL_STUDENT).exists() and MODEL_STUDENT.startswith("models/"):
    from smollm2 import prepare_smollm2

    prepare_smollm2(MODEL_STUDENT)

# %% [markdown]
# ## 1. The problem
#
# The student reads a question. The teacher reads the question and its answer. Both may be the same model, as here: then they
# differ only in their prompts. The goal is text that contains the teacher's knowledge and is still likely under the student.

# %%
FACTS = [
    ("What does our shop call its blue mug?", "Atlantic"),
    ("What does our shop call its red mug?", "Ember"),
    ("On which day is our shop closed?", "Tuesday"),
    ("Who founded our shop?", "Ada"),
]
QUESTIONS = [question for question, _ in FACTS]
TEMPLATE = "{prompt}\n\nThe answer is {answer}. Say so in one short sentence."
ENGINE = dict(max_model_len=256, gpu_memory_utilization=0.4)
if not ON_GPU:
    ENGINE |= dict(dtype="float32", enforce_eager=True, kv_cache_memory_bytes=1 << 28)

# %% [markdown]
# ## 2. Sample from q\*
#
# Every token is drawn from q\* ∝ π_θ^(1-α) · π_t^α. `records` has the α, log-probabilities and KLs of every token. Where both
# models agree, both KLs are 0 and α has no effect. Where only the teacher knows the answer (the name), both KLs are large.

# %%
with OptimalSamplingV1(
    model_teacher=MODEL_TEACHER, model_theta=MODEL_STUDENT, enable_chat_template=True, track_alpha_stats=True, **ENGINE
) as sampler:
    teacher_prompts = [TEMPLATE.format(prompt=question, answer=answer) for question, answer in FACTS]
    mixed = sampler.generate(teacher_prompts, QUESTIONS, max_tokens=24, seed=0)
    tokenizer = sampler.engine.tokenizer

assert mixed.records is not None
for question, text, ids, record in zip(QUESTIONS, mixed.generated_texts, mixed.generated_ids, mixed.records, strict=True):
    print(f"\n{question}\n  {text.strip()}")
    most = int(record.kl_theta.argmax())
    print(f"  mean α {record.alpha.mean():.2f}; the models differ most at {tokenizer.decode([ids[most]])!r}:")
    print(f"  log π_θ {record.logp_theta[most]:.1f}, log π_t {record.logp_teacher[most]:.1f}, KL {record.kl_theta[most]:.2f}")

# %% [markdown]
# With `kl_symmetry` and α inside its bounds, both KLs of q\* are equal at every token. This checks the sampler at no cost:

# %%
gaps = torch.cat([record.chernoff_gap(MixingConfig()) for record in mixed.records])
print(f"largest |KL(q*‖π_θ) - KL(q*‖π_t)| over {len(gaps)} tokens: {gaps.max() if len(gaps) else 0.0:.1e} nats")

# %% [markdown]
# ## 3. Train the student on it
#
# Each step copies the student's weights to the engine, samples new completions from q\*, and trains the student towards the
# teacher's distributions recorded during sampling. The data set needs at least one batch of rows.

# %%
data = Dataset.from_list([{"prompt": question, "answer": answer} for question, answer in FACTS])
args = OSDConfig(
    output_dir=str(OUTPUT),
    teacher_model_name_or_path=MODEL_TEACHER,
    enable_chat_template=True,
    privileged_template=TEMPLATE,
    max_completion_length=24,
    per_device_train_batch_size=len(FACTS),
    max_steps=STEPS,
    learning_rate=1e-4,
    lr_scheduler_type="constant",
    beta=0.0,  # forward KL: cover the teacher's whole distribution
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=not ON_GPU,
    bf16=ON_GPU,
    model_init_kwargs={"dtype": "float32"},
    engine_kwargs=ENGINE,
)
trainer = OSDTrainer(model=MODEL_STUDENT, args=args, train_dataset=data)
trainer.train()
trainer.save_model()
trainer.close()

# %% [markdown]
# ## 4. Results
#
# `osd/q/kl_student` is the divergence of q\* from the student. It falls as the student learns the answers.

# %%
history = [entry for entry in trainer.state.log_history if "osd/q/kl_student" in entry]
for entry in history:
    kl, alpha = entry["osd/q/kl_student"], entry["osd/alpha/mean"]
    print(f"step {entry['step']}: KL(q*‖π_θ) {kl:.3f} nats per token, mean α {alpha:.2f}")

# %% [markdown]
# Samples of the trained student alone (α = 0), which reads only its own prompt:

# %%
with OptimalSamplingV1(
    model_teacher=MODEL_TEACHER,
    model_theta=str(OUTPUT),
    alpha_method="fixed",
    fixed_alpha=0.0,
    enable_chat_template=True,
    **ENGINE,
) as sampler:
    alone = sampler.generate(QUESTIONS, max_tokens=24, temperature=0)
for (question, answer), text in zip(FACTS, alone.generated_texts, strict=True):
    print(f"{'right' if answer in text else 'wrong'}: {question} {text.strip()!r}")

# %% [markdown]
# ## Further reading
#
# `osd generate`, `osd inspect` and `osd compare` do part 2 for files (docs/usage.md). docs/distillation.md describes the other
# losses, schedules and corrections for part 3. examples/demo.py is a longer run, measured on held-out data.
