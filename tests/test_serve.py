"""`osd serve`, over HTTP and in a process of its own: what it draws from, what it returns, what it refuses, how it ends."""

from __future__ import annotations

import json
import math
import re
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from contextlib import suppress

import httpx
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from osd import cli
from osd.core import RECORD_FIELDS, TOKEN_ORIGINS
from osd.data.generate import generate
from osd.data.pair import EnginePair
from osd.data.remote import ServerPair
from osd.data.settings import GenerateConfig
from osd.engine.backend import arguments
from osd.engine.backend import server as backend
from osd.engine.config import PairConfig
from osd.engine.engine import PairEngine
from osd.engine.remote import RemoteEngine
from osd.engine.request import PairPrompt
from osd.engine.served import ServedPair
from osd.engine.wire import record_from_json
from tests.documents import ROOT, blocks, commands
from tests.exact import completion_logits, mixture, q_star, solve
from tests.generate_run import content, keys, read_output, write_rows
from tests.served import KEY, LONGEST, LONGEST_OF_STUDENT, serve, served
from tests.tiny import save_tokenizer, tiny_engine_kwargs, tiny_model

TEACHER, STUDENT = [7, 8, 9, 10], [20, 21]
CHAT = "/v1/chat/completions"
# The student's own: other words between the messages.
STUDENT_TEMPLATE = "{% for m in messages %}{{ 'w50 ' + m['content'] + ' w51 ' }}{% endfor %}"


@pytest.fixture(scope="module")
def model_paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    teacher, student = tiny_model(root / "teacher", seed=1), tiny_model(root / "student", seed=2)
    tokenizer = save_tokenizer(student, 64)
    tokenizer.chat_template = STUDENT_TEMPLATE
    tokenizer.save_pretrained(student)
    # What vLLM would sample with by itself: q* would be cut off.
    (teacher / "generation_config.json").write_text(json.dumps({"temperature": 0.3, "top_k": 2, "eos_token_id": 2}))
    return teacher, student


@pytest.fixture(scope="module")
def server(model_paths, tmp_path_factory):
    own = json.dumps({"max_model_len": LONGEST_OF_STUDENT})
    log = tmp_path_factory.mktemp("log") / "serve.log"
    with served(*model_paths, log, "--api-key", KEY, "--student-engine-kwargs", own) as client:
        yield client


def drawn(choice):
    """Return the log-probabilities of the drawn tokens, as the server says."""
    logprobs = choice["logprobs"]
    return torch.tensor(
        logprobs["token_logprobs"] if "token_logprobs" in logprobs else [entry["logprob"] for entry in logprobs["content"]],
        dtype=torch.float64,
    )


def of(logp, choice):
    """Return the entries of log-probabilities [T, V] at a choice's tokens."""
    return logp.gather(-1, torch.tensor(choice["token_ids"])[:, None])[:, 0]


def assert_drawn(choice, logp):
    torch.testing.assert_close(drawn(choice), of(logp, choice), atol=2e-4, rtol=0)


def policies(models, prompts, choice):
    """Return log-probabilities [T, V] of (teacher, student)."""
    return [completion_logits(m, p, choice["token_ids"]).log_softmax(-1) for m, p in zip(models, prompts, strict=True)]


# -- what it draws from -------------------------------------------------------------------------------------------------


def test_logprobs_are_those_of_q_star_under_both_prompts(server, models):
    """The planted errors: a server that ignored the student's prompt, or that sampled from the teacher, would be seen."""
    choices = [server.complete(TEACHER, STUDENT, seed=seed)[0] for seed in range(4)]
    wrong_prompt, teacher_alone = [], []
    for choice in choices:
        assert len(choice["token_ids"]) == 24
        assert_drawn(choice, q_star(models, [TEACHER, STUDENT], choice["token_ids"]))
        wrong = of(q_star(models, [TEACHER, TEACHER], choice["token_ids"]), choice)
        wrong_prompt.append((drawn(choice) - wrong).abs().mean())
        teacher_alone.append((drawn(choice) - of(policies(models, [TEACHER, STUDENT], choice)[0], choice)).abs().mean())
    assert min(wrong_prompt) > 0.1
    assert min(teacher_alone) > 0.1


def test_without_a_student_prompt_both_read_the_same(server, models):
    [choice] = server.complete(TEACHER, seed=1)
    assert_drawn(choice, q_star(models, [TEACHER, TEACHER], choice["token_ids"]))


def test_text_prompts_are_tokenized_for_each_side(server):
    [text] = server.complete("w7 w8 w9 w10", osd={"student_prompt": "w20 w21"}, seed=1)
    [ids] = server.complete(TEACHER, STUDENT, seed=1)
    assert text["token_ids"] == ids["token_ids"]


@pytest.mark.parametrize("own", [None, [{"role": "user", "content": "w30"}]])
def test_chat_messages_are_rendered_by_each_sides_template(server, models, own):
    messages = [{"role": "user", "content": "w7"}]
    [choice] = server.complete(messages, route=CHAT, seed=2, osd={"student_messages": own})
    teacher = [1, 5, 7, 2, 1, 6]  # <bos> user w7 <eos> <bos> assistant
    student = [50, 7 if own is None else 30, 51]
    assert_drawn(choice, q_star(models, [teacher, student], choice["token_ids"]))


def test_options_of_a_request_choose_the_mixture(server, models):
    fixed = server.complete(TEACHER, STUDENT, osd={"alpha": 0.25}, seed=1)[0]
    lt, ls = policies(models, [TEACHER, STUDENT], fixed)
    assert_drawn(fixed, mixture(ls, lt, torch.tensor([[0.25]]).double()))

    mixed = server.complete(TEACHER, STUDENT, osd={"mix_tokens": 5}, seed=1)[0]
    lt, ls = policies(models, [TEACHER, STUDENT], mixed)
    expected = torch.cat([mixture(ls, lt, solve("kl_symmetry", ls, lt))[:5], ls[5:]])
    assert_drawn(mixed, expected)

    alone = server.complete(TEACHER, osd={"teacher_only": True}, seed=1)[0]
    assert_drawn(alone, policies(models, [TEACHER, STUDENT], alone)[0])
    assert alone["osd"]["logp_theta"] == [None] * 24


def test_a_grammar_constrains_q_star(server):
    [choice] = server.complete(TEACHER, STUDENT, structured_outputs={"choice": ["w7", "w9"]}, ignore_eos=False, seed=0)
    assert choice["text"].strip() in ("w7", "w9")
    assert choice["finish_reason"] == "stop"


def test_the_choices_of_one_request_differ_and_each_has_its_record(server, models):
    for fields in ({"prompt": TEACHER, "student": STUDENT, "n": 2}, {"prompt": [TEACHER, STUDENT], "n": 2}):
        choices = server.complete(**fields, seed=5)
        assert [choice["index"] for choice in choices] == list(range(len(choices)))
        assert len({tuple(choice["token_ids"]) for choice in choices}) == len(choices)
        for choice in choices:
            np.testing.assert_allclose(choice["osd"]["logq"], drawn(choice), atol=1e-4)


# -- the record ---------------------------------------------------------------------------------------------------------


def test_the_record_has_every_column_of_every_token(server, models):
    [choice] = server.complete(TEACHER, STUDENT, seed=3, top_p=0.9)
    record = choice["osd"]
    assert set(record) == {*RECORD_FIELDS, "weights_version", "origin"}
    assert {len(column) for column in record.values()} == {24}
    lt, ls = policies(models, [TEACHER, STUDENT], choice)
    alpha = solve("kl_symmetry", ls, lt)
    np.testing.assert_allclose(record["alpha"], alpha[:, 0], atol=1e-3)
    for name, logp in (("logq", mixture(ls, lt, alpha)), ("logp_theta", ls), ("logp_teacher", lt)):
        np.testing.assert_allclose(record[name], of(logp, choice), atol=1e-3)
    assert all(draw >= logq for draw, logq in zip(record["logp_draw"], record["logq"], strict=True))
    assert record["weights_version"] == [0] * 24
    assert record["origin"] == ["drawn"] * 24


def test_a_stop_string_ends_the_record_with_the_tokens(server):
    [whole] = server.complete(TEACHER, STUDENT, seed=3)
    third = whole["text"].split()[2]
    [stopped] = server.complete(TEACHER, STUDENT, seed=3, stop=[third])
    length = len(stopped["token_ids"])
    assert 0 < length < 24
    assert stopped["osd"] == {name: column[:length] for name, column in whole["osd"].items()}


def test_no_record_is_returned_unless_asked_for(server):
    for options in ({}, {"osd": {"student_prompt_token_ids": STUDENT}}):
        [choice] = server.post("/v1/completions", {"prompt": TEACHER, "max_tokens": 4, **options}).json()["choices"]
        assert "osd" not in choice
        assert choice["routed_experts"] is None


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(("prompt", "route"), [(TEACHER, "/v1/completions"), ([{"role": "user", "content": "w7"}], CHAT)])
def test_a_stream_has_the_same_tokens_and_records(server, prompt, route, n):
    whole = server.complete(prompt, STUDENT, route=route, seed=9, n=n)
    tokens, text, records = [[] for _ in range(n)], [""] * n, {}
    for event in server.complete(prompt, STUDENT, route=route, seed=9, n=n, stream=True):
        for choice in event["choices"]:
            index = choice["index"]
            tokens[index] += choice.get("token_ids") or []
            text[index] += choice["text"] if route != CHAT else choice["delta"].get("content") or ""
            assert ("osd" in choice) == (choice["finish_reason"] is not None)
            records |= {index: choice["osd"]} if "osd" in choice else {}
    for index, choice in enumerate(whole):
        assert tokens[index] == choice["token_ids"]
        assert text[index] == (choice["text"] if route != CHAT else choice["message"]["content"])
        assert records[index] == choice["osd"]


# -- mistakes -----------------------------------------------------------------------------------------------------------

LONG = [7] * LONGEST
REFUSED = [
    ({"osd": {"student_prompt_token_ids": [64]}}, "token id 64 is not one of the student's 64 ids"),
    ({"osd": {"student_prompt_token_ids": [-1]}}, "token id -1 is not one of the student's"),
    ({"osd": {"student_prompt_token_ids": [2**70]}}, "is not one of the student's"),
    ({"osd": {"student_prompt_token_ids": []}}, "the student's prompt is empty"),
    ({"osd": {"student_prompt_token_ids": [7.0]}}, "has 7.0, which is not a token id"),
    ({"osd": {"student_prompt_token_ids": [True]}}, "has True, which is not a token id"),
    ({"osd": {"student_prompt_token_ids": "w7"}}, "is not a list of token ids"),
    ({"osd": {"student_prompt_token_ids": LONG[: LONGEST_OF_STUDENT - 3]}}, f"is over its max_model_len={LONGEST_OF_STUDENT}"),
    ({"osd": {"student_prompt": ["w7"]}}, "is not text"),
    ({"osd": []}, "is not an object of options"),
    ({"osd": False}, "is not an object of options"),
    ({"osd": {"student_prompt": "w7 " * LONGEST}}, "the student's prompt cannot be rendered"),
    ({"osd": {"student_prompt": "w7", "student_prompt_token_ids": [7]}}, "give the student's prompt once"),
    ({"osd": {"student_messages": []}}, "/v1/completions takes the student's prompt as osd.student_prompt"),
    ({"osd": {"teacher_only": True, "student_prompt": "w7"}}, "has no effect with teacher_only"),
    ({"prompt": [[7], [8]], "osd": {"student_prompt": "w7"}}, "one student prompt for several prompts"),
    ({"osd": {"alpha": 1.5}}, "alpha=1.5 is outside [0, 1]"),
    ({"osd": {"alpha": -1}}, "alpha=-1 is outside [0, 1]"),
    ({"osd": {"alpha": float("nan")}}, "alpha=nan is outside [0, 1]"),
    ({"osd": {"alpha": "half"}}, "alpha='half' is not a number"),
    ({"osd": {"alpha": True}}, "alpha=True is not a number"),
    ({"osd": {"mix_tokens": -1}}, "mix_tokens=-1 is negative"),
    ({"osd": {"mix_tokens": 1.5}}, "mix_tokens=1.5 is not a whole number"),
    ({"osd": {"record": 1}}, "record=1 is not true or false"),
    ({"osd": {"aplha": 0.5}}, "unknown option 'aplha' (did you mean 'alpha'?)"),
    ({"osd": {"hidden": True}}, "unknown option 'hidden'"),
    ({"osd": {"weights_version": 7}}, "unknown option 'weights_version'"),
    ({"osd": [0.5]}, "is not an object of options"),
    ({"osd_alpha": 0.5}, "'osd_alpha' is not a field of a request"),
    ({"vllm_xargs": {"osd": "{}"}}, "vllm_xargs has 'osd'"),
    ({"vllm_xargs": {"osd_alpha": 0.5}}, "vllm_xargs has 'osd_alpha'"),
    ({"use_beam_search": True, "osd": {"student_prompt": "w7"}}, "use_beam_search has one prompt for both sides"),
    ({"prompt": [64]}, "token id 64 is not one of the teacher's 64 ids"),
    ({"prompt": LONG}, "max_tokens must be at least 1"),
    ({"prompt": LONG[:LONGEST_OF_STUDENT]}, "the student's prompt has 128 tokens"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"echo": True, "logprobs": 1}, "prompt_logprobs is not supported"),
    ({"temperature": -1}, "temperature must be non-negative"),
    ({"temperature": float("nan")}, "temperature must be a finite number"),
    ({"top_p": 0}, "top_p must be in (0, 1]"),
    ({"n": 0}, "n must be at least 1"),
    ({"max_tokens": -3}, "max_tokens must be at least 1"),
    ({"allowed_token_ids": [7], "bad_words": ["w7"]}, "leave no token that can be drawn"),
]
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]
REFUSED_CHATS = [
    ({"messages": IMAGE}, "not a multimodal model"),
    ({"osd": {"student_messages": IMAGE}}, "the student's prompt cannot be rendered"),
    ({"osd": {"student_messages": "w7"}}, "the student's prompt cannot be rendered"),
    ({"osd": {"student_prompt": "w7"}}, "takes the student's prompt as osd.student_messages"),
]


@pytest.mark.parametrize("stream", [False, True])
def test_mistakes_are_answered_with_400_and_the_server_goes_on(server, stream):
    completion = {"prompt": TEACHER, "max_tokens": 4, "stream": stream}
    chat = {"messages": [{"role": "user", "content": "w7"}], "max_tokens": 4, "stream": stream}
    answers = [(given, wanted, server.refused({**completion, **given})) for given, wanted in REFUSED]
    answers += [(given, wanted, server.refused({**chat, **given}, route=CHAT)) for given, wanted in REFUSED_CHATS]
    wrong = [(given, answer) for given, wanted, answer in answers if answer[0] != 400 or wanted not in answer[1]]
    assert not wrong, wrong
    assert server.http.get("/health").status_code == 200
    assert len(server.complete(TEACHER, STUDENT)[0]["token_ids"]) == 24


def test_the_pairs_own_checks_answer_before_a_stream_begins(server):
    body = {"prompt": TEACHER, "stream": True, "osd": {"student_prompt_token_ids": [64]}}
    assert server.post("/v1/completions", body).status_code == 400


def test_bodies_that_are_not_requests_are_answered_by_vllm(server):
    for body in (b"", b'{"osd": ', b'["osd"]', b'"osd"', b"\xff\xfe"):
        assert server.post("/v1/completions", body).status_code == 400


def test_routes_without_options_refuse_them_and_sample_from_q_star_without(server):
    body = {"input": "w7", "max_output_tokens": 4}
    assert server.refused({**body, "osd": {"alpha": 1}}, route="/v1/responses")[0] == 400
    assert server.post("/v1/responses", body).status_code == 200


def test_a_request_without_max_tokens_fills_the_shorter_context(server):
    for osd, most in ({}, LONGEST_OF_STUDENT - 3), ({"teacher_only": True}, LONGEST - 6):  # prompts of 3 and 6 tokens
        [choice] = server.complete([{"role": "user", "content": "w7"}], route=CHAT, max_tokens=None, osd=osd)
        assert (len(choice["token_ids"]), choice["finish_reason"]) == (most, "length")


def test_beam_search_searches_q_star(server):
    body = {"prompt": TEACHER, "max_tokens": 3, "n": 2, "use_beam_search": True, "temperature": 0}
    assert len({choice["text"] for choice in server.post("/v1/completions", body).json()["choices"]}) == 2


# -- the server ---------------------------------------------------------------------------------------------------------


def test_every_route_but_health_needs_the_key(server):
    routes = ["/v1/models", "/v1/osd", "/metrics", "/tokenize", "/invocations", "/version", "/docs", "/nowhere"]
    assert {route: httpx.get(server.server.url + route).status_code for route in routes} == dict.fromkeys(routes, 401)
    assert httpx.get(server.server.url + "/health").status_code == 200
    answer = httpx.post(server.server.url + "/v1/completions", json={}, headers={"Authorization": "Bearer wrong"})
    assert answer.status_code == 401


def test_it_says_what_it_serves(server, model_paths):
    info = server.http.get("/v1/osd").json()
    assert (info["teacher"], info["student"]) == tuple(map(str, model_paths))
    assert info["mixing"]["alpha_method"] == "kl_symmetry"
    assert info["limits"]["student"] == {"vocab_size": 64, "max_model_len": LONGEST_OF_STUDENT}


def test_clients_that_hang_up_leave_nothing_behind(server):
    for _ in range(3):
        with httpx.Client(base_url=server.server.url, headers=server.http.headers) as http, suppress(httpx.ReadTimeout):
            http.post("/v1/completions", json={"prompt": TEACHER, "max_tokens": 120, "ignore_eos": True}, timeout=0.05)
    body = {"prompt": TEACHER, "max_tokens": 120, "ignore_eos": True, "stream": True, "osd": {"record": True}}
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    idle(server)
    [choice] = server.complete(TEACHER, STUDENT, seed=1)
    assert len(choice["osd"]["alpha"]) == 24


def test_a_client_that_does_not_read_holds_nobody_up(server):
    """Its stream is larger than what sockets buffer."""
    host, port = server.http.base_url.host, server.http.base_url.port
    body = {"prompt": TEACHER, "max_tokens": 120, "ignore_eos": True, "stream": True, "n": 8, "logprobs": 20}
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    slow = [socket.socket() for _ in range(4)]
    for client in slow:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, port))
        client.sendall(head.encode() + content)
    [choice] = server.complete(TEACHER, STUDENT, seed=1)
    assert len(choice["token_ids"]) == 24
    idle(server)
    for client in slow:
        assert client.recv(16).startswith(b"HTTP/1.1 200")
        client.close()
    assert server.complete(TEACHER, STUDENT, seed=1)[0]["token_ids"] == choice["token_ids"]


def idle(server):
    """Wait until no request runs in the engine."""
    deadline = time.monotonic() + 120
    while "vllm:num_requests_running{" in (text := server.http.get("/metrics").text):
        running = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running{")]
        if all(line.endswith(" 0.0") for line in running):
            break
        assert time.monotonic() < deadline, running


@pytest.fixture
def here(server, model_paths, tmp_path, monkeypatch):
    """A folder to work in, the key, and a function that puts the server and the models in the place of documented ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    teacher, student = map(str, model_paths)
    write_rows(tmp_path / "problems.jsonl", [{"prompt": f"w{i} w{i + 1}", "answer": "w9"} for i in range(7, 10)])
    names = {"http://localhost:8000": server.server.url}
    names |= {"Qwen/Qwen2.5-7B-Instruct": teacher, "Qwen/Qwen2.5-1.5B-Instruct": student}
    return lambda text: re.sub("|".join(map(re.escape, names)), lambda found: names[found[0]], text)


def test_the_blocks_of_the_page_run(server, here, capsys):
    namespace = {}
    ran = set()
    for block in blocks((ROOT / "docs" / "serving.md").read_text()):
        text = here(block.text)
        if block.language == "python":
            exec(compile(text, "docs/serving.md", "exec"), namespace)
            assert len(namespace["choice"].osd["alpha"]) == namespace["answer"].usage.completion_tokens
            ran.add("python")
        elif text.startswith("curl"):
            out = subprocess.run(
                ["bash", "-c", f"curl -s {text.removeprefix('curl')}"], capture_output=True, text=True, check=True
            )
            assert "alpha" in json.loads(out.stdout)["choices"][0]["osd"]
            ran.add("curl")
        else:
            [(words, _)] = commands(text)
            ran.add(" ".join(words[:2]))
            if words[1] == "serve":
                args = arguments.parser().parse_args(words[2:])
                assert arguments.pair_config(args, arguments.given(words[2:])).engine_kwargs == {"max_model_len": 4096}
            else:
                cli.main([*words[1:], "--max_completion_length", "8", "--shard_size", "4"])
                assert "samples of" in capsys.readouterr().out
    assert ran == {"python", "curl", "osd serve", "osd generate"}


def test_generated_data_is_that_of_an_engine_in_this_process(server, here, tmp_path, model_paths):
    teacher, student = map(str, model_paths)
    given = {"input": "problems.jsonl", "teacher_model_name_or_path": teacher, "model_name_or_path": student}
    given |= {"privileged_template": "{prompt} {answer}", "num_samples": 8, "max_completion_length": 16, "top_p": 0.95}
    generate(GenerateConfig(**given, output="through", server=server.server.url), ServerPair)
    generate(GenerateConfig(**given, output="local", engine_kwargs=tiny_engine_kwargs(max_num_seqs=16)), EnginePair)
    through, local = (read_output(folder) for folder in ("through", "local"))
    assert len(through) == len(local) == 24
    for one, other in zip(through, local, strict=True):
        numbers = [name for name in one if name in RECORD_FIELDS or name.startswith(("alpha_", "kl_"))]
        for name in numbers:
            np.testing.assert_allclose(one.pop(name), other.pop(name), atol=1e-4, err_msg=name)
        assert one.pop("config_hash") != other.pop("config_hash"), "the engine's arguments are settings"
        assert {name: str(value) for name, value in one.items()} == {name: str(value) for name, value in other.items()}


def drafts_in_metrics(text):
    """Return vLLM's counters of speculative decoding, summed over their labels."""
    counted = Counter()
    for name, value in re.findall(r"^vllm:spec_decode_num_(\w+)_total\{.*\} (\S+)$", text, re.MULTILINE):
        counted[name] += float(value)
    return counted


def test_without_drafts_vllm_has_no_metrics_of_them(server):
    assert "vllm:num_requests_running" in server.http.get("/metrics").text
    assert not drafts_in_metrics(server.http.get("/metrics").text)


def test_sigterm_leaves_no_process(server):
    """The last test of the module: it ends the server."""
    assert len(server.server.members()) >= 2, "the engine is a process of its own"
    server.server.process.send_signal(signal.SIGTERM)
    server.server.process.wait(30)
    deadline = time.monotonic() + 10
    while server.server.members():
        assert time.monotonic() < deadline, server.server.members()
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [False, True], ids=["two front ends", "one front end"])
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT], ids=lambda sent: sent.name)
@pytest.mark.parametrize("running", [2, 4])
def test_a_signal_while_replicas_start_leaves_no_process(model_paths, tmp_path, weights, sent, running):
    """Data parallel: a coordinator, two engines and the front ends are processes of their own."""
    flags = ["--data-parallel-size", "2", "--api-key", KEY]
    flags += ["--weight-transfer-config", '{"backend": "http"}'] if weights else []
    server = serve(*model_paths, tmp_path / "log", *flags)
    try:
        deadline = time.monotonic() + 240
        while len(server.members()) < running:
            assert server.process.poll() is None, server.log.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        server.process.send_signal(sent)
        deadline = time.monotonic() + 60
        while server.members():
            assert time.monotonic() < deadline, (server.members(), server.log.read_text()[-3000:])
            time.sleep(0.1)
    finally:
        server.kill()


@pytest.mark.slow
def test_sigkill_in_mid_run_loses_and_repeats_no_sample(model_paths, tmp_path):
    """A server is killed while it samples, and another one is started on its port."""
    teacher, student = map(str, model_paths)
    path = write_rows(tmp_path / "problems.jsonl", [{"prompt": f"w{i} w{i + 1}"} for i in range(7, 57)])
    given = {"input": str(path), "teacher_model_name_or_path": teacher, "model_name_or_path": student, "num_samples": 4}
    given |= {"max_completion_length": 100, "shard_size": 40, "batch_size": 40, "generation_kwargs": {"ignore_eos": True}}
    first = serve(*model_paths, tmp_path / "first.log")
    servers = [first]

    def replace():
        while not list((tmp_path / "through").glob("data-*")):
            time.sleep(0.05)
        first.kill()
        servers.append(serve(*model_paths, tmp_path / "second.log", port=int(first.url.rpartition(":")[2])))

    thread = threading.Thread(target=replace)
    try:
        first.wait()
        thread.start()
        generate(GenerateConfig(**given, output=str(tmp_path / "through"), server=first.url), ServerPair)
    finally:
        thread.join()
        for server in servers:
            server.kill()
    generate(GenerateConfig(**given, output=str(tmp_path / "local"), engine_kwargs=tiny_engine_kwargs()), EnginePair)
    through, local = (read_output(tmp_path / name) for name in ("through", "local"))
    assert len(servers) == 2
    assert len(through) == 200
    assert keys(through) == keys(local)
    assert content(through) == content(local)


# -- arguments, before a model loads ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--student", "s"], "--teacher is not set"),
        (["some/model", "--teacher", "t", "--student", "s"], "give --teacher and --student"),
        (["--teacher", "t", "--student", "s", "--worker-cls", "x"], "^--worker-cls is set by the pair itself"),
        (["--teacher", "t", "--student", "s", "--enable-lora"], "^--enable-lora is not supported"),
        (["--teacher", "t", "--student", "s", "--student-chat-template", "none.jinja"], "is neither a file nor the text"),
        (["--teacher", "t", "--student", "s", "--grpc"], "take no middleware"),
        (["--teacher", "t", "--student", "s", "--alpha-min", "2"], "alpha_min=2.0 is not a weight"),
        (
            ["--teacher", "t", "--student", "s", "--student-engine-kwargs", '{"tensor_parallel_size": 2}'],
            "^--student-engine-kwargs.'tensor_parallel_size'. cannot differ .*; set it as a flag",
        ),
    ],
)
def test_wrong_arguments_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        backend.serve(flags)


def refusal(flags, *models):
    """Return the one line that ends `osd serve` with these flags."""
    teacher, student = models or ("t", "s")
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        backend.serve(["--teacher", str(teacher), "--student", str(student), *flags.split("|")])
    return str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--weight-transfer-config|http",
            """--weight-transfer-config: 'http' is not JSON; write --weight-transfer-config '{"key": "value"}', or a key""",
        ),
        ('--weight-transfer-config|{"bakend": "http"}', "bakend='http': Unexpected keyword argument"),
        ('--weight-transfer-config|{"backend": "htp"}', "has the backend 'htp'; use one of nccl, http"),
        ("--weight-transfer-config", "--weight-transfer-config: expected one argument"),
        ("-cc.mode|x", "mode='x': Invalid compilation mode: x. Valid modes are: NONE"),
        ("--student-engine-kwargs|x", "--student-engine-kwargs: 'x' is not JSON"),
        ("--student-engine-kwargs|[1]", "'[1]' is refused: it is not a JSON object"),
        ("--max-model-len|x", "--max-model-len: 'x' is not a whole number"),
        ("--max-num-queued-reqs|x", "--max-num-queued-reqs: 'x' is not a whole number"),
        ("--alpha-min|x", "--alpha-min: 'x' is not a number"),
        ("--dtype|x", "--dtype: invalid choice: 'x' (choose from"),
        ("--max-modl-len=5", "--max-modl-len=5 (did you mean '--max-model-len'?)"),
        ("--config|none.yaml", "--config='none.yaml' cannot be read"),
        ("--port|99999999", "--port=99999999 is not a port"),
        ("--api-server-count|0", "--api-server-count=0 serves nothing"),
        ("--ssl-keyfile|none.pem", "--ssl-keyfile='none.pem' is not a file"),
        ("--middleware|nope.x", "--middleware='nope.x' cannot be imported (No module named 'nope')"),
        ("--seed|-5", "--seed=-5 is too small; use 0 or more"),
        ("--additional-config|x", "--additional-config='x' is not a mapping"),
        ("--distributed-executor-backend|x", "--distributed-executor-backend='x' is unknown; use one of mp, ray"),
        ("--runner|pooling", "--runner='pooling': a pair generates text; use auto or generate"),
        ("--decode-context-parallel-size|2", "--decode-context-parallel-size=2: the pair's KV caches are not split"),
        ("--kv-offloading-size|1", "--kv-offloading-size=1.0 is not supported: the paired engine has no KV transfer"),
        ("--spec-tokens|3", "in a pair the student drafts; set --num-speculative-tokens instead"),
        ("--return-sampling-mask", "--return-sampling-mask is not supported: the pair draws its own tokens"),
        ("--mm-encoder-only", "--mm-encoder-only is not supported: a pair reads text"),
        ("--enable-dbo", "--enable-dbo is not supported"),
    ],
)
def test_a_bad_value_ends_in_one_line(flags, message):
    refused = refusal(flags)
    assert message in refused
    assert "_kwargs" not in refused


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has NCCL")
@pytest.mark.parametrize("given", ["{}", '{"backend": "nccl"}'])
def test_nccl_is_refused_where_vllm_runs_on_a_cpu(given):
    refused = refusal(f"--weight-transfer-config|{given}|--api-key|k")
    assert "--weight-transfer-config has the backend 'nccl', vLLM's default: NCCL needs GPUs" in refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gpu-memory-utilization|7", "gpu_memory_utilization=7.0: Input should be less than or equal to 1"),
        ("--max-num-seqs|0", "max_num_seqs=0: Input should be greater than or equal to 1"),
        ("--load-format|x", "Load format `x` is not supported"),
        ("--enable-auto-tool-choice", "--enable-auto-tool-choice requires --tool-call-parser"),
        ("--enable-auto-tool-choice|--tool-call-parser|x", "invalid tool call parser: x"),
        ("--reasoning-parser|x", "Reasoning parser 'x' not found"),
        ("--chat-template|none.jinja", "none.jinja"),
        ('--student-engine-kwargs|{"max_model_len": "many"}', "the student's engine arguments: max_model_len='many'"),
        ('--student-engine-kwargs|{"load_format": "x"}', "the student's engine arguments: Load format `x`"),
    ],
)
def test_a_value_that_only_vllm_refuses_ends_in_one_line_before_a_model_loads(model_paths, flags, message):
    assert message in refusal(flags, *model_paths)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"engine_kwargs": {"gpu_memory_utilization": 7}}, "gpu_memory_utilization=7: Input should be less than or equal to 1"),
        ({"student_kwargs": {"load_format": "x"}}, "the student's engine arguments: Load format `x` is not supported"),
    ],
)
def test_an_engine_without_a_server_refuses_them_alike(model_paths, kwargs, message):
    teacher, student = map(str, model_paths)
    with pytest.raises(ValueError, match=f"^{message}$"):
        PairEngine(PairConfig(teacher=teacher, student=student, **kwargs))


def test_written_arguments_reach_both_sides_and_the_teachers_files_only_the_teacher():
    argv = ["--teacher", "t", "--student", "s", "--max-model-len", "4k", "--revision", "main", "-cc.mode", "0"]
    argv += ["--student-engine-kwargs", '{"max_model_len": 64}', "--fixed-alpha", "0.25", "--alpha-method", "fixed"]
    args = arguments.parser().parse_args(argv)
    config = arguments.pair_config(args, arguments.given(argv))
    assert config.engine_kwargs == {"max_model_len": 4000, "compilation_config": {"mode": 0}}
    assert config.teacher_kwargs["revision"] == "main"
    assert config.student_kwargs == {"max_model_len": 64}
    assert (config.mixing.alpha_method, config.mixing.fixed_alpha) == ("fixed", 0.25)
    assert args.host == "127.0.0.1"


# -- drafts -------------------------------------------------------------------------------------------------------------


def test_drafts_are_in_the_record_and_in_vllms_metrics(model_paths, models, monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    weights = ("--api-key", KEY, "--weight-transfer-config", '{"backend": "http"}')
    with served(*model_paths, tmp_path / "log", "--num-speculative-tokens", "3", *weights) as client:
        choices = [choice for seed in range(6) for choice in client.complete(TEACHER, STUDENT, seed=seed, n=2)]
        *_, last = client.complete(TEACHER, STUDENT, seed=9, stream=True)
        [alone] = client.complete(TEACHER, osd={"teacher_only": True}, seed=1)
        counted = drafts_in_metrics(client.http.get("/metrics").text)
        trained = in_training(client, *map(str, model_paths))
    assert {TOKEN_ORIGINS[origin] for origin in trained.tolist()} >= {"accepted", "corrected", "bonus"}
    for choice in choices:
        assert_drawn(choice, q_star(models, [TEACHER, STUDENT], choice["token_ids"]))
        assert record_from_json(choice["osd"]).origin_T.tolist() == [TOKEN_ORIGINS.index(o) for o in choice["osd"]["origin"]]
    assert alone["osd"]["origin"] == ["drawn"] * 24
    records = [choice["osd"] for choice in [*choices, last["choices"][0]]]
    assert {len(record["origin"]) for record in records} == {24}
    origins = Counter(origin for record in records for origin in record["origin"])
    assert min(origins[name] for name in ("accepted", "corrected", "bonus")) >= 5, origins
    # A cycle ends with a corrected token or a bonus; the last one of a completion may be cut short by max_tokens.
    cycles, most = origins["corrected"] + origins["bonus"], len(records)
    assert cycles <= counted["drafts"] <= cycles + most
    assert origins["accepted"] <= counted["accepted_tokens"] <= origins["accepted"] + 3 * most
    assert counted["accepted_tokens"] < counted["draft_tokens"] <= 3 * counted["drafts"]
    assert 0 < counted["accepted_tokens_per_pos"] == counted["accepted_tokens"]
    # Among the positions that were verified, drafts are accepted as often as the record of these positions says.
    kept = [
        (origin == "accepted", min(1.0, math.exp(theta - q)))
        for record in records
        for origin, theta, q in zip(record["origin"], record["logp_theta"], record["logq"], strict=True)
        if origin in ("accepted", "corrected")
    ]
    accepted, expected = np.array(kept, dtype=float).mean(0)
    assert abs(accepted - expected) < 5 * (0.5 / len(kept)) ** 0.5


def in_training(client, teacher, student):
    """Return how the tokens came to be that a trainer gets from a server."""
    engine = RemoteEngine(ServedPair(config=PairConfig(teacher=teacher, student=student), url=client.server.url))
    try:
        engine.load_student_weights(AutoModelForCausalLM.from_pretrained(student).named_parameters())
        prompts = [PairPrompt(teacher_token_ids=TEACHER, student_token_ids=STUDENT)] * 4
        completions = engine.generate(prompts, sampling={"max_tokens": 24, "ignore_eos": True, "seed": 1})
        assert all(len(c.record.origin_T) == len(c.token_ids) == 24 for c in completions)
        return torch.cat([c.record.origin_T for c in completions])
    finally:
        engine.close()
