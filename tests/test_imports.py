"""Imports point one way, and commands that need no network of neurons do not wait for torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ddpm_lmk"

# From the ground up: a package imports itself, its own line and those before it.
LAYERS: list[set[str]] = [
    {"errors"},
    {"system"},
    {"config"},
    {"bench"},
    {"data", "models"},
    {"rundir"},
    {"tasks"},
    {"engine"},
    {"inference"},
    {"run"},
    {"launcher"},
    {"sweep"},
    {"report"},
    {"demo"},
    {"cli"},
]
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}

# What answers at once on a login node: never imports torch when imported, whatever it does when called.
WITHOUT_TORCH = [
    *("errors", "config", "config.load", "config.explain", "config.yaml", "bench", "report.page"),
    *("cli", "cli.app", "cli.train", "cli.shards", "cli.results", "cli.bench", "cli.dry_run", "cli.doctor"),
    *("sweep", "sweep.run", "sweep.progress", "sweep.forecast"),
    *("launcher", "launcher.rank", "launcher.supervise", "launcher.preflight", "launcher.time_runs"),
    *(
        "rundir.lock",
        "rundir.retention",
        "inference.scoring",
        "engine.forecast",
        "engine.requirements",
    ),
    *("system.children", "system.environment", "system.limits", "system.processes"),
    *("system.heartbeat", "system.signals", "system.shipped", "system.machine", "system.console"),
    *("data", "data.spec", "data.sources.base", "data.shards.verify", "data.shards.pack", "data.phantom"),
    *("data.loading.order", "data.loading.augment"),
    *("data.images.dicom", "data.images.sandbox", "system.sandbox"),
]
ONLY_PARALLEL = {"accelerate", "deepspeed"}


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__").removesuffix("__init__")] = ast.parse(path.read_text())
    return found


def imports(tree: ast.AST, *, at_import: bool) -> set[str]:
    """Dotted names a module imports; with `at_import`, only those that run when it is imported."""
    names: set[str] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the arrows"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif at_import and is_deferred(node):
            continue
        waiting += ast.iter_child_nodes(node)
    return names


def is_deferred(node: ast.AST) -> bool:
    """Does the body of this node run later than the import, or never?"""
    is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    return is_function or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")


def layer(name: str) -> str:
    """The part of the package a dotted module name belongs to."""
    return name.removeprefix("ddpm_lmk.").split(".")[0]


def test_every_module_has_its_place_in_the_layers() -> None:
    assert {layer(name) for name in modules()} - {""} <= set(LAYER_OF)


def test_imports_point_one_way() -> None:
    wrong = []
    for name, tree in modules().items():
        if not name:
            continue
        used = {layer(used) for used in imports(tree, at_import=True) if used.startswith("ddpm_lmk.")} & set(LAYER_OF)
        wrong += [f"{name} -> {other}" for other in used if LAYER_OF[other] > LAYER_OF[layer(name)]]
    assert wrong == []


def test_only_the_process_group_knows_accelerate_and_deepspeed() -> None:
    users = {
        name
        for name, tree in modules().items()
        if {used.split(".")[0] for used in imports(tree, at_import=False)} & ONLY_PARALLEL
    }
    assert users == {"engine.parallel", "engine.trackers"}  # the second uses its classes for trackers and nothing else


def test_nothing_unpickles() -> None:
    calls = {"torch.load", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load"}
    found = [
        f"{name}: {ast.unparse(node.func)}"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if name != "models.import_torch"  # the one door, with its own tests
        and isinstance(node, ast.Call)
        and (ast.unparse(node.func) in calls or ast.unparse(node.func).endswith(".extractall"))
    ]
    assert found == []


def test_one_door_leads_to_cuda() -> None:
    """`system.accelerator`, which has an answer for a CPU too."""

    def is_use(node: ast.AST) -> bool:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            return any(used.startswith("torch.cuda") for used in imports(node, at_import=False))
        return isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda"

    assert {name for name, tree in modules().items() if any(map(is_use, ast.walk(tree)))} == {"system.accelerator"}


def test_no_drawer_of_odds_and_ends() -> None:
    assert [str(path) for path in PACKAGE.rglob("*.py") if path.stem in ("utils", "common", "helpers", "misc")] == []


def run_python(code: str, *arguments: str, cwd: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_modules_for_login_nodes_do_not_import_torch(tmp_path: Path) -> None:
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module('ddpm_lmk.' + name)\n"
    code += "    assert 'torch' not in sys.modules, name\n"
    run_python(code, *WITHOUT_TORCH, cwd=tmp_path)


COMMAND = """\
import sys
from ddpm_lmk import cli
code = cli.run(sys.argv[1:])
assert 'torch' not in sys.modules, 'torch was imported'
assert code == 3 if sys.argv[-1] == 'data.path=nowhere' else code == 0, code
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["pretrain", "--help"],
        ["pretrain", "--explain"],
        ["sweep", str(ROOT / "configs/smoke/sweep.yaml"), "--dry-run", "data.path=nowhere"],
    ],
    ids=lambda arguments: " ".join(Path(word).name for word in arguments),
)
def test_answers_at_once_without_torch(arguments: list[str], tmp_path: Path) -> None:
    assert run_python(COMMAND, *arguments, cwd=tmp_path).strip()
