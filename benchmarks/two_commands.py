"""The README's two commands as a newcomer runs them, timed whole: fresh clone, fresh user, nothing installed.

    python benchmarks/two_commands.py python3.11 python3.13     # about 20 minutes for each Python on two cores

Each Python goes through the parts `demo` and `test` of `.ci/run`, the demo on a processor held to AVX2. Time is that of
the clock and counts installing. The report of the first demo becomes `results/demo`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ddpm_lmk.system import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SAID = {"demo": re.compile(r"^done in .*$", re.M), "test": re.compile(r"^=* ?(\d+ .*passed.*? in [\d.]+s).*$", re.M)}


def run_part(part: str, python: str, log: Path, environment: dict[str, str]) -> dict[str, Any]:
    """A part of `.ci/run` with this Python: its time, its exit code and what it said at its end."""
    began = time.monotonic()
    with log.open("w") as file:
        code = subprocess.call(
            ["bash", str(ROOT / ".ci" / "run"), part],
            env=os.environ | environment | {"PYTHON": python},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    found = SAID[part].search(log.read_text())
    said = found and (found[1] if found.groups() else found[0])
    wall_s, load = round(time.monotonic() - began), round(os.getloadavg()[2], 1)
    return {"command": f"make {part}", "exit_code": code, "wall_s": wall_s, "load_15_min_at_end": load, "said": said}


def main() -> int:
    """Run everything, say how it goes, write the result file; ends with 1 where a command did not end well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pythons", nargs="+", help="interpreters, e.g. python3.11")
    parser.add_argument("--part", choices=tuple(SAID), action="append", help="only this; other rows of the file stay")
    options = parser.parse_args()
    target = RESULTS / "two_commands.json"
    rows: list[dict[str, Any]] = json.loads(target.read_text())["rows"] if options.part and target.exists() else []
    with tempfile.TemporaryDirectory(prefix="ddpm-lmk-two-") as folder:
        for part, python in ((part, python) for part in options.part or SAID for python in options.pythons):
            asked = [python, "-c", "import platform; print(platform.python_version())"]
            version = subprocess.check_output(asked, text=True).strip()
            out, log = Path(folder) / f"demo-{version}", Path(folder) / f"{part}-{version}.log"
            row = {"python": version, **run_part(part, python, log, {"OUT": str(out)})}
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
            if row["exit_code"]:
                sys.stdout.write(log.read_text()[-4000:])
            elif part == "demo" and python == options.pythons[0]:
                for name in ("report.md", "report.csv"):
                    shutil.copyfile(out / name, RESULTS / "demo" / name)
                shutil.copytree(out, ROOT / "demo-output", dirs_exist_ok=True)  # to look at
            rows = [*(old for old in rows if (old["python"], old["command"]) != (version, row["command"])), row]
    result = {
        "rows": rows,
        "hardware": machine.hardware(),
        "versions": machine.versions("torch"),
        "code": machine.code_digest(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    target.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(row["exit_code"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
