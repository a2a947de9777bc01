"""What a client may send to whom before it has been enrolled."""

import socket
from pathlib import Path

import pytest

from fedshelf.config import places
from fedshelf.deploy.address import Address
from fedshelf.deploy.credentials import local_secret
from fedshelf.identity.chain import Chain


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", socket.gethostname()])
def test_a_server_on_this_machine_gets_the_secret_that_it_left(home: Path, host: str) -> None:
    assert local_secret(Address(host=host, port=1)) == ""
    secret = Chain(places.identity_directory()).local_token()
    assert local_secret(Address(host=host, port=1)) == secret


@pytest.mark.parametrize("host", ["shop.example", "203.0.113.7", "127.0.0.1.example"])
def test_another_machine_does_not_get_it(home: Path, host: str) -> None:
    Chain(places.identity_directory()).local_token()
    assert local_secret(Address(host=host, port=1)) == ""
