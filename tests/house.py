"""How large and how tangled the package is: files, lines, layers of import, circles, comments, documented keys.

    python -m tests.house [--root CHECKOUT] [--run MODULE] [--json]

Counted with `ast` and `tokenize`, nothing is imported; documented keys are what `ddpm-lmk pretrain --explain` of that
checkout prints. `docs/house.md` holds the numbers before and after the package was rebuilt.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import subprocess
import sys
import tokenize
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "ddpm_lmk"
RUN = f"{PACKAGE}.run"  # what a pre-training run of one process imports
WANTED = {
    "files": "<= 135",
    "lines": "<= 22000",
    "top files": "<= 5",
    "top folders": "<= 13",
    "layers of import": "<= 13",
    "circles at import": "0",
    "circles, imports in functions included": "0",
    "modules of a run": "<= 70",
    "lines of a run": "<= 12000",
    "comments per 100 lines of code": ">= 5",
    "documented keys of a pretrain run file": "<= 80",
    "lines of benchmarks": "<= 3500",
    "lines of tests": "<= 16000",
}
BESIDE_CODE = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}

Arrows = dict[str, set[str]]


def modules(package: Path) -> dict[str, Path]:
    """Every module of a package by dotted name."""
    paths = {}
    for path in sorted(package.rglob("*.py")):
        parts = (package.name, *path.relative_to(package).with_suffix("").parts)
        paths[".".join(parts).removesuffix(".__init__")] = path
    return paths


def imported(tree: ast.AST, known: set[str], *, at_import: bool) -> set[str]:
    """The modules among `known` that a module imports; with `at_import`, only when it is itself imported."""
    names: set[str] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole in known else node.module or "")
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue  # never runs
        elif at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        waiting += ast.iter_child_nodes(node)
    return names & known


def imports_of(package: Path, *, at_import: bool) -> Arrows:
    """Which modules each module imports."""
    paths = modules(package)
    trees = {name: ast.parse(path.read_text()) for name, path in paths.items()}
    return {name: imported(tree, set(paths), at_import=at_import) - {name} for name, tree in trees.items()}


def components(arrows: Arrows) -> list[list[str]]:
    """Groups of modules that import one another, those that are imported first (Tarjan, SIAM J. Comput. 1, 1972)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(name: str) -> None:
        number[name] = low[name] = len(number)
        stack.append(name)
        for other in arrows[name]:
            if other not in number:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], number[other])
        if low[name] == number[name]:
            at = stack.index(name)
            groups.append(stack[at:])
            del stack[at:]

    for name in arrows:
        if name not in number:
            visit(name)
    return groups


def circles(arrows: Arrows) -> list[list[str]]:
    """Groups of modules that import one another in a circle."""
    return [sorted(group) for group in components(arrows) if len(group) > 1]


def num_layers(arrows: Arrows) -> int:
    """Length of the longest chain of imports; a circle counts as one link."""
    depth: dict[str, int] = {}
    for group in components(arrows):
        below = {other for name in group for other in arrows[name]} - set(group)
        depth |= dict.fromkeys(group, 1 + max((depth[other] for other in below), default=0))
    return max(depth.values())


def reach(arrows: Arrows, start: str) -> set[str]:
    """Everything that importing `start` imports, the packages on the way included."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name in arrows and name not in seen:
            seen.add(name)
            waiting += [*arrows[name], name.rpartition(".")[0]]
    return seen


def num_lines(paths: Iterable[Path]) -> int:
    """Lines of files, empty ones included."""
    return sum(len(path.read_text().splitlines()) for path in paths)


def comments_per_100(paths: Iterable[Path]) -> float:
    """Comments for 100 lines that hold code: neither empty, nor a comment alone, nor a docstring."""
    comments = code = 0
    for path in paths:
        lines: set[int] = set()
        before = tokenize.NEWLINE
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            is_docstring = token.type == tokenize.STRING and before in BESIDE_CODE
            if token.type == tokenize.COMMENT:
                comments += 1
            elif token.type not in BESIDE_CODE and not is_docstring:
                lines |= set(range(token.start[0], token.end[0] + 1))
            if token.type not in (tokenize.NL, tokenize.COMMENT):
                before = token.type
        code += len(lines)
    return 100 * comments / code


def num_documented_keys(root: Path) -> int:
    """Different keys that `--explain` prints, each at the beginning of a line; kinds of a task may share one."""
    command = [sys.executable, "-m", f"{PACKAGE}.cli", "pretrain", "--explain"]
    environment = os.environ | {"PYTHONPATH": str(root)}
    page = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout
    return len({line.split()[0] for line in page.splitlines() if line[:1].isalpha()})


def measure(root: Path, *, package: str = PACKAGE, start: str = RUN) -> dict[str, float]:
    """The rows of the table, but for the keys."""
    folder = root / package
    paths = modules(folder)
    at_import, all_imports = (imports_of(folder, at_import=only) for only in (True, False))
    of_run = reach(at_import, start)
    top = [entry for entry in folder.iterdir() if entry.suffix == ".py" or (entry / "__init__.py").is_file()]
    return {
        "files": len(paths),
        "lines": num_lines(paths.values()),
        "top files": sum(entry.is_file() for entry in top),
        "top folders": sum(entry.is_dir() for entry in top),
        "layers of import": num_layers(at_import),
        "circles at import": len(circles(at_import)),
        "circles, imports in functions included": len(circles(all_imports)),
        "modules of a run": len(of_run),
        "lines of a run": num_lines(paths[name] for name in of_run),
        "modules of a run, imports in functions included": len(reach(all_imports, start)),
        "comments per 100 lines of code": round(comments_per_100(paths.values()), 1),
        "lines of benchmarks": num_lines((root / "benchmarks").rglob("*.py")),
        "lines of tests": num_lines((root / "tests").rglob("*.py")),
    }


def main(arguments: list[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to measure")
    parser.add_argument("--run", default=RUN, help="module that does a run; ddpm_lmk.runs before 0.2.0")
    parser.add_argument("--json", action="store_true", help="the numbers, and what was wanted, as JSON")
    given = parser.parse_args(arguments)
    numbers = measure(given.root, start=given.run) | {
        "documented keys of a pretrain run file": num_documented_keys(given.root)
    }
    if given.json:
        sys.stdout.write(json.dumps({"measured": numbers, "wanted": WANTED}, indent=1) + "\n")
    else:
        rows = [
            ("what", "measured", "wanted"),
            *((what, f"{n:g}", WANTED.get(what, "")) for what, n in numbers.items()),
        ]
        sys.stdout.writelines(f"{what:<48}{number:>9}  {wanted}\n".rstrip() + "\n" for what, number, wanted in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
