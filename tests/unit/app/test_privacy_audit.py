"""`fedshelf privacy audit` attacks what a run and a store have kept, and its report stays private."""

import json
import re
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from fedshelf.app.audit.attacks import AuditOptions, audit
from fedshelf.app.audit.subject import AuditSubject, subject_of_run, subject_of_store
from fedshelf.app.client import StoreClient
from fedshelf.app.client_place import ClientPlace
from fedshelf.core.errors import UsageError
from fedshelf.core.messages import Ready
from fedshelf.data.synthetic_sales import write_synthetic_sales
from fedshelf.privacy import policy as policies
from fedshelf.privacy.audit.findings import UNPROTECTED, AuditReport
from fedshelf.reporting.audit_page import audit_page
from fedshelf.storage.held_model import FileHeldModel
from tests.unit.cli.test_command_line import fedshelf
from tests.unit.data.samples import write_pack

TINY = ["--image-size", "16", "--width", "8", "--batch-size", "4", "--rounds", "1", "--local-epochs", "1"]
QUICK = AuditOptions(inversion_steps=2, num_canaries=20, num_stores=2, least_stores=2, num_shadows=8)
FLAGS = ["--inversion-steps", "2", "--canaries", "20", "--summed-stores", "2", "--min-stores", "2"]


@pytest.fixture
def simulated(home: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Simulates a run on two stores, and returns its folder."""
    for name, own in (("lyon", "<jam>"), ("oslo", "tea")):
        write_pack(Path("stores") / name, {"apple": 5, "milk": 4, own: 3})

    def simulate(*flags: str) -> str:
        arguments = ["simulate", "--data-dir", "stores", "--run-dir", "run", *TINY, *flags]
        assert fedshelf(capsys, *arguments)[0] == 0
        return "run"

    return simulate


def test_an_unknown_store_is_told_with_those_there_are(simulated: Any) -> None:
    with pytest.raises(UsageError, match=r"--name nobody: .* The stores are 'lyon', 'oslo'"):
        subject_of_run(simulated(), data_dir=None, store="nobody")
    with pytest.raises(UsageError, match="did you mean 'oslo'"):
        subject_of_run("run", data_dir=None, store="osla")


@pytest.mark.usefixtures("home")
def test_a_report_needs_a_file_and_not_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = fedshelf(capsys, "privacy", "audit", "run", "--out", str(tmp_path))
    said = f"--out {tmp_path}: that is a folder. Name a file in it, such as {tmp_path / 'report.html'}"
    assert (code, error) == (2, f"error: {said}\n")


def audited(run: str) -> AuditReport:
    return audit(subject_of_run(run, data_dir=None, store=None), QUICK)


def test_features_are_read_off_the_output_layer_of_a_run_with_sales(simulated: Any) -> None:
    write_synthetic_sales({name: Path("stores") / name for name in ("lyon", "oslo")}, seed=0, gamma=1.0, listed=1.0)
    report = audited(simulated("--sales"))
    errors = [one.features_error for one in report.labels if one.model == "run" and one.protection.startswith("none")]
    assert [error for error in errors if error is not None and error < 1e-2]


def attacks_of(report: AuditReport) -> list[tuple[str, str]]:
    return [(one.model, one.protection.split(" ")[0].rstrip(":,")) for one in report.canaries]


def test_a_run_is_attacked_with_protection_and_without(simulated: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = simulated("--norm", "group"), Path("report.html")
    code, text, error = fedshelf(capsys, "privacy", "audit", run, "--out", str(out), "--json", *FLAGS)
    assert code == 0, error
    found = json.loads(text)
    assert [(one["model"], one["protection"].split(" ")[0]) for one in found["reconstructions"]] == [
        ("probe", "none"), ("probe", "secure"), ("probe", "--clip-norm"), ("probe", "--dp"), ("run", "none"),
        ("run", "--dp"),
    ]  # fmt: skip
    assert all(one["found"]["epsilon"] <= (one["accounted"] or 1e9) for one in found["canaries"])
    assert found["unprotected"] == list(UNPROTECTED)
    assert found["assumptions"].keys() == {
        "gradient inversion", "label inference", "canaries", "canary stores", "LiRA",
    }  # fmt: skip
    assert found["rare_products"] == [
        {"product": "<jam>", "stores": ["lyon"]}, {"product": "tea", "stores": ["oslo"]},
    ]  # fmt: skip
    assert "pictures" not in text
    assert stat.S_IMODE(out.stat().st_mode) == 0o600


def test_the_text_names_what_was_found_and_the_page_shows_it_and_loads_nothing(
    simulated: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = simulated("--norm", "batch")
    code, text, _ = fedshelf(capsys, "privacy", "audit", run, "--name", "oslo", *FLAGS)
    assert code == 0
    for part in ("Audit of oslo", "the model in", "SSIM", "ceiling", "mixes the photos", "stays there: report.html"):
        assert part in text
    page = Path("report.html").read_text(encoding="utf-8")
    assert "&lt;jam&gt;" in page
    assert "<jam>" not in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) > 6
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|<script|<link|@import|url\(", page)
    for sentence in ("stays there", "Unprotected", "A failed attack proves nothing"):
        assert sentence in page


def test_a_run_with_noise_and_a_codec_is_attacked_as_it_is_sent(simulated: Any) -> None:
    flags = ["--norm", "group", "--dp", "sample", "--noise-multiplier", "1.5", "--codec-up", "int8"]
    report = audited(simulated(*flags))
    assert attacks_of(report) == [
        ("probe", "none"), ("probe", "--clip-norm"), ("probe", "--dp"), ("run", "none"), ("run", "as"),
    ]  # fmt: skip
    sent = report.canaries[-1]
    assert sent.protection == "as sent: --dp sample, noise 1.5, --codec-up int8"
    assert sent.found.epsilon <= sent.accounted < 20


def test_heads_on_features_are_attacked_by_shadow_heads(simulated: Any) -> None:
    report = audited(simulated("--train", "head"))
    assert {one.model for one in report.reconstructions} == {"probe"}
    assert [one.protection.split(" ")[0] for one in report.membership] == ["none", "--dp"]
    alone = next(one for one in report.labels if one.model == "run" and one.num_photos == 1)
    assert alone.num_right == 1
    assert alone.features_error is not None
    assert alone.features_error < 1e-3
    assert sum("trains its output layer on features" in sentence for sentence in report.left_out) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--algorithm", "ridge"], "sends sums over all photos"),
        (["--norm", "group", "--dp", "client", "--noise-multiplier", "1"], "The server sees uploads without it"),
        (["--personalize", "fedper", "--norm", "group"], "LiRA"),
    ],
    ids=["ridge", "dp client", "fedper"],
)
def test_what_cannot_be_attacked_is_listed_with_its_reason(simulated: Any, flags: list[str], said: str) -> None:
    report = audited(simulated(*flags))
    assert said in " ".join(report.left_out)
    assert len(report.store_canaries) == ("client" in flags)
    assert all(0 < one.accounted < 20 for one in report.store_canaries)
    assert attacks_of(report)[:3] == [("probe", "none"), ("probe", "--clip-norm"), ("probe", "--dp")]


def store_after_setup(run: str) -> ClientPlace:
    """A client's state as it is once it has received a run's setup."""
    subject: AuditSubject = subject_of_run(run, data_dir=None, store="oslo")
    place = ClientPlace.of(Path("stores/oslo"), name="oslo", state_dir=None, device="cpu", test_dir=None)
    place.make_state_dir()
    assert isinstance(StoreClient(place, policy=policies.load("open")).handle(subject.opened.setup), Ready)
    return place


@pytest.mark.parametrize("flags", [["--norm", "group"], ["--train", "head"]], ids=["all", "head"])
def test_a_store_audits_itself_by_its_photos_or_its_state_directory(simulated: Any, flags: list[str]) -> None:
    place = store_after_setup(simulated(*flags))
    before = {path: path.read_bytes() for path in place.state_dir.rglob("*") if path.is_file()}
    by_photos, by_state = (subject_of_store(folder) for folder in (place.data_dir, place.state_dir))
    assert by_photos.store == by_state.store == "oslo"
    assert by_state.origin.startswith("new weights")
    report = audit(by_state, QUICK)
    assert {path: path.read_bytes() for path in place.state_dir.rglob("*") if path.is_file()} == before
    held = FileHeldModel(place.state_dir / "model.safetensors")
    held.save("older", torch.zeros(3))
    assert subject_of_store(place.state_dir).origin == by_state.origin, "a model of another run is not loaded"
    held.save("newest", torch.full_like(by_state.shared, 0.5))
    newest = subject_of_store(place.state_dir)
    assert newest.origin == "the model that was received last"
    assert (newest.shared == 0.5).all()
    assert {one.model for one in report.canaries} == {"probe", "run"}
    assert report.rare_products is None
    assert "A store does not know what others sell" in audit_page(report)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give either RUN"),
        (["run", "--store", "stores/oslo"], "give either RUN"),
        (["--store", "stores/oslo", "--name", "oslo"], "--data-dir and --name belong to a simulated run"),
        (["--store", "stores/oslo"], "is neither a store's state directory nor a photo folder that a client"),
        (["run", "--name", "olso"], "--name olso: there is no such store in"),

    ],
)  # fmt: skip
def test_mistakes_are_sentences(
    simulated: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    simulated()
    code, _, error = fedshelf(capsys, "privacy", "audit", *arguments)
    assert code != 0
    assert said in error


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{}", b'{"kind": "setup"}'], ids=str)
def test_a_damaged_setup_is_a_sentence(simulated: Any, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    write_pack(Path("bern"), {"apple": 3})
    place = ClientPlace.of(Path("bern"), name=None, state_dir=None, device="cpu", test_dir=None)
    place.make_state_dir()
    (place.state_dir / "setup.json").write_bytes(content)
    code, _, error = fedshelf(capsys, "privacy", "audit", "--store", "bern")
    assert code == 1
    assert error.startswith("error: ")


def test_a_store_that_has_not_taken_part_is_told_so(simulated: Any, capsys: pytest.CaptureFixture[str]) -> None:
    write_pack(Path("bern"), {"apple": 3})
    place = ClientPlace.of(Path("bern"), name=None, state_dir=None, device="cpu", test_dir=None)
    place.make_state_dir()
    code, _, error = fedshelf(capsys, "privacy", "audit", "--store", "bern")
    assert code != 0
    assert "has not taken part in a run yet" in error


def test_the_audit_of_a_masked_run_says_that_no_upload_is_seen_by_itself(simulated: Any) -> None:
    write_pack(Path("stores") / "rome", {"apple": 5, "milk": 4})
    report = audited(simulated("--norm", "group", "--secagg"))
    assert any(sentence.startswith("--secagg: the server sees no upload by itself") for sentence in report.left_out)
    assert ("run", "none") in attacks_of(report)
