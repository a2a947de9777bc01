"""Runs that learn from a teacher: what they refuse, what they record, and what is done with the result."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedshelf.app.client import _bytes_needed as needed
from fedshelf.app.run import open_run
from fedshelf.app.setup import OpenedSetup, open_setup
from fedshelf.app.teacher import TeacherModel
from fedshelf.cli.app import main
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import ModelError, RefusedError, UsageError
from fedshelf.core.events import RunStatus
from fedshelf.core.messages import TEACHER, Setup
from fedshelf.data.photo_set import PhotoSet
from fedshelf.edge.serving.session import Session
from fedshelf.simulate.engine import simulate
from fedshelf.storage.model_files import WEIGHTS, load_model_files, save_model
from fedshelf.storage.run_directory import RunDirectory
from tests.unit.data.samples import write_pack

PRODUCTS = {"apple": 4, "milk": 4, "tea": 4}
TEACHER_RUN = Path("teacher")


def config(run_dir: str, **values: Any) -> RunConfig:
    given: dict[str, Any] = {
        "data_dir": Path("stores"), "image_size": 16, "width": 4, "rounds": 2, "batch_size": 4, "device": "cpu",
        "val_fraction": 0.25, "local_epochs": 1,
    }  # fmt: skip
    return RunConfig(**{**given, "run_dir": Path(run_dir), **values})


def run(given: RunConfig) -> RunDirectory:
    status, directory = simulate(given)
    assert status is RunStatus.FINISHED
    return directory


def weights(directory: RunDirectory) -> bytes:
    return (directory.model / WEIGHTS).read_bytes()


def card(directory: RunDirectory) -> Any:
    return load_model_files(directory.model)[2]


@pytest.fixture
def teacher(home: Path) -> Path:
    """A run at another size than its students, whose stores have chosen models of their own."""
    for name in ("lyon", "oslo", "rome"):
        write_pack(Path("stores") / name, PRODUCTS)
    run(config("teacher", image_size=24, width=6, personalize="finetune"))
    return TEACHER_RUN


def test_a_weight_of_zero_is_training_without_a_teacher_bit_for_bit(teacher: Path) -> None:
    plain = weights(run(config("plain")))
    assert weights(run(config("zero", teacher=teacher, distill_weight=0.0))) == plain
    assert weights(run(config("some", teacher=teacher, distill_weight=0.5))) != plain


def test_a_store_learns_from_the_model_that_it_has_chosen_in_the_teachers_run(teacher: Path) -> None:
    own = weights(run(config("own", teacher=teacher)))
    assert weights(run(config("again", teacher=teacher, workers=2))) == own
    assert weights(run(config("global", teacher=teacher / "model"))) != own
    shutil.rmtree(teacher / "stores" / "oslo")
    assert weights(run(config("two", teacher=teacher))) != own


def test_masked_students_are_those_without_masks_bit_for_bit(teacher: Path) -> None:
    same = {"teacher": teacher, "codec_up": "modular:32", "min_clients": 3}
    assert weights(run(config("masked", secagg=True, **same))) == weights(run(config("plain", **same)))


def test_a_student_is_a_run_like_any_other_and_says_what_it_learned_from(
    teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pack(Path("photos"), PRODUCTS)
    (Path("student.toml")).write_text("width = 4\nbatch-size = 4\nlocal-epochs = 1\nval-fraction = 0.25\n")
    flags = "--student resnet10 --data-dir stores --rounds 1 --run-dir student --image-size 16 --config student.toml"
    main(["distill", "--teacher", "teacher", *flags.split()])
    capsys.readouterr()
    main(["runs", "show", "student", "--json"])
    shown = json.loads(capsys.readouterr().out)["teacher"]
    digest = TeacherModel.read(teacher / "model").digest
    assert shown == {"model": str(teacher.absolute()), "digest": digest, "weight": 0.5, "temperature": 2.0}
    training = card(RunDirectory.open(Path("student")))["training"]
    assert training["distillation"] == {"teacher": digest, "weight": 0.5, "temperature": 2.0}
    main(["evaluate", "photos", "--run", "student", "--json"])
    assert json.loads(capsys.readouterr().out)["num_photos"] == sum(PRODUCTS.values())
    photo = next(str(path) for path in Path("photos").rglob("*") if path.is_file())
    main(["predict", photo, "--run", "student"])
    assert "apple" in capsys.readouterr().out


def test_a_student_is_exported_as_a_model_of_its_own_size(teacher: Path) -> None:
    student = run(config("student", teacher=teacher))
    main(["export", str(student.path), "--out", "student.onnx"])
    info = Session.open(Path("student.onnx")).info
    assert (info.image_size, info.labels) == (16, ("apple", "milk", "tea"))
    assert info.card["training"]["distillation"] == card(student)["training"]["distillation"]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ((), "--mode federated needs a teacher: add --teacher RUN"),
        (("--mode", "central"), "--mode central needs a teacher"),
        (("--mode", "ensemble"), "--mode ensemble and --unlabelled-dir go together"),
        (("--teacher", "teacher", "--unlabelled-dir", "stores"), "--mode ensemble and --unlabelled-dir go together"),
    ],
)
def test_a_student_without_what_its_mode_needs_is_refused_before_anything_is_written(
    teacher: Path, flags: tuple[str, ...], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["distill", "--student", "resnet10", "--data-dir", "stores", "--run-dir", "student", *flags])
    assert ended.value.code == UsageError.exit_code
    assert problem in " ".join(capsys.readouterr().err.replace("\u2502", " ").split())
    assert not Path("student").exists()


def test_a_store_counts_the_teacher_among_the_memory_that_it_allows(
    teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Setup] = []

    def noting(setup: Setup, **options: Any) -> OpenedSetup:
        seen.append(setup)
        return open_setup(setup, **options)

    monkeypatch.setattr("fedshelf.simulate.client_runner.open_setup", noting)
    run(config("student", teacher=teacher, workers=0))
    opened = open_setup(seen[0], device="cpu")
    photos = PhotoSet(images=np.zeros((12, 16, 16, 3), np.uint8), labels=np.zeros(12, np.int64))
    assert opened.teacher is not None
    alone = needed(replace(opened, teacher=None), photos)
    assert needed(opened, photos) == alone + opened.teacher.bytes_needed(4)


def test_at_the_server_one_folder_of_photos_is_trained_on(teacher: Path) -> None:
    shown = card(run(config("central", mode="central", teacher=teacher, data_dir=Path("stores/lyon"))))
    assert shown["training"]["clients_counted_last_round"] == 1


def test_the_stores_models_are_distilled_on_photos_without_labels(teacher: Path) -> None:
    write_pack(Path("unlabelled"), {"anything": 6})
    alone = {"unlabelled_dir": Path("unlabelled"), "mode": "ensemble", "ensemble_steps": 3}
    fused = run(config("fused", **alone))
    assert card(fused)["training"]["ensemble"] == {"steps": 3, "learning_rate": 0.001}
    assert weights(fused) != weights(run(config("plain")))
    assert weights(fused) == weights(run(config("again", workers=2, **alone)))
    assert weights(run(config("both", teacher=teacher, **alone))) != weights(fused)


def refusal(**values: Any) -> str:
    with pytest.raises(UsageError) as caught, open_run(config("refused", **values), watchers=()):
        pass
    return "\n".join(map(str, caught.value.args))


@pytest.mark.parametrize(
    ("values", "flag", "reason"),
    [
        ({"secagg": True, "codec_up": "modular:32", "min_clients": 3}, "--secagg", "sees none of them"),
        ({"he": True, "codec_up": "modular:32", "min_clients": 3}, "--he", "sees none of them"),
        ({"codec_up": "modular:32"}, "--codec-up modular:32", "sees only their sum"),
        ({"algorithm": "fedbuff"}, "--algorithm fedbuff", "after each round"),
        ({"train": "head"}, "--train head", "features"),
        ({"personalize": "fedbn"}, "--personalize fedbn", "stays in its store"),
        ({"dp": "client", "noise_multiplier": 1.0}, "--dp client", "no noise is added"),
    ],
)
def test_no_ensemble_where_the_server_does_not_have_each_stores_whole_model(
    home: Path, values: dict[str, Any], flag: str, reason: str
) -> None:
    write_pack(Path("stores") / "lyon", PRODUCTS)
    write_pack(Path("unlabelled"), {"anything": 2})
    told = refusal(unlabelled_dir=Path("unlabelled"), mode="ensemble", **values)
    assert f"{flag} with --unlabelled-dir" in told
    assert reason in told


def test_noise_covers_no_teacher_that_was_trained_without_it(teacher: Path) -> None:
    private = {"dp": "sample", "noise_multiplier": 1.0, "norm": "group", "val_fraction": 0.0}
    assert "--dp sample with --teacher" in refusal(teacher=teacher, **private)
    noisy = run(config("noisy", **private))
    student = run(config("student", teacher=noisy.path, **private))
    assert card(student)["training"]["dp"] == "sample"
    assert "--dp client with --teacher" in refusal(teacher=noisy.path, dp="client", noise_multiplier=1.0)


def test_a_teacher_is_asked_about_photos_not_features(teacher: Path) -> None:
    assert "--train head with --teacher" in refusal(teacher=teacher, train="head")


def test_a_teacher_of_other_products_is_refused_by_name(teacher: Path) -> None:
    write_pack(Path("stores") / "oslo", {"bread": 2})
    with pytest.raises(UsageError, match="only the student knows 'bread'"):
        simulate(config("student", teacher=teacher))
    with pytest.raises(UsageError, match="nowhere"):
        simulate(config("student", teacher=Path("nowhere")))


def test_products_are_matched_by_name(teacher: Path) -> None:
    folder = teacher / "model"
    tensors, labels, described = load_model_files(folder)
    order = [2, 0, 1]
    turned = {name: tensor[order] if name.startswith("head.") else tensor for name, tensor in tensors.items()}
    save_model(Path("turned"), turned, [labels[row] for row in order], described)
    views = torch.randn(2, 3, 24, 24)
    opened = [TeacherModel.read(each).open(labels, torch.device("cpu")) for each in (folder, Path("turned"))]
    torch.testing.assert_close(opened[0].logits(views), opened[1].logits(views))


def test_a_client_takes_no_other_teacher_than_its_configuration_names(teacher: Path) -> None:
    model = TeacherModel.read(teacher / "model")
    given = config("student").model_copy(update={"teacher_digest": model.digest})

    def setup(text: str, values: torch.Tensor | None) -> Setup:
        vectors = {} if values is None else {TEACHER: values}
        return Setup(run_id="r", config="", catalogue="", layout_digest="", teacher=text, vectors=vectors)

    found = TeacherModel.of_setup(setup(model.text, model.values), given)
    assert found is not None
    assert found.digest == model.digest
    for text, values in (
        (model.text, model.values + 1), (model.text.replace("resnet10", "resnet18"), model.values),
        ("{}", model.values), (model.text, None),
    ):  # fmt: skip
        with pytest.raises(RefusedError, match="teacher"):
            TeacherModel.of_setup(setup(text, values), given)
    own = model.description.model_copy(update={"name": "package:function"})
    with pytest.raises(ModelError, match="function"):
        TeacherModel(description=own, values=model.values).open(own.labels, torch.device("cpu"))
    with pytest.raises(ModelError, match="do not fit"):
        TeacherModel(description=model.description, values=model.values[1:]).open(own.labels, torch.device("cpu"))
