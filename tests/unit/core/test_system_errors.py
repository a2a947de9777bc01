"""What the system and the network refuse, in words for a person."""

import errno
import http.client
import json
import os
import socket
import ssl
import urllib.error

import pytest

from fedshelf.core.system_errors import content_problem, current_user, reason, user_name
from tests.other_user import UID


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "connection refused"),
        (OSError(errno.EHOSTUNREACH, "No route to host"), "no route to host"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/srv/x"), "no such file or directory"),
        (OSError(errno.EIO, "I/O error"), "I/O error"),
        (OSError("no number"), "no number"),
        (OSError(), "OSError"),
        (TimeoutError(), "timed out"),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "name not known"),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), "no name server answers"),
        (socket.gaierror(socket.EAI_FAMILY, "ai_family not supported"), "ai_family not supported"),
        (urllib.error.URLError(ConnectionRefusedError(111, "Connection refused")), "connection refused"),
        (http.client.RemoteDisconnected("Remote end closed connection"), "the connection was closed without an answer"),
        (http.client.BadStatusLine("\x15\x03\x03"), "the answer is not HTTP"),
        (http.client.IncompleteRead(b"half", 4), "the connection ended in the middle of an answer"),
        (ssl.SSLEOFError(8, "EOF occurred in violation of protocol"), "EOF occurred in violation of protocol"),
        (UnicodeError("label empty or too long"), "label empty or too long"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_reason_holds_no_number_and_no_class(error: Exception, words: str) -> None:
    assert reason(error) == words


def test_a_real_handshake_with_a_program_that_does_not_encrypt_is_told() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
    with ours, theirs, pytest.raises(ssl.SSLError) as caught:
        ssl.create_default_context().wrap_socket(ours, server_hostname="x")
    assert reason(caught.value).startswith("TLS: ")


def test_a_user_is_told_by_name_where_there_is_one() -> None:
    assert user_name(0) == "user 'root'"
    assert user_name(UID) == f"user id {UID}"
    assert current_user() == user_name(os.geteuid())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is not JSON (line 1, column 1)"),
        (b"{\n", "it is not JSON (line 2, column 1)"),
        (b"\xff", "it is not UTF-8 text"),
        (b"{}", "it lacks 'rounds'"),
        (b"[]", "a value in it has the wrong type"),
        (b'{"rounds": "x"}', "invalid literal for int() with base 10: 'x'"),
    ],
)
def test_a_problem_with_content_names_no_class(content: bytes, words: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)) as caught:
        int(json.loads(content.decode("utf-8"))["rounds"])
    assert content_problem(caught.value) == words
