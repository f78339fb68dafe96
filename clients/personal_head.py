"""A head that stays on the client, beside the global one."""

from __future__ import annotations

from fedsim.engine.update import Client
from fedsim.models import Weights


def with_personal_head(w: Weights, client: Client) -> Weights:
    """Add the client's own head, ``personal.*``; before its first round it equals the global one.

    Parameters
    ----------
    w : Weights
        The global weights, with ``head.weight`` [C, D] and ``head.bias`` [C].
    client : Client
        Its state, if it has one, is the head.
    """
    first = {"personal.weight": w["head.weight"], "personal.bias": w["head.bias"]}
    return {**w, **(client.state or first)}
