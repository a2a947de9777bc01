"""Addresses as people type them."""

import pytest

from fedshelf.core.errors import UsageError
from fedshelf.deploy.address import Address, parse_address


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("192.168.1.100:8080", "192.168.1.100", 8080),
        ("shop.example:1", "shop.example", 1),
        ("[::1]:65535", "::1", 65535),
        ("localhost:0", "localhost", 0),
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
        ("https://shop:8080", "is a URL"),
        ("shop:http", "no valid port"),
        ("shop:65536", "no valid port"),
        ("shop:-1", "no valid port"),
        ("shop:²", "no valid port"),
        ("[]:80", "no valid host"),
        ("a b:80", "no valid host"),
    ],
)
def test_a_bad_address_is_named_with_an_example(text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as caught:
        parse_address(text)
    assert repr(text) in str(caught.value)
    assert "192.168.1.100:8080" in str(caught.value)
