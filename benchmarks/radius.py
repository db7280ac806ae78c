"""Coverage of the 90 % radius in simulated films, by how many of them are labelled: nothing is trained or timed.

    python -m benchmarks.radius --out benchmarks/results [--draws 300]

A film has 19 points; each has a scale of its own, which its spread tells, and normal noise (or Student's t, gross
misses); and all of a film share a factor that nothing tells, so that they are off together. For every number of films a
factor is learnt 300 times, by `ddpm_lmk.inference.radius` and by counting all points, or films alone, as independent;
what it holds is counted on 3,000 other films. Writes `radius_coverage.json`.
"""

from __future__ import annotations

import argparse
import math
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from ddpm_lmk.inference.radius import Errors, conformal_quantile
from ddpm_lmk.system.files import write_json
from ddpm_lmk.system.machine import versions

POINTS = 19
COVERAGE = 0.9
TESTED = 3000
FILMS = (2, 3, 5, 10, 25, 50)
# standard deviation of the logarithm of a film's factor, and degrees of freedom of the noise
KINDS: dict[str, tuple[float, float | None]] = {
    "independent": (0.0, None),
    "f = 0.3": (0.3, None),
    "f = 0.5, t(4)": (0.5, 4.0),
    "f = 0.8": (0.8, None),
}


def simulated_films(rng: np.random.Generator, films: int, *, film: float, freedom: float | None) -> Errors:
    """Errors of so many films, in px.

    Args:
        film: standard deviation of the logarithm of a film's factor, which no spread tells.
        freedom: degrees of freedom of Student's t; None is normal noise.
    """
    scale = np.exp(rng.normal(0, 0.6, (films, POINTS)))
    noise = rng.normal(size=(films, POINTS, 2))
    if freedom is not None:
        noise /= np.sqrt(rng.chisquare(freedom, (films, POINTS, 1)) / freedom)
    error = np.linalg.norm(noise, axis=-1) * scale * np.exp(rng.normal(0, film, (films, 1)))
    return Errors([str(index) for index in range(POINTS)], error, np.full_like(error, math.nan), scale)


def quantile_of(scores: np.ndarray, count: float) -> float | None:
    """The quantile of pooled scores with the conformal correction for `count` of them."""
    ordered = np.sort(scores, axis=None)
    rank = math.ceil(round(COVERAGE * (count + 1) / count * ordered.size, 9))
    return float(ordered[rank - 1]) if rank <= ordered.size else None


def study(draws: int) -> list[dict[str, Any]]:
    """A row for each number of films: what each way of counting holds of each kind of films."""
    rows = []
    for films in FILMS:
        row: dict[str, Any] = {"films": films}
        for name, (film, freedom) in KINDS.items():
            rng = np.random.default_rng(films)
            tested = simulated_films(rng, TESTED, film=film, freedom=freedom).ratio
            learnt = [simulated_films(rng, films, film=film, freedom=freedom).ratio for _ in range(draws)]
            ways = {
                "ours": [conformal_quantile(scores, COVERAGE)[0] for scores in learnt],
                "by points": [quantile_of(scores, scores.size) for scores in learnt],
                "by films": [quantile_of(scores, films) for scores in learnt],
            }
            row[name] = {way: _held(tested, factors) for way, factors in ways.items()}
        rows.append(row)
    return rows


def _held(tested: np.ndarray, factors: list[float | None]) -> dict[str, float | None]:
    """Share of the true points that these factors hold, and its deviation; how often there is no factor."""
    within = [100 * float((tested <= factor).mean()) for factor in factors if factor is not None]
    found: dict[str, float | None] = {"mean_pct": None, "std_pct": None}
    if len(within) > 1:
        found = {"mean_pct": round(fmean(within), 2), "std_pct": round(stdev(within), 2)}
    return found | {"without_pct": round(100 * (1 - len(within) / len(factors)), 1)}


def main() -> None:
    """Simulate, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--draws", type=int, default=300)
    args = parser.parse_args()
    result = {
        "coverage": COVERAGE,
        "draws": args.draws,
        "rows": study(args.draws),
        "versions": versions("ddpm-lmk", "numpy"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(args.out / "radius_coverage.json", result)


if __name__ == "__main__":
    main()
