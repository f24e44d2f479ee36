"""Multimodal checkpoints as text models: the language model is sampled, synced and trained; rows with images are refused."""

import json

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from osd.engine.engine import PairConfig, PairEngine
from osd.engine.multimodal import text_config, text_weights
from osd.prompt_checks import check_text_only
from osd.validate_models import student_layout
from tests.architectures import MULTIMODAL, save_multimodal
from tests.exact import completion_logits
from tests.pairs import runners
from tests.served import served
from tests.tiny import tiny_engine_kwargs
from tests.training import build_trainer, watch

PROMPT = [7, 8, 9, 10] * 8


def whole(path):
    """Load the multimodal class, as TRL does."""
    return getattr(transformers, AutoConfig.from_pretrained(path).architectures[0]).from_pretrained(path).eval()


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_the_language_model_alone_computes_what_the_checkpoint_does(kind, tmp_path):
    """Premise of loading the language model's class: its configuration, with the weights that are its own, by its names."""
    path = save_multimodal(tmp_path, kind)
    config = text_config(AutoConfig.from_pretrained(path))
    alone = AutoModelForCausalLM.from_config(config).eval()
    assert config.architectures == [type(alone).__name__]
    assert config.dtype == torch.float32
    weights = dict(text_weights(load_file(path / "model.safetensors").items()))
    missing, unexpected = alone.load_state_dict(weights, strict=False)
    assert not unexpected
    assert missing == ["lm_head.weight"] * bool(config.tie_word_embeddings)
    expected = completion_logits(whole(path), PROMPT, [11, 12])
    torch.testing.assert_close(completion_logits(alone, PROMPT, [11, 12]), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.1


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_the_layout_syncs_the_language_model_and_nothing_else(kind, tmp_path, tiny_pair):
    path = save_multimodal(tmp_path, kind)
    layout = student_layout(PairConfig(teacher=str(tiny_pair[0]), student=str(path)))
    live = dict(whole(path).named_parameters())
    assert layout.shapes == {name: parameter.shape for name, parameter in live.items()}
    assert {name for names in layout.on_disk.values() for name in names} <= load_file(path / "model.safetensors").keys()
    assert not any("vision" in name or "visual" in name or "connector" in name for name in layout.on_disk)
    assert all(name in layout.on_disk for name in live if "layers." in name and "language_model" in name)


NEEDS_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM imports torchvision with it, and needs bfloat16")


@pytest.fixture(scope="module", params=["Gemma 3", pytest.param("Qwen 3.5", marks=NEEDS_A_GPU)])
def folders(tmp_path_factory, request):
    root = tmp_path_factory.mktemp("multimodal")
    paths = save_multimodal(root / "teacher", request.param, 3), save_multimodal(root / "student", request.param, 4)
    (paths[1] / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Gemma3ImageProcessor"}))
    return paths


@pytest.fixture(scope="module")
def engine(folders):
    with PairEngine(PairConfig(teacher=str(folders[0]), student=str(folders[1]), engine_kwargs=tiny_engine_kwargs())) as engine:
        yield engine


def gap(model, prompt, completion, column):
    logp_TV = completion_logits(model, prompt, completion.token_ids).log_softmax(-1)
    token_T1 = torch.tensor(completion.token_ids)[:, None]
    return (logp_TV.gather(-1, token_T1)[:, 0] - getattr(completion.record, column)).abs().max().item()


@pytest.mark.gpu
def test_the_engine_has_no_encoders(engine):
    for runner in runners(engine).values():
        names = [name for name, _ in runner.get_model().named_parameters()]
        assert len(names) > 20
        assert not any("vis" in name or "projector" in name for name in names)


@pytest.mark.gpu
@pytest.mark.parametrize("adapter", [None, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")])
def test_a_multimodal_student_is_trained_and_saved_as_what_it_was(engine, folders, tmp_path, adapter):
    """Both sides are multimodal: log-probabilities before and after each sync, gradients, and the saved checkpoint."""
    trainer = build_trainer(engine, folders[1], tmp_path / "out", peft_config=adapter)
    teacher, gaps = whole(folders[0]), []

    def look(prompts):
        batch = trainer.vllm_generation.last_batch.completions
        trainer.model.eval()
        for prompt, row, completion in zip(prompts, trainer._rows, batch, strict=True):
            gaps.append(gap(trainer.model, prompt, completion, "logp_theta"))
            gaps.append(gap(teacher, row, completion, "logp_teacher"))
        trainer.model.train()

    spy = trainer._renderer.teacher_ids
    trainer._renderer.teacher_ids = lambda rows: setattr(trainer, "_rows", spy(rows)) or trainer._rows
    watch(trainer, look)
    before = {name: parameter.detach().clone() for name, parameter in whole(folders[1]).named_parameters()}
    trainer.train()
    assert len(gaps) == 2 * 4 * 3
    assert max(gaps) < 2e-3
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained
    assert not any("vis" in name or "projector" in name for name in trained)
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "preprocessor_config.json").exists()
    if adapter is not None:
        return
    saved = whole(tmp_path / "saved")
    assert type(saved) is type(whole(folders[1]))
    assert saved.config.vision_config.hidden_size == 32
    for name, parameter in saved.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (name in trained), name


@pytest.mark.gpu
def test_a_language_model_that_lost_a_layer_is_seen(engine, folders, monkeypatch):
    """The planted error: names that the sync drops."""
    from osd.engine import multimodal

    known = multimodal.text_name
    monkeypatch.setattr(multimodal, "text_name", lambda name: None if "layers.1.mlp" in name else known(name))
    live = whole(folders[1])
    with pytest.raises(ValueError, match="left 2 of the student's parameters as they were"):
        engine.load_student_weights(live.named_parameters())
    monkeypatch.undo()
    engine.load_student_weights(live.named_parameters())


@pytest.mark.slow
def test_a_multimodal_pair_is_served_as_text(tmp_path):
    paths = [save_multimodal(tmp_path / name, "Gemma 3", seed) for name, seed in (("teacher", 3), ("student", 4))]
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with served(*paths, tmp_path / "log") as server:
        [choice] = server.complete(PROMPT, PROMPT[:5], seed=1)
        [chat] = server.complete([{"role": "user", "content": "w7"}], route="/v1/chat/completions", seed=2)
        refused = {"messages": [{"role": "user", "content": [image]}], "max_tokens": 2}
        assert server.refused(refused, route="/v1/chat/completions")[0] == 400
        assert len(server.complete(PROMPT)[0]["token_ids"]) == 24
    token_T1 = torch.tensor(choice["token_ids"])[:, None]
    assert len(token_T1) == len(chat["token_ids"]) == 24
    for path, prompt, column in zip(paths, (PROMPT, PROMPT[:5]), ("logp_teacher", "logp_theta"), strict=True):
        logp_TV = completion_logits(whole(path), prompt, choice["token_ids"]).log_softmax(-1)
        recorded = torch.tensor(choice["osd"][column], dtype=torch.float64)
        torch.testing.assert_close(recorded, logp_TV.gather(-1, token_T1)[:, 0], atol=2e-3, rtol=0)


# -- rows with images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["image", "images", "video", "audio"])
def test_rows_with_media_are_refused_by_column(column):
    with pytest.raises(ValueError, match=rf"it has '{column}' \(\['a.png'\]\), and OSD distils text"):
        check_text_only({"prompt": "w7", column: ["a.png"]})
    for nothing in (None, [], ""):
        check_text_only({"prompt": "w7", column: nothing})


def test_the_trainer_refuses_rows_with_images_and_can_drop_them(tiny_pair, tmp_path):
    from osd.train import OSDConfig
    from osd.train.preparation import plan

    rows = [{"prompt": "w7", "image": None}, {"prompt": "w8", "image": "a.png"}, {"prompt": "w9", "image": None}]
    data = Dataset.from_list(rows)

    def planned(**fields):
        fields |= {"teacher_model_name_or_path": str(tiny_pair[0]), "max_completion_length": 8}
        args = OSDConfig(str(tmp_path), use_cpu=True, bf16=False, **fields)
        return plan(str(tiny_pair[1]), args, train_dataset=data).datasets(data, None)[0]

    with pytest.raises(ValueError, match="1 of 3 rows of the training set cannot be used; the first is row 1: it has 'image'"):
        planned()
    with pytest.warns(UserWarning, match="drop_bad_rows"):
        assert list(planned(drop_bad_rows=True)["prompt"]) == ["w7", "w9"]
