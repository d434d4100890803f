"""Certificates for the tests: a CA of their own, and files as a server reads them and a client's `SSL_CERT_FILE` names."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from pathlib import Path

import trustme

from wakecall.http.tls import Certificates

__all__ = ["Authority"]


class Authority:
    """A CA that nobody trusts but who is told to.

    Args:
        directory: where its files go.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._authority = trustme.CA()
        self.file = str(directory / "ca.pem")
        self._authority.cert_pem.write_to_path(self.file)

    @property
    def trust(self) -> ssl.SSLContext:
        """A client's context that trusts it."""
        context = ssl.create_default_context()
        self._authority.configure_trust(context)
        context.set_alpn_protocols(["http/1.1"])
        return context

    def issue(
        self, *names: str, to: str = "server", not_after: datetime = datetime(2090, 1, 1, tzinfo=UTC)
    ) -> tuple[str, str]:
        """The paths of a new certificate and its key, for `names` or else all of loopback's."""
        names = names or ("localhost", "127.0.0.1", "::1")
        issued = self._authority.issue_cert(*names, not_before=datetime(2020, 1, 1, tzinfo=UTC), not_after=not_after)
        certfile, keyfile = self.directory / f"{to}.pem", self.directory / f"{to}.key"
        certfile.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        keyfile.write_bytes(issued.private_key_pem.bytes())
        return str(certfile), str(keyfile)

    def certificates(self) -> Certificates:
        """A new pair, read."""
        return Certificates(*self.issue())
