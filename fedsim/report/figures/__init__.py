"""The figures: each is drawn by a function that takes frames, and saved as a PNG file.

Its modules:

- ``style``: the look that they share
- ``accuracy``: of each view over the rounds, of each client, on class groups; personal gains
- ``class_counts``: who holds what, of few clients by ``bubbles``, of many by ``heat_maps``; both
  draw ``counts``
- ``heads``: how long the class vectors of a model's heads are, and how far apart
- ``pseudo_labels``: how many are kept, and how many of them are right
- ``one_run``: all figures of a run
- ``comparison``: several runs side by side
"""

from fedsim.errors import EngineError

try:
    import matplotlib  # noqa: F401
except (ValueError, OSError) as error:
    raise EngineError(
        f"Matplotlib can't be imported, which draws the figures: {error} (is matplotlibrc broken, "
        "or MPLBACKEND wrong?)"
    ) from None
