"""Connections are counted: strangers by address, stores by name."""

from collections import Counter

from fedshelf.deploy.http_server import MAX_PER_STORE, MAX_STRANGERS, MAX_STRANGERS_PER_ADDRESS, Connections


def test_an_address_has_so_many_connections_and_others_have_theirs() -> None:
    counted: Counter[tuple[str, str]] = Counter()
    connections = Connections(lambda what, address: counted.update([(what, address)]))
    slots = [connections.open("198.51.100.7") for _ in range(MAX_STRANGERS_PER_ADDRESS)]
    assert all(slots)
    assert connections.open("198.51.100.7") is None
    assert counted == {("too many connections", "198.51.100.7"): 1}
    assert connections.open("198.51.100.8") is not None
    assert slots[0] is not None
    slots[0].close()
    slots[0].close()  # twice counts once
    assert connections.open("198.51.100.7") is not None
    assert connections.open("198.51.100.7") is None


def test_all_strangers_together_have_so_many_connections() -> None:
    connections = Connections(lambda what, address: None)
    assert all(connections.open(f"2001:db8::{number}") for number in range(MAX_STRANGERS))
    assert connections.open("another") is None


def test_a_store_is_no_longer_counted_as_a_stranger_and_has_so_many_connections() -> None:
    connections = Connections(lambda what, address: None)
    slots = []
    for _ in range(MAX_PER_STORE + 1):
        slot = connections.open("198.51.100.7")
        assert slot is not None
        slots.append(slot)
    assert [slot.admit("lyon") for slot in slots] == [True] * MAX_PER_STORE + [False]
    assert all(connections.open("198.51.100.7") for _ in range(MAX_STRANGERS_PER_ADDRESS)), "none is a stranger's"
    slots.pop().close()
    slots.pop().close()
    again = connections.open("198.51.100.9")
    assert again is not None
    assert again.admit("lyon")
    assert again.admit("lyon")  # a second request on it
