"""A client as an ordinary Flower app, for stock `flower-supernode`. Documented Flower API only.

There, each message runs in a new process: the client is built anew for each, from the node's configuration
(``flower-supernode --node-config 'data-dir="…" name="…" state-dir="…"'``).
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedshelf.core.messages import Failure, Join
from fedshelf.deploy.client_part import ClientPart, Handler
from fedshelf.deploy.failure_text import failure_text
from fedshelf.deploy.records import WireMessage, to_parcel

LOG = logging.getLogger(__name__)

MakeHandler: TypeAlias = Callable[[Mapping[str, Any]], tuple[Join, Handler]]


def make_client_app(make_handler: MakeHandler) -> ClientApp:
    """The app; `make_handler` builds a client from the node's configuration, for each message."""
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        reply: WireMessage
        try:
            join, handle = make_handler(context.node_config)
        except Exception as error:
            LOG.exception("the client could not be built from its node configuration")
            reply = Failure(reason=failure_text(error))
        else:
            reply, _ = ClientPart(join=join, handle=handle).answer(message)
        return Message(to_parcel(reply).inline(), reply_to=message)

    for entry in (app.train(), app.evaluate(), app.query()):
        entry(answer)
    return app
