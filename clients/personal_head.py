"""A head that stays on the client, beside the global one."""

from __future__ import annotations

from fedsim.engine.update import Client
from fedsim.models import Weights, parts


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
    return {**w, **first, **client.state}


def trained_personal_head(w_k: Weights, client: Client) -> Weights:
    """Return the client's own head, to be kept; nothing where no label has trained it.

    A copy of an early global head would fall behind the global one that such a client starts from.
    """
    return parts(w_k, ["personal"]) if len(client.labelled) else {}
