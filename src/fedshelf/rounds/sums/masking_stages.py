"""One stage of secure aggregation at the server: the same message to all members, and an answer of each."""

from collections.abc import Callable, Iterable
from typing import Any

from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import EncryptionReply, EncryptionStage, Failure, MaskingReply, MaskingRequest, MaskingStage
from fedshelf.core.ports import Reply
from fedshelf.privacy.secure_aggregation import wire
from fedshelf.rounds.dispatch import Patience, Traffic
from fedshelf.rounds.plan import Context

FACTOR, AT_LEAST_SECONDS = 3.0, 20.0
"""How long a stage waits for the other half, relative to the first one, and in addition."""


def ask(
    context: Context, names: Iterable[str], request: MaskingRequest, kind: type[Any], add: Callable[[Any], None], *,
    on_problem: Callable[[str, str, Reply | None], None], traffic: Traffic, enough: Callable[[], bool] = lambda: False,
) -> None:  # fmt: skip
    """Send members the message of one stage, and wait for their answers.

    Args:
        context: the run.
        names: the members.
        request: the message.
        kind: the class of an answer.
        add: takes an answer.
        on_problem: called with a member whose answer is not used, why, and its reply if there is one.
        traffic: updated with what is sent and received.
        enough: whether no more answers are needed.
    """
    waiting = set(names)
    patience = Patience(len(waiting), factor=FACTOR, at_least=AT_LEAST_SECONDS, timer=context.timer)

    def on_reply(reply: Reply) -> None:
        waiting.discard(reply.client)
        patience.on_reply()
        try:
            add(content_of(reply, MaskingReply, request.stage, kind))
        except RefusedError as error:
            on_problem(reply.client, str(error), reply)

    context.dispatcher.dispatch(
        sorted(waiting), request.key, lambda name: request, on_reply, seconds=context.plan.rounds.timeout,
        traffic=traffic, enough=lambda now: patience.is_over(now) or enough(),
        answers=lambda reply: not isinstance(reply.message, MaskingReply) or is_for(reply.message, request),
    )  # fmt: skip
    if enough():
        return
    for name in sorted(waiting):
        there = context.membership.address(name) is not None
        on_problem(name, "no answer in time" if there else context.membership.absence(name), None)


def is_for(reply: MaskingReply, request: MaskingRequest) -> bool:
    """Whether a reply is one to this request, and not a late one to the stage before."""
    return (reply.purpose, reply.stage) == (request.purpose, request.stage)


def content_of(
    reply: Reply, message: type[MaskingReply | EncryptionReply], stage: MaskingStage | EncryptionStage, kind: type[Any]
) -> Any:
    """What a reply to one stage says.

    Args:
        reply: the reply.
        message: the class of its message.
        stage: the stage.
        kind: the class of the content.

    Raises:
        RefusedError: the client has failed, or it is not an answer of this stage.
    """
    given = reply.message
    if isinstance(given, Failure):
        raise RefusedError(given.reason)
    if not isinstance(given, message) or given.stage is not stage:
        raise RefusedError(reply.reason or f"it answered stage '{stage.value}' with something else")
    found = wire.from_text(given.content, kind)
    if found.member != reply.client:
        raise RefusedError("it answered in another store's name")
    return found
