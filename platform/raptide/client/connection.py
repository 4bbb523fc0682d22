"""What a client of either kind is made with: where the endpoint is, and how it is asked."""

from __future__ import annotations

import os
from typing import Any

from raptide.client.exchange import Patience
from raptide.client.methods import refuse_small
from raptide.client.runner import Runner
from raptide.client.transport import Certificate, Verify


class Connection:
    """The part of both clients that knows nothing of threads or event loops."""

    _opens: Any
    """The transport's class."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        model: str | None = None,
        *,
        weights: str | None = None,
        timeout_s: float = 300.0,
        retry_s: float = 120.0,
        parallel: int = 4,
        chunk_sequences: int = 64,
        progress: bool = False,
        verify: Verify = True,
        cert: Certificate | None = None,
    ) -> None:
        """Nothing is sent yet.

        Args:
            url: where the endpoint is, `http://host:port`.
            key: API key; None takes RAPTIDE_API_KEY from the environment, if it is set.
            model: a name of `models()`; None leaves the choice to the endpoint.
            weights: digest of the only weights that may answer, as `weights` or `models()` give it;
                None takes those that answer first, for each call anew.
            timeout_s: seconds one request may take, its wait in the endpoint's queue included.
            retry_s: seconds to go on trying while nothing is answered; a proxy restarts in less
                than the default. 0 never tries again.
            parallel: requests at once.
            chunk_sequences: sequences in one request.
            progress: show a bar on stderr.
            verify: how the endpoint's certificate is checked: True by the authorities that httpx
                knows (SSL_CERT_FILE and SSL_CERT_DIR replace them), a file or folder by the ones in
                it, False not at all; or an ssl.SSLContext.
            cert: the client's own certificate: a PEM file with its key, or (file, key's file).

        Raises:
            ConfigError: an argument is out of range, or the URL is none.
        """
        for name, value, least in (
            ("timeout_s", timeout_s, 0.001),
            ("retry_s", retry_s, 0),
            ("parallel", parallel, 1),
            ("chunk_sequences", chunk_sequences, 1),
        ):
            refuse_small(name, value, least)
        self._transport = self._opens(url, key_of(key), parallel, verify, cert)
        self._runner = Runner(
            *(self._transport, model, weights, timeout_s, Patience(retry_s)),
            *(parallel, chunk_sequences, progress),
        )

    @property
    def weights(self) -> str | None:
        """Digest of the weights that answered last; before, of those that were asked for."""
        return self._runner.met or self._runner.weights


def key_of(key: str | None) -> str | None:
    """A key, or that of the environment."""
    return key if key is not None else os.environ.get("RAPTIDE_API_KEY") or None
