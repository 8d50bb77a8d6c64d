"""What .ci/bench measures against: Chat Completions -> Messages the way it is usually written.

Every shortcut is deliberate and stays: http.server's HTTP/1.0 and its backlog of 5, a new upstream
connection for each request, readline, json.loads and json.dumps for each event, a flush for each.
"""

import argparse
import json
import os
import time
import urllib.request
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FINISH = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length"}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fields = {
            "model": body["model"],
            "max_tokens": body.get("max_tokens", 4096),
            "stream": True,
        }
        fields["messages"] = [m for m in body["messages"] if m["role"] != "system"]
        fields["system"] = "".join(m["content"] for m in body["messages"] if m["role"] == "system")
        url = self.server.base_url + "/v1/messages"
        headers = {"Content-Type": "application/json", "anthropic-version": "2023-06-01"}
        headers["x-api-key"] = os.environ["ANTHROPIC_API_KEY"]
        request = urllib.request.Request(url, json.dumps(fields).encode(), headers)
        base = {"id": "chatcmpl-" + uuid.uuid4().hex, "created": int(time.time())}
        base["model"] = body["model"]
        with urllib.request.urlopen(request) as upstream:
            (self.stream if body.get("stream") else self.answer)(base, upstream)

    def events(self, upstream):
        while line := upstream.readline():
            if line.startswith(b"data: "):
                yield json.loads(line[6:])

    def stream(self, base, upstream):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.send_chunk(base, {"role": "assistant", "content": ""})
        for event in self.events(upstream):
            if event["type"] == "content_block_delta" and event["delta"]["type"] == "text_delta":
                self.send_chunk(base, {"content": event["delta"]["text"]})
            elif event["type"] == "message_delta":
                self.send_chunk(base, {}, FINISH.get(event["delta"]["stop_reason"], "stop"))
        self.wfile.write(b"data: [DONE]\n\n")

    def send_chunk(self, base, delta, finish=None):
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        chunk = {**base, "object": "chat.completion.chunk", "choices": [choice]}
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        self.wfile.flush()

    def answer(self, base, upstream):
        text, finish, usage = "", "stop", {}
        for event in self.events(upstream):
            if event["type"] == "message_start":
                usage.update(event["message"]["usage"])
            elif event["type"] == "content_block_delta" and event["delta"]["type"] == "text_delta":
                text += event["delta"]["text"]
            elif event["type"] == "message_delta":
                finish = FINISH.get(event["delta"]["stop_reason"], "stop")
                usage.update(event["usage"])
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": finish}
        tokens = {"prompt_tokens": usage["input_tokens"]}
        tokens["completion_tokens"] = usage["output_tokens"]
        tokens["total_tokens"] = usage["input_tokens"] + usage["output_tokens"]
        answer = {**base, "object": "chat.completion", "choices": [choice], "usage": tokens}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--base-url", default="https://api.anthropic.com")
    options = parser.parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", options.port), Handler)
    server.base_url = options.base_url
    print(f"listening on http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
