"""The house: what is installed, what imports what, and what the documentation claims."""

import ast
import doctest
import importlib
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]

# Folder in the repository -> package.
HOUSE = {
    "lightning_bd": "lightning_bd", "callbacks": "lightning_bd.callbacks", "datamodules": "lightning_bd.datamodules",
    "configs": "lightning_bd.configs",
}  # fmt: skip

# From the bottom up; a module imports from its own layer or those below. What is not named here is on top.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("functional", "label_maps", "batch", "cache", "description", "files", "image_files", "quiet"),
    ("backbones", "metrics", "selection"),
    ("triggers",),
    ("manifest_checks", "manifest", "poisoning", "crafting"),
    ("datamodules", "callbacks", "classifier"),
)

# Neighbours in a layer that must not lean on each other: callbacks drop into projects with data of their own.
STRANGERS = {("callbacks", "datamodules"), ("callbacks", "classifier"), ("datamodules", "callbacks"),
             ("datamodules", "classifier"), ("classifier", "datamodules"), ("classifier", "callbacks")}  # fmt: skip


def find_modules() -> dict[str, Path]:
    """All source files by the names of their modules."""
    found = {}
    for folder, package in HOUSE.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = find_modules()


def imports(module: str) -> set[str]:
    """Full names of what a module imports, also inside functions and for type checking."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def unit(name: str) -> str | None:
    """``lightning_bd.<unit>.…``; None outside the library and for the library's own ``__init__``."""
    parts = name.split(".")
    if parts[0] != "lightning_bd" or len(parts) == 1 or f"lightning_bd.{parts[1]}" not in MODULES:
        return None
    return parts[1]


def layer(name: str) -> int:
    return next((number for number, units in enumerate(LAYERS) if name in units), len(LAYERS))


def test_the_house_was_found() -> None:
    assert {"lightning_bd.cli", "lightning_bd.callbacks.defense", "lightning_bd.datamodules.base"} <= MODULES.keys()
    assert unit("lightning_bd.__version__") is None
    assert imports("lightning_bd.__main__") == {"lightning_bd.cli.main"}


def test_pyproject_lists_the_packages_on_disk() -> None:
    on_disk = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert set(SETUPTOOLS["packages"]) == on_disk
    assert len(SETUPTOOLS["packages"]) == len(on_disk), "a package is listed twice"


def test_every_folder_with_code_is_a_package() -> None:
    for path in MODULES.values():
        assert (path.parent / "__init__.py").is_file(), f"{path.parent} has no __init__.py, so it is not installed"


def test_package_dir_is_the_house() -> None:
    assert SETUPTOOLS["package-dir"] == {package: folder for folder, package in HOUSE.items()}


def test_all_configs_are_shipped() -> None:
    [pattern] = SETUPTOOLS["package-data"]["lightning_bd.configs"]
    files = {path for path in (ROOT / "configs").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert files - {ROOT / "configs" / "__init__.py"} == set((ROOT / "configs").glob(pattern))


def test_versions_agree() -> None:
    assert PYPROJECT["project"]["version"] == importlib.import_module("lightning_bd").__version__


@pytest.mark.parametrize("folder", ["callbacks", "datamodules", "configs", "tests", "benchmarks", "docs"])
def test_no_folder_is_a_top_level_package(folder: str, tmp_path: Path) -> None:
    """They would collide with users' own folders of these names."""
    done = subprocess.run(
        [sys.executable, "-c", f"import lightning_bd, {folder}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"ModuleNotFoundError: No module named '{folder}'" in done.stderr


@pytest.mark.slow
def test_the_packages_are_importable_from_anywhere(tmp_path: Path) -> None:
    names = ", ".join(SETUPTOOLS["packages"])
    done = subprocess.run(
        [sys.executable, "-c", f"import {names}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    here = unit(module)
    for imported in imports(module):
        there = unit(imported)
        if here is None:
            assert there is None, f"`import lightning_bd` must stay light, but it imports {imported}"
        elif there is not None and there != here:
            assert layer(there) <= layer(here), f"{module} imports {imported}, which lies above it"
            assert (here, there) not in STRANGERS, f"{module} imports {imported}"


def test_every_named_layer_is_checked() -> None:
    """A misspelt name would put a unit on top, where everything is allowed."""
    units = {unit(module) for module in MODULES}
    assert {name for names in LAYERS for name in names} <= units


@pytest.mark.parametrize("name", ["functional", "triggers", "backbones"])
def test_the_maths_knows_no_lightning(name: str) -> None:
    modules = [module for module in MODULES if unit(module) == name]
    assert modules
    for module in modules:
        for imported in imports(module):
            assert imported.partition(".")[0] not in ("lightning", "pytorch_lightning"), f"{module} imports {imported}"


def test_importing_functional_loads_no_lightning(tmp_path: Path) -> None:
    names = ", ".join(module for module in MODULES if unit(module) == "functional")
    found = "[name for name in sys.modules if name.startswith(('lightning.', 'pytorch_lightning'))]"
    code = f"import sys, {names}; print({found})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_commands_import_reports() -> None:
    """Training never draws; a command that ends with a figure does."""
    modules = [module for module in MODULES if unit(module) in ("reports", "commands")]
    assert modules
    for module in MODULES:
        if module not in modules:
            assert not any(unit(imported) == "reports" for imported in imports(module)), module


def test_reports_read_files_only() -> None:
    """They must work where neither torch nor the run's code does."""
    for module in MODULES:
        if unit(module) == "reports":
            for imported in imports(module):
                assert unit(imported) in (None, "reports"), f"{module} imports {imported}"
                assert imported.partition(".")[0] not in ("torch", "lightning"), f"{module} imports {imported}"


@pytest.mark.parametrize("module", MODULES)
def test_doctests(module: str) -> None:
    results = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


def test_doctests_are_found() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    attempted = sum(len(test.examples) for module in MODULES for test in finder.find(importlib.import_module(module)))
    assert attempted > 50


@pytest.mark.parametrize("module", MODULES)
def test_all_names_what_is_there_and_documented(module: str) -> None:
    loaded = importlib.import_module(module)
    path = MODULES[module]
    if path.read_text(encoding="utf-8").strip():
        assert loaded.__doc__, f"{module} has no docstring"
    names = getattr(loaded, "__all__", ())
    assert len(set(names)) == len(names)
    for name in names:
        assert hasattr(loaded, name), f"{module}.__all__ names `{name}`, which does not exist"
        value = getattr(loaded, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"{module}.{name} has no docstring"
        if inspect.isclass(value) and value.__module__ == module:
            for part, member in vars(value).items():
                function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
                if inspect.isfunction(function) and not part.startswith("_"):
                    assert inspect.getdoc(getattr(value, part)), f"{module}.{name}.{part} has no docstring"


@pytest.mark.parametrize("module", [name for name in SETUPTOOLS["packages"] if name != "lightning_bd"])
def test_packages_only_re_export(module: str) -> None:
    for node in ast.parse(MODULES[module].read_text(encoding="utf-8")).body:
        named = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert named or text or isinstance(node, ast.ImportFrom), f"{module}: {ast.unparse(node)}"
