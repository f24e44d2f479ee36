"""Training against `osd serve`: the same run as with an engine in the trainer's process, and what ends it.

The server is a process of its own; weights go over HTTP, since there is no NCCL on a CPU.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from osd import cli
from osd.core import MixingConfig
from osd.engine.config import PairConfig
from osd.engine.engine import PairPrompt
from osd.engine.remote import RemoteEngine, ServerLost
from osd.engine.served import ServedPair, ServerUnavailable
from osd.engine.transport import HTTPTransport
from osd.engine.wire import STATE_ROUTE, framed, frames
from osd.train import OSDConfig
from tests.exact import completion_logits, q_star, reference
from tests.served import KEY, free_port, running, served
from tests.tiny import tiny_engine_kwargs, tiny_model
from tests.training import build_trainer, logged

PROMPTS = [PairPrompt(teacher_token_ids=[7, 8, 9, 10], student_token_ids=[20, 21]) for _ in range(4)]
GREEDY = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
SCHEDULE = {"alpha_schedule": "linear", "alpha_max_end": 0.2, "alpha_max": 0.9}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)


@pytest.fixture
def connect(tiny_pair, server):
    """Makes engines behind the server, and lets them go at the end."""
    engines = []

    def connect(**options):
        config = PairConfig(teacher=str(tiny_pair[0]), student=str(tiny_pair[1]))
        engines.append(RemoteEngine(ServedPair(config=config, url=server.server.url, **options)))
        return engines[-1]

    yield connect
    for engine in engines:
        engine.close()
    wait_for(lambda: state(server)["trainer"] is None)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def state(server):
    return server.http.get(STATE_ROUTE).json()


def weights(path, seed=None):
    """The student's weights, or random ones."""
    model = AutoModelForCausalLM.from_pretrained(path)
    generator = torch.Generator().manual_seed(seed or 0)
    if seed is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model, dict(model.named_parameters())


def gap(engine, model):
    """Return the largest distance of the engine's student from a model, in nats, over a few tokens."""
    completions = engine.generate(PROMPTS[:1], sampling=GREEDY)
    logp = completion_logits(model, PROMPTS[0].student_token_ids, completions[0].token_ids).log_softmax(-1)
    drawn = logp.gather(-1, torch.tensor(completions[0].token_ids)[:, None])[:, 0]
    return (drawn - completions[0].record.logp_theta).abs().max().item()


# -- the same run -------------------------------------------------------------------------------------------------------


def run(tiny_pair, out, server=None, **fields):
    """Losses, α's bound and completions of a run, with its engine here or behind a server."""
    if server is None:
        fields["engine_kwargs"] = tiny_engine_kwargs(seed=5)
    else:
        fields |= {"vllm_mode": "server", "vllm_server_base_url": server.server.url}
    given = {"teacher_model_name_or_path": str(tiny_pair[0]), "seed": 5, **fields}
    with build_trainer(None, tiny_pair[1], out, **given) as trainer:
        batches, generate = [], trainer.vllm_generation.generate

        def watched(*args, **kwargs):
            result = generate(*args, **kwargs)
            batches.append(trainer.vllm_generation.last_batch.completions)
            return result

        trainer.vllm_generation.generate = watched
        trainer.train()
        names = ("loss", "osd/alpha/max", "osd/engine/teacher_cache_hit", "osd/engine/student_cache_hit")
        return {name: logged(trainer, name) for name in names}, [c for batch in batches for c in batch]


def assert_same_run(one, other, tolerance=1e-5):
    close = {"atol": tolerance, "rtol": tolerance}
    for name in one[0]:
        torch.testing.assert_close(torch.tensor(one[0][name]), torch.tensor(other[0][name]), **close)
    assert len(one[1]) == len(other[1]) > 0
    for a, b in zip(one[1], other[1], strict=True):
        assert (a.token_ids, a.finish_reason, a.error) == (b.token_ids, b.finish_reason, b.error)
        torch.testing.assert_close(a.record.values_TR, b.record.values_TR, **close)
        torch.testing.assert_close(a.record.teacher_hidden_TH, b.record.teacher_hidden_TH, **close)
        torch.testing.assert_close(a.record.teacher_topk_TX, b.record.teacher_topk_TX, **close)


@pytest.mark.parametrize("signal", [{}, {"teacher_signal": "topk", "teacher_topk": 9}], ids=["recorded", "topk"])
def test_a_run_is_that_of_an_engine_in_the_process(tiny_pair, server, tmp_path, monkeypatch, signal):
    """With a schedule of α, evaluation and measured privilege, which take the engine's other paths."""
    fields = {**SCHEDULE, "privilege_gap_steps": 2, "privilege_gap_tokens": 3, **signal}
    if signal:
        monkeypatch.setattr(RemoteEngine, "teacher_lm_head", None)  # it is not asked for
    here = run(tiny_pair, tmp_path, **fields)
    through = run(tiny_pair, tmp_path, server, **fields)
    assert_same_run(through, here)
    assert here[0]["osd/alpha/max"][0] > here[0]["osd/alpha/max"][-1], "the schedule moved"
    assert state(server)["sync"] is not None
    wait_for(lambda: state(server)["trainer"] is None)  # a trainer that ends lets the server go


def test_a_server_that_keeps_old_weights_is_found(tiny_pair, server, tmp_path, monkeypatch):
    """The planted error: every sync sends what the first one sent."""
    send, first = HTTPTransport.send, []

    def stale(self, named_tensors):
        given = [(name, tensor.detach().clone()) for name, tensor in named_tensors]
        first.extend(given if not first else [])
        send(self, first)

    monkeypatch.setattr(HTTPTransport, "send", stale)
    with pytest.raises(RuntimeError, match="the engine's student is not the student in training"):
        run(tiny_pair, tmp_path, server)


def test_an_adapter_is_pushed_alone_after_the_first_sync(tiny_pair, server, tmp_path, monkeypatch):
    pushed, send = [], HTTPTransport.send

    def watched(self, named_tensors):
        given = list(named_tensors)
        pushed.append(len(given))
        send(self, given)

    monkeypatch.setattr(HTTPTransport, "send", watched)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    run(tiny_pair, tmp_path, server, peft_config=lora)  # its checks after the syncs 1 and 2 compare the probabilities
    assert pushed[0] > pushed[1] == pushed[2] == 4


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a GPU for the trainer and one for the server")
def test_weights_go_by_nccl_between_two_gpus(tiny_pair, tmp_path, monkeypatch):
    """The same run by both transports; its checks after the syncs compare the probabilities."""
    runs = []
    for backend in ("nccl", "http"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # of the server; this process has its devices by now
        flags = ("--api-key", KEY, "--weight-transfer-config", f'{{"backend": "{backend}"}}')
        with served(*tiny_pair, tmp_path / f"{backend}.log", *flags) as server:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
            runs.append(run(tiny_pair, tmp_path, server, vllm_group_port=free_port()))
    assert_same_run(*runs, tolerance=1e-3)  # batches of other sizes round otherwise


def test_completions_are_of_q_star_under_the_pushed_weights(connect, tiny_pair):
    engine = connect()
    model, tensors = weights(tiny_pair[1], seed=3)
    engine.load_student_weights(tensors.items())
    [completion, *_] = engine.generate(PROMPTS, sampling={"max_tokens": 8, "ignore_eos": True}, hidden=True)
    models = reference(tiny_pair[0]), model
    expected = q_star(models, [PROMPTS[0].teacher_token_ids, PROMPTS[0].student_token_ids], completion.token_ids)
    drawn = expected.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(completion.record.logp_draw.double(), drawn.double(), atol=2e-4, rtol=0)
    weight, bias = engine.teacher_lm_head()
    assert bias is None
    torch.testing.assert_close(weight, models[0].lm_head.weight.detach())
    logits = completion_logits(models[0], PROMPTS[0].teacher_token_ids, completion.token_ids)
    hidden = completion.record.teacher_hidden_TH
    torch.testing.assert_close((hidden @ weight.T).log_softmax(-1), logits.log_softmax(-1).float(), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="topk=65 is out of range: both models share 64 token ids"):
        engine.generate(PROMPTS, sampling={"max_tokens": 8}, topk=65)
    with pytest.raises(ValueError, match="topk=3 with hidden=True: the record has one of them"):
        engine.generate(PROMPTS, sampling={"max_tokens": 8}, topk=3, hidden=True)


# -- whose weights ------------------------------------------------------------------------------------------------------


def test_a_second_trainer_is_refused_and_the_first_goes_on(connect, tiny_pair):
    engine = connect()
    with pytest.raises(RuntimeError, match=r"another trainer .* uses this server"):
        connect()
    model, tensors = weights(tiny_pair[1], seed=4)
    engine.load_student_weights(tensors.items())
    assert gap(engine, model) < 1e-3


def test_a_client_that_is_no_trainer_cannot_change_the_weights_of_one(connect, server):
    connect()
    vllms = ("/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update")
    for route in (*vllms, "/v1/osd/weights", "/v1/osd/sample"):
        answer = server.post(route, {"trainer": "another", "sync": None, "init_info": {}, "update_info": {}})
        assert answer.status_code == 409, (route, answer.text)
        assert "another trainer" in answer.text


def test_a_batch_is_never_drawn_from_the_weights_of_another_sync(connect, tiny_pair, server):
    engine = connect()
    _, tensors = weights(tiny_pair[1], seed=5)
    engine.load_student_weights(tensors.items())
    ours, engine._sync = engine._sync, "of another trainer"
    with pytest.raises(ServerLost, match="of another trainer' were asked for") as raised:
        engine.generate(PROMPTS, sampling=GREEDY)
    with pytest.raises(RuntimeError, match="sync them first"):
        engine.generate(PROMPTS, sampling=GREEDY)
    engine.load_student_weights(tensors.items())
    assert len(engine.finish(raised.value.batch)) == len(PROMPTS)
    assert engine._sync != ours


def test_a_lost_connection_is_taken_up_again_with_whole_weights(connect, tiny_pair):
    engine = connect()
    model, tensors = weights(tiny_pair[1], seed=6)
    engine.load_student_weights(tensors.items())
    engine._sender._held.close()  # as a proxy would
    wait_for(lambda: engine.pair.info()["state"]["trainer"] is None)
    with pytest.raises(ServerLost, match="connection to the server has ended") as raised:
        engine.generate(PROMPTS, sampling=GREEDY)
    with pytest.raises(ServerLost, match="a partial sync builds upon"):
        engine.load_student_weights([], partial=True)
    engine.load_student_weights(tensors.items())
    assert len(engine.finish(raised.value.batch)) == len(PROMPTS)
    assert gap(engine, model) < 1e-3


def test_bodies_that_are_none_are_answered_with_400(server):
    whole = {
        "trainer": None,
        "sync": None,
        "mixing": {},
        "prompts": [[[7], [8]]],
        "sampling": [{"max_tokens": 2}],
        "alpha": [None],
    }
    whole |= {"seeds": [1], "mix_tokens": None, "teacher_only": False, "hidden": False, "topk": 0}
    wrong = [b"", b"{", [], {}, *({**whole, name: "x"} for name in whole if name not in ("trainer", "sync"))]
    wrong += [{**whole, "sampling": [{"nothing": 1}]}, {**whole, "prompts": [[[7], [9999]]]}, {**whole, "seeds": []}]
    for body in wrong:
        answer = server.post("/v1/osd/sample", body)
        assert (answer.status_code, bool(answer.json()["error"]["message"])) == (400, True), body
    for route in ("/v1/osd/trainer", "/v1/osd/nothing"):
        assert server.post(route, {}).status_code in (400, 404)
    assert server.http.get("/v1/osd/teacher_head").status_code == 400
    wait_for(lambda: state(server)["trainer"] is None)
    server.complete([7, 8])


# -- transfers that break -----------------------------------------------------------------------------------------------


def test_a_transfer_that_breaks_half_way_is_not_sampled_from(connect, tiny_pair, server):
    engine = connect()
    model, tensors = weights(tiny_pair[1], seed=7)

    def broken():
        yield from list(tensors.items())[:5]
        raise KeyError("the trainer failed")

    with pytest.raises(KeyError, match="the trainer failed"):
        engine.load_student_weights(broken())
    with pytest.raises(RuntimeError, match="sync them first"):
        engine.generate(PROMPTS, sampling=GREEDY)
    status, message = server.refused({"prompt": [7, 8], "max_tokens": 2})
    assert (status, "has begun and not ended" in message) == (503, True)
    with pytest.raises(RuntimeError, match=r"left .* of the student's parameters as they were"):
        engine.load_student_weights(list(tensors.items())[:5])
    assert not state(server)["whole"]
    engine.close()  # and its trainer ends
    wait_for(lambda: state(server)["trainer"] is None)
    assert server.refused({"prompt": [7, 8], "max_tokens": 2})[0] == 503
    other = connect()
    assert other.load_student_weights(tensors.items()) == other.weights_version
    assert gap(other, model) < 1e-3
    assert server.post("/v1/completions", {"prompt": [7, 8], "max_tokens": 2}).status_code == 200


def test_wrong_tensors_are_refused_and_the_next_sync_mends_it(connect, tiny_pair):
    engine = connect()
    model, tensors = weights(tiny_pair[1], seed=8)
    with pytest.raises(RuntimeError, match="the server refuses a part of the weights"):
        engine.load_student_weights([("model.layers.0.mlp.down_proj.weight", torch.zeros(3, 3))])
    engine.load_student_weights(tensors.items())
    assert gap(engine, model) < 1e-3


def test_another_clients_running_request_ends_with_503_at_an_update(connect, tiny_pair, server):
    engine = connect()
    answers = []
    body = {"prompt": [7, 8], "max_tokens": 240, "ignore_eos": True}
    while not answers or answers[-1].status_code == 200:  # an answer may come before the update
        asking = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", body)))
        asking.start()
        time.sleep(0.05)
        engine.load_student_weights(weights(tiny_pair[1], seed=9)[1].items())
        asking.join()
        assert len(answers) < 20
    assert answers[-1].status_code == 503
    assert "were updated while the request ran" in answers[-1].text


def test_other_clients_never_sample_with_the_mixing_of_a_trainer(connect, tiny_pair, server):
    engine = connect()
    engine.load_student_weights(weights(tiny_pair[1])[1].items())
    engine.set_mixing(MixingConfig(alpha_method="fixed", fixed_alpha=0.25))
    assert all((c.record.alpha == 0.25).all() for c in engine.generate(PROMPTS, sampling=GREEDY))
    body = {"prompt": [7, 8], "max_tokens": 4, "osd": {"record": True}}
    refused = server.post("/v1/completions", body)
    assert refused.status_code == 503
    assert "other mixing settings" in refused.text
    engine.close()
    wait_for(lambda: state(server)["trainer"] is None)
    assert state(server)["mixing"] == server.http.get("/v1/osd").json()["mixing"] == MixingConfig().to_dict()
    answer = server.post("/v1/completions", body).json()
    assert 0.25 not in answer["choices"][0]["osd"]["alpha"]


def test_nobody_mixes_otherwise_without_holding_the_server(server):
    body = {"trainer": None, "sync": None, "mixing": {"alpha_method": "fixed"}, "prompts": [], "sampling": [], "alpha": []}
    answer = server.post("/v1/osd/sample", body)
    assert (answer.status_code, "no trainer holds" in answer.text) == (409, True)
    assert state(server)["mixing"] == MixingConfig().to_dict()


def test_token_ids_that_are_keys_arrive_as_numbers(connect, tiny_pair):
    engine = connect()
    engine.load_student_weights(weights(tiny_pair[1])[1].items())
    completions = engine.generate(PROMPTS, sampling={**GREEDY, "logit_bias": {9: 500.0}})
    assert all(set(c.token_ids) == {9} for c in completions)


def test_a_prompt_that_cannot_be_sampled_ends_the_batch_at_once(connect, tiny_pair, monkeypatch):
    engine = connect()
    engine.load_student_weights(weights(tiny_pair[1])[1].items())
    take = RemoteEngine._take
    failed = {"status": 500, "message": "KeyError: 7"}
    monkeypatch.setattr(RemoteEngine, "_take", lambda self, batch, places, of, t: take(self, batch, places, of | failed, t))
    with pytest.raises(RuntimeError, match=r"cannot sample prompt . of the batch: KeyError: 7"):
        engine.generate(PROMPTS, sampling=GREEDY)


def test_a_full_queue_is_waited_for(connect, tiny_pair):
    """The server queues 12 requests, and answers the others of a batch with 503."""
    engine = connect()
    engine.load_student_weights(weights(tiny_pair[1])[1].items())
    prompts = [PairPrompt(teacher_token_ids=[7, 8, i], student_token_ids=[20, i]) for i in range(7, 57)]
    asked, ask_once = [], engine._ask_once
    engine._ask_once = lambda batch: (asked.append(len(batch.completions)), ask_once(batch))
    completions = engine.generate(prompts, sampling={"max_tokens": 4, "ignore_eos": True})
    assert [len(c.token_ids) for c in completions] == [4] * 50
    assert len(asked) > 1, "the queue was never full: nothing was tested"


def test_a_trainer_that_does_not_read_holds_nobody_up(connect, tiny_pair, server):
    """Its completions are whole when it reads on."""
    engine = connect()
    engine.load_student_weights(weights(tiny_pair[1])[1].items())
    prompts, read_on = [replace(PROMPTS[0], student_token_ids=[20, i]) for i in range(7, 19)], threading.Event()
    take, began = engine._take, threading.Event()

    def wait(*given):
        began.set()
        assert read_on.wait(60)
        take(*given)

    engine._take = wait
    sampling = {"max_tokens": 120, "ignore_eos": True}
    batch = engine.begin(prompts, sampling=sampling, mixing=engine.mixing, hidden=True)
    assert began.wait(60)
    [choice] = server.complete([7, 8])
    assert len(choice["token_ids"]) == 24
    wait_for(lambda: not running(server))
    read_on.set()
    assert [len(c.record.teacher_hidden_TH) for c in engine.finish(batch)] == [120] * len(prompts)


# -- servers that are not there -----------------------------------------------------------------------------------------


def config(tmp_path, tiny_pair, **given):
    given = {"vllm_mode": "server", "teacher_model_name_or_path": str(tiny_pair[0]), **given}
    return OSDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **given)


def test_without_a_server_a_run_ends_before_its_models_load(tiny_pair, tmp_path):
    url = f"http://127.0.0.1:{free_port()}"
    start = time.monotonic()
    fields = {"vllm_mode": "server", "vllm_server_base_url": url, "vllm_server_timeout": 1.0}
    with pytest.raises(RuntimeError, match=r"no `osd serve` has answered at .* for 1 seconds"):
        build_trainer(None, tiny_pair[1], tmp_path, teacher_model_name_or_path=str(tiny_pair[0]), **fields)
    assert time.monotonic() - start < 30


def test_a_server_that_another_trainer_uses_is_found_before_a_model_loads(tiny_pair, server, tmp_path, monkeypatch):
    def taken(self, device):
        raise ServerUnavailable(f"taken, on {device}")

    monkeypatch.setattr(ServedPair, "check_trainer", taken)
    monkeypatch.setattr("trl.trainer.utils.create_model_from_path", lambda *args, **kwargs: pytest.fail("weights"))
    with pytest.raises(ServerUnavailable, match="taken, on c"):
        run(tiny_pair, tmp_path, server)


def test_a_server_of_other_models_or_without_the_key_is_refused(tiny_pair, server, monkeypatch, tmp_path):
    pair = PairConfig(teacher=str(tiny_pair[1]), student=str(tiny_pair[1]))
    with pytest.raises(ValueError, match=r"the teacher of server .* is '.*teacher', and"):
        ServedPair(config=pair, url=server.server.url).info()
    other = tmp_path / tiny_pair[0].name
    tiny_model(other, seed=99)
    with pytest.raises(ValueError, match=r"the teacher of server .* has other weights than '.*teacher' here"):
        ServedPair(config=PairConfig(teacher=str(other), student=str(tiny_pair[1])), url=server.server.url).info()
    monkeypatch.setenv("VLLM_API_KEY", "wrong")
    with pytest.raises(ValueError, match="refuses the API key; set the variable VLLM_API_KEY"):
        ServedPair(config=pair, url=server.server.url).info()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"vllm_mode": "colocate", "vllm_server_base_url": "http://x"}, "vllm_server_base_url=.* without vllm_mode='server'"),
        ({"vllm_mode": "colocate", "vllm_server_port": 1}, "vllm_server_port=1 without vllm_mode='server'"),
        ({"vllm_mode": "remote"}, "vllm_mode='remote' is unknown; use one of colocate, server"),
    ],
)
def test_fields_of_a_server_need_its_mode(tmp_path, tiny_pair, given, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, tiny_pair, **given)


def test_the_address_is_trls(tmp_path, tiny_pair):
    assert config(tmp_path, tiny_pair).server_url() == "http://0.0.0.0:8000"
    assert config(tmp_path, tiny_pair, vllm_server_host="h", vllm_server_port=7).server_url() == "http://h:7"
    assert config(tmp_path, tiny_pair, vllm_server_base_url="https://b").server_url() == "https://b"


def test_a_server_that_takes_weights_needs_a_key(tiny_pair, capsys, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY")
    models = ["--teacher", str(tiny_pair[0]), "--student", str(tiny_pair[1])]
    for flags, message in (
        (["--weight-transfer-config", '{"backend": "http"}'], "whoever reaches the port"),
        (["--weight-transfer-config", '{"backend": "ipc"}', "--api-key", "k"], "use one of nccl, http"),
        (["--weight-transfer-config", '{"backend": "http"}', "--api-key", "k", "--api-server-count", "2"], "use 1"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["serve", *models, *flags])
        assert message in capsys.readouterr().err


# -- frames -------------------------------------------------------------------------------------------------------------


def test_frames_come_whole_from_any_chunks():
    stream = b"".join(framed(part) for part in (b"", b"abc", bytes(range(256)) * 3))
    for size in (1, 7, 8, 9, len(stream)):
        chunks = [stream[i : i + size] for i in range(0, len(stream), size)]
        assert list(frames(chunks)) == [b"", b"abc", bytes(range(256)) * 3]
    with pytest.raises(ValueError, match="bytes into a frame"):
        list(frames([stream[:-1]]))


def test_a_server_is_named_by_an_url(tiny_pair):
    pair = PairConfig(teacher=str(tiny_pair[0]), student=str(tiny_pair[1]))
    assert ServedPair(config=pair, url="http://a:1/v1/").url == "http://a:1"
    with pytest.raises(ValueError, match="write http://host:port"):
        ServedPair(config=pair, url="a:1")
    assert "secret" not in repr(ServedPair(config=pair, url="http://a:1", api_key="secret"))
