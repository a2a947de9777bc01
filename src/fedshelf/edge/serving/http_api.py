"""The HTTP API and the page of `fedshelf edge serve`."""

import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ExceptionHandler

from fedshelf.core.errors import DataError, FedShelfError, RunError
from fedshelf.core.guess import Guess
from fedshelf.edge.serving.browser_model import BrowserModel
from fedshelf.edge.serving.correction_journal import Correction
from fedshelf.edge.serving.corrections import Corrections, TooManyWaitingError
from fedshelf.edge.serving.guard import Access, Guard
from fedshelf.edge.serving.local_head import LocalHead
from fedshelf.edge.serving.openapi import document
from fedshelf.edge.serving.photo_copy import clean_copy
from fedshelf.edge.serving.recognizer import BusyError, Prediction, Recognizer, digest
from fedshelf.edge.serving.session import Session
from fedshelf.edge.serving.uploads import read_form

logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 1
_STATIC = Path(__file__).with_name("static")
_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_IN_BROWSER = {
    "/in-browser.js": ("in-browser.js", "text/javascript"),
    "/service-worker.js": ("service-worker.js", "text/javascript"),
}
Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(
    session: Session, *, access: Access, corrections: Corrections | None = None, local_head: LocalHead | None = None,
    in_browser: BrowserModel | None = None,
) -> Guard:  # fmt: skip
    """The ASGI app.

    Args:
        session: the model.
        access: who may use it.
        corrections: files corrected photos; None: they are refused.
        local_head: learns from them at once; None: the next model does.
        in_browser: what browsers need to run the model themselves; None: the server runs it.
    """
    api = _Api(session, corrections, local_head, names_in_browser=in_browser is not None)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        api.recognizer.close()
        if in_browser is not None:
            in_browser.close()

    routes = [
        *(Route(path, _file(name, kind)) for path, (name, kind) in _PAGE.items()),
        Route("/favicon.ico", api.no_icon),
        Route("/healthz", api.health),
        Route("/readyz", api.ready),
        Route("/openapi.json", api.openapi),
        Route("/v1/model", api.model),
        Route("/v1/predict", _with_place(api.predict, api.recognizer), methods=["POST"]),
        Route("/v1/corrections", _with_place(api.correct, api.recognizer), methods=["POST"]),
    ]
    if in_browser is not None:
        routes += [Route(path, _file(name, kind)) for path, (name, kind) in _IN_BROWSER.items()]
        routes += in_browser.routes()
    app = Starlette(
        routes=routes, lifespan=lifespan,
        exception_handlers={
            HTTPException: cast(ExceptionHandler, _http_error), FedShelfError: _expected_error, Exception: _fault,
        },
    )  # fmt: skip
    return Guard(app=app, access=access, runs_wasm=in_browser is not None)


class _Api:
    def __init__(
        self, session: Session, corrections: Corrections | None, local_head: LocalHead | None, *, names_in_browser: bool
    ) -> None:
        self.recognizer = Recognizer(session, local_head)
        self._corrections = corrections
        info = session.info
        model = {
            "model": info.digest, "products": list(info.labels), "paths": list(info.paths),
            "threshold": info.threshold, "image_size": info.image_size, "precision": info.precision,
            "corrections": corrections is not None, "learns_at_once": local_head is not None,
            "in_browser": names_in_browser, "card": dict(info.card),
        }  # fmt: skip
        self._model = JSONResponse(model).body

    async def no_icon(self, request: Request) -> Response:
        return Response(status_code=204)

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        return JSONResponse({"status": "ready", "model": self.recognizer.session.info.digest})

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(document())

    async def model(self, request: Request) -> Response:
        return Response(self._model, media_type="application/json")

    async def predict(self, request: Request) -> Response:
        form = await read_form(request)
        if form.file is None:
            raise HTTPException(400, "the form has no photo: send it in the field 'file'")
        prediction = await self.recognizer.predict(form.file)
        return JSONResponse(_prediction(prediction, self.recognizer.session.info.digest))

    async def correct(self, request: Request) -> Response:
        corrections = self._corrections
        if corrections is None:
            raise HTTPException(404, "this server takes no corrections: start it with --data-dir FOLDER")
        form = await read_form(request)
        product = form.fields.get("product", "")
        if form.file is not None:
            photo, guess = form.file, (await self.recognizer.predict(form.file)).guesses[0]
        else:
            recent = self.recognizer.recent(form.fields.get("prediction", ""))
            if recent is None:
                raise HTTPException(
                    404, "the photo of that prediction is not remembered any more: send it in the field 'file'"
                )
            photo, guess = recent.data, recent.guess
        filed = await self.recognizer.in_worker(lambda: _file_correction(corrections, photo, product, guess))
        local_head = self.recognizer.local_head
        learned = await self.recognizer.in_worker(local_head.refresh) if local_head else frozenset()
        return JSONResponse({**_correction(filed), "learned": filed.id in learned})


def _file_correction(corrections: Corrections, photo: bytes, product: str, guess: Guess) -> Correction:
    return corrections.file(clean_copy(photo), product, source=digest(photo), guess=guess)


def _prediction(prediction: Prediction, model: str) -> dict[str, Any]:
    record = {
        "id": prediction.id,
        "predictions": [{"product": guess.label, "probability": guess.probability} for guess in prediction.guesses],
        "sure": prediction.is_sure, "model": model,
    }  # fmt: skip
    if prediction.is_sure:
        return record
    folder = prediction.folder
    return {**record, "folder": None if folder is None else {"path": folder.label, "probability": folder.probability}}


def _correction(correction: Correction) -> dict[str, Any]:
    return {
        "id": correction.id, "status": correction.status.value, "product": correction.product,
        "reason": correction.reason,
    }  # fmt: skip


def _file(name: str, kind: str) -> Endpoint:
    content = (_STATIC / name).read_bytes()

    async def serve(request: Request) -> Response:
        return Response(content, media_type=kind)

    return serve


def _with_place(endpoint: Endpoint, recognizer: Recognizer) -> Endpoint:
    """Answer 503 before a request is read, if there are too many."""

    @functools.wraps(endpoint)
    async def limited(request: Request) -> Response:
        try:
            with recognizer.place():
                return await endpoint(request)
        except BusyError:
            raise HTTPException(
                503, "too many photos at the same time: try again in a second",
                {"retry-after": str(RETRY_AFTER_SECONDS), "connection": "close"},
            ) from None  # fmt: skip

    return limited


async def _http_error(request: Request, error: HTTPException) -> Response:
    headers = dict(error.headers or {})
    if error.status_code == 413:  # the rest of the photo is not read
        headers["connection"] = "close"
    return JSONResponse({"error": error.detail}, error.status_code, headers)


async def _expected_error(request: Request, error: Exception) -> Response:
    if isinstance(error, TooManyWaitingError):
        return JSONResponse({"error": str(error)}, 429)
    if isinstance(error, DataError):
        return JSONResponse({"error": str(error)}, 422)
    logger.error("%s", error)
    return JSONResponse({"error": str(error)}, 507 if isinstance(error, RunError) else 500)


async def _fault(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "the server has a fault: its log has the details"}, 500)
