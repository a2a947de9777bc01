"""Public classes and functions have docstrings; a method may have that of the protocol or base class it implements."""

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "fedshelf"
OF_TORCH = {"Module": ("forward",), "Function": ("forward", "backward")}
"""Methods that classes of other packages declare, by the name of the base class."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def undocumented(modules: Mapping[str, ast.Module]) -> list[str]:
    """The public classes, functions and methods without a docstring, as `PATH: NAME`."""
    classes = [(path, node) for path, tree in modules.items() for node in tree.body if isinstance(node, ast.ClassDef)]
    declared = _declared(node for _, node in classes)
    missing = [
        f"{path}: {node.name}"
        for path, tree in modules.items()
        for node in tree.body
        if isinstance(node, ast.ClassDef | Function) and _lacks(node)
    ]
    for path, node in classes:
        if node.name.startswith("_"):
            continue
        inherited = {name for base in _bases(node) for name in declared[base]} | declared["Protocol"]
        missing += [f"{path}: {node.name}.{m.name}" for m in _methods(node) if _lacks(m) and m.name not in inherited]
    return sorted(missing)


def _declared(classes: Iterable[ast.ClassDef]) -> dict[str, set[str]]:
    """The documented methods of each class with those of its bases; under "Protocol", those of all protocols."""
    by_name = {node.name: node for node in classes}
    declared: dict[str, set[str]] = defaultdict(set, {base: set(names) for base, names in OF_TORCH.items()})

    def collect(name: str) -> set[str]:
        if name in by_name:
            node = by_name.pop(name)
            declared[name] |= {method.name for method in _methods(node) if ast.get_docstring(method)}
            declared[name] |= {method for base in _bases(node) if base != "Protocol" for method in collect(base)}
            if "Protocol" in _bases(node):
                declared["Protocol"] |= declared[name]
        return declared[name]

    for name in list(by_name):
        collect(name)
    return declared


def _bases(node: ast.ClassDef) -> Iterator[str]:
    for base in node.bases:
        plain = base.value if isinstance(base, ast.Subscript) else base
        yield plain.attr if isinstance(plain, ast.Attribute) else ast.unparse(plain)


def _methods(node: ast.ClassDef) -> Iterator[Function]:
    return (item for item in node.body if isinstance(item, Function))


def _lacks(node: ast.ClassDef | Function) -> bool:
    is_setter = any(isinstance(found, ast.Attribute) and found.attr == "setter" for found in node.decorator_list)
    return not node.name.startswith("_") and not is_setter and not ast.get_docstring(node)


def test_public_names_have_docstrings() -> None:
    modules = {
        str(path.relative_to(SOURCE)): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCE.rglob("*.py")
    }
    assert undocumented(modules) == []


PROTOCOL = 'class Clock(Protocol):\n    """Time."""\n    def now(self) -> float:\n        """Return seconds."""\n'


@pytest.mark.parametrize(("text", "missing"), [
    ("def f(): ...", ["m.py: f"]),
    ("async def f(): ...", ["m.py: f"]),
    ("class C: ...", ["m.py: C"]),
    ('class C:\n    """C."""\n    def f(self): ...', ["m.py: C.f"]),
    ("def _f(): ...\nclass _C:\n    def f(self): ...", []),
    ('def f():\n    """F."""\n    def inner(): ...', []),
    (PROTOCOL + 'class Real:\n    """Real."""\n    def now(self): ...\n    def then(self): ...', ["m.py: Real.then"]),
    ('class A:\n    """A."""\n    def f(self):\n        """F."""\nclass B(A):\n    """B."""\n    def f(self): ...', []),
    ('class A:\n    """A."""\n    def f(self):\n        """F."""\nclass B:\n    """B."""\n    def f(self): ...',
     ["m.py: B.f"]),
    ('class Net(nn.Module):\n    """Net."""\n    def forward(self, x): ...', []),
])  # fmt: skip
def test_what_lacks_a_docstring_is_found(text: str, missing: list[str]) -> None:
    assert undocumented({"m.py": ast.parse(text)}) == missing
