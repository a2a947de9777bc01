"""The operating system's and the network's errors in plain words, without numbers and class names."""

import http.client
import os
import pwd
import socket
import ssl

_NAMES = {socket.EAI_NONAME: "name not known", socket.EAI_AGAIN: "no name server answers"}


def reason(error: BaseException) -> str:
    """Why something failed, as the end of a sentence.

    Args:
        error: what the system or the standard library raised.

    Returns:
        For example `connection refused`, `name not known` or `no such file or directory`.
    """
    inner = getattr(error, "reason", None)
    if isinstance(inner, BaseException):  # urllib wraps what it met
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


def current_user() -> str:
    """This process's user, by name where the system knows one: `user 'fedshelf'`, else `user id 1234`."""
    return user_name(os.geteuid())


def user_name(uid: int) -> str:
    """A user, by name where the system knows one.

    Args:
        uid: the user's number.
    """
    try:
        return f"user '{pwd.getpwuid(uid).pw_name}'"
    except KeyError:
        return f"user id {uid}"
