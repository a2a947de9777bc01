"""Weights from a file: what is read, what fits, and where the rows of the head go."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from fedshelf.core.errors import ModelError
from fedshelf.core.events import WeightsLoaded
from fedshelf.models.build import build
from fedshelf.models.initial_weights import check_fit, extra_tensors, load_initial_weights, read_initial_weights
from fedshelf.models.settings import ModelSettings
from fedshelf.storage.model_files import save_model

OLD = ("apple", "milk", "tea")


def make(name: str = "resnet10", classes: int = 3, seed: int = 0, **settings: Any) -> nn.Module:
    given: dict[str, Any] = {"image_size": 32, "width": 4, **settings}
    return build(ModelSettings(name=name, num_classes=classes, **given), seed=seed)


def saved(path: Path, tensors: Any, *, labels: Sequence[str] | None = None, **metadata: str) -> Path:
    """A file of another program, with its labels next to it."""
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata or None)
    else:
        torch.save(tensors, path)
    if labels is not None:
        path.with_name("labels.json").write_text(json.dumps(labels))
    return path


def load(module: nn.Module, path: Path, names: Sequence[str] = OLD) -> WeightsLoaded:
    return load_initial_weights(module, read_initial_weights(path), names)


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_rows(module: nn.Module, expected: Mapping[int, tuple[Mapping[str, Tensor], int]]) -> None:
    """Each row of the head, by its position, is the given row of the given tensors."""
    head = module.state_dict()
    for row, (tensors, position) in expected.items():
        assert torch.equal(head["head.weight"][row], tensors["head.weight"][position])
        assert torch.equal(head["head.bias"][row], tensors["head.bias"][position])


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "wrapped.pth", "w.bin"])
def test_weights_are_loaded_whole_from_either_kind_of_file(tmp_path: Path, name: str) -> None:
    tensors: Any = make(seed=1).state_dict()
    path = saved(tmp_path / name, {"state_dict": tensors, "epoch": 3} if "wrapped" in name else tensors, labels=OLD)
    target = make(seed=2)
    assert load(target, path) == WeightsLoaded(file=name, kept=OLD)
    assert all(torch.equal(t, target.state_dict()[n]) for n, t in tensors.items())


def test_a_files_content_says_what_kind_it_is_not_its_name(tmp_path: Path) -> None:
    tensors = make(seed=1).state_dict()
    shutil.move(saved(tmp_path / "w.safetensors", tensors), tmp_path / "weights.pt")
    shutil.move(saved(tmp_path / "w.pt", tensors), tmp_path / "weights.safetensors")
    for name in ("weights.pt", "weights.safetensors"):
        assert read_initial_weights(tmp_path / name).tensors.keys() == tensors.keys()


def test_rows_go_where_their_products_are(tmp_path: Path) -> None:
    source, target = make(seed=1).state_dict(), make(classes=4, seed=2)
    fresh = copied(target)
    path = saved(tmp_path / "w.safetensors", source, labels=OLD)
    loaded = load(target, path, ("apple", "kiwi", "tea", "zucchini"))
    assert loaded == WeightsLoaded(
        file="w.safetensors", kept=("apple", "tea"), added=("kiwi", "zucchini"), dropped=("milk",)
    )
    assert_rows(target, {0: (source, 0), 1: (fresh, 1), 2: (source, 2), 3: (fresh, 3)})
    assert torch.equal(target.state_dict()["stem.0.weight"], source["stem.0.weight"])


def test_as_many_products_in_another_order_are_not_taken_for_one_another(tmp_path: Path) -> None:
    source, target = make(seed=1).state_dict(), make(seed=2)
    fresh = copied(target)
    path = saved(tmp_path / "w.safetensors", source, labels=OLD)
    assert load(target, path, ("milk", "soap", "tea")) == WeightsLoaded(
        file="w.safetensors", kept=("tea",), moved=("milk",), added=("soap",), dropped=("apple",)
    )
    assert_rows(target, {0: (source, 1), 1: (fresh, 1), 2: (source, 2)})


def test_names_are_equal_however_their_accents_are_written(tmp_path: Path) -> None:
    source, target = make(seed=1).state_dict(), make(seed=2)
    path = saved(tmp_path / "w.safetensors", source, labels=("Cafe\u0301", "milk", "tea"))
    assert load(target, path, ("Caf\u00e9", "milk", "tea")).kept == ("Caf\u00e9", "milk", "tea")


def test_a_renamed_product_keeps_its_row_by_an_alias_unless_its_new_name_has_one(tmp_path: Path) -> None:
    source, target = make(seed=1).state_dict(), make(seed=2)
    weights = read_initial_weights(saved(tmp_path / "w.safetensors", source, labels=("apple", "Milk", "tea")))
    aliases = {"Milk": "milk", "apple": "tea"}
    loaded = load_initial_weights(target, weights, ("chai", "milk", "tea"), aliases)
    assert (loaded.kept, loaded.added, loaded.dropped) == (("milk", "tea"), ("chai",), ("apple",))
    assert_rows(target, {1: (source, 1), 2: (source, 2)})


def test_every_classifier_of_a_model_with_two_is_mapped(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"name": "pit_ti_distilled_224", "image_size": 224}
    source, target = make(seed=1, **settings).state_dict(), make(seed=2, **settings)
    load(target, saved(tmp_path / "w.safetensors", source, labels=OLD), ("tea", "apple", "milk"))
    for head in ("head", "head_dist"):
        assert torch.equal(target.state_dict()[f"{head}.weight"], source[f"{head}.weight"][[2, 0, 1]])


def test_labels_in_the_metadata_count_before_those_in_the_folder(tmp_path: Path) -> None:
    source, target = make(seed=1).state_dict(), make(seed=2)
    path = saved(tmp_path / "w.safetensors", source, labels=OLD, class_names=json.dumps(["tea", "milk", "apple"]))
    assert load(target, path).moved == ("apple", "tea")
    assert_rows(target, {0: (source, 2), 1: (source, 1), 2: (source, 0)})


@pytest.mark.parametrize(("classes", "rows"), [(3, "3"), (1009, "1,009")])
def test_a_head_that_nothing_names_starts_fresh_and_it_is_said_how_to_name_it(
    tmp_path: Path, classes: int, rows: str
) -> None:
    source, target = make(classes=classes, seed=1).state_dict(), make(seed=2)
    fresh = copied(target)
    loaded = load(target, saved(tmp_path / "w.safetensors", source))
    assert loaded.added == OLD
    for part in (f"{rows} rows", str(tmp_path / "labels.json"), "JSON list in the order of the rows"):
        assert part in loaded.reason
    assert_rows(target, {row: (fresh, row) for row in range(3)})
    assert torch.equal(target.state_dict()["stem.0.weight"], source["stem.0.weight"])


def test_a_model_of_fedshelf_without_its_labels_is_told_where_they_are(tmp_path: Path) -> None:
    save_model(tmp_path, make(seed=1).state_dict(), OLD, {})
    assert load(make(), tmp_path / "model.safetensors").kept == OLD
    (tmp_path / "labels.json").unlink()
    reason = load(make(), tmp_path / "model.safetensors").reason
    assert f"{tmp_path / 'labels.json'} is missing" in reason
    assert "Copy it from where the file comes from" in reason


def test_labels_of_another_model_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "one", make(seed=1).state_dict(), OLD, {})
    save_model(tmp_path / "two", make(seed=2).state_dict(), OLD[::-1], {})
    shutil.copy(tmp_path / "two" / "model.safetensors", tmp_path / "one" / "w.safetensors")
    with pytest.raises(ModelError, match=r"w\.safetensors' is damaged or of another model.*folder of its own"):
        read_initial_weights(tmp_path / "one" / "w.safetensors")
    shutil.copy(tmp_path / "two" / "labels.json", tmp_path / "one")
    with pytest.raises(ModelError, match=r"labels\.json' is damaged or of another model"):
        read_initial_weights(tmp_path / "one" / "model.safetensors")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('["apple", "milk"]', r"rows of its head \(3\) and its labels \(2\).*fresh head"),
        ('["apple", "milk", "milk"]', r"labels\.json.*distinct.*milk"),
        ('{"0": "apple"}', r"labels\.json.*JSON list"),
        ("[1, 2, 3]", r"labels\.json.*JSON list"),
        ("apple\nmilk\ntea", r"labels\.json.*not JSON"),
        ("\udcff", r"labels\.json.*not JSON"),
    ],
)
def test_labels_that_cannot_be_those_of_the_file_are_refused(tmp_path: Path, text: str, why: str) -> None:
    path = saved(tmp_path / "w.safetensors", make(seed=1).state_dict())
    (tmp_path / "labels.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ModelError, match=why):
        load(make(), path)


def test_no_product_in_common_is_said(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.safetensors", make(seed=1).state_dict(), labels=OLD)
    loaded = load(make(), path, ("x", "y", "z"))
    assert (loaded.added, loaded.dropped) == (("x", "y", "z"), OLD)
    assert "none of the file's classes is in the catalogue" in loaded.reason


def test_a_file_without_a_head_is_a_backbone(tmp_path: Path) -> None:
    source, target = make(seed=1).state_dict(), make(seed=2)
    backbone = {name: tensor for name, tensor in source.items() if not name.startswith("head.")}
    loaded = load(target, saved(tmp_path / "w.safetensors", backbone))
    assert loaded == WeightsLoaded(file="w.safetensors", added=OLD, reason="the file has no head")
    assert torch.equal(target.state_dict()["stem.0.weight"], source["stem.0.weight"])


def test_tensors_that_do_not_fit_are_named_with_both_shapes(tmp_path: Path) -> None:
    tensors = dict(make(seed=1).state_dict())
    tensors["stem.0.weight"] = torch.zeros(9, 3, 3, 3)
    tensors["head.weight"] = torch.zeros(3, 7)
    tensors["extra.weight"] = torch.zeros(1)
    del tensors["blocks.1.body.0.weight"]
    target = make()
    before = copied(target)
    with pytest.raises(ModelError) as caught:
        load(target, saved(tmp_path / "w.safetensors", tensors))
    for part in (
        "tensors that differ (2): head.weight (3, 7) for (3, 32), stem.0.weight (9, 3, 3, 3) for (4, 3, 3, 3)",
        "missing (1): blocks.1.body.0.weight",
        "unknown to the model (1): extra.weight",
        "--model, --norm, --width",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


def test_tensors_of_a_part_that_the_model_lacks_are_left_out(tmp_path: Path) -> None:
    source, target = make(seed=1).state_dict(), make(seed=2)
    extra = {"auxiliary_head.weight": torch.zeros(9, 9), "projector.0.weight": torch.zeros(1)}
    weights = read_initial_weights(saved(tmp_path / "w.safetensors", {**source, **extra}, labels=OLD))
    assert extra_tensors(target, weights) == sorted(extra)
    assert load_initial_weights(target, weights, OLD).kept == OLD
    assert all(torch.equal(tensor, target.state_dict()[name]) for name, tensor in source.items())


@pytest.mark.parametrize(
    ("of", "to"),
    [
        ({"name": "resnet34"}, {"name": "resnet18"}),  # every tensor of the smaller one is in the larger one
        ({"norm": "batch"}, {"norm": "group"}),
        ({"width": 8}, {"width": 4}),
        ({"name": "resnet18"}, {}),
    ],
    ids=str,
)
def test_a_file_of_another_architecture_does_not_fit(tmp_path: Path, of: dict[str, Any], to: dict[str, Any]) -> None:
    path = saved(tmp_path / "w.safetensors", make(seed=1, **of).state_dict(), labels=OLD)
    with pytest.raises(ModelError, match="does not fit the model"):
        check_fit(make(**to), read_initial_weights(path))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_with_code_is_refused_and_not_run(tmp_path: Path, legacy: bool) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(tmp_path / "exploded"), "w"))

    torch.save({"w": Bomb()}, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ModelError, match="more than plain tensors"):
        read_initial_weights(tmp_path / "w.pt")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "the file is empty"),
        (b"x", "neither a safetensors file nor a torch file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "neither a safetensors file nor a torch file"),
        (b"<!DOCTYPE html>", "neither a safetensors file nor a torch file"),
    ],
)
def test_a_file_that_holds_no_weights_is_said_to_be_what_it_is(
    tmp_path: Path, name: str, content: bytes, why: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=rf"{name}: .*{why}"):
        read_initial_weights(tmp_path / name)


@pytest.mark.parametrize("kind", ["w.safetensors", "w.pt", "legacy.pt"])
def test_a_file_that_is_cut_off_anywhere_is_called_damaged(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path / "whole.safetensors", make(seed=1).state_dict())
    if kind.endswith(".pt"):
        torch.save(make().state_dict(), path, _use_new_zipfile_serialization=kind == "w.pt")
    whole = path.read_bytes()
    for length in (9, 64, len(whole) // 2, len(whole) - 1):
        (tmp_path / kind).write_bytes(whole[:length])
        with pytest.raises(ModelError, match=rf"{kind}: .*truncated or damaged"):
            read_initial_weights(tmp_path / kind)


def test_a_path_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.pt: cannot be read: No such file"):
        read_initial_weights(tmp_path / "absent.pt")
    with pytest.raises(ModelError, match="cannot be read: Is a directory"):
        read_initial_weights(tmp_path)


def test_what_is_no_dictionary_of_tensors_is_refused(tmp_path: Path) -> None:
    for content in ([torch.zeros(1)], {"w": torch.zeros(1), "epoch": 3}, torch.zeros(1)):
        with pytest.raises(ModelError, match="dictionary of tensors"):
            read_initial_weights(saved(tmp_path / "w.pt", content))


def test_weights_that_diverged_are_named(tmp_path: Path) -> None:
    tensors = dict(make(seed=1).state_dict())
    tensors["stem.0.weight"] = torch.full_like(tensors["stem.0.weight"], float("nan"))
    with pytest.raises(ModelError, match=r"stem\.0\.weight holds values that are not finite"):
        read_initial_weights(saved(tmp_path / "w.safetensors", tensors))
