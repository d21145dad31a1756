"""A local stand-in for the Hugging Face hub: what `datasets` and `huggingface_hub` ask of it.

with Hub({"owner/name": {"data/train-0.parquet": b"..."}}) as hub: HF_ENDPOINT=hub.url
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

SHA = hashlib.sha1(b"the only commit").hexdigest()


class Hub:
    """Serves repositories of data sets, each a dict of path -> bytes, at one commit."""

    def __init__(self, repositories: dict):
        self.asked: list[str] = []
        self.breaks = 0  # files that still end half way, with the connection
        self.ranges: list[int] = []  # where the requests for a file began
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                self.answer(b"")

            def do_HEAD(self):
                self.answer(b"")

            def do_POST(self):
                self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

            def answer(self, body: bytes):
                path = unquote(urlparse(self.path).path)
                hub.asked.append(f"{self.command} {path}")
                api = re.fullmatch(r"/api/datasets/([\w-]+/[\w-]+)"
                                   r"(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?", path)
                file = re.fullmatch(r"/datasets/([\w-]+/[\w-]+)/resolve/([^/]+)/(.+)", path)
                if file and file[1] in repositories and file[2] in ("main", SHA):
                    content = repositories[file[1]].get(file[3])
                    self.file(content) if content is not None else self.error("EntryNotFound")
                elif api and api[1] in repositories and api[3] in (None, "main", SHA):
                    self.json(self.about(api[1], repositories[api[1]], api[2], api[4], body))
                elif api and api[1] in repositories:
                    self.error("RevisionNotFound")
                else:
                    self.error("RepoNotFound")

            def about(self, name, files, what, folder, body):
                folders = {p.rsplit("/", i)[0] for p in files for i in range(1, p.count("/") + 1)}
                tree = {**{p: {"type": "directory", "path": p, "oid": SHA, "size": 0}
                           for p in folders},
                        **{p: {"type": "file", "path": p, "oid": etag(c), "size": len(c)}
                           for p, c in files.items()}}
                if what == "paths-info":
                    wanted = body.decode()
                    try:
                        paths = json.loads(wanted)["paths"]
                    except ValueError:
                        paths = [unquote(v) for v in re.findall(r"paths=([^&]*)", wanted)]
                    return [tree[p] for p in ([paths] if isinstance(paths, str) else paths)
                            if p in tree]
                if what == "tree":
                    recursive = "recursive=true" in self.path.lower()
                    inside = [p for p in tree if p.startswith(folder + "/" if folder else "")]
                    return [tree[p] for p in sorted(inside) if recursive
                            or "/" not in p[len(folder) + bool(folder):]]
                return {"id": name, "_id": "0", "sha": SHA, "private": False, "tags": [],
                        "downloads": 0, "likes": 0, "siblings": [{"rfilename": p} for p in files]}

            def json(self, value):
                self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

            def error(self, code):
                self.send(404, b"{}", {"X-Error-Code": code, "X-Repo-Commit": SHA})

            def file(self, content):
                first, code = 0, 200
                if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                    first, code = int(match[1]), 206
                if self.command == "GET":
                    hub.ranges.append(first)
                if self.command == "GET" and hub.breaks and len(content) > 9:
                    hub.breaks -= 1
                    self.send(code, content[first:], {"ETag": f'"{etag(content)}"',
                              "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}, len(content) // 2)
                    self.close_connection = True
                    return
                self.send(code, content[first:], {
                    "ETag": f'"{etag(content)}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"})

            def send(self, code, content, headers, stop=None):
                self.send_response(code)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content[:stop])

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
