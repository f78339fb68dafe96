"""FedLabel against what people would use instead, over label skews and seeds.

``python -m experiments.studies.semi_supervised EXPERIMENT.toml --csv FILE`` runs each method of
`METHODS` on the experiment's data, model and optimiser, for each Dirichlet alpha and seed, and
prints a Markdown table: last-round accuracy, mean and standard deviation over the seeds. Runs that
are in FILE already aren't run again.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from pathlib import Path

import pandas as pd

import fedsim

METHODS: dict[str, list[str]] = {
    "FedAvg, labelled part only": ["method.name=fedavg"],
    "FixMatch, local teacher": ["method.name=fixmatch-local"],
    "FixMatch, global teacher": ["method.name=fixmatch-global"],
    "FedLabel": [],
    "FedLabel, single upload": ["method.aggregation=single"],
    "FedLabel, joint schedule": ["method.schedule=joint"],
    "FedAvg, all labels": ["method.name=fedavg", "clients.labelled=1.0"],
}


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.1, 0.5])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--fixmatch-threshold", type=float, default=0.95)
    arguments = parser.parse_args()
    for seed, alpha, method in itertools.product(
        range(arguments.seeds), arguments.alphas, arguments.methods
    ):
        done = pd.read_csv(arguments.csv) if arguments.csv.exists() else pd.DataFrame()
        key = {"method": method, "alpha": alpha, "seed": seed}
        if len(done) and (done[list(key)] == pd.Series(key)).all(axis=1).any():
            continue
        row = key | run(arguments, key)
        print(row, flush=True)
        pd.concat([done, pd.DataFrame([row])]).to_csv(arguments.csv, index=False)
    print(table(pd.read_csv(arguments.csv)))


def run(arguments: argparse.Namespace, key: dict[str, object]) -> dict[str, float]:
    """Run one experiment and return its last-round figures, in %."""
    overrides = [f"clients.alpha={key['alpha']}", f"seed={key['seed']}", *arguments.overrides]
    overrides += METHODS[str(key["method"])]
    if "FixMatch" in str(key["method"]):
        overrides.append(f"method.threshold={arguments.fixmatch_threshold}")
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = fedsim.simulate(fedsim.load(arguments.experiment, overrides))
    last = result.rounds.iloc[-1]
    figures = {
        "generic": 100 * last["generic_accuracy"],
        "personal": 100 * last["personal_accuracy"],
        "pseudo_accuracy": float("nan"),
        "kept": float("nan"),
        "local": float("nan"),
    }
    counts = result.training[result.training["round"] == last["round"]].sum()
    if counts.get("pseudo_kept", 0):
        figures["pseudo_accuracy"] = 100 * counts["pseudo_correct"] / counts["pseudo_kept"]
        figures["kept"] = 100 * counts["pseudo_kept"] / counts["pseudo_seen"]
        figures["local"] = 100 * counts.get("pseudo_local", float("nan")) / counts["pseudo_kept"]
    figures = {name: round(float(value), 2) for name, value in figures.items()}
    return figures | {"seconds": round(time.perf_counter() - started, 1)}


def table(rows: pd.DataFrame) -> str:
    """Return the Markdown table: a row a method, columns for each alpha; – where nothing ran."""
    alphas = sorted(rows["alpha"].unique())
    columns = ("generic", "personal", "pseudo-labels right / kept")
    heads = [f"alpha {alpha}: {column}" for alpha in alphas for column in columns]
    lines = [" | ".join(["| method", *heads]) + " |", "|---" * (1 + len(heads)) + "|"]
    for method in METHODS:
        cells = [f"| {method}"]
        for alpha in alphas:
            chosen = rows[(rows["method"] == method) & (rows["alpha"] == alpha)]
            cells += [_spread(chosen["generic"]), _spread(chosen["personal"])]
            right, kept = chosen["pseudo_accuracy"].mean(), chosen["kept"].mean()
            cells.append("–" if pd.isna(right) else f"{right:.1f} / {kept:.1f}")
        lines.append(" | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: pd.Series) -> str:
    if values.empty:
        return "–"
    if len(values) == 1:
        return f"{values.iloc[0]:.1f} (1 seed)"
    seeds = "" if len(values) == 3 else f" ({len(values)} seeds)"
    return f"{values.mean():.1f} ± {values.std():.1f}{seeds}"


if __name__ == "__main__":
    main()
