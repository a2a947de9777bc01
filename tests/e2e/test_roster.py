"""Servers that show another roster, or another chain's key, than the one that signs: real clients end, and say why."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from fedshelf.core.errors import RosterError
from fedshelf.core.ports import Joined
from fedshelf.deploy.credentials import Credentials
from fedshelf.deploy.flower_client import FleetSession
from fedshelf.deploy.flower_server import EmbeddedServer
from fedshelf.deploy.tls import ServerTls, certificate_fingerprint, client_context, ensure_server_tls
from fedshelf.identity import certificates
from fedshelf.identity.chain import Chain
from fedshelf.identity.keys import KeyPair
from fedshelf.identity.store_keys import StoreKeys
from fedshelf.identity.tokens import Token
from tests.ports import free_port
from tests.processes import Process, Site
from tests.unit.deploy.echo import PATIENCE, ThreadClient, expect

pytestmark = pytest.mark.e2e


class HostileChain(Chain):
    """Shows what it is told to, and enrolls with any secret."""

    show: Callable[[], str] | None = None

    def signed_roster(self) -> str:
        return super().signed_roster() if self.show is None else self.show()

    def enroll(self, secret: str, name: str, request: str):  # type: ignore[no-untyped-def]
        return super().enroll("" if self.is_open else secret, name, request)


@pytest.fixture
def tls(tmp_path: Path) -> ServerTls:
    return ensure_server_tls(tmp_path / "tls")


@pytest.fixture
def chain(tmp_path: Path) -> HostileChain:
    return HostileChain(tmp_path / "identity")


@pytest.fixture
def server(tls: ServerTls, chain: Chain) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(host="127.0.0.1", port=free_port(), tls=tls, chain=chain) as running:
        yield running


def token_of(server: EmbeddedServer, tls: ServerTls, chain: Chain, name: str = "lyon") -> Token:
    return chain.add(name, authority=certificate_fingerprint(tls.ca), addresses=(str(server.address),))


def client(pair: Site, server: EmbeddedServer, token: Token | None, *arguments: str) -> Process:
    """A store's real client, on a machine that knows nothing of the server's."""
    pair.address = f"localhost:{server.address.port}"
    state = str(pair.root / "state")
    given = () if token is None else ("--token", str(token))
    return pair.client("store-1", "--name", "lyon", "--state-dir", state, *given, *arguments)


def problem(process: Process) -> str:
    """The one sentence with which a client ends."""
    assert process.end() == 1, process.text()
    (sentence,) = re.findall(r"error: (.*)$", process.text())
    assert "Traceback" not in sentence
    return str(sentence)


def test_a_client_that_accepts_the_roster_joins_and_keeps_it(
    pair: Site, server: EmbeddedServer, tls: ServerTls, chain: HostileChain
) -> None:
    policy = pair.root / "policy.toml"
    policy.write_text(f'[server]\nroster-key = "{chain.key.text}"\n')
    running = client(pair, server, token_of(server, tls, chain), "--policy", str(policy))
    joined = expect(server.transport(), Joined)
    assert joined.join.client == "lyon"
    assert StoreKeys(pair.root / "state" / "keys").roster() == chain.roster()
    running.interrupt()
    running.end()


def test_a_forged_an_old_and_a_foreign_roster_end_the_client(
    pair: Site, server: EmbeddedServer, tls: ServerTls, chain: HostileChain
) -> None:
    """The server has the right certificate and authenticates the store: only the roster is wrong."""
    token = token_of(server, tls, chain)
    keys = StoreKeys(pair.root / "state" / "keys")
    FleetSession(Credentials(server.address, keys, name="lyon", token=token)).leave()
    before = chain.signed_roster()
    other = KeyPair.generate()
    chain.enroll(token_of(server, tls, chain, "nice").secret, "nice", _request(other))
    forged = chain.roster().signed(other)
    without = chain.roster().without("lyon", "now").signed(chain._keys)
    FleetSession(Credentials(server.address, keys, name="lyon")).leave()
    kept = keys.roster()

    for shown, expected in (
        (forged, "not signed by this chain's key"),
        (before, "an older roster than"),
        (without, "does not have this store's key as that of 'lyon'"),
        ("[" * 100_000, "not signed by this chain's key"),
    ):
        chain.show = lambda shown=shown: shown
        assert expected in problem(client(pair, server, token))
        assert keys.roster() == kept
    chain.show = None
    FleetSession(Credentials(server.address, keys, name="lyon")).leave()


def test_a_key_that_the_policy_does_not_name_ends_the_client_before_it_is_enrolled(
    pair: Site, server: EmbeddedServer, tls: ServerTls, chain: HostileChain
) -> None:
    policy, pinned = pair.root / "policy.toml", KeyPair.generate().public.text
    policy.write_text(f'[server]\nroster-key = "{pinned}"\n')
    told = problem(client(pair, server, token_of(server, tls, chain), "--policy", str(policy)))
    assert f"the chain's key at this server is {chain.key.text}, and this store's policy accepts {pinned} only" in told
    assert StoreKeys(pair.root / "state" / "keys").enrollment() is None


def test_a_server_cannot_change_the_chains_key_by_rejecting_a_store(
    pair: Site, server: EmbeddedServer, tls: ServerTls, chain: HostileChain, tmp_path: Path
) -> None:
    """The store starts over with the token that its service gives at every start, or with none."""
    token = token_of(server, tls, chain)
    keys = StoreKeys(pair.root / "state" / "keys")
    FleetSession(Credentials(server.address, keys, name="lyon", token=token)).leave()
    server.close()
    other = HostileChain(tmp_path / "other", is_open=True)
    with EmbeddedServer(host="127.0.0.1", port=server.address.port, tls=tls, chain=other) as hostile:
        for given in (token, None):
            assert "shows another chain's key than when this store was enrolled" in problem(
                client(pair, hostile, given)
            )
        enrollment = keys.enrollment()
        assert enrollment is not None
        assert enrollment.chain == chain.key
    anew = Chain(tmp_path / "anew")
    with EmbeddedServer(host="127.0.0.1", port=server.address.port, tls=tls, chain=anew) as second:
        token = token_of(second, tls, anew)  # headquarters vouches for the new key
        FleetSession(Credentials(second.address, keys, name="lyon", token=token)).leave()
    assert keys.roster() == anew.roster()


def test_a_roster_that_is_not_accepted_ends_also_a_client_that_was_connected(
    server: EmbeddedServer, tls: ServerTls, chain: HostileChain, tmp_path: Path
) -> None:
    """Unlike other errors of a server that has changed, which are waited out."""
    keys, token = StoreKeys(tmp_path / "lyon"), token_of(server, tls, chain)
    with ThreadClient(server.address, "lyon", insecure=False, keys=keys, token=token) as running:
        expect(server.transport(), Joined)
        server.close()
        chain.show = lambda: chain.roster().signed(KeyPair.generate())
        with (
            EmbeddedServer(host="127.0.0.1", port=server.address.port, tls=tls, chain=chain),
            pytest.raises(RosterError, match="not signed by this chain's key"),
        ):
            running.result.result(PATIENCE)


def test_only_an_admitted_store_gets_the_roster(server: EmbeddedServer, tls: ServerTls, chain: HostileChain) -> None:
    with httpx.Client(verify=client_context(tls.ca)) as stranger:
        assert stranger.get(f"https://{server.address}/fedshelf/roster").status_code == 401


def _request(keys: KeyPair) -> str:
    return certificates.signing_request(keys)
