"""sample.py --serve: OpenAI's endpoints over HTTP, on the texts of one Batch.

The event loop reads requests and writes answers; the batch's thread computes. A client that goes
takes its texts out of the batch. A first signal lets what runs come to its end, a second one ends.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import os
import re
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from plainllama.generation.batching import Batch, Full
from plainllama.generation.connections import BACKLOG, Connection
from plainllama.generation.protocol import Asked, Model, Wrong, vector
from plainllama.generation.replies import Reply
from plainllama.settings import UserError

KEY = "PLAINLLAMA_API_KEY"
PAGE = Path(__file__).with_name("page.html")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
BODY = 2 * 2**20  # bytes
BODY_SECONDS = 30.0  # that a client has to send them
END_SECONDS = 10  # that answers which are complete have to be taken, when the server ends
ALIVE_SECONDS = 5.0  # after which a stream without news says that it lives
OPEN = ("/", "/health")  # asked for without a key
GONE = Response(status_code=499)  # nobody reads it


class Service:
    """The endpoints, over a model and its batch. `host`: where they are bound; `cors`: the origin
    whose pages may ask, '' for none."""

    def __init__(self, model: Model, batch: Batch, host: str, cors: str = "", key: str = ""):
        self.model, self.batch, self.key = model, batch, key
        self.hosts = {*LOOPBACK, host} if host in LOOPBACK else set()  # empty: any
        self.draining, self.answering = False, 0
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.reader = ThreadPoolExecutor(1)  # long bodies are read beside the event loop
        routes = [Route("/", self.page), Route("/health", self.health),
                  Route("/metrics", self.metrics), Route("/v1/models", self.models),
                  Route("/v1/models/{name:path}", self.models)]
        for path, kind in (("/v1/completions", "completions"), ("/v1/embeddings", "embeddings"),
                           ("/v1/chat/completions", "chat")):
            routes.append(Route(path, partial(self.answer, kind), methods=["POST"]))
        self.paths = {route.path for route in routes}
        self.app = Starlette(routes=routes, exception_handlers={
            HTTPException: not_there, Exception: broken})
        self.door: Any = self.enter
        if cors:  # around the door, so that its pages may read why they are refused
            self.door = CORSMiddleware(self.enter, allow_origins=[cors], allow_methods=["*"],
                                       allow_headers=["*"])

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer, and count the answer."""
        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self.paths else "other"
                self.statuses[path, message["status"]] += 1
            await send(message)

        await self.door(scope, receive, counted)

    async def enter(self, scope: Any, receive: Any, send: Any) -> None:
        """Check who asks, before anything is read; then answer."""
        answer: Any = self.app
        try:
            self.admit(Request(scope))
        except Wrong as wrong:
            answer = refused(wrong)
        await answer(scope, receive, send)

    def admit(self, request: Request) -> None:
        """Refuse a request to another host's name (a page elsewhere may have its name point here),
        and one without the key."""
        named = request.headers.get("host", "")
        name = re.sub(r":\d*$", "", named).strip("[]").lower()
        if self.hosts and name not in self.hosts:
            raise Wrong(f"this server is not {named[:80]!r}: ask for 127.0.0.1, or start it with "
                        "--host", None, 403)
        free = request.url.path in OPEN or request.method == "OPTIONS"
        given = request.headers.get("authorization", "").encode()
        if self.key and not free and not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
            raise Wrong(f"Authorization: Bearer with the key in the server's {KEY} is needed", None,
                        401, "invalid_api_key", {"WWW-Authenticate": "Bearer"})

    # ---- what is only looked at

    async def health(self, request: Request) -> Response:
        """Whether it takes requests."""
        if self.draining:
            return JSONResponse({"status": "ending"}, 503)
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        """The one model."""
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": [self.model.card()]})
        if name != self.model.name:
            raise HTTPException(404, f"there is no model {name[:80]!r}")
        return JSONResponse(self.model.card())

    async def page(self, request: Request) -> Response:
        """The chat page, which may run nothing but its own script and ask nobody but this."""
        if not PAGE.is_file():
            raise HTTPException(404, "there is no page; the endpoints are under /v1")
        html = PAGE.read_text(encoding="utf-8")
        return Response(html, media_type="text/html", headers=guards(html))

    async def metrics(self, request: Request) -> Response:
        """Counts in Prometheus' text."""
        running, waiting = self.batch.load()
        counts = self.batch.counts
        lines = []
        for name, kind, value in (
                ("running", "gauge", running), ("waiting", "gauge", waiting),
                ("prompt_tokens_total", "counter", counts["prompt_tokens"]),
                ("prompt_tokens_cached_total", "counter", counts["cached_tokens"]),
                ("new_tokens_total", "counter", counts["new_tokens"]),
                ("cancelled_total", "counter", counts["cancelled"]),
                ("time_to_first_token_seconds_sum", "counter", counts["seconds_to_first_tokens"]),
                ("time_to_first_token_seconds_count", "counter", counts["first_tokens"])):
            lines += [f"# TYPE plainllama_{name} {kind}", f"plainllama_{name} {value}"]
        lines.append("# TYPE plainllama_requests_total counter")
        for (path, status), number in sorted(self.statuses.items()):
            lines.append(f'plainllama_requests_total{{path="{path}",status="{status}"}} {number}')
        return PlainTextResponse("\n".join(lines) + "\n",
                                 media_type="text/plain; version=0.0.4; charset=utf-8")

    # ---- what is computed

    async def answer(self, kind: str, request: Request) -> Response:
        """Answer a request for texts or vectors."""
        try:
            if request.headers.get("content-type", "").partition(";")[0] != "application/json":
                # else a page elsewhere could ask without being allowed to
                raise Wrong("Content-Type must be application/json", None, 415)
            raw = await read_body(request)
            loop = asyncio.get_running_loop()
            asked = await loop.run_in_executor(self.reader, self.model.read, kind, raw)
            if self.draining:
                raise Wrong("the server is ending", None, 503, None, {"Retry-After": "10"})
            reply = Reply(self.model, kind, asked)
            try:
                self.batch.add(reply.texts)
            except Full:
                raise Wrong(f"{self.batch.queue} texts wait already; ask again later", None, 429,
                            "rate_limit_exceeded", {"Retry-After": "2"}) from None
        except Wrong as wrong:
            return refused(wrong)
        except ClientDisconnect:
            return GONE
        self.answering += 1
        if asked.stream:
            return Stream(self.events(reply), partial(self.leave, reply))
        try:
            return await self.whole(reply, kind, asked, request)
        finally:
            self.leave(reply)

    def leave(self, reply: Reply) -> None:
        """Be done with an answer, complete or not."""
        self.answering -= 1
        self.batch.cancel(reply.texts)

    async def whole(self, reply: Reply, kind: str, asked: Asked, request: Request) -> Response:
        """Wait for all of an answer, unless the client goes."""
        gathered = asyncio.ensure_future(reply.gathered())
        gone = asyncio.ensure_future(disconnected(request))
        await asyncio.wait([gathered, gone], return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not gathered.done():
            gathered.cancel()
            return GONE
        if reply.problem:
            return refused(Wrong(reply.problem, None, 500))
        if kind != "embeddings":
            return JSONResponse(reply.body())
        data = [{"object": "embedding", "index": i, "embedding": vector(
            text.state.tolist(), asked.base64)} for i, text in enumerate(reply.texts)
                if text.state is not None]
        tokens = sum(map(len, asked.prompts))
        return JSONResponse({"object": "list", "data": data, "model": self.model.name,
                             "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})

    async def events(self, reply: Reply) -> AsyncIterator[str]:
        """Write an answer as it comes, and a comment where nothing does."""
        chunks = reply.chunks()
        coming = asyncio.ensure_future(anext(chunks, None))
        try:
            while True:
                done, _ = await asyncio.wait([coming], timeout=ALIVE_SECONDS)
                if not done:
                    yield ": waiting\n\n"
                    continue
                chunk = coming.result()
                if chunk is None:
                    break
                yield f"data: {json.dumps(chunk, ensure_ascii=False, allow_nan=False)}\n\n"
                coming = asyncio.ensure_future(anext(chunks, None))
            if not reply.problem:
                yield "data: [DONE]\n\n"
        finally:
            coming.cancel()


class Stream(StreamingResponse):
    """Server-sent events; `leave` is called when they have ended, or the client has gone."""

    def __init__(self, events: AsyncIterator[str], leave: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream",
                         headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.leave = leave

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Write them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.leave()


async def read_body(request: Request) -> bytes:
    """Read a body, within limits of size and time."""
    too_large = Wrong(f"the body has more than {BODY:,} bytes", None, 413,
                      headers={"Connection": "close"})
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > BODY:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > BODY:
                    raise too_large
    except TimeoutError:
        raise Wrong(f"the body did not come within {BODY_SECONDS:g} s", None, 408,
                    headers={"Connection": "close"}) from None
    return bytes(body)


async def disconnected(request: Request) -> None:
    """Wait until the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def refused(wrong: Wrong) -> JSONResponse:
    """An error in OpenAI's form."""
    return JSONResponse(wrong.body(), wrong.status, wrong.headers)


async def not_there(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: an unknown path, another method."""
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.detail == "Not Found":
        message = f"there is no {request.url.path[:80]}; the endpoints are under /v1"
    elif error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}"
    return refused(Wrong(message, None, error.status_code,
                         headers=dict(error.headers) if error.headers else None))


async def broken(request: Request, error: Exception) -> Response:
    """What nobody foresaw, which is also shown on the server's screen."""
    return refused(Wrong(f"{type(error).__name__} in the server", None, 500))


def guards(html: str) -> dict[str, str]:
    """Headers that let a page run its own inline script and style and nothing else."""
    hashed = {}
    for tag in ("script", "style"):
        found = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", html, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
                  for text in found]
        hashed[tag] = " ".join(f"'sha256-{each}'" for each in hashes) or "'none'"
    policy = (f"default-src 'none'; script-src {hashed['script']}; style-src {hashed['style']}; "
              "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
              "frame-ancestors 'none'")
    return {"Content-Security-Policy": policy, "X-Frame-Options": "DENY",
            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


# ---- the process

class Server(uvicorn.Server):
    """uvicorn, but a first signal lets answers end and refuses new requests meanwhile."""

    def __init__(self, service: Service):
        super().__init__(uvicorn.Config(service, log_level="error", access_log=False,
                                        lifespan="off", timeout_keep_alive=30, server_header=False,
                                        h11_max_incomplete_event_size=64 * 1024, http=Connection,
                                        ws="none", timeout_graceful_shutdown=END_SECONDS,
                                        backlog=BACKLOG))
        self.service = service

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Take a signal."""
        name, running = signal.Signals(sig).name, self.service.answering
        if self.service.draining:  # print() might be at work when a signal comes
            os.write(2, f"{name}: ended at once; answers cut short: {running}\n".encode())
            os._exit(143)
        self.service.draining = True
        print(f"{name}: {running} running answers come to their end; a second signal ends at once"
              if running else f"{name}: the server ends, nothing was running", flush=True)

    async def on_tick(self, counter: int) -> bool:
        """Whether to end; asked ten times a second."""
        ended = self.service.draining and self.service.answering == 0
        return await super().on_tick(counter) or ended


def bind(host: str, port: int) -> socket.socket:
    """Take a port, before anything slow; UserError if it cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except (OSError, UnicodeError, OverflowError) as error:
        raise UserError(f"cannot listen on --host={host} --port={port}: {error}; take another "
                        "one (--port=0: any that is free)") from None
    return made


def serve(service: Service, place: socket.socket) -> int:
    """Answer until a signal comes; the exit code."""
    host, port = place.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    kind = "chat and completions" if service.model.chat else "completions, no chat"
    print(f"serving {service.model.name} on http://{name}:{port}/v1: {kind}, a context of "
          f"{service.model.block_size} tokens, {len(service.batch.slots.all)} texts side by side"
          + (f", with the key of {KEY}" if service.key else ""))
    if service.hosts == set() and not service.key:
        print(f"whoever reaches this machine may ask: {KEY} in the environment is a key to ask for")
    print(f"in a browser: http://{name}:{port}", flush=True)
    Server(service).run(sockets=[place])
    service.batch.close()
    return 0
