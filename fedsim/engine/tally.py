"""What is counted during a pass of SGD: sums over its steps, and how good pseudo-labels are.

Shapes: K clients side by side, B examples in a batch.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.data.class_groups import GROUPS
from fedsim.engine.requests import Targets

Rows = slice | Tensor | None
"""Which rows of a stack take a step: the first ones, or some; None for a client alone."""

Counts = dict[str, float]
"""A client's sums, by name."""


class Tally:
    """Sums of scalars over the steps, for each row of a stack or for a client alone.

    They are noted during the pass and added up after it: an addition takes as long as many a step's
    other operations.
    """

    def __init__(self, lead: tuple[int, ...]) -> None:
        self._lead = lead
        self._noted: list[tuple[Rows, dict[str, Tensor]]] = []

    def note(self, rows: Rows, values: dict[str, Tensor]) -> None:
        """Keep values of the same names as ever, for some rows."""
        self._noted.append((rows, values))

    def totals(self) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.intp]]:
        """Return the sums, float64 [K] or [], and how often each row was noted."""
        if not self._lead:
            steps = [values for _, values in self._noted]
            names = steps[0] if steps else ()
            # Brought over together: from a GPU, one by one would be slow.
            noted = {name: torch.stack([step[name] for step in steps]).tolist() for name in names}
            return {name: np.array(sum(of)) for name, of in noted.items()}, np.array(len(steps))
        (count,) = self._lead
        if not self._noted:
            return {}, np.zeros(count, np.intp)
        place = np.concatenate([_places(rows) for rows, _ in self._noted])
        totals = {}
        for name in self._noted[0][1]:
            found = torch.cat([values[name] for _, values in self._noted])
            totals[name] = np.bincount(place, found.double().cpu().numpy(), count).astype(float)
        return totals, np.bincount(place, minlength=count)


def _places(rows: Rows) -> NDArray[np.int64]:
    if isinstance(rows, Tensor):
        return rows.cpu().numpy()
    assert rows is not None, "a client alone has no rows"
    return np.arange(rows.stop)


def audit(groups: Tensor, targets: Targets, truth: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Count how many pseudo-labels are kept and how many are true.

    Parameters
    ----------
    groups : torch.Tensor
        [C], whether a class is head, medium or tail.
    targets : dict
        What the teacher said of a batch [..., B].
    truth, mask : torch.Tensor
        True labels, -1 where nobody knows them, and 1 for an example and 0 for padding, [..., B].

    Returns
    -------
    dict
        ``seen``, ``kept``, ``correct``, ``local`` and so on, [...]. What is kept of the head, the
        medium and the tail classes are those pseudo-labels whose truth is known.
    """
    kept = targets["kept"] * mask
    correct = kept * (targets["pseudo_label"] == truth)
    counts = {"seen": mask.sum(-1), "kept": kept.sum(-1), "correct": correct.sum(-1)}
    if "local" in targets:
        counts["local"] = (kept * targets["local"]).sum(-1)
    group = torch.where(truth >= 0, groups[truth], -1)
    for g, name in enumerate(GROUPS):
        counts[f"kept_{name}"] = (kept * (group == g)).sum(-1)
        counts[f"correct_{name}"] = (correct * (group == g)).sum(-1)
    return counts
