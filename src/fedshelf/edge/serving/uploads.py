"""Reads the form that a request carries, with its size limited before anything is parsed."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

MAX_PHOTO_BYTES = 32 << 20
"""Larger than the photos of phones; `data.decode` limits what is decoded."""
MAX_BODY_BYTES = MAX_PHOTO_BYTES + (64 << 10)  # with the form around it
MAX_FIELDS, MAX_FIELD_BYTES = 4, 4096
BODY_SECONDS = 30.0


class _InMemoryParser(MultiPartParser):
    """Keeps photos in memory: nothing of them is written to a temporary file."""

    spool_max_size = MAX_BODY_BYTES + 1

    def discard(self) -> None:
        """Let go of what was read before a failure."""
        for file in self._files_to_close_on_error:
            file.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """A multipart form.

    Attributes:
        file: the content of the field `file`; None if there is none.
        fields: the other fields.
    """

    file: bytes | None
    fields: dict[str, str]


async def read_form(request: Request) -> Form:
    """Read a request's multipart form.

    Raises:
        HTTPException: it is too large (413), too slow (408), not a multipart form (415), or malformed (400).
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise HTTPException(415, "send a form: multipart/form-data with the photo in the field 'file'")
    parser = _InMemoryParser(
        request.headers, _chunks(request), max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES
    )  # fmt: skip
    parsed = None
    try:
        async with asyncio.timeout(BODY_SECONDS):
            parsed = await parser.parse()
    except TimeoutError:
        raise HTTPException(408, f"the photo did not arrive within {BODY_SECONDS:.0f} seconds: send it again") from None
    except ClientDisconnect:
        raise HTTPException(400, "the connection was closed before the photo was whole") from None
    except (MultiPartException, LookupError, ValueError) as error:
        reason = getattr(error, "message", "its content type, or a name in it, is damaged")
        raise HTTPException(400, f"the form cannot be read: {reason}") from error
    finally:
        if parsed is None:
            parser.discard()
    try:
        fields, file = {}, None
        for name, value in parsed.multi_items():
            if isinstance(value, UploadFile):
                if name != "file":
                    raise HTTPException(400, "the photo must be in the field 'file'")
                file = await value.read()
            else:
                fields[name] = value
        return Form(file=file, fields=fields)
    finally:
        await parsed.close()


async def _chunks(request: Request) -> AsyncGenerator[bytes, None]:
    """The body, as long as it is not too large."""
    too_large = HTTPException(413, f"the photo is too large: {MAX_PHOTO_BYTES >> 20} MiB is the most")
    announced = request.headers.get("content-length", "0")
    if not announced.isdigit() or len(announced) > 15 or int(announced) > MAX_BODY_BYTES:
        raise too_large
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise too_large
        yield chunk
