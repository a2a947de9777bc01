"""What a client tells of an exception."""

import pytest

from fedshelf.core.errors import DataError
from fedshelf.deploy.client_part import MAX_CHARACTERS, failure_text


def test_class_and_message_are_told() -> None:
    assert failure_text(ValueError("loss is not finite in step 12")) == "ValueError: loss is not finite in step 12"


def test_an_expected_error_speaks_for_itself() -> None:
    assert failure_text(DataError("no usable photos")) == "no usable photos"


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "No such file or directory", "/srv/photos/Secret Shop/IMG_1.jpg"),
        ValueError("cannot read /srv/photos/Secret/IMG_1.jpg: truncated"),
        ValueError("cannot read 'C:\\photos\\Secret Shop\\IMG_1.jpg' (truncated)"),
        ValueError('in folder "/srv/photos/Secret Shop": nothing'),
        DataError("photo Secret/IMG_1.PNG is broken"),
        DataError("photo 'Secret IMG_1.jpeg' is broken"),
        DataError("photo IMG_Secret.webp is broken"),
        DataError("photo IMG_Secret.HEIC is broken"),
        DataError("photo IMG_Secret.tiff is broken"),
        RuntimeError("see ~/Secret/log and ../Secret"),
    ],
)
def test_places_on_the_clients_disk_are_not_told(error: Exception) -> None:
    text = failure_text(error)
    assert "Secret" not in text
    assert "IMG_1" not in text
    assert text


@pytest.mark.parametrize("user", ["user 'secret'", "user id 1234"])
def test_users_of_the_clients_machine_are_not_told(user: str) -> None:
    text = failure_text(DataError(f"{user} cannot write to '/home/secret/cache' (permission denied)"))
    assert text.endswith("… cannot write to … (permission denied)")
    assert "secret" not in text
    assert "1234" not in text


def test_a_message_stays_short_and_on_one_line() -> None:
    text = failure_text(DataError("a\nb " * 1000))
    assert len(text) <= MAX_CHARACTERS
    assert "\n" not in text
