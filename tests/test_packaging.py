"""The installed package: what is in it, how quickly it is imported, and who imports whom."""

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dflows", "datamodules", "lightning_modules")

# Imports run one way: mathematics <- datamodules, lightning_modules <- what commands share <- the
# commands; and experiments, which are not in the wheel, import all but commands.
SHARED = "dflows.cli"
# The library's door to trained models, which imports what it needs when it is called.
LATE = "dflows.loading"
ALLOWED = {"dflows", "torch"} | set(sys.stdlib_module_names)
ALLOWED_IN = {
    "dflows.codec.tables": {"constriction", "numpy"},
    "dflows.codec.texts": {"numpy"},
    "dflows.latent.prior": {"zuko"},
    "dflows.metrics": {"torchmetrics"},
}


def run(*arguments, **environment):
    """Runs Python, and returns what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=environment.pop("cwd", ROOT),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel made from a copy of the checkout, so that nothing is left behind in it."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    for name in (*PACKAGES, "configs", "tests"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    run("-m", "pip", "wheel", *options, "--wheel-dir", folder, checkout)
    (file,) = folder.glob("dflows-*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder that the wheel was installed into."""
    target = tmp_path_factory.mktemp("installed")
    run("-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", target, wheel)
    return target


def test_wheel_holds_the_packages_and_the_configs_and_nothing_else(wheel):
    expected = {
        file.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.suffix in {".py", ".html"} or file.name == "py.typed"
    }
    expected |= {
        f"dflows/configs/{file.relative_to(ROOT / 'configs').as_posix()}"
        for file in (ROOT / "configs").rglob("*")
        if file.suffix in {".py", ".yaml"}
    }
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == expected
    assert "dflows/configs/quickstart.yaml" in found


def test_installed_packages_and_configs_are_found_from_elsewhere(installed, tmp_path):
    script = (
        "import importlib, importlib.resources, json, pathlib, sys\n"
        f"files = [importlib.import_module(name).__file__ for name in {PACKAGES!r}]\n"
        "shipped = importlib.resources.files('dflows.configs')\n"
        "names = [entry.name for entry in shipped.iterdir()]\n"
        "text = shipped.joinpath('quickstart.yaml').read_text(encoding='utf-8')\n"
        "tests = importlib.util.find_spec('tests') is not None\n"
        "print(json.dumps([files, names, len(text), tests]))\n"
    )
    printed = run("-c", script, cwd=tmp_path, PYTHONPATH=str(installed))
    files, names, length, tests = json.loads(printed)
    assert all(Path(file).is_relative_to(installed) for file in files)
    assert {"quickstart.yaml", "smoke"} <= set(names)
    assert length
    assert not tests


def test_installed_command_finds_a_shipped_config_by_name(installed, tmp_path):
    arguments = ("-m", "dflows.fit", "--config", "quickstart.yaml", "--print_config")
    printed = run(*arguments, cwd=tmp_path, PYTHONPATH=str(installed))
    assert "class_path" in printed


def test_import_is_quick_and_light():
    script = (
        "import sys, time, torch\n"
        "start = time.process_time()\n"  # others may use the machine, too
        "import dflows\n"
        "print(time.process_time() - start, *{name.split('.')[0] for name in sys.modules})\n"
    )
    printed = [run("-c", script).split() for _ in range(3)]
    assert min(float(seconds) for seconds, *_ in printed) < 1
    heavy = {"pytorch_lightning", "lightning", "datasets", "torchmetrics", "tokenizers"}
    heavy |= {"jsonargparse", "matplotlib", "rich", "pandas", "pyarrow"}
    assert not heavy & set(printed[0])


def module_name(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {
    module_name(file): ast.parse(file.read_text(encoding="utf-8"))
    for package in (*PACKAGES, "experiments")
    for file in (ROOT / package).rglob("*.py")
}


def is_command(name):
    """Whether a module is run as ``python -m PACKAGE.NAME``."""
    return name.count(".") == 1 and any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        for node in TREES[name].body
    )


COMMANDS = {name for name in TREES if is_command(name)}


def imports(name):
    """Every module that a module names in an import, wherever in it."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} has a relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name, *packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("name", sorted(TREES))
def test_imports_run_one_way(name):
    used = set(imports(name))
    commands = {module for module in used if within(module, *COMMANDS)}
    assert not commands, f"nothing imports a command, and {name} imports {sorted(commands)}"
    if within(name, "experiments"):
        return
    assert not {module for module in used if within(module, "experiments")}
    if name in COMMANDS or within(name, SHARED, LATE):
        return
    assert not {module for module in used if within(module, SHARED)}
    if within(name, "dflows"):
        allowed = ALLOWED | ALLOWED_IN.get(name, set())
        assert not {module.split(".")[0] for module in used} - allowed
