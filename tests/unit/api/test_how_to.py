"""The how-to pages of the Python API: their code runs, and their tables name what there is."""

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import fedshelf
from fedshelf.tracking.queries import run_summary
from tests.howto import PAGES, run_python

REFERENCE = PAGES.parent / "reference" / "python-api.md"


def test_the_page_about_python_runs() -> None:
    found = run_python("python-api.md")
    assert len(run_summary(Path("runs/trial")).rounds) == 3
    assert [record.round for record in found["result"].history] == [1, 2]
    assert found["again"].classes == ("apple", "milk")


def test_the_ported_flower_client_runs_and_its_function_serves_fedprox_too() -> None:
    found = run_python("port-a-flower-client.md")
    result = found["result"]
    assert [len(record.clients) for record in result.history] == [4, 4, 4]
    assert result.classes == ("0", "1", "2")
    assert all(store.accuracy is not None for store in result.stores.values())
    assert result.history[-1].train_loss < result.history[0].train_loss
    prox = fedshelf.Federation(
        found["stores"], model=found["Net"], local_training=found["train"], algorithm="fedprox", image_size=32
    )
    assert prox.run(1, progress=False).history[0].accuracy is not None


def section(title: str) -> str:
    return REFERENCE.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]


def public(kind: type) -> set[str]:
    return {name for name in vars(kind) if name[0] != "_"}


@pytest.mark.parametrize("kind", [fedshelf.Result, fedshelf.StoreResult], ids=lambda kind: kind.__name__)
def test_the_reference_lists_all_attributes_and_methods_of_results(kind: Any) -> None:
    named = set(re.findall(r"`(\w+)[`(]", re.sub(r"\|[^|]*\|$", "", section(kind.__name__), flags=re.MULTILINE)))
    attributes = {field.name for field in fields(kind) if field.name[0] != "_"}
    assert named == attributes | {name for name in public(kind) if callable(getattr(kind, name))} - {"of"}


@pytest.mark.parametrize("name", ["Federation", "serve", "join"])
def test_the_reference_has_the_arguments_of_each_function(name: str) -> None:
    called = getattr(fedshelf, name)
    function = called.__init__ if inspect.isclass(called) else called
    parts = []
    for parameter in inspect.signature(function).parameters.values():
        plain = parameter.replace(annotation=inspect.Parameter.empty)
        parts += ["*"] * (parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts)
        parts += [str(plain).replace("'", '"')] if parameter.name != "self" else []
    assert f"{name}({', '.join(parts)})" in REFERENCE.read_text(encoding="utf-8")


def test_the_reference_has_all_algorithms_and_hooks() -> None:
    assert set(re.findall(r"`([FRS]\w+)`", section("Algorithms"))) == set(fedshelf.algorithms.__all__)
    assert public(fedshelf.Hooks) | {"num_examples", "round"} == {"before_step", "loss", "num_examples", "round"}
