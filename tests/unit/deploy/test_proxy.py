"""Which proxy the environment names for a server."""

import pytest

from fedshelf.core.errors import TransportError
from fedshelf.deploy.address import Address, parse_address
from fedshelf.deploy.proxy import proxy_for

SERVER = Address(host="shop.example", port=8080)


@pytest.mark.parametrize(
    ("environment", "encrypted", "expected"),
    [
        ({}, True, None),
        ({"https_proxy": "http://proxy:3128"}, True, "proxy:3128"),
        ({"HTTPS_PROXY": "http://proxy:3128/"}, True, "proxy:3128"),
        ({"https_proxy": "proxy:3128", "HTTPS_PROXY": "http://other:1"}, True, "proxy:3128"),
        ({"https_proxy": " ", "ALL_PROXY": "http://all:1"}, True, "all:1"),
        ({"https_proxy": "http://proxy:3128"}, False, None),
        ({"HTTP_PROXY": "http://proxy"}, False, "proxy:80"),
        ({"https_proxy": "http://[2001:db8::1]:3128"}, True, "[2001:db8::1]:3128"),
    ],
)
def test_a_proxy_is_named_by_the_variable_for_what_is_spoken(
    environment: dict[str, str], encrypted: bool, expected: str | None
) -> None:
    proxy = proxy_for(SERVER, encrypted=encrypted, environment=environment)
    assert (proxy and str(proxy.address)) == expected


def test_user_and_password_authorize_and_are_never_shown() -> None:
    proxy = proxy_for(SERVER, encrypted=True, environment={"https_proxy": "http://me:s%40me@proxy:3128"})
    assert proxy is not None
    assert proxy.headers == {"Proxy-Authorization": "Basic bWU6c0BtZQ=="}  # me:s@me
    assert str(proxy) == "the proxy proxy:3128 (https_proxy)"
    assert "bWU6" not in repr(proxy)


@pytest.mark.parametrize(
    "url",
    [
        "http://me:secret#1@proxy:3128",
        "http://me:secret/1@proxy:3128",
        "http://proxy:secret/",
        "http://proxy:3128#secret",
        "http://proxy:3128/secret",
        "http://proxy:99999?secret",
        "http://[secret:3128",
        "http://me:secret@:3128",
        "http://secret..proxy:3128",
        "http://me:secret@pro\u202exy:3128",
    ],
)
def test_a_url_that_cannot_be_read_is_named_by_its_variable_and_not_repeated(url: str) -> None:
    with pytest.raises(
        TransportError, match=r"HTTPS_PROXY does not hold a valid proxy URL .*percent-encoded"
    ) as caught:
        proxy_for(SERVER, encrypted=True, environment={"HTTPS_PROXY": url})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["socks5", "socks5h", "https"])
def test_a_proxy_of_another_kind_is_named(scheme: str) -> None:
    with pytest.raises(TransportError, match=f"of the kind {scheme}://; .*HTTP proxies"):
        proxy_for(SERVER, encrypted=True, environment={"ALL_PROXY": f"{scheme}://proxy:1080"})


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "[::1]", "a.localhost", "[::ffff:127.0.0.1]"])
def test_a_server_on_this_machine_is_never_reached_through_a_proxy(host: str) -> None:
    environment = {"HTTPS_PROXY": "http://me:#broken"}
    assert proxy_for(parse_address(f"{host}:8080"), encrypted=True, environment=environment) is None


@pytest.mark.parametrize(
    ("no_proxy", "server", "is_direct"),
    [
        ("*", "shop.example:8080", True),
        ("shop.example", "shop.example:8080", True),
        ("SHOP.example", "shop.EXAMPLE:8080", True),
        (".example", "shop.example:8080", True),
        ("example", "shop.example:8080", True),
        ("*.example", "shop.example:8080", True),
        ("op.example", "shop.example:8080", False),
        ("a, b ,shop.example", "shop.example:8080", True),
        ("a b shop.example", "shop.example:8080", True),
        ("shop.example:8080", "shop.example:8080", True),
        ("shop.example:443", "shop.example:8080", False),
        ("10.0.0.0/8", "10.1.2.3:8080", True),
        ("10.1.2.3/8", "10.9.9.9:8080", True),
        ("10.0.0.0/8", "11.1.2.3:8080", False),
        ("10.0.0.0/99", "10.1.2.3:8080", False),
        ("10.1.2.3", "10.1.2.3:8080", True),
        ("10.1.2.3:8080", "10.1.2.3:8080", True),
        ("2.3", "10.1.2.3:8080", False),
        ("2001:db8::/32", "[2001:db8::5]:8080", True),
        ("[2001:db8::5]", "[2001:db8::5]:8080", True),
        ("[2001:db8::5]:8080", "[2001:db8::5]:8080", True),
        ("2001:db8::5", "[2001:DB8:0::5]:8080", True),
        ("fe80::/10", "[2001:db8::5]:8080", False),
        ("", "shop.example:8080", False),
        (",,", "shop.example:8080", False),
    ],
)
def test_exceptions_are_names_domains_addresses_and_networks(no_proxy: str, server: str, is_direct: bool) -> None:
    for variable in ("NO_PROXY", "no_proxy"):
        environment = {"HTTPS_PROXY": "http://proxy:3128", variable: no_proxy}
        assert (proxy_for(parse_address(server), encrypted=True, environment=environment) is None) is is_direct
