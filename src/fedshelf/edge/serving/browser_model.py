"""The model in the browser: the files of `fedshelf edge serve --in-browser`.

ONNX Runtime's build for browsers is not part of the sources; `scripts/get-browser-runtime` puts it into `RUNTIME`.
"""

import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route

from fedshelf.core.errors import ModelError, UsageError
from fedshelf.core.system_errors import reason

RUNTIME = Path(__file__).with_name("browser_runtime")
RUNTIME_FILES = {
    "ort.wasm.min.mjs": "text/javascript",
    "ort-wasm-simd-threaded.mjs": "text/javascript",
    "ort-wasm-simd-threaded.wasm": "application/wasm",
}
_CHUNK = 1 << 18


@dataclass(frozen=True, kw_only=True, slots=True)
class BrowserModel:
    """A model file that browsers may fetch.

    Attributes:
        descriptor: the open file, so that a file that replaces it later does not reach browsers under its digest.
        size: its size in bytes.
        runtime: the folder of ONNX Runtime's files.
    """

    descriptor: int
    size: int
    runtime: Path

    @classmethod
    def open(cls, model: Path, runtime: Path = RUNTIME) -> "BrowserModel":
        """Open a model file for browsers.

        Args:
            model: the file.
            runtime: the folder of ONNX Runtime's files.

        Raises:
            UsageError: a file of ONNX Runtime is missing.
            ModelError: the model file cannot be read.
        """
        missing = [name for name in RUNTIME_FILES if not (runtime / name).is_file()]
        if missing:
            raise UsageError(
                f"--in-browser needs {', '.join(missing)} in '{runtime}': run 'make browser-runtime' in the source "
                "folder of FedShelf, and install FedShelf from there"
            )
        try:
            descriptor = os.open(model, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ModelError(f"model file '{model}' cannot be read: {reason(error)}") from error
        return cls(descriptor=descriptor, size=os.fstat(descriptor).st_size, runtime=runtime)

    def routes(self) -> list[Route]:
        """The routes of the model file and the runtime."""
        files = (Route(f"/runtime/{name}", self._file(name, kind)) for name, kind in RUNTIME_FILES.items())
        return [*files, Route("/v1/model.onnx", self._model)]

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)

    def _file(self, name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
        async def serve(request: Request) -> Response:
            return FileResponse(self.runtime / name, media_type=kind)

        return serve

    async def _model(self, request: Request) -> Response:
        return StreamingResponse(
            self._chunks(), media_type="application/octet-stream", headers={"content-length": str(self.size)}
        )

    def _chunks(self) -> Iterator[bytes]:
        for start in range(0, self.size, _CHUNK):
            yield os.pread(self.descriptor, min(_CHUNK, self.size - start), start)
