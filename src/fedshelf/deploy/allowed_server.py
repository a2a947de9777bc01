"""Whether a store's policy allows the server that its client is about to connect to."""

from pathlib import Path

from fedshelf.config.places import tls_directory
from fedshelf.core.errors import PolicyError
from fedshelf.deploy.address import parse_server_address
from fedshelf.deploy.credentials import fetch_authority
from fedshelf.deploy.tls import certificate_fingerprint, client_context, local_authority
from fedshelf.identity.store_keys import StoreKeys
from fedshelf.identity.tokens import Token
from fedshelf.privacy.policy_tables import Server


def check_server(
    allowed: Server, server_address: str, *, keys: StoreKeys, token: Token | None, ca: Path | None, insecure: bool
) -> Path | None:
    """Check a server's address and the certificate authorities that the client would trust, before anything is sent.

    Args:
        allowed: what the policy allows.
        server_address: HOST:PORT.
        keys: the store's keys.
        token: admits the store, if it has one.
        ca: the certificate authority that the user gave.
        insecure: whether TLS is disabled.

    Returns:
        The only certificate authority to trust; None for the one that enrolling gives, or for any.

    Raises:
        PolicyError: the policy does not allow the server.
        UsageError: the address or the certificate is invalid.
    """
    address = str(parse_server_address(server_address))
    if allowed.authorities and not insecure:
        client_context(ca)
        named = token.authority if token else ""
        if not (ca or named or keys.authority_file) and local_authority():
            ca = tls_directory() / "ca.pem"
        files = [path for path in (ca, None if ca or named else keys.authority_file) if path is not None]
        for authority in filter(None, [*map(certificate_fingerprint, files), named]):
            allowed.check(address, authority)
        if files or named:
            return ca
    allowed.check(address, "")
    return ca


def look_at_server(allowed: Server, server_address: str) -> tuple[str, str]:
    """Fetch the certificate authority of a server, and check both. The answer is not authenticated.

    Args:
        allowed: what the policy allows.
        server_address: HOST:PORT.

    Returns:
        The authority's fingerprint, "" if the server has no authority of its own; and why the policy does not allow the
        server, "" if it does.

    Raises:
        UsageError: the address is invalid.
        TransportError: the server cannot be reached.
    """
    address = parse_server_address(server_address)
    _, authority = fetch_authority(address)
    try:
        allowed.check(str(address), authority)
    except PolicyError as error:
        return authority, str(error)
    return authority, ""
