"""A stand-in for W&B's server on loopback, for the real client: runs, their history, resuming.

It honours the offsets of the file stream as W&B does, so that rows that come twice, or not at all,
show.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

HISTORY = "wandb-history.jsonl"


@dataclass
class Run:
    """What the server has of one run."""

    id: str
    project: str = ""
    name: str = ""
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """Its rows, by their place."""
        rows = self.lines.get(HISTORY, {})
        assert sorted(rows) == list(range(len(rows))), "there is a gap"
        return [json.loads(rows[number]) for number in sorted(rows)]

    def stream(self, body: dict[str, Any]) -> None:
        for name, chunk in (body.get("files") or {}).items():
            lines = self.lines.setdefault(name, {})
            for number, line in enumerate(chunk.get("content") or [], int(chunk.get("offset", 0))):
                lines[number] = line
            if name == "wandb-summary.json" and chunk.get("content"):
                self.summary = json.loads(chunk["content"][-1])
        if body.get("complete"):
            self.exit_code = body.get("exitcode", 0)

    def bucket(self) -> dict[str, Any]:
        """As GraphQL tells it."""
        counts = {name: len(self.lines.get(file, {})) for name, file in _COUNTED.items()}
        rows = self.lines.get(HISTORY, {})
        return {
            "id": self.id,
            "name": self.id,
            "displayName": self.name,
            "config": json.dumps(self.config),
            "summaryMetrics": json.dumps(self.summary),
            "historyTail": json.dumps([rows[max(rows)]] if rows else []),
            "eventsTail": "[]",
            "tags": self.tags,
            "sweepName": None,
            "wandbConfig": '{"t": 1}',
            "project": {"id": "p", "name": self.project, "entity": {"id": "e", "name": "tester"}},
            **counts,
        }


_COUNTED = {
    "historyLineCount": HISTORY,
    "eventsLineCount": "wandb-events.jsonl",
    "logLineCount": "output.log",
}


class Server:
    """``with Server() as server``; ``server.url`` is for WANDB_BASE_URL."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.broken = threading.Event()
        """While it is set, the server answers nothing but errors."""
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        handler = type("Bound", (_Handler,), {"outer": self})
        self._http = _Quiet(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def answer(self, path: str, body: Any, data: bytes) -> dict[str, Any]:
        with self._lock:
            if path == "/graphql":
                operation = re.search(r"\b(?:query|mutation)\s+(\w+)", body.get("query", ""))
                name = operation[1] if operation else ""
                method: Any = getattr(self, f"_{name}", lambda variables: {})
                return {"data": method(body.get("variables") or {})}
            if stream := re.fullmatch(r"/files/[^/]+/([^/]+)/([^/]+)/file_stream", path):
                self._run(stream[2], stream[1]).stream(body)
                return {"exitcode": None, "limits": {}}
            if stored := re.fullmatch(r"/storage/([^/]+)/(.+)", path):
                self._run(stored[1]).files[stored[2]] = data
            return {}

    def _run(self, run_id: str, project: str = "") -> Run:
        return self.runs.setdefault(run_id, Run(run_id, project))

    def _Viewer(self, variables: Any) -> dict[str, Any]:  # noqa: N802
        viewer = {"id": "u", "entity": "tester", "username": "tester", "email": "", "flags": "{}"}
        return {"viewer": {**viewer, "teams": {"edges": []}}}

    def _RunResumeStatus(self, variables: Any) -> dict[str, Any]:  # noqa: N802
        run = self.runs.get(variables["name"])
        entity = {"id": "e", "name": "tester"}
        bucket = None if run is None else run.bucket()
        return {
            "model": {"id": "p", "name": variables["project"], "entity": entity, "bucket": bucket}
        }

    def _UpsertBucket(self, variables: Any) -> dict[str, Any]:  # noqa: N802
        new = variables["name"] not in self.runs
        run = self._run(variables["name"], variables.get("project") or "")
        run.name = variables.get("displayName") or run.name
        run.tags = variables.get("tags") or run.tags
        run.config |= json.loads(variables.get("config") or "{}")
        return {"upsertBucket": {"bucket": run.bucket(), "inserted": new}}

    def _CreateRunFiles(self, variables: Any) -> dict[str, Any]:  # noqa: N802
        run = variables["run"]
        files = [
            {"name": name, "uploadUrl": f"{self.url}/storage/{run}/{name}"}
            for name in variables["files"]
        ]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed has gone without a word."""


class _Handler(BaseHTTPRequestHandler):
    outer: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def _serve(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.outer.broken.is_set():
            return self._send(500, {"error": "broken"})
        path = self.path.partition("?")[0]
        body: Any = {}
        if not path.startswith("/storage/") and path.endswith(("graphql", "file_stream")):
            zipped = "gzip" in self.headers.get("Content-Encoding", "")
            body = json.loads(gzip.decompress(data) if zipped else data)
        return self._send(200, self.outer.answer(path, body, data))

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = _serve  # noqa: N815
