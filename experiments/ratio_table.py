"""Mean and spread of rho = ratio - 1 per denoising step, of one run or more: `python
experiments/ratio_table.py RUN ...`

Pools the updates that are not the first of their epoch. Their samples' noise has no part in what moved the
policy, so for a centred ratio the mean over samples must be 0 within its standard error.
"""

import json
import math
import sys
from pathlib import Path


def pooled(run_dir):
    """Per trained step: (mean, standard error, spread) of rho."""
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if line["kind"] == "update" and not line["first"] and line["live"]]
    total = sum(line["live"] for line in updates)
    rows = []
    for t in range(len(updates[0]["ratio_mean"])):
        mean = sum(line["live"] * line["ratio_mean"][t] for line in updates) / total
        variance = sum(line["live"] * line["ratio_std"][t] ** 2 for line in updates) / total
        rows.append((mean, math.sqrt(variance / total), math.sqrt(variance)))
    return rows, total


def main():
    tables = {}
    for run_dir in sys.argv[1:]:
        settings = json.loads((Path(run_dir) / "config.json").read_text())["args"]
        rows, total = pooled(run_dir)
        tables[f"{settings['method']}, seed {settings['seed']} ({total} samples)"] = rows
    print("| step | " + " | ".join(f"{name}: mean ± standard error, spread" for name in tables) + " |")
    print("|-" * (1 + len(tables)) + "|")
    for t in range(len(next(iter(tables.values())))):
        cells = [
            f"{mean:+.1e} ± {error:.0e}, {spread:.1e}"
            for mean, error, spread in (r[t] for r in tables.values())
        ]
        print(f"| {t} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
