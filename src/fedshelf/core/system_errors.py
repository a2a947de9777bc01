"""Plain descriptions of errors from the system, the network and parsers, without numbers and class names."""

import http.client
import json
import os
import pwd
import socket
import ssl

_NAMES = {socket.EAI_NONAME: "name not known", socket.EAI_AGAIN: "no name server answers"}


def reason(error: BaseException) -> str:
    """Describe why something failed, as the end of a sentence.

    Args:
        error: an exception of the system or the standard library.

    Returns:
        For example `connection refused`, `name not known` or `no such file or directory`.
    """
    inner = getattr(error, "reason", None)
    if isinstance(inner, BaseException):  # urllib wraps the original error
        return reason(inner)
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError) and isinstance(inner, str):
        return f"TLS: {inner.lower().replace('_', ' ')}"
    if isinstance(error, socket.gaierror) and error.errno in _NAMES:
        return _NAMES[error.errno]
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, http.client.RemoteDisconnected):
        return "the connection was closed without an answer"
    if isinstance(error, http.client.BadStatusLine):
        return "the answer is not HTTP"
    if isinstance(error, http.client.IncompleteRead):
        return "the connection ended in the middle of an answer"
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def content_problem(error: BaseException) -> str:
    """Describe why the content of a file cannot be used, as a clause.

    Args:
        error: what its parser raised.

    Returns:
        For example `it is not JSON (line 1, column 1)` or `it lacks 'sha256'`.
    """
    match error:
        case KeyError():
            return f"it lacks {error}"
        case json.JSONDecodeError():
            return f"it is not JSON (line {error.lineno}, column {error.colno})"
        case UnicodeDecodeError():
            return "it is not UTF-8 text"
        case TypeError() | AttributeError():
            return "a value in it has the wrong type"
        case OSError():
            return reason(error)
    return str(error)


def current_user() -> str:
    """The user of this process, by name if known: `user 'fedshelf'`, otherwise `user id 1234`."""
    return user_name(os.geteuid())


def user_name(uid: int) -> str:
    """A user, by name if the system knows it.

    Args:
        uid: the user id.
    """
    try:
        return f"user '{pwd.getpwuid(uid).pw_name}'"
    except KeyError:
        return f"user id {uid}"
