"""A stand-in for `osd serve` that draws as `tests.fake_pair.FakePair` does: ``python -m tests.fake_server PORT [JSON]``.

The JSON object has any of:

- "seconds": for each answer; "silent": no request is ever answered
- "mixing": options of the mixing; "key": the API key; "other": it is not an `osd serve`
- "answers": what the first requests get instead, each [status, text]
- "failing": seeds whose requests get status 500
- "log": a file that gets a line for each request that is about to be answered

It imports neither torch nor vLLM: tests start and kill it many times.
"""

from __future__ import annotations

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from osd.core import RECORD_FIELDS, MixingConfig
from tests.draws import draw

FIELDS = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "prompt", "stop"]
LIMITS = {"vocab_size": 64, "max_model_len": 64}


def answer(body: dict[str, Any]) -> dict[str, Any]:
    ids, rows = draw(body["seed"], body["prompt"], body["osd"]["student_prompt_token_ids"], body["max_tokens"])
    record = {name: [row[i] for row in rows] for i, name in enumerate(RECORD_FIELDS)}
    choice = {
        "index": 0,
        "text": " ".join(f"w{token}" for token in ids),
        "token_ids": ids,
        "finish_reason": "length" if len(ids) == body["max_tokens"] else "stop",
        "osd": {**record, "weights_version": [0] * len(ids), "origin": ["drawn"] * len(ids)},
    }
    return {"choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def reply(self, status: int, content: Any) -> None:
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.path == "/health":
            return self.reply(200, {})
        if OPTIONS.get("key") not in (None, (self.headers["Authorization"] or "").removeprefix("Bearer ")):
            return self.reply(401, {"error": "Unauthorized"})
        mixing = MixingConfig(**OPTIONS.get("mixing", {})).to_dict()
        info = dict(teacher="t", student="s", mixing=mixing, limits=dict(teacher=LIMITS, student=LIMITS), fields=FIELDS)
        return self.reply(200, info) if self.path == "/v1/osd" and not OPTIONS.get("other") else self.reply(404, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if OPTIONS.get("answers"):
            return self.reply(*OPTIONS["answers"].pop(0))
        if OPTIONS.get("silent"):
            time.sleep(3600)
        if body["seed"] in OPTIONS.get("failing", ()):
            return self.reply(500, {"error": {"message": "NaN in the student's logits"}})
        if OPTIONS.get("log"):
            with open(OPTIONS["log"], "a") as log:
                log.write(f"{body['seed']}\n")
        time.sleep(OPTIONS.get("seconds", 0))
        return self.reply(200, answer(body))

    def log_message(self, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128


if __name__ == "__main__":
    OPTIONS = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
