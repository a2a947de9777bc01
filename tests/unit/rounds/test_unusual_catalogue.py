"""A store that brings far more products than the others does not shape the run's catalogue without a person's word."""

import logging
from dataclasses import replace
from typing import Any

import pytest

from fedshelf.core.events import ClientRefused, RunStatus, Waiting
from fedshelf.core.messages import ClassFolder
from fedshelf.core.ports import Left
from tests.worlds import CLASSES, World

FLOOD = tuple(ClassFolder(leaf=f"product {n}", path=f"product {n}") for n in range(150))


def flooded(**plan: Any) -> World:
    """Two stores with the usual products, and one with 150 of its own."""
    world = World(plan=plan)
    peers = [world.peer(name) for name in world.names]
    peers[2].join = replace(peers[2].join, classes=FLOOD)
    for peer in peers:
        world.transport.connect(peer)
    return world


def test_the_start_waits_until_the_store_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    world = flooded()
    emit = world.sink.emit
    swapped: list[bool] = []

    def swap(event: Any) -> None:
        emit(event)
        if isinstance(event, Waiting) and "--confirm-catalogue" in event.what and not swapped:
            swapped.append(True)
            world.transport.arrive(Left(address="line-to-c"))
            world.transport.connect(world.peer("c", address="another-line-to-c"), delay=5.0)

    world.sink.emit = swap  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING):
        assert world.server().run() is RunStatus.FINISHED
    assert world.catalogue is not None
    assert world.catalogue.names == CLASSES
    assert caplog.text.count("'c' alone brings 150 of its 153 products") == 1
    assert "start the server again with --confirm-catalogue" in caplog.text


def test_more_stores_of_its_kind_make_it_usual() -> None:
    world = flooded()
    for name in "de":
        peer = world.peer("a", address=f"line-to-{name}")
        peer.join = replace(peer.join, client=name, classes=(*FLOOD, *peer.join.classes))
        world.transport.connect(peer, delay=30.0)
    assert world.server().run() is RunStatus.FINISHED
    assert world.catalogue is not None
    assert len(world.catalogue) == 153


def test_a_confirmed_catalogue_is_taken_as_it_is() -> None:
    world = flooded(confirmed=True)
    assert world.server().run() is RunStatus.FINISHED
    assert world.catalogue is not None
    assert len(world.catalogue) == 153


@pytest.mark.parametrize("classes", [(), (ClassFolder(leaf="x", path="/".join("x" * 40)),)], ids=["none", "too deep"])
def test_who_introduces_itself_without_usable_classes_does_not_count_for_the_start(
    classes: tuple[ClassFolder, ...],
) -> None:
    world = World(names=("a", "b"), num_rounds=1)
    peer = world.peer("a", address="odd-line")
    peer.join = replace(peer.join, client="odd", classes=classes)
    world.transport.connect(peer)
    world.transport.connect(world.peer("a"))
    world.transport.connect(world.peer("b"), delay=40.0)
    assert world.server().run() is RunStatus.FINISHED
    assert [event.client for event in world.sink.of(ClientRefused)] == ["odd"]
    assert [len(record.clients) for record in world.finished] == [2]
