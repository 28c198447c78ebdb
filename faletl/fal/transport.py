"""A deadline for a whole request, and a way to stop it, below httpx."""

from __future__ import annotations

import math
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

import httpcore
import httpx

from faletl.config import Settings
from faletl.errors import SettingsError


class StoppedError(Exception):
    """The client was stopped while it waited."""


current_deadline: ContextVar[tuple[float, float]] = ContextVar("deadline")
"""The moment at which the current request must end (monotonic), and the seconds that it was allowed."""


def _left(timeout: float | None) -> float:
    at, seconds = current_deadline.get((math.inf, math.inf))
    left = at - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout(f"no complete answer within {seconds:.0f} s")
    return left if timeout is None else min(left, timeout)


def extend_deadline(seconds: float) -> None:
    """Move the deadline of the current request: we spent this time, not fal."""
    at, allowed = current_deadline.get((math.inf, math.inf))
    current_deadline.set((at + seconds, allowed))


class _DeadlineStream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream, backend: DeadlineBackend) -> None:
        self._stream = stream
        self._backend = backend
        backend.watch(stream)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        # TLS has a socket of its own; the plain one is detached.
        stream = self._stream.start_tls(ssl_context, server_hostname, _left(timeout))
        return _DeadlineStream(stream, self._backend)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class DeadlineBackend(httpcore.NetworkBackend):
    """Sockets that keep to the deadline of the current request, and that another thread can shut."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._backend = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        stream = self._backend.connect_tcp(host, port, _left(timeout), local_address, socket_options)
        return _DeadlineStream(stream, self)

    def watch(self, stream: httpcore.NetworkStream) -> None:
        """Remember the stream's socket, to shut it when the client stops; no socket opens after that."""
        with self._lock:
            self._sockets.add(stream.get_extra_info("socket"))
        if self._stop.is_set():
            stream.close()
            raise httpcore.ConnectError("stopped")

    def shut_down(self) -> None:
        """Wake every thread that waits for a byte: its read fails."""
        with self._lock:
            open_sockets = list(self._sockets)
        for open_socket in open_sockets:
            try:
                open_socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # already closed


def transport(settings: Settings, backend: httpcore.NetworkBackend) -> httpx.HTTPTransport:
    """Return httpx's own transport over our sockets: TLS always verified, a proxy only if set."""
    try:
        tls = ssl.create_default_context(cafile=str(settings.ca_file) if settings.ca_file else None)
    except OSError as error:  # an ssl.SSLError is one
        raise SettingsError(
            f"FALETL_CA_FILE: the file has no CA certificates ({error.strerror})"
        ) from None
    direct = httpx.HTTPTransport(verify=tls, trust_env=False)
    direct._pool.close()  # httpx 0.28 has no public way to name the network backend
    proxy = settings.proxy.get_secret_value() if settings.proxy else None
    direct._pool = httpcore.ConnectionPool(
        ssl_context=tls,
        proxy=httpcore.Proxy(proxy) if proxy else None,
        max_connections=settings.parallel,
        max_keepalive_connections=settings.parallel,
        keepalive_expiry=30,
        network_backend=backend,
    )
    return direct
