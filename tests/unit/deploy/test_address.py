"""Addresses as people type them."""

import re

import pytest

from fedshelf.core.errors import UsageError
from fedshelf.deploy.address import (
    Address,
    own_addresses,
    parse_address,
    parse_advertised,
    parse_server_address,
    reachable_address,
)

LISTEN = Address(host="0.0.0.0", port=8080)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("192.168.1.100:8080", "192.168.1.100", 8080),
        ("shop.example:1", "shop.example", 1),
        ("[::1]:65535", "::1", 65535),
        ("localhost:0", "localhost", 0),
        ("fed_server:1", "fed_server", 1),  # Docker allows it
        ("[fe80::1%eth0]:80", "fe80::1%eth0", 80),
        (f"{'a' * 63}.example:1", f"{'a' * 63}.example", 1),
        ("münchen.example:1", "münchen.example", 1),
    ],
)
def test_an_address_is_read_and_written_back(text: str, host: str, port: int) -> None:
    address = parse_address(text)
    assert address == Address(host=host, port=port)
    assert str(address) == text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("localhost", "lacks a host or a port"),
        (":8080", "lacks a host or a port"),
        ("", "lacks a host or a port"),
        ("::1:8080", "without brackets"),
        ("[::1", "only one of the two brackets"),
        ("::1]:80", "only one of the two brackets"),
        ("[::1]", "lacks a host or a port"),
        ("https://shop:8080", "is a URL"),
        ("shop:http", "no valid port"),
        ("shop:65536", "no valid port"),
        ("shop:-1", "no valid port"),
        ("shop:²", "no valid port"),
        (f"shop:{'9' * 5000}", "no valid port"),
        ("[]:80", "no valid host"),
        ("a b:80", "no valid host"),
        ("a\x00b:80", "no valid host"),
        ("a\u202eb:80", "no valid host"),
        ("a..b:30001", "nothing stands between two of its dots"),
        (".b:30001", "nothing stands between two of its dots"),
        (f"{'a' * 70}.example:30001", "more than 63 characters"),
        (f"{'ü' * 60}.example:30001", "the name system cannot express it"),
        (f"{'a.' * 130}example:30001", "253 in all"),
    ],
)
def test_a_bad_address_is_named_with_an_example(text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as caught:
        parse_address(text)
    assert repr(text) in str(caught.value)
    assert "192.168.1.100:8080" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["0.0.0.0:30001", "[::]:30001", "[::ffff:0.0.0.0]:30001", "0:30001", "*:30001", "shop:0"]
)
def test_a_client_is_told_that_a_wildcard_is_the_server_s_side(text: str) -> None:
    parse_address(text)
    with pytest.raises(UsageError, match=f"--server-address {re.escape(text)} is what a server listens on"):
        parse_server_address(text)


@pytest.mark.parametrize("text", ["0.0.0.0", "[::]:8080", "*", "a..b", "http://shop.example", "shop.example:port", ""])
def test_what_cannot_be_advertised_is_named(text: str) -> None:
    with pytest.raises(UsageError, match="--advertise"):
        parse_advertised(text, LISTEN)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("shop.example", "shop.example:8080"),
        ("shop.example.", "shop.example:8080"),
        ("shop.example:443", "shop.example:443"),
        ("203.0.113.7", "203.0.113.7:8080"),
        ("2001:db8::7", "[2001:db8::7]:8080"),
        ("[2001:db8::7]", "[2001:db8::7]:8080"),
        ("[2001:db8::7]:443", "[2001:db8::7]:443"),
    ],
)
def test_the_port_may_be_left_out_where_there_is_a_default(text: str, expected: str) -> None:
    assert str(parse_advertised(text, LISTEN)) == expected


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [("127.0.0.1", True), ("127.1", True), ("::1", True), ("::ffff:127.0.0.1", True), ("localhost", True),
     ("LOCALHOST", True), ("a.localhost", True), ("notlocalhost", False), ("128.0.0.1", False), ("shop", False)],
)  # fmt: skip
def test_addresses_of_this_machine_are_known_in_all_notations(host: str, is_loopback: bool) -> None:
    assert Address(host=host, port=1).is_loopback is is_loopback


def test_a_server_that_listens_everywhere_is_reached_by_an_address_of_this_machine() -> None:
    for wildcard in ("0.0.0.0", "::", ""):
        found = reachable_address(Address(host=wildcard, port=8080))
        assert found.host in own_addresses()
        assert found.port == 8080
    listening = Address(host="shop.example", port=8080)
    assert reachable_address(listening) == listening
