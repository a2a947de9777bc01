"""A user's own model: its source is found, compared, and only then run."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedshelf.core.errors import ModelError, PolicyError, UsageError
from fedshelf.models.build import at_most, build, find_problem
from fedshelf.models.own_model import build_own, find_source, use_model_path
from fedshelf.models.settings import ModelSettings
from tests.own_models import forgotten_imports

MARKED = "open('imported', 'a').close()\n"
HEAD = "import torch\nfrom torch import nn\n"
LINEAR = "nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, {}))"


@pytest.fixture
def folder(home: Path) -> Iterator[Path]:
    """A `--model-path` with a package, a module beside it, and one that nothing imports."""
    path = Path("models").absolute()
    (path / "nets" / "parts").mkdir(parents=True)
    texts = {
        "nets/__init__.py": MARKED,
        "nets/small.py": f"{HEAD}from .parts import layers\nfrom nets import sizes\n"
        "def make(num_classes):\n    import lazy_helper\n    return layers.head(num_classes)\n",
        "nets/parts/__init__.py": "",
        "nets/parts/layers.py": f"{HEAD}def head(k):\n    return {LINEAR.format('k')}\n",
        "nets/sizes.py": "import json, beside\n",
        "nets/unused.py": "",
        "beside.py": "",
        "lazy_helper.py": "",
        "unused.py": "",
    }
    for name, text in texts.items():
        (path / name).write_text(text)
    with forgotten_imports(path):
        use_model_path(path)
        yield path


def module_of(folder: Path, text: str) -> str:
    """Write `own.py` and return its digest."""
    (folder / "own.py").write_text(text)
    return find_source("own:make").digest


def make(digest: str, *, num_classes: int = 4, name: str = "own:make") -> torch.nn.Module:
    return build_own(name, digest=digest, num_classes=num_classes, image_size=8)


def test_the_digest_covers_the_files_that_the_module_imports_from_its_folder(folder: Path) -> None:
    covered = [
        "beside.py", "lazy_helper.py", "nets/__init__.py", "nets/parts/__init__.py", "nets/parts/layers.py",
        "nets/sizes.py", "nets/small.py",
    ]  # fmt: skip
    source = find_source("nets.small:make")
    assert sorted(source.files) == covered
    for path in covered:
        file = folder / path
        before = file.read_text()
        file.write_text(f"{before}# changed\n")
        assert find_source("nets.small:make").digest != source.digest, path
        file.write_text(before)
    (folder / "unused.py").write_text("x = 1\n")
    (folder / "nets" / "sizes.py").write_bytes(b"import json, beside\r\n")
    assert find_source("nets.small:make").digest == source.digest
    (folder / "beside.py").rename(folder / "unused.py")
    assert find_source("nets.small:make").digest != source.digest


def test_of_an_installed_package_only_its_own_files_count(home: Path) -> None:
    files = find_source("typer.core:TyperGroup").files
    assert len(files) > 3
    assert {path.partition("/")[0] for path in files} == {"typer"}


def test_no_code_runs_before_its_digest_was_compared(folder: Path) -> None:
    digest = find_source("nets.small:make").digest
    with pytest.raises(ModelError, match=f"has the digest {digest[:16]}…, and 0{{16}}… is .* version of beside.py, "):
        make("0" * 64, name="nets.small:make")
    with pytest.raises(ModelError, match="its source is not recorded"):
        build(ModelSettings(name="nets.small:make", num_classes=4, image_size=8), seed=0)
    assert not Path("imported").exists()
    assert make(digest, name="nets.small:make")(torch.zeros(5, 3, 8, 8)).shape == (5, 4)
    assert Path("imported").exists()


def test_a_file_that_changes_after_its_import_is_not_taken_for_the_new_one(folder: Path) -> None:
    make(find_source("nets.small:make").digest, name="nets.small:make")
    (folder / "beside.py").write_text("changed = True\n")
    with pytest.raises(ModelError, match=r"beside\.py changed after this process had read it\. Start it again"):
        make(find_source("nets.small:make").digest, name="nets.small:make")


def test_weights_are_those_of_the_seed_and_the_trial_pass_leaves_no_trace(folder: Path) -> None:
    norm = "nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), nn.Flatten(), nn.Linear(192, k))"
    digest = module_of(folder, f"{HEAD}def make(k):\n    return {norm}\n")
    settings = ModelSettings(name="own:make", num_classes=4, image_size=8, digest=digest)
    before = torch.get_rng_state()
    one, same, other = (build(settings, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["3.weight"], other["3.weight"])
    assert (int(one["0.num_batches_tracked"]), float(one["0.running_mean"].abs().sum())) == (0, 0)
    grouped = build(ModelSettings(name="own:make", num_classes=4, image_size=8, digest=digest, norm="group"), seed=1)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in grouped.modules())


def test_random_numbers_drawn_at_the_import_do_not_change_the_weights(folder: Path) -> None:
    digest = module_of(folder, f"{HEAD}CONSTANT = torch.randn(3)\ndef make(k):\n    return {LINEAR.format('k')}\n")
    settings = ModelSettings(name="own:make", num_classes=4, image_size=8, digest=digest)
    first, second = (build(settings, seed=1).state_dict() for _ in range(2))
    assert torch.equal(first["1.weight"], second["1.weight"])


def test_lazy_modules_get_their_shapes_in_the_trial_pass(folder: Path) -> None:
    digest = module_of(folder, f"{HEAD}def make(k):\n    return nn.Sequential(nn.Flatten(), nn.LazyLinear(k))\n")
    with at_most(1000):
        assert [tuple(parameter.shape) for parameter in make(digest).parameters()] == [(4, 192), (4,)]


def test_a_store_s_limit_on_parameters_holds(folder: Path) -> None:
    digest = module_of(folder, f"{HEAD}def make(k):\n    return {LINEAR.format('k')}\n")
    with at_most(700), pytest.raises(PolicyError, match="max-parameters = 700"):
        make(digest)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def other(k): pass\n", r"the module 'own' has no such function\. Correct the name"),
        ("make = 3\ndef made(k): pass\n", r"has no such function: did you mean 'made'\?"),
        ("import absent_library\n", "importing it failed in own.py, line 3: ModuleNotFoundError: No module named "
                                    "'absent_library'"),
        ("raise SystemExit(3)\n", "importing it failed in own.py, line 3: SystemExit: 3"),
        ("def make(k):\n    raise ValueError('two\\nlines')\n", "calling it with 4 failed in own.py, line 4: "
                                                              r"ValueError: two lines\. Correct the module"),
        ("def make(): pass\n", r"calling it with 4 failed: TypeError: make\(\) takes 0 positional arguments"),
        ("def make(k): return [k]\n", r"returns list\. It must return a torch\.nn\.Module"),
        ("def make(k): return nn.Flatten()\n", r"has no parameters\. Return a module of which all"),
        (f"def make(k): return {LINEAR.format(7)}\n", r"returns \[2, 7\] for 2 photos in evaluation mode\. It must "
                                                     r"return \[2, 4\]"),
        ("def make(k): return nn.Linear(5, k)\n", r"a trial pass on photos of 8 px failed: RuntimeError: mat1 and"),
        (f"def make(k): return {LINEAR.format('k')}.requires_grad_(False)\n", "has 2 parameters without requires_grad"),
        ("class make(nn.Linear):\n    def __init__(self, k): super().__init__(192, k)\n"
         "    def forward(self, x):\n        y = super().forward(x.flatten(1))\n"
         "        return (y, y) if self.training else y\n", "returns tuple for 2 photos in training mode"),
        ("class make(nn.Linear):\n    def __init__(self, k): super().__init__(192, k)\n"
         "    def forward(self, x):\n        y = super().forward(x.flatten(1)).sigmoid()\n        y += 1\n"
         "        return y\n", "a trial pass .* failed: RuntimeError: one of the variables needed for gradient"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_code_is_one_sentence(folder: Path, body: str, message: str) -> None:
    digest = module_of(folder, HEAD + body)
    with pytest.raises(ModelError, match=message) as caught:
        make(digest)
    assert "\n" not in str(caught.value)
    assert str(folder) not in str(caught.value)


@pytest.mark.parametrize("text", [b"def make(k:\n", b"\xff = 3\n", b"x = '\0'\n"])
def test_a_file_that_is_not_python_is_told_with_its_name(folder: Path, text: bytes) -> None:
    (folder / "own.py").write_bytes(text)
    with pytest.raises(ModelError, match=r"--model own:make: reading it failed( in own\.py, line 1)?: "):
        find_source("own:make")


@pytest.mark.parametrize("name", ["absent:make", "os:abort", "sys:exit", "__main__:make"])
def test_a_module_that_is_not_there_or_python_s_own_is_not_taken(folder: Path, name: str) -> None:
    with pytest.raises(ModelError, match=r"there is no module '.*' here.*--model-path DIR"):
        find_source(name)


@pytest.mark.parametrize("name", ["torch._C:Generator", "nets.absent:make"])
def test_a_module_without_source_is_told(folder: Path, name: str) -> None:
    with pytest.raises(ModelError, match=r"the source of the module '.*' is not available: there is no '.*\.py' in "):
        find_source(name)


@pytest.mark.parametrize(
    "name",
    ["../nets:make", "/etc/x:make", ".nets:make", "nets..a:make", "nets:make()", "nets:", ":make", "nets:a:b", "a b:c",
     "nets:make\n", "nets/small:make", "nets:a.b", "nеts:make", "n" * 300 + ":make"],
)  # fmt: skip
def test_a_name_that_is_no_dotted_path_of_identifiers_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(ModelError, match="is not MODULE:FUNCTION"):
        find_source(name)
    assert "is not MODULE:FUNCTION" in str(find_problem(name))


def test_a_model_path_that_is_no_folder_is_told() -> None:
    with pytest.raises(UsageError, match="--model-path absent: no such folder"):
        use_model_path(Path("absent"))
    before = list(sys.path)
    use_model_path(None)
    assert sys.path == before
