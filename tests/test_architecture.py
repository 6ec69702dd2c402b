"""The house keeps its shape: arrows point down, ray is imported in one folder, public names are documented."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import saets

PACKAGE = Path(saets.__file__).parent

FLOORS = (
    {"cli", "__main__"},
    {"commands"},
    {"pipeline"},
    {"stages", "planning"},
    {"checks", "doctor", "explore", "distributed"},
    {"forecast", "features", "judge", "generation", "effects", "run_folder", "scores", "plots", "report", "explorer", "model"},
    {"engine", "methods", "fit", "vector", "hub", "sae"},
    {"experiment", "records"},
    {"terminal", "files", "tokens", "hooks", "keys", "shapes", "errors"},
)
"""From the door down to the ground; a module imports from its own floor and from floors below."""


def modules() -> dict[str, Path]:
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Every module named in an import statement of the file, those inside functions and under TYPE_CHECKING included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names if node.module == "saets"}
    return found


def floor(name: str) -> int:
    top = name.split(".")[0]
    return next(i for i, names in enumerate(FLOORS) if top in names)


def inner_imports(path: Path) -> set[str]:
    """Modules of this package that the file imports, without the package's own name."""
    known = {name.split(".")[0] for name in modules()}
    inner = {name.removeprefix("saets.") for name in imports(path) if name.startswith("saets.")}
    return {name for name in inner if name.split(".")[0] in known}


@pytest.mark.parametrize("name", [name for name in modules() if name != "__init__"])
def test_no_arrow_runs_back_up(name: str) -> None:
    upward = {other for other in inner_imports(modules()[name]) if floor(other) < floor(name)}
    assert not upward, f"{name} imports {upward} from a floor above"


def test_modules_import_each_other_without_cycles() -> None:
    graph = {name: inner_imports(path) & modules().keys() for name, path in modules().items() if name != "__init__"}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"import cycle: {' -> '.join([*path, name])}"
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_only_distributed_imports_ray() -> None:
    guilty = {
        name
        for name, path in modules().items()
        if any(module.split(".")[0] == "ray" for module in imports(path)) and not name.startswith("distributed")
    }
    assert not guilty


BARE = """
import sys
for name in ("pydantic", "jaxtyping", "transformer_lens", "sae_lens", "ray", "polars", "pyarrow", "psutil"):
    sys.modules[name] = None
import saets.engine.rollout, saets.engine.calibration, saets.engine.machine, saets.engine.reference
"""


def test_the_engine_can_be_used_where_only_torch_and_transformers_are_installed() -> None:
    subprocess.run([sys.executable, "-c", BARE], check=True, timeout=120)


def test_every_public_name_exists_and_is_documented() -> None:
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    api = readme.split("## Python", 1)[1].split("\n## ", 1)[0]
    for name in saets.__all__:
        assert getattr(saets, name).__doc__, f"saets.{name} has no docstring"
        assert f"`{name}`" in api, f"saets.{name} is not in README's list of names"


def test_readme_maps_every_module() -> None:
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    missing = [name for name, path in modules().items() if path.name != "__init__.py" and f"{path.name}`" not in readme]
    assert not missing, f"README's map lacks {missing}"
