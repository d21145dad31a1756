"""A client's connection: what may not last forever, and requests that are no HTTP."""

import json
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from plainllama.generation.protocol import Wrong

HEAD_SECONDS = 30.0  # that a client has to send a request's lines before its body
TAKEN_SECONDS = 60.0  # within which it takes what is written for it, some 50 kB
FILES, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
MOST = 1000 if FILES == resource.RLIM_INFINITY else min(1000, FILES // 2)  # connections at once
BACKLOG = 64  # that are taken before others are closed


class Connection(H11Protocol):
    """uvicorn's, with limits of time for a request's first lines, and for an answer that its client
    does not take."""

    def connection_made(self, transport: Any) -> None:
        """Wait for a first request."""
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(HEAD_SECONDS, transport.abort)
        if len(self.connections) > MOST:  # without files asyncio only fills the screen
            transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take bytes. The time for a request's first lines runs until all of them are there, where
        uvicorn's ends with the first byte."""
        self.conn.receive_data(data)
        self.handle_events()

    def handle_events(self) -> None:
        """Read what has come; a request whose answer is being made has all the time."""
        super().handle_events()
        if self.cycle and not self.cycle.response_complete:
            self._unset_keepalive_if_required()

    def timeout_keep_alive_handler(self) -> None:
        """Close what has had no new request for too long, whatever is still to be taken."""
        self.transport.abort()

    def pause_writing(self) -> None:
        """Wait for a client that is slow to take its answer, but not forever."""
        super().pause_writing()
        self.untaken = self.loop.call_later(TAKEN_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It took some."""
        super().resume_writing()
        self.untaken.cancel()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP in OpenAI's form too, if there is no answer yet."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(Wrong(msg).body()).encode()
            headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))),
                       ("Connection", "close")]
            for event in (h11.Response(status_code=400, headers=headers, reason="Bad Request"),
                          h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
