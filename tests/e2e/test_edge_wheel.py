"""The distribution fedshelf-edge: built, installed by pip into a fresh environment, and used there."""

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import httpx
import pytest

from fedshelf.edge.serving.browser_model import RUNTIME, RUNTIME_FILES
from tests.model_folders import tinted, write_model
from tests.unit.cli.screen import run

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]


def pip(*arguments: str) -> None:
    """Run pip, or skip if it cannot reach its index."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    if re.search("connection|No matching distribution|Network is unreachable|Temporary failure", done.stderr):
        pytest.skip(f"pip cannot reach its package index: {done.stderr.strip().splitlines()[-1]:.200}")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed command."""
    folder = tmp_path_factory.mktemp("till")
    pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT / "packaging/edge"))
    (wheel,) = folder.glob("fedshelf_edge-*.whl")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    pip("--python", str(folder / "venv/bin/python"), "install", "-c", str(ROOT / "constraints.txt"), str(wheel))
    return folder / "venv/bin/fedshelf-edge"


def clean_environment(home: Path) -> dict[str, str]:
    """Without the variables by which this project's sources would be found."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {
        "FEDSHELF_HOME": str(home), "PYTHONUNBUFFERED": "1",
    }  # fmt: skip


def test_it_names_a_photo_and_files_a_correction_without_torch(program: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "model", paths=["Warm/Red", "Cold/Green", "Cold/Blue"], image_size=32)
    code, text = run("export", str(tmp_path / "model"), "--format", "onnx", "--out", str(tmp_path / "m.onnx"))
    assert code == 0, text
    store = tmp_path / "store"
    (store / "Cold/Green").mkdir(parents=True)
    environment = clean_environment(tmp_path / "home")
    has_runtime = all((RUNTIME / name).exists() for name in RUNTIME_FILES)
    process = subprocess.Popen(
        [program, "serve", str(tmp_path / "m.onnx"), "--port", "0", "--data-dir", str(store),
         *(["--in-browser"] if has_runtime else [])],
        text=True, stdout=subprocess.PIPE, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        found = re.search(r" at (http://\S+)", process.stdout.readline())
        assert found
        photo = encoded("Red")
        with httpx.Client(base_url=found[1], timeout=60) as client:
            answer = client.post("v1/predict", files={"file": photo}).json()
            assert answer["predictions"][0]["product"] == "Red"
            filed = client.post("v1/corrections", files={"file": encoded("Green")}, data={"product": "Green"}).json()
            assert "<title>" in client.get("/").text
            if has_runtime:
                sent = client.get("runtime/ort-wasm-simd-threaded.wasm")
                assert sent.headers["content-type"] == "application/wasm"
                assert sent.content == (RUNTIME / "ort-wasm-simd-threaded.wasm").read_bytes()
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert filed["status"] == "training"
    assert len(list(store.glob("Cold/Green/correction-*.jpg"))) == 1
    listed = subprocess.run(
        [program, "corrections", "list", str(store), "--json"], check=True, capture_output=True, text=True,
        env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert [record["id"] for record in json.loads(listed.stdout)] == [filed["id"]]


def test_nothing_of_training_is_installed_and_it_has_no_file_in_common_with_fedshelf(program: Path) -> None:
    code = """
import importlib.metadata, importlib.util
names = ("torch", "timm", "torchvision", "flwr", "typer", "pydantic", "fedshelf")
files = {str(file).split("/")[0] for file in importlib.metadata.files("fedshelf-edge")}
print([name for name in names if importlib.util.find_spec(name)], sorted(n for n in files if "dist-info" not in n))
"""
    done = subprocess.run(
        [program.with_name("python"), "-c", code], check=True, capture_output=True, text=True,
        env=clean_environment(program.parent),
    )  # fmt: skip
    assert done.stdout.strip() == "[] ['..', 'fedshelf_edge']"  # '..': the command in bin/


def encoded(label: str) -> bytes:
    """A noisy photo of a product's color (PNG)."""
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(tinted(label, 5)).save(out, "PNG")
    return out.getvalue()
