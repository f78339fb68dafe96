"""The figure of who holds what: labelled and unlabelled examples by client and class.

K clients, C classes.
"""

from __future__ import annotations

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from fedsim.report.figures import style
from fedsim.report.figures.bubbles import MOST_BUBBLES, bubbles
from fedsim.report.figures.counts import Counts
from fedsim.report.figures.heat_maps import heat_maps


def class_counts(
    partition: pd.DataFrame,
    num_clients: int,
    num_classes: int,
    title: str,
    names: pd.DataFrame | None = None,
) -> Figure:
    """Draw how many labelled and unlabelled training examples of each class the clients hold.

    Up to 60 clients and 40 classes: a circle for each client and class with area proportional to
    the count, the dark part labelled. Above that: heat maps of the clients grouped by their most
    frequent class, and histograms of how much and how many classes a client holds. Both come
    with the totals of the classes, the long tail.

    Parameters
    ----------
    partition : DataFrame
        The frame of partition.csv; pairs of client and class that don't occur may be missing.
        Examples of class -1, which nobody knows, get a row of their own.
    num_clients, num_classes : int
        K and C; clients and classes are numbered from 0.
    title : str
        Written above the picture as it is.
    names : DataFrame, optional
        The frame of names.csv; what has no name is called by its number.

    Raises
    ------
    DataError
        A column is missing, a client or class is out of range, or nobody holds anything.
    """
    counts = Counts.read(partition, num_clients, num_classes, names)
    with mpl.rc_context(style.STYLE):
        most_clients, most_classes = MOST_BUBBLES
        if num_clients <= most_clients and num_classes <= most_classes:
            return bubbles(counts, title)
        return heat_maps(counts, title)
