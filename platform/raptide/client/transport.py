"""Requests on their way: of an event loop for `AsyncClient`, of a thread that waits for `Client`.

What is sent, and what an answer means, is in exchange.py. A request that nobody wants any more is
called off wherever it is, in a pause as well, and its connection closed: the endpoint then computes
no further.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import ssl
import threading
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx

from raptide.client.exchange import Exchange
from raptide.errors import ConfigError

T = TypeVar("T")

Verify = bool | str | os.PathLike[str] | ssl.SSLContext
Certificate = str | os.PathLike[str] | tuple[str | os.PathLike[str], str | os.PathLike[str]]

CONNECT_S = 10.0
GRACE_S = 5.0
"""Seconds beyond a request's deadline in which the endpoint's own word about it may arrive."""

CLOSE_S = 1.0


class AsyncTransport:
    """One endpoint, of the event loop that runs.

    Args:
        url: where the endpoint is, with or without `/v1`.
        key: sent as a bearer token; None sends none.
        connections: requests at once.
        verify: True for the authorities that httpx trusts, a file or folder with others, a context,
            or False.
        cert: the client's own certificate, or that and its key.
    """

    def __init__(
        self,
        url: str,
        key: str | None,
        connections: int,
        verify: Verify = True,
        cert: Certificate | None = None,
    ) -> None:
        self.url = plain_url(url)
        tls = tls_context(verify, cert) if self.url.startswith("https") else True
        # Our own queue, not httpx's: what is to be sent is known when it is sent, and httpx's never
        # moves on once it has lost as many connections as it may have.
        self._places = asyncio.Semaphore(connections)
        self._make = partial(
            httpx.AsyncClient,
            base_url=self.url,
            headers=key_header(key),
            verify=tls,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=connections),
        )
        self._http = self._make()
        self._running: Counter[httpx.AsyncClient] = Counter()

    def start(self, exchange: Exchange[Any]) -> asyncio.Task[Any]:
        return asyncio.create_task(self.ask(exchange))

    async def result(self, handle: asyncio.Task[Any]) -> Any:
        return await handle

    def cancel(self, handle: asyncio.Task[Any]) -> None:
        handle.cancel()  # of one that has failed it also says that nobody need be told

    async def pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        for http in {self._http, *self._running}:
            await http.aclose()

    async def ask(self, exchange: Exchange[T]) -> T:
        """Send a request until it is answered.

        Raises:
            As `Exchange.answered` and `Exchange.failed`.
        """
        while True:
            try:
                async with self._places:
                    response = await self._send(exchange)
            except httpx.HTTPError as error:
                wait_s: float | None = exchange.failed(error, self.url)
            else:
                wait_s = exchange.answered(response)
            if wait_s is None:
                return exchange.result
            await asyncio.sleep(wait_s)

    async def _send(self, exchange: Exchange[Any]) -> httpx.Response:
        """One request and its answer.

        httpx may lose a connection when a request is called off, and would count and hold it for
        ever: further requests take new ones then, and the last of the old goes with its client.
        """
        http = self._http
        self._running[http] += 1
        try:
            return await http.request(
                exchange.method,
                exchange.path,
                json=exchange.body,
                headers=exchange.headers(),
                timeout=httpx.Timeout(exchange.timeout_s + GRACE_S, connect=CONNECT_S),
            )
        except asyncio.CancelledError:
            if http is self._http:
                self._http = self._make()
            raise
        finally:
            self._running[http] -= 1
            if not self._running[http]:
                del self._running[http]
                if http is not self._http:
                    await http.aclose()


class BlockingTransport:
    """The same for threads that wait, over an event loop that all clients of a process share.

    A wait is over at once when Ctrl-C interrupts it, wherever its requests are.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._make = lambda: AsyncTransport(*arguments, **options)
        self._inner = self._make()
        self._process = os.getpid()
        self.url = self._inner.url

    def start(self, exchange: Exchange[Any]) -> concurrent.futures.Future[Any]:
        if self._process != os.getpid():  # a fork has neither the loop nor the connections
            self._inner, self._process = self._make(), os.getpid()
        return _LOOP.run(self._inner.ask(exchange))

    async def result(self, handle: concurrent.futures.Future[Any]) -> Any:
        try:
            return handle.result()
        except BaseException:
            handle.cancel()
            raise

    def cancel(self, handle: concurrent.futures.Future[Any]) -> None:
        handle.cancel()

    async def pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def close(self) -> None:
        if self._process == os.getpid():
            concurrent.futures.wait([_LOOP.run(self._inner.close())], CLOSE_S)


class _LoopThread:
    """An event loop in a thread of its own, begun when it is needed, and anew in a forked child."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, coroutine: Any) -> concurrent.futures.Future[Any]:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                work = self._loop.run_forever
                threading.Thread(target=work, name="raptide-client", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)


_LOOP = _LoopThread()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _LOOP.__init__())  # type: ignore[misc]


def plain_url(url: str) -> str:
    """The endpoint's root.

    Raises:
        ConfigError: it is no URL.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(
            f"The endpoint's URL begins with http:// or https://, but {url!r} was given."
        )
    root = url.rstrip("/").removesuffix("/v1")
    try:
        if not httpx.URL(root).host:
            raise ConfigError(f"{url!r} names no host.")
    except httpx.InvalidURL as error:
        raise ConfigError(f"{url!r} is no URL ({error}).") from None
    return root


def key_header(key: str | None) -> Mapping[str, str]:
    """Raises ConfigError where a key cannot stand in a header."""
    if key is None:
        return {}
    if not (key.isascii() and key.isprintable()) or not key.strip():
        raise ConfigError("An API key is plain printable text, but the one given is not.")
    return {"Authorization": f"Bearer {key.strip()}"}


def tls_context(verify: Verify, cert: Certificate | None) -> ssl.SSLContext:
    """What TLS is spoken with.

    Raises:
        ConfigError: a file is not there, or holds no certificates or no key.
    """
    if isinstance(verify, ssl.SSLContext):
        context = verify
    else:
        context = httpx.create_ssl_context(verify=verify is not False)
    try:
        if isinstance(verify, str | os.PathLike):
            place = Path(verify)
            context = ssl.create_default_context(
                cafile=None if place.is_dir() else str(place),
                capath=str(place) if place.is_dir() else None,
            )
        if cert is not None:
            context.load_cert_chain(*map(str, cert if isinstance(cert, tuple) else (cert,)))
    except (OSError, ssl.SSLError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise ConfigError(
            f"TLS cannot be set up of verify={verify!r} and cert={cert!r} ({reason}); give PEM "
            "files of certificates, and of the key with the second."
        ) from None
    return context
