"""A server of a stock model in the manner of OpenAI's completions, and a proxy that breaks what
passes.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

KINDS = ["fields", "generation_config", "none"]
PROMPT = "How far is it?"
GREEDY = {"do_sample": False, "max_new_tokens": 10}


class _Local(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, handler):
        super().__init__(("127.0.0.1", 0), handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def end(self):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def refuse(self, status, message, **headers):
        text = json.dumps({"error": {"message": message}}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(text), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(text)

    def begin_stream(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()


class Server(_Local):
    """kind: "fields" (vLLM's manner: ids both ways, log-probabilities), "generation_config"
    (transformers': text, extra fields refused, stop strings kept), "none" (temperature alone).
    """

    def __init__(self, model, tokenizer, kind, hidden=()):
        self.model, self.tokenizer, self.kind = model, tokenizer, kind
        self.requests, self.cancelled, self.running, self.most = [], 0, 0, 0
        self.pause = 0.0  # seconds a token
        self.end_token = tokenizer.eos_token_id  # of scripts
        self.endings = iter(())  # of the next answers: "garbage" behind the end, "abort"
        self.busy = 0  # requests that are refused first, for a while
        self.script = None  # what it writes after a text, instead of the model
        self.hidden = list(hidden)  # tokens that it never samples
        self.lock = threading.Lock()
        super().__init__(_Completions)

    def pieces(self, asked):
        """(token, log-probability) until the end token, by stock forwards."""
        prompt = asked["prompt"]
        ids = prompt if isinstance(prompt, list) else self.tokenizer(prompt).input_ids
        generator = torch.Generator().manual_seed(asked.get("seed") or 0)
        heat = asked.get("temperature", 1.0)
        if self.kind == "generation_config":
            told = json.loads(asked.get("generation_config") or "{}")
            heat = heat if told.get("do_sample") else 0.0
        if self.script is not None:
            written = self.tokenizer(self.script(self.tokenizer.decode(ids))).input_ids
            yield from ((token, 0.0, None) for token in written[: asked["max_tokens"]])
            if len(written) < asked["max_tokens"]:
                yield self.end_token, 0.0, "stop"
            return
        for _ in range(asked["max_tokens"]):
            with self.lock, torch.no_grad():
                logits = self.model(torch.tensor([ids])).logits[0, -1].float()
            told = logits.log_softmax(-1)
            logits[self.hidden] = -torch.inf
            scores = logits / heat if heat else logits
            drawn = torch.multinomial(scores.softmax(-1), 1, generator=generator)
            token = int(drawn) if heat else int(logits.argmax())
            if token == self.tokenizer.eos_token_id:
                yield token, float(told[token]), "stop"
                return
            yield token, float(told[token]), None
            ids = [*ids, token]
            time.sleep(self.pause)


class _Completions(_Handler):
    def do_POST(self):
        server, asked = self.server, json.loads(self.body())
        server.requests.append(asked)
        if server.kind != "fields" and isinstance(asked["prompt"], list):
            return self.refuse(500 if server.kind == "none" else 400, "prompt: expected a string")
        extras = {"top_k", "min_p", "repetition_penalty", "repeat_penalty", "return_token_ids"}
        extras |= {"skip_special_tokens"}
        if server.kind == "none":
            extras |= {"generation_config"}
        if server.kind != "fields" and extras & set(asked):
            return self.refuse(422, f"unknown fields {sorted(extras & set(asked))}")
        if server.busy:
            server.busy -= 1
            return self.refuse(503, "loading", Retry_After="0.01")
        with server.lock:
            server.running += 1
            server.most = max(server.most, server.running)
        try:
            self.answer(asked)
        except (BrokenPipeError, ConnectionResetError):
            server.cancelled += 1
        finally:
            server.running -= 1

    def choice(self, tokens, reason):
        server = self.server
        hides = server.kind != "fields"
        text = server.tokenizer.decode(
            [t for t, _ in tokens if t != server.tokenizer.eos_token_id], skip_special_tokens=hides
        )
        choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
        if server.kind == "fields":
            choice["token_ids"] = [t for t, _ in tokens]
            choice["logprobs"] = {"token_logprobs": [x for _, x in tokens], "tokens": []}
        return choice

    def answer(self, asked):
        if not asked.get("stream"):
            tokens = list(self.server.pieces(asked))
            made = self.choice([(t, x) for t, x, _ in tokens], tokens[-1][2] or "length")
            text = json.dumps(self.envelope([made])).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(text)
            return
        self.begin_stream()
        count, end, ending = 0, None, next(self.server.endings, "")
        for token, logprob, reason in self.server.pieces(asked):
            count, end = count + 1, reason
            self.send(self.envelope([self.choice([(token, logprob)], None)]))
            if ending == "abort" and count == 3:
                self.send(self.envelope([self.choice([], "abort")]))
                return
        usage = {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": count + 1}
        last = self.envelope([self.choice([], end or "length")])
        self.send({**last, "usage": usage} if self.server.kind != "none" else last)
        self.wfile.write(b"data: {\n\n" if ending == "garbage" else b"data: [DONE]\n\n")
        self.close_connection = True

    def envelope(self, choices):
        return {
            "id": "1",
            "object": "text_completion",
            "created": 1,
            "model": "m",
            "choices": choices,
        }

    def send(self, data):
        self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")
        self.wfile.flush()


class FaultProxy(_Local):
    """Passes requests on to a server and breaks some: `faults` names what happens to the next ones,
    in turn: "pass", "drop" (no answer), "429", "cut" (half an answer), "slow" (a byte at a time),
    "garbage".
    """

    def __init__(self, url, faults):
        self.host, self.port = url.split("/")[2].split(":")
        self.faults, self.seen, self.lock = faults, {}, threading.Lock()
        super().__init__(_Proxy)

    def fault(self):
        with self.lock:
            name = next(self.faults)
            self.seen[name] = self.seen.get(name, 0) + 1
            return name


class _Proxy(_Handler):
    def do_POST(self):
        body, fault = self.body(), self.server.fault()
        self.close_connection = True
        if fault == "drop":
            return None
        if fault == "429":
            return self.refuse(429, "later", Retry_After="0.05")
        onward = http.client.HTTPConnection(self.server.host, int(self.server.port))
        with contextlib.closing(onward), contextlib.suppress(BrokenPipeError, ConnectionResetError):
            onward.request("POST", self.path, body, {"Content-Type": "application/json"})
            answer = onward.getresponse()
            kind = answer.headers.get("Content-Type") or "application/json"
            self.send_response(answer.status)
            self.send_header("Content-Type", kind)
            self.send_header("Connection", "close")
            self.end_headers()
            sent = 0
            while data := answer.read1(1 << 16):
                sent += len(data)
                if fault == "cut" and sent > 900:
                    self.wfile.write(data[: len(data) // 2])
                    return None
                if fault == "garbage" and sent > 900:
                    self.wfile.write(b'data: {"choices": [\n\n')
                    return None
                for part in (
                    [data[i : i + 7] for i in range(0, len(data), 7)] if fault == "slow" else [data]
                ):
                    self.wfile.write(part)
                    self.wfile.flush()
                    time.sleep(0.0005 if fault == "slow" else 0)
        return None
