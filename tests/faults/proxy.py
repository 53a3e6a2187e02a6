"""A proxy in front of a real S3 server that injects faults into a share of the requests.

It serves one request per connection, so that a fault affects a single request. The faults depend
on the seed and on the order in which requests arrive.
"""

import asyncio
import random
import socket
import struct
import threading
import weakref
from collections import Counter
from collections.abc import Sequence

HOST = "127.0.0.1"
# 503: respond with SlowDown. reset: reset the connection, before or after the server has handled
# the request. truncate: forward half of an upload, or half of a response. stall: send nothing for
# as long as the client waits. flip: flip one bit in the body of an upload or a response.
KINDS = ("503", "reset", "truncate", "stall", "flip")
_BUSY = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"


class FaultProxy:
    """Use it as `with FaultProxy(server.port, share=0.1) as proxy:`, with `proxy.endpoint`."""

    def __init__(
        self,
        upstream: int,
        share: float,
        kinds: Sequence[str] = KINDS,
        seed: int = 0,
        longest_stall: float = 60.0,  # seconds
    ) -> None:
        self.upstream, self.share, self.kinds = upstream, share, tuple(kinds)
        self.longest_stall = longest_stall
        self.requests = 0
        self.injected: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._writers: weakref.WeakSet[asyncio.StreamWriter] = weakref.WeakSet()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.port = 0

    @property
    def endpoint(self) -> str:
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        serving = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, HOST, 0, limit=1 << 20), self._loop
        )
        self._server = serving.result(10)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        await asyncio.sleep(0)  # asyncio reports a task that is cancelled before its first step
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in self._writers:  # a closed connection lives on while its peer reads nothing
            writer.transport.abort()
        await asyncio.sleep(0)  # asyncio closes the sockets in its next turn
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await self._one_request(reader, writer)
        except (OSError, EOFError, asyncio.CancelledError):
            pass  # either side closed the connection
        finally:
            writer.close()

    async def _one_request(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        names = [line.partition(b":")[0].strip().lower() for line in lines]
        fields = dict(zip(names, (line.partition(b":")[2].strip() for line in lines), strict=True))
        if fields.get(b"expect", b"").lower() == b"100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(int(fields.get(b"content-length", b"0")))
        headers = [
            line
            for name, line in zip(names, lines, strict=True)
            if name not in (b"expect", b"connection")
        ]
        head = b"\r\n".join([headers[0], b"Connection: close", *headers[1:]])

        fault = self._draw()
        if fault == "503":
            size = str(len(_BUSY)).encode()
            start = b"HTTP/1.1 503 Slow Down\r\nConnection: close\r\nContent-Length: "
            writer.write(start + size + b"\r\n\r\n" + _BUSY)
        elif fault == "stall":
            await asyncio.wait_for(reader.read(1), self.longest_stall)
        elif fault == "reset" and self._random.random() < 0.5:
            _reset(writer)
        elif fault == "truncate" and body:
            await self._forward(head + body[: len(body) // 2], finished=False)
        else:
            body, flipped = self._flipped(body, fault == "flip")
            response = await self._forward(head + body, finished=True)
            if fault == "reset":
                _reset(writer)
                return
            at = response.find(b"\r\n\r\n") + 4
            content = response[at:]
            if fault == "truncate":
                cut = len(content) // 2 if content else -(at // 2)
                response = response[: at + cut]
            elif fault == "flip" and not flipped:
                response = response[:at] + self._flipped(content, True)[0]
            writer.write(response)
        await writer.drain()

    def _draw(self) -> str:
        self.requests += 1
        if self._random.random() >= self.share:
            return ""
        kind = self._random.choice(self.kinds)
        self.injected[kind] += 1
        return kind

    def _flipped(self, data: bytes, wanted: bool) -> tuple[bytes, bool]:
        if not wanted or not data:
            return data, False
        changed = bytearray(data)
        changed[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
        return bytes(changed), True

    async def _forward(self, request: bytes, *, finished: bool) -> bytes:
        """The server's response; with `finished` false, b"" after sending a partial request."""
        reader, writer = await asyncio.open_connection(HOST, self.upstream)
        self._writers.add(writer)
        try:
            writer.write(request)
            await writer.drain()
            return await reader.read() if finished else b""
        finally:
            writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close the connection as a crashed host would: RST instead of FIN."""
    plain: socket.socket = writer.get_extra_info("socket")
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
