"""The certificate and key that a server shows, read before it listens and again whenever they were renewed.

Each reading makes a context of its own, so that a bad pair leaves the one before untouched: OpenSSL takes a certificate
before it looks at the key, and a context that failed half way serves nobody.
"""

from __future__ import annotations

import os
import ssl
import stat
from typing import Final

__all__ = ["BadCertificate", "Certificates"]

# All of them with forward secrecy and authenticated encryption; TLS 1.3 has no others.
_CIPHERS_OF_1_2: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"

# What OpenSSL says, by version and by kind of key, when the two are not one another's.
_MISMATCH: Final = {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"}


class BadCertificate(ValueError):
    """TLS cannot be served with this certificate and key; the message says which file is wrong, and how."""


class _Encrypted(Exception):
    """OpenSSL asked for a password."""


class Certificates:
    """A certificate and its key in files, and the context of those that were read last.

    Args:
        certfile: PEM, the certificate first, then those between it and the root.
        keyfile: PEM, not encrypted; may be the same file.

    Attributes:
        context: for the next handshake.

    Raises:
        BadCertificate: they cannot be used.
    """

    def __init__(self, certfile: str, keyfile: str) -> None:
        self.certfile = certfile
        self.keyfile = keyfile
        self.context = _make_context(certfile, keyfile)

    def reload(self) -> None:
        """Read both files again: handshakes from now on get what is in them. Blocks for as long as reading does.

        Raises:
            BadCertificate: they cannot be used; what was read before stays.
        """
        self.context = _make_context(self.certfile, self.keyfile)


def _make_context(certfile: str, keyfile: str) -> ssl.SSLContext:
    for what, path in (("certificate", certfile), ("key", keyfile)):
        _check_readable(what, path)
    try:
        # On its own: the errors of loading both do not tell whose they are.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(certfile)
    except ssl.SSLError as error:
        raise BadCertificate(f"{certfile} holds no certificate in PEM form") from error
    except OSError as error:
        # Whoever renews it may have taken it away since we looked.
        raise BadCertificate(f"the certificate {certfile} cannot be read: {error.strerror or error}") from error
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS_OF_1_2)
    # A peer could have us do it again and again, and it is cheap for the peer alone.
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certfile, keyfile, password=_refuse_password)
    except _Encrypted as error:
        raise BadCertificate(f"the key in {keyfile} is encrypted; only one without a password can be used") from error
    except ssl.SSLError as error:
        if error.reason in _MISMATCH:
            raise BadCertificate(f"the key in {keyfile} is not that of the first certificate in {certfile}") from error
        if error.reason in (None, "PEM_LIB"):
            raise BadCertificate(f"{keyfile} holds no private key in PEM form") from error
        reason = error.reason.lower().replace("_", " ")
        raise BadCertificate(f"the certificate in {certfile} and its key cannot be used: {reason}") from error
    except OSError as error:
        raise BadCertificate(f"{certfile} or {keyfile} cannot be read: {error.strerror or error}") from error
    return context


def _check_readable(what: str, path: str) -> None:
    try:
        # First, for opening a pipe would wait for whoever writes into it.
        is_file = stat.S_ISREG(os.stat(path).st_mode)
        if is_file:
            with open(path, "rb"):
                pass
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "this is no path"
        raise BadCertificate(f"the {what} {path} cannot be read: {why}") from error
    if not is_file:
        raise BadCertificate(f"the {what} {path} cannot be read: it is no regular file")


def _refuse_password() -> str:
    # Without this OpenSSL asks on the terminal, and waits.
    raise _Encrypted
