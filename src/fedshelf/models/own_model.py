"""A user's own model: a function on this machine that is named as `package.module:function`.

A server sends the name and a digest of the source, never code. The digest covers the module's source file and every
source file that it imports, directly or through others, from the folder in which its top-level module or package lies;
in a `site-packages` folder, from the same package only. The files are found by reading `import` statements, so the
digest is known, and compared, before any of the code runs. Other libraries, data files and modules imported by a
computed name are not covered.
"""

import ast
import copy
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from fedshelf.core.errors import FedShelfError, ModelError, UsageError
from fedshelf.core.text import counted, did_you_mean, first_few
from fedshelf.models.convolution_fault import avoid_convolution_fault
from fedshelf.models.registry import problem_with_own

INSTALLED = frozenset({"site-packages", "dist-packages"})
_MAX_ERROR_CHARACTERS = 300
_imported: dict[Path, str] = {}  # digests of source files when this process imported them


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """The source of a user's own model.

    Attributes:
        name: the model's name, `package.module:function`.
        files: the covered files, by their path in the folder of the top-level module.
        digests: SHA-256 of each file, by the same path. Line endings do not count.
    """

    name: str
    files: Mapping[str, Path]
    digests: Mapping[str, str]

    @property
    def digest(self) -> str:
        """SHA-256 of the files' paths and digests."""
        text = "\n".join(f"{self.digests[path]} {path}" for path in sorted(self.digests))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def module(self) -> str:
        """The module that holds the function."""
        return self.name.partition(":")[0]


def use_model_path(folder: Path | None) -> None:
    """Let this process, and those that it forks, find modules in `--model-path` first.

    Args:
        folder: the folder, if there is one.

    Raises:
        UsageError: there is no such folder.
    """
    if folder is None:
        return
    if not folder.is_dir():
        raise UsageError(f"--model-path {folder}: no such folder")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def find_source(name: str) -> Source:
    """Find the source of a model without running any of it.

    Args:
        name: the model's name.

    Returns:
        The source.

    Raises:
        ModelError: the name is invalid, there is no such module, or its source is not available or not Python.
    """
    if problem := problem_with_own(name):
        raise ModelError(problem)
    module = name.partition(":")[0]
    top = module.partition(".")[0]
    importlib.invalidate_caches()
    try:
        spec = None if top in {*sys.stdlib_module_names, "__main__"} else importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise ModelError(
            f"--model {name}: there is no module '{top}' here, except perhaps in Python itself. Give the "
            "folder that it lies in with --model-path DIR"
        )
    places = spec.submodule_search_locations or ([spec.origin] if spec.origin else [])
    roots = [Path(place).absolute().parent for place in places]
    if _file_of(module, roots) is None:
        raise ModelError(
            f"--model {name}: the source of the module '{module}' is not available: there is no "
            f"'{module.replace('.', '/')}.py' in '{first_few(map(str, roots)) or top}'. The module must be a file of "
            "Python, because stores compare its digest"
        )
    only = f"{top}." if any(root.name in INSTALLED for root in roots) else ""
    files: dict[str, Path] = {}
    digests: dict[str, str] = {}
    queue = [module]
    while queue:
        for above in accumulate(queue.pop().split("."), "{}.{}".format):  # a package is imported before what is in it
            found = _file_of(above, roots)
            if found is None or found[0] in files:
                continue
            path, file = found
            files[path] = file
            with _explained(name, files, "reading it"):
                content = file.read_bytes().replace(b"\r\n", b"\n")
                imports = list(_imports(ast.parse(content, filename=str(file)), path))
            digests[path] = hashlib.sha256(content).hexdigest()
            queue += [imported for imported in imports if f"{imported}.".startswith(only)]
    return Source(name=name, files=files, digests=digests)


def build_own(name: str, *, digest: str | None, num_classes: int, image_size: int) -> nn.Module:
    """Import a model's module, if its source has the given digest, and call the function.

    Args:
        name: the model's name.
        digest: the digest that the source must have.
        num_classes: number of outputs, which the function is called with.
        image_size: side of the photos in pixels, for a trial pass.

    Returns:
        The module, in training mode.

    Raises:
        ModelError: the source differs, the code fails, or what it returns cannot be trained.
    """
    if digest is None:
        raise ModelError(
            f"the model '{name}' was given to fedshelf.Federation as an object, so its source is not recorded. Load "
            "the weights into a module of your own, or give the model's name to Federation: MODULE:FUNCTION"
        )
    source = find_source(name)
    if source.digest != digest:
        raise ModelError(
            f"--model {name}: the source on this machine has the digest {source.digest[:16]}…, and "
            f"{digest[:16]}… is asked for. Use the same version of {first_few(sorted(source.files))}"
        )
    digests = source.digests
    if stale := [
        path for path, file in source.files.items() if _imported.setdefault(file, digests[path]) != digests[path]
    ]:
        raise ModelError(f"--model {name}: {first_few(stale)} changed after this process had read it. Start it again")
    with _explained(name, source.files, "importing it"), torch.random.fork_rng(devices=[]):  # only the first time
        imported = importlib.import_module(source.module)
    function = getattr(imported, name.partition(":")[2], None)
    if not callable(function):
        near = did_you_mean(name.partition(":")[2], [key for key, value in vars(imported).items() if callable(value)])
        raise ModelError(
            f"--model {name}: the module '{source.module}' has no such function{near or '. Correct the name'}"
        )
    return call(name, function, num_classes=num_classes, image_size=image_size, files=source.files)


def call(
    name: str, function: Callable[[int], object], *, num_classes: int, image_size: int, files: Mapping[str, Path],
) -> nn.Module:  # fmt: skip
    """Call a function that makes a model, and try the model.

    Args:
        name: the model's name.
        function: the function.
        num_classes: number of outputs, which the function is called with.
        image_size: side of the photos in pixels, for a trial pass.
        files: the source files by the paths to show in messages.

    Returns:
        The module, in training mode.

    Raises:
        ModelError: the code fails, or what it returns cannot be trained.
    """
    with _explained(name, files, f"calling it with {num_classes}"):
        module = function(num_classes)
    if not isinstance(module, nn.Module):
        raise ModelError(f"--model {name} returns {type(module).__name__}. It must return a torch.nn.Module")
    with _explained(name, files, f"a trial pass on photos of {image_size} px"):
        _try(name, module.float(), num_classes, image_size)
    return module.train()


def _try(name: str, module: nn.Module, num_classes: int, image_size: int) -> None:
    """Do a pass in evaluation and a step in training, after which `module` has the same values.

    Raises:
        ModelError: the result is not one of logits, or there is nothing to train.
    """
    photos_BCHW = torch.zeros(2, 3, image_size, image_size)
    with torch.no_grad():  # first, because it creates the tensors of lazy modules
        evaluated = module.eval()(photos_BCHW)
    needs_grad = [parameter.requires_grad for parameter in module.parameters()]
    if not needs_grad or not all(needs_grad):
        what = (
            f"{counted(needs_grad.count(False), 'parameter')} without requires_grad" if needs_grad else "no parameters"
        )
        raise ModelError(f"--model {name} has {what}. Return a module of which all parameters can be trained")
    trial = copy.deepcopy(module).train()
    avoid_convolution_fault(trial)
    trained = trial(photos_BCHW)
    for mode, output in (("evaluation", evaluated), ("training", trained)):
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if shape != [2, num_classes]:
            raise ModelError(
                f"--model {name} returns {shape} for 2 photos in {mode} mode. It must return [2, {num_classes}]: one "
                "number for each photo and class, before softmax"
            )
    trained.sum().backward()


def _file_of(module: str, roots: list[Path]) -> tuple[str, Path] | None:
    """A module's source: its path in the first of `roots` that has it, and the file."""
    stem = module.replace(".", "/")
    candidates = [(path, root / path) for root in roots for path in (f"{stem}/__init__.py", f"{stem}.py")]
    return next((found for found in candidates if found[1].is_file()), None)


def _imports(tree: ast.AST, path: str) -> Iterator[str]:
    """Names of modules that a file may import; some are names in a module."""
    package = path.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}".lstrip(".") for alias in node.names)


@contextmanager
def _explained(name: str, files: Mapping[str, Path], what: str) -> Iterator[None]:
    """Turn what the user's code raises into a sentence with the type, the message and the line.

    Raises:
        ModelError: the code failed.
    """
    try:
        yield
    except FedShelfError:  # also a limit on the number of parameters
        raise
    except (Exception, SystemExit) as error:
        lines = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        lines += [(error.filename or "", error.lineno)] if isinstance(error, SyntaxError) else []
        path_of = {str(file): path for path, file in files.items()}
        where = [f" in {path_of[file]}, line {line}" for file, line in lines if file in path_of][-1:]
        message = " ".join(str(error).split())[:_MAX_ERROR_CHARACTERS]
        raise ModelError(
            f"--model {name}: {what} failed{''.join(where)}: {type(error).__name__}: {message}. Correct the module, or "
            "install what it needs"
        ) from error
