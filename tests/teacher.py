"""A server on loopback that speaks OpenAI's protocol, with every fault that a real one has.

`serve(answer)` starts one; `answer(messages, n)` is called with the messages and the number of the
request, and returns a text, or one of the faults below. Alone, it serves SmolLM2-135M-Instruct:

    python tests/teacher.py FOLDER 8000        (tests/smollm2.py makes the folder)
"""

import json
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BUSY, BROKEN, SLOW, CUT, NONSENSE, EMPTY = "429", "500", "slow", "cut", "nonsense", "empty"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status: int, body: bytes, length: int | None = None, **headers):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.n_requests += 1
            n = server.n_requests
            server.running += 1
            server.most = max(server.most, server.running)
            server.seen.append(asked)
        try:
            said = server.answer(asked["messages"], n)
            if said == BUSY:
                return self.reply(429, b'{"error": {"message": "slow down"}}', Retry_After="0.05")
            if said == BROKEN:
                return self.reply(500, b'{"error": {"message": "oh no"}}')
            if said == SLOW:
                time.sleep(server.pause)
                said = "too late"
            if said == NONSENSE:
                return self.reply(200, b"<html>not what you asked for</html>")
            if said == EMPTY:
                return self.reply(200, b'{"id": "x", "object": "chat.completion", "choices": []}')
            choice = {"index": 0, "finish_reason": "stop"}
            choice["message"] = {"role": "assistant", "content": said}
            n_asked = sum(len(message["content"].split()) for message in asked["messages"])
            usage = {"prompt_tokens": n_asked, "completion_tokens": len(said.split())}
            usage["total_tokens"] = sum(usage.values())
            body = {"id": "x", "object": "chat.completion", "created": 0, "model": "teacher"}
            body = json.dumps(body | {"choices": [choice], "usage": usage}).encode()
            if said == CUT:
                self.reply(200, body[:20], len(body))
                self.close_connection = True
                return self.connection.close()
            self.reply(200, body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client gave up waiting
        finally:
            with server.lock:
                server.running -= 1


@contextmanager
def serve(answer, port: int = 0, pause: float = 3):
    """Yields the server: `url`, `n_requests`, `most` at a time, and all that was `seen`."""
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    server.answer, server.lock, server.pause = answer, threading.Lock(), pause
    server.n_requests, server.running, server.most, server.seen = 0, 0, 0, []
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def smollm2(folder):
    """An `answer` by SmolLM2-135M-Instruct on this repository's own LLaMA."""
    import torch

    import tokenizer
    from llama import KVCache, LLaMA

    llama, words = LLaMA.from_pretrained(folder), tokenizer.load(folder)
    start, end = (words.token_id(f"<|im_{x}|>") for x in ("start", "end"))
    lock = threading.Lock()

    @torch.inference_mode()
    def answer(messages, n):
        ids = []
        for message in messages:
            text = words.encode(f"{message['role']}\n{message['content']}")
            ids += [start, *text, end, *words.encode("\n")]
        ids += [start, *words.encode("assistant\n")]
        with lock:
            cache = KVCache(llama.config, 1, len(ids) + 400, torch.float32, "cpu")
            said, token = [], torch.tensor([ids])
            while len(said) < 400:
                token = llama.head(llama.hidden(token, cache=cache)[:, -1:]).argmax(-1)
                if token.item() == end:
                    break
                said.append(token.item())
        return words.decode(said)

    return answer


if __name__ == "__main__":
    with serve(smollm2(sys.argv[1]), int(sys.argv[2])) as running:
        print(running.url, file=sys.stderr)
        threading.Event().wait()
