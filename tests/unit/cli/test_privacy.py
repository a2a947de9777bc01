"""`fedshelf privacy`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fedshelf.privacy.accounting import SampledGaussian, compose
from tests.unit.cli.test_command_line import fedshelf

STEPS = ["--sampling-rate", "0.05", "--steps", "1000", "--delta", "1e-5"]


def test_epsilon_prints_both_bounds_and_their_assumptions_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = fedshelf(capsys, "privacy", "epsilon", "--noise-multiplier", "1.1", *STEPS, "--json")
    found = json.loads(out)
    assert code == 0
    assert list(found) == ["rdp", "pld", "assumptions"]
    assert (found["rdp"], found["pld"]) == (pytest.approx(10.015, abs=1e-3), pytest.approx(9.192, abs=1e-3))
    assert all(isinstance(sentence, str) for sentence in found["assumptions"])


def test_a_target_epsilon_finds_the_noise(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = fedshelf(capsys, "privacy", "epsilon", "--target-epsilon", "8", *STEPS, "--json")
    found = json.loads(out)
    assert code == 0
    assert 7.92 <= found["pld"] <= 8
    again = ["privacy", "epsilon", "--noise-multiplier", str(found["noise_multiplier"]), *STEPS, "--json"]
    assert json.loads(fedshelf(capsys, *again)[1])["pld"] == found["pld"]


@pytest.mark.parametrize("columns", [60, 80])
def test_the_text_fits_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = fedshelf(capsys, "privacy", "epsilon", "--noise-multiplier", "1.1", *STEPS)
    assert code == 0
    assert max(map(len, out.splitlines()[1:])) <= columns
    for text in ("Noise multiplier 1.1", "δ = 1e-05", "PLD      9.192", "RDP     10.015", "Poisson"):
        assert text in out


def test_a_tiny_epsilon_is_not_shown_as_zero(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = fedshelf(capsys, "privacy", "epsilon", "--noise-multiplier", "8000", *STEPS)
    assert "0.00025" in out


def test_no_noise_is_no_number_in_json_and_infinite_in_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    none = ["privacy", "epsilon", "--noise-multiplier", "0", *STEPS]
    found = json.loads(fedshelf(capsys, *none, "--json")[1])
    assert found["rdp"] is found["pld"] is None
    assert "nothing is guaranteed" in found["assumptions"][-1]
    assert "inf" in fedshelf(capsys, *none)[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*STEPS], "give either --noise-multiplier or --target-epsilon"),
        (["--noise-multiplier", "1", "--target-epsilon", "8", *STEPS], "give either --noise-multiplier or"),
        (["--noise-multiplier", "nan", *STEPS], "noise multiplier nan: must be a number from 0 to 1,000,000"),
        (["--noise-multiplier", "many", *STEPS], "--noise-multiplier many: not a number"),
        (["--noise-multiplier", "1", "--steps", "0", "--delta", "1e-5"], "steps 0: must be a whole number from 1"),
        (["--noise-multiplier", "1", "--steps", "9", "--delta", "1"], "delta 1.0: must be a number between 0 and 1"),
        (["--noise-multiplier", "1", "--steps", "9"], "missing flag --delta NUMBER"),
        (["--target-epsilon", "-8", *STEPS], "target epsilon -8.0: must be a number between 0 and 500"),
        (["--target-epsilon", "8", *STEPS, "--sampling-rate", "0"], "sampling rate 0: no photo takes part"),
        (["--target-epsilon", "8", *STEPS, "--sampling-rate", "2"], "sampling rate 2.0: must be a number from 0 to 1"),
    ],
)
def test_bad_values_are_usage_errors(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    code, out, error = fedshelf(capsys, "privacy", "epsilon", *arguments)
    assert (code, out) == (2, "")
    assert said in error


def test_the_group_s_help_does_not_wait_for_the_accounting() -> None:
    program = (
        "import sys\nfrom fedshelf.cli import main\n"
        "try:\n    main(['privacy', 'epsilon', '--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'numpy', 'scipy', 'dp_accounting') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


RUN = """
dp = "sample"
rounds = 4
norm = "group"
width = 8
image-size = 16
batch-size = 8
local-epochs = 1
noise-multiplier = 0.3
"""


def test_an_explanation_of_a_run_is_about_that_run_in_the_text_and_as_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for number in range(40):
        folder = tmp_path / "photos" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / f"{number}.png")
    (tmp_path / "run.toml").write_text(RUN)
    given = ["privacy", "explain", "--config", str(tmp_path / "run.toml"), "--data-dir", str(tmp_path / "photos")]
    code, out, _ = fedshelf(capsys, *given)
    found = json.loads(fedshelf(capsys, *given, "--json")[1])
    assert code == 0
    assert found["noise"]["noise_multiplier"] == 0.3
    text = " ".join(out.split())
    assert f"ε: at most {found['epsilon']:.4g} in this run (δ = 1e-05). The store adds noise of 0.3 times" in text
    assert "Budget of ε: the policy sets none." in text
    assert "evaluation num_correct not sent dp = sample" in text
    assert "upload seconds withheld dp = sample" in text
    (tmp_path / "policy.toml").write_text('[protection]\nrequired = "sample-dp"\nepsilon = 3.0\n')
    code, out, _ = fedshelf(capsys, *given, "--policy", str(tmp_path / "policy.toml"))
    text = " ".join(out.split())
    assert code == 0
    assert "it refuses this run refused: one round needs an ε of" in text
    assert "upload vectors not sent the run is refused" in text
    assert "Budget of ε: at most 3 in 365 days, over all runs." in text


def test_an_explanation_of_a_masked_run_says_what_is_summed_and_who_could_get_around_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text("secagg = true\nwidth = 8\nimage-size = 16\n")
    code, out, _ = fedshelf(capsys, "privacy", "explain", "--config", str(tmp_path / "run.toml"))
    text = " ".join(out.split())
    assert code == 0
    for said in (
        "upload vectors summed secagg", "upload train_loss summed secagg", "upload seconds clear",
        "evaluation num_correct summed secagg", "maskingreply content clear",
        "The server and its operator: the sum of the updates of a round's stores",
        "A server that invents stores gets around that, unless the policy pins the roster's key",
    ):  # fmt: skip
        assert said in text, text
    plain = tmp_path / "plain.toml"
    plain.write_text("width = 8\nimage-size = 16\n")
    assert "maskingreply" not in fedshelf(capsys, "privacy", "explain", "--config", str(plain))[1]


def test_an_explanation_of_noise_that_stores_share_is_about_the_sum(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = 'secagg = true\ndp = "client"\nnoise-multiplier = 2.0\nwidth = 8\nimage-size = 16\nnorm = "group"\n'
    (tmp_path / "run.toml").write_text(run)
    server = " ".join(fedshelf(capsys, "privacy", "explain", "--config", str(tmp_path / "run.toml"))[1].split())
    assert "The server adds noise to the sum of updates, and sees that sum without it." in server
    (tmp_path / "run.toml").write_text(run + 'noise-at = "stores"\nrounds = 3\n')
    given = ["privacy", "explain", "--config", str(tmp_path / "run.toml")]
    stores = " ".join(fedshelf(capsys, *given)[1].split())
    for said in (
        "Each store adds a share of the noise before its update is masked.", "upload vectors noised, summed",
        "upload train_loss withheld noise-at = stores", "upload num_steps withheld noise-at = stores",
        "evaluation num_correct not sent noise-at = stores",
        "the sum of the updates of a round's stores, with noise that bounds what it says of one store",
    ):  # fmt: skip
        assert said in stores, stores
    shared = SampledGaussian(noise_multiplier=2.0, sampling_rate=1.0, steps=3)
    known = compose([shared], 1e-5, unit="client", is_discrete=True).epsilon
    assert json.loads(fedshelf(capsys, *given, "--json")[1])["epsilon"] == pytest.approx(known)


@pytest.mark.usefixtures("home")
def test_the_seconds_need_only_what_was_not_given(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.toml").write_text("width = 8\nimage-size = 16\n", encoding="utf-8")
    told = fedshelf(capsys, "privacy", "explain", "--config", "run.toml")[1]
    assert "Seconds: unknown without --data-dir." in told
    assert "Seconds: unknown without --config and --data-dir." in fedshelf(capsys, "privacy", "explain")[1]
