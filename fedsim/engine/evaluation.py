"""Tests the views of models: on the global test set, and each client's on its own.

Shapes: B examples, D features, m examples of a client's own test set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.data.federation import Federation
from fedsim.engine.loader import PREDICT_BLOCK
from fedsim.engine.local import LocalTrainer, unchanged
from fedsim.engine.step import tf32
from fedsim.engine.update import Client, ClientUpdate, Inputs
from fedsim.errors import EngineError, UserError, described
from fedsim.models.net import Weights

Scores = dict[str, tuple[NDArray[np.int64], NDArray[np.float32]]]
"""For each view the most probable class and the cross-entropy of each test example, [B]."""


@dataclass(frozen=True, slots=True)
class Tested:
    """What testing blocks of the global test set gave.

    Attributes
    ----------
    scores : Scores
        For each generic view the predicted class and the loss of each example.
    features : ndarray of float32 [B, D] or None
        The examples' features, if the method has personal views.
    """

    scores: Scores
    features: NDArray[np.float32] | None


class Evaluator:
    """Tests models in one process.

    Parameters
    ----------
    trainer : LocalTrainer
        Has the data and the model, and makes the personal models of those methods that train them.
    """

    def __init__(self, trainer: LocalTrainer) -> None:
        self._trainer = trainer

    @torch.no_grad()
    @tf32(False)
    def test_generic(
        self, method: ClientUpdate, w: Weights, index: NDArray[np.integer[Any]]
    ) -> tuple[Scores, Tensor]:
        """Test the generic views on examples of the global test set.

        Parameters
        ----------
        method : ClientUpdate
            Says what the views are.
        w : Weights
            The global weights.
        index : ndarray of int [B]
            The examples.

        Returns
        -------
        scores : Scores
            Of each generic view.
        features : torch.Tensor
            The examples' features under the global backbone, [B, D].

        Raises
        ------
        EngineError
            If the method or the model fails.
        """
        net, x = self._trainer.net, self._test_inputs(index)
        try:
            features = net.predict_features(w, x)
            with unchanged(method, w):
                logits = method.generic(net, dict(w), Inputs(features, lambda: x))
                views = _checked_views("generic", logits)
            # A method may have no generic model to test.
            tested = {view: logits for view, logits in views.items() if view in method.views}
            return self._scores(tested, index), features
        except UserError:
            raise
        except Exception as error:
            raise EngineError(f"the global model can't be tested: {described(error)}") from error

    @tf32(False)
    def test_personal(
        self,
        method: ClientUpdate,
        w: Weights,
        clients: Sequence[Client],
        features: Sequence[Tensor],
    ) -> list[Scores]:
        """Test the personal views of some clients, each on its own test set of m examples.

        Parameters
        ----------
        method, w, clients
            As for `LocalTrainer.personalise_all`.
        features : sequence of torch.Tensor
            Of each client's test examples under the global backbone, [m, D].

        Returns
        -------
        list of Scores
            Of each client's personal views.

        Raises
        ------
        EngineError
            If the method fails, naming the client; or changes the global weights in place, of
            which the client isn't known.
        """
        scores = []
        made = self._trainer.personalise_all(method, w, clients)
        for client, w_k, of_client in zip(clients, made, features, strict=True):
            index = self._trainer.federation.test(client.id)
            inputs = Inputs(of_client, partial(self._test_inputs, index))
            try:
                if isinstance(w_k, Exception):
                    raise w_k
                with unchanged(method, w), torch.no_grad():
                    views = method.personal(self._trainer.net, w_k, client, inputs)
                    scores.append(self._scores(_checked_views("personal", views), index))
            except Exception as error:
                raise EngineError(
                    f"round {client.round}: client {client.id}'s personal model can't be tested: "
                    f"{described(error)}"
                ) from error
        return scores

    def _test_inputs(self, index: NDArray[np.integer[Any]]) -> Tensor:
        return self._trainer.loader.normalise(self._trainer.loader.test.inputs(index))

    def _scores(self, views: dict[str, Tensor], index: NDArray[np.integer[Any]]) -> Scores:
        y = self._trainer.loader.test.labels(index)
        scores = {}
        for view, logits in views.items():
            loss = torch.nn.functional.cross_entropy(logits, y, reduction="none")
            scores[view] = logits.argmax(1).cpu().numpy(), loss.cpu().numpy()
        return scores


def _checked_views(name: str, views: Any) -> dict[str, Tensor]:
    if not isinstance(views, dict):
        raise TypeError(f"{name} must return a dict of logits by view, not {type(views).__name__}")
    return views


def join_scores(parts: Sequence[Scores]) -> Scores:
    """Join the scores of parts of a test set, in order."""
    return {
        view: (
            np.concatenate([scores[view][0] for scores in parts]),
            np.concatenate([scores[view][1] for scores in parts]),
        )
        for view in (parts[0] if parts else ())
    }


def num_blocks(federation: Federation) -> int:
    """Return into how many blocks testing cuts the global test set."""
    return ceil(len(federation.source.y_test) / PREDICT_BLOCK)
