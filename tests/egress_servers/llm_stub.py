"""A scripted model behind Anthropic's and OpenAI's APIs, over TLS. Runs in threads of the test.

It answers with a tool call where the request offers a shell and has no result of one yet, else with text.
Each request's path, credentials and body are kept in `seen`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.egress_servers.served import Served

TEXT = "The answer is 42."
COMMAND = "echo made-by-a-tool > tool.txt"


class ModelStub(Served):
    """A context manager; `port` is where it listens.

    Args:
        certificate: Certificate and key; None for plain HTTP.
        key: What requests must carry, or they get 401.
        input_tokens: What it says a request had.
        output_tokens: What it says that its answer had.
    """

    def __init__(
        self,
        certificate: tuple[Path, Path] | None,
        *,
        key: str,
        input_tokens: int = 100,
        output_tokens: int = 50,
    ) -> None:
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.keys = {key}
        self.tokens = (input_tokens, output_tokens)
        self.hold: threading.Event | None = None
        self.arrived = threading.Semaphore(0)
        self.cut = threading.Event()
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def do_GET(self) -> None:
                self._send(200, b"{}")

            def do_POST(self) -> None:
                if "chunked" in self.headers.get("transfer-encoding", ""):
                    body = b""
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    body = self.rfile.read(int(self.headers.get("content-length", 0)))
                fields = json.loads(body) if body.startswith(b"{") else {}
                headers = {name.lower(): value for name, value in self.headers.items()}
                with stub._lock:
                    stub.seen.append((self.path, headers, fields))
                stub.arrived.release()
                if stub.hold is not None:
                    stub.hold.wait()
                given = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
                if given not in stub.keys:
                    error = {"type": "authentication_error", "message": f"invalid key {given}"}
                    self._send(401, json.dumps({"type": "error", "error": error}).encode())
                elif fields.get("stream"):
                    self._stream(stub._events(self.path, fields))
                else:
                    self._send(200, json.dumps(stub._document(self.path, fields)).encode())

            def _send(self, status: int, data: bytes) -> None:
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _stream(self, events: Iterator[dict[str, Any]]) -> None:
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                for event in events:
                    line = f"data: {json.dumps(event)}\n\n"
                    if "type" in event:
                        line = f"event: {event['type']}\n{line}"
                    self.wfile.write(f"{len(line):x}\r\n{line}\r\n".encode())
                self.wfile.write(b"0\r\n\r\n")

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, *_: object) -> None:
                """A client that hangs up is part of the tests."""

        super().__init__(Server(("127.0.0.1", 0), Handler), certificate)

    def calls(self, ending: str) -> list[dict[str, Any]]:
        """The bodies of the requests to a path with this end."""
        return [body for path, _, body in self.seen if path.partition("?")[0].endswith(ending)]

    def _wants_tool(self, fields: dict[str, Any]) -> str:
        text = json.dumps(fields.get("messages") or fields.get("input") or "")
        if "tool_result" in text or "function_call_output" in text:
            return ""
        tools = [tool.get("name") for tool in fields.get("tools") or [] if isinstance(tool, dict)]
        return next((name for name in ("Bash", "exec_command", "shell") if name in tools), "")

    def _document(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:
        read, written = self.tokens
        model = fields.get("model", "")
        if path.partition("?")[0].endswith("/messages"):
            return {
                "id": "msg_1", "type": "message", "role": "assistant", "model": model,
                "content": [{"type": "text", "text": TEXT}], "stop_reason": "end_turn",
                "usage": {"input_tokens": read, "output_tokens": written},
            }  # fmt: skip
        if "/chat/completions" in path:
            return {
                "id": "c1", "object": "chat.completion", "model": model,
                "choices": [{"index": 0, "message": {"role": "assistant", "content": TEXT}}],
                "usage": {"prompt_tokens": read, "completion_tokens": written,
                          "prompt_tokens_details": {"cached_tokens": read // 2}},
            }  # fmt: skip
        return {}

    def _events(self, path: str, fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if "/messages" in path:
            yield from self._anthropic(fields)
        elif "/responses" in path:
            yield from self._responses(fields)
        else:
            for word in TEXT.split():
                yield {"model": fields.get("model"), "choices": [{"delta": {"content": word}}]}

    def _anthropic(self, fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
        read, written = self.tokens
        message: dict[str, Any] = {
            "id": "msg_1", "type": "message", "role": "assistant", "content": [],
            "model": fields.get("model"), "stop_reason": None,
            "usage": {"input_tokens": read, "output_tokens": 1},
        }  # fmt: skip
        yield {"type": "message_start", "message": message}
        tool = self._wants_tool(fields)
        if tool:
            block: dict[str, Any] = {"type": "tool_use", "id": "toolu_1", "name": tool, "input": {}}
            asked = json.dumps({"command": COMMAND, "description": "make a file"})
            delta = {"type": "input_json_delta", "partial_json": asked}
        else:
            block = {"type": "text", "text": ""}
            delta = {"type": "text_delta", "text": TEXT}
        yield {"type": "content_block_start", "index": 0, "content_block": block}
        yield {"type": "content_block_delta", "index": 0, "delta": delta}
        if self.cut.is_set():
            raise ConnectionAbortedError
        yield {"type": "content_block_stop", "index": 0}
        reason = {"stop_reason": "tool_use" if tool else "end_turn", "stop_sequence": None}
        yield {"type": "message_delta", "delta": reason, "usage": {"output_tokens": written}}
        yield {"type": "message_stop"}

    def _responses(self, fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
        read, written = self.tokens
        yield {"type": "response.created", "response": {"id": "resp_1", "model": fields.get("model")}}
        tool = self._wants_tool(fields)
        item: dict[str, Any]
        if tool:
            command: dict[str, Any] = (
                {"cmd": COMMAND} if tool == "exec_command" else {"command": ["sh", "-c", COMMAND]}
            )
            item = {
                "type": "function_call",
                "call_id": "call_1",
                "name": tool,
                "arguments": json.dumps(command),
            }
        else:
            content = [{"type": "output_text", "text": TEXT}]
            item = {"type": "message", "role": "assistant", "id": "msg_1", "content": content}
        yield {"type": "response.output_item.done", "output_index": 0, "item": item}
        usage = {
            "input_tokens": read, "output_tokens": written, "total_tokens": read + written,
            "input_tokens_details": {"cached_tokens": 0},
        }  # fmt: skip
        yield {"type": "response.completed", "response": {"id": "resp_1", "usage": usage, "output": [item]}}
