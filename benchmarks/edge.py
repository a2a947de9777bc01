"""*edge*: what `fedshelf-edge serve` costs, compared with ONNX Runtime on the same file, in one run.

All ways of naming a photo take turns, so that a busy machine slows them alike. Figures are medians over repetitions.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import onnxruntime
import psutil

from benchmarks import results
from benchmarks.measure import MeasurementError
from benchmarks.results import Outcome
from fedshelf.data.decode import decode
from fedshelf.edge.model_info import INPUT, OUTPUT
from fedshelf.edge.serving.session import Session

START_LIMIT, MEMORY_LIMIT, SESSION_LIMIT, HTTP_LIMIT = 3.0, 130.0, 1.15, 3.0
WARM_UP = 5
_BOUNDARY = "fedshelf"


def measure(model: Path, photos: Path, repetitions: int) -> Outcome:
    """Measure a model file on photos.

    Args:
        model: the model file.
        photos: folder of photos (JPEG).
        repetitions: how often each way names a photo.

    Raises:
        MeasurementError: there is no photo, the server does not start, or the ways disagree.
    """
    files = sorted(photos.rglob("*.jpg"))[:50]
    if not files:
        raise MeasurementError(f"'{photos}' holds no .jpg file")
    data = [file.read_bytes() for file in files]
    session, bare = Session.open(model), onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    size = session.info.image_size
    pixels = [decode(photo, size) for photo in data]

    def run_bare(pixels_HW3: np.ndarray) -> str:
        (probabilities,) = bare.run([OUTPUT], {INPUT: pixels_HW3[None]})
        return session.info.labels[int(probabilities[0].argmax())]

    def run_session(photo: bytes) -> str:
        probabilities_K = session.predict(session.decode(photo))
        session.is_sure(probabilities_K)
        session.sure_folder(probabilities_K)
        return session.top(probabilities_K, 5)[0].label

    forms = [_form(photo) for photo in data]
    with _serving(model) as (client, process, began):
        _ask(client, forms[0])
        first_answer = time.monotonic() - began
        ways: Mapping[str, Callable[[int], str]] = {
            "session.run": lambda n: run_bare(pixels[n]),
            "decode + session.run": lambda n: run_bare(decode(data[n], size)),
            "decode + our session": lambda n: run_session(data[n]),
            "HTTP": lambda n: _ask(client, forms[n]),
        }
        seconds = _turns(ways, len(data), repetitions)
        memory = _peak_mb(process)
    median = {way: statistics.median(values) for way, values in seconds.items()}
    ratio = median["decode + our session"] / median["decode + session.run"]
    added = 1000 * (median["HTTP"] - median["decode + our session"])
    rows = [[way, f"{1000 * value:.2f}"] for way, value in median.items()]
    limits = [
        ["decode + our session ÷ decode + session.run", f"{ratio:.3f}", f"{SESSION_LIMIT:g}"],
        ["HTTP adds, ms", f"{added:.2f}", f"{HTTP_LIMIT:g}"],
        ["start to first answer, s", f"{first_answer:.2f}", f"{START_LIMIT:g}"],
        ["peak memory of the server, MB", f"{memory:.0f}", f"{MEMORY_LIMIT:g}"],
    ]
    text = (
        f"{results.table(['one photo', 'p50 ms'], rows)}\n\n{results.table(['what', 'measured', 'limit'], limits)}\n\n"
        f"A model file of {model.stat().st_size / 1e6:.1f} MB with input of {size} pixels, {len(data)} photos, "
        f"{repetitions} repetitions of each way in turn."
    )
    summary = {
        "ratio": round(ratio, 3), "http_ms": round(added, 2), "first_answer": round(first_answer, 2),
        "peak_mb": round(memory),
    }  # fmt: skip
    return Outcome(summary=summary, text=text)


def _turns(ways: Mapping[str, Callable[[int], str]], num_photos: int, repetitions: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(-WARM_UP, repetitions):
        answers = set()
        for way, name in ways.items():
            began = time.perf_counter()
            answers.add(name(turn % num_photos))
            if turn >= 0:
                seconds[way].append(time.perf_counter() - began)
        if len(answers) > 1:
            raise MeasurementError(f"the ways name different products: {sorted(answers)}")
    return seconds


@contextlib.contextmanager
def _serving(model: Path) -> Iterator[tuple[HTTPConnection, psutil.Process, float]]:
    with tempfile.TemporaryDirectory() as home:
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "fedshelf.edge.till", "serve", str(model), "--port", "0"], text=True,
            stdout=subprocess.PIPE, env={**os.environ, "FEDSHELF_HOME": home, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            line = process.stdout.readline() if process.stdout else ""
            if " at " not in line:
                raise MeasurementError("'fedshelf-edge serve' did not start")
            address = urlsplit(line.rpartition(" at ")[2].strip())
            with contextlib.closing(HTTPConnection(address.hostname or "", address.port, timeout=30)) as client:
                yield client, psutil.Process(process.pid), began
        finally:
            process.terminate()
            process.wait()
            if process.stdout:
                process.stdout.close()


def _form(photo: bytes) -> bytes:
    """A form with a photo, as a till sends it; made before the clock runs."""
    head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="photo.jpg"\r\n\r\n'
    return head.encode() + photo + f"\r\n--{_BOUNDARY}--\r\n".encode()


def _ask(client: HTTPConnection, form: bytes) -> str:
    client.request("POST", "/v1/predict", form, {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"})
    answer = client.getresponse()
    content = answer.read()
    if answer.status != 200:
        raise MeasurementError(f"the server answered {answer.status}: {content[:200]!r}")
    return str(json.loads(content)["predictions"][0]["product"])


def _peak_mb(process: psutil.Process) -> float:
    status = Path(f"/proc/{process.pid}/status")
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024 / 1e6
    return float(process.memory_info().rss) / 1e6
