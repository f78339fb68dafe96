"""What the tests of personalised clients share: the same passes by the engine and by PyTorch."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.data.federation import Federation
from fedsim.data.statistics import Statistics
from fedsim.engine.evaluation import Evaluator, Scores
from fedsim.engine.loader import Loader
from fedsim.engine.local import LocalTrainer
from fedsim.engine.training import LocalTraining
from fedsim.engine.update import Client, ClientUpdate, Examples, Upload
from fedsim.models import Model, Net, Weights
from fedsim.models.small import cnn
from fedsim.processor import one_thread
from fedsim.rng import generator

# Two batches of 6 an epoch: BatchNorm over the few values of a smaller one would make 1e-7 of
# rounding a thousand times more.
LR, MOMENTUM, BATCH, EPOCHS, SEED, CLIENT, ROUND = 0.1, 0.5, 6, 2, 3, 1, 2
TRAINING = LocalTraining(epochs=EPOCHS, batch_size=BATCH, lr=LR, momentum=MOMENTUM)


@dataclass(frozen=True)
class Bench:
    """Client 1 in round 2 of a small federation; the model is a CNN with BatchNorm."""

    model: Model
    federation: Federation

    @property
    def w(self) -> Weights:
        return Net(self.model).initial_weights()

    @property
    def trainer(self) -> LocalTrainer:
        statistics = Statistics.of(self.federation)
        return LocalTrainer(Net(self.model), self.federation, statistics, TRAINING, SEED)

    @property
    def examples(self) -> Examples:
        return Examples(self.federation.labelled(CLIENT), True)

    # ----- by the engine -------------------------------------------------------------------

    def update(self, method: ClientUpdate, w: Weights, state: Weights | None = None) -> Upload:
        return self.trainer.update(method, w, CLIENT, ROUND, state)[0]

    def test(self, method: ClientUpdate, w: Weights, state: Weights | None = None) -> Scores:
        """Return the scores of all views on the client's test examples."""
        trainer, evaluator = self.trainer, Evaluator(self.trainer)
        generic, features = evaluator.test_generic(method, w, self.federation.test(CLIENT))
        me = replace(trainer.clients(ROUND, [CLIENT])[0], state=state or {})
        (personal,) = evaluator.test_personal(method, w, [me], [features])
        return generic | personal

    def client(self, **parts) -> Client:
        none = Examples(self.examples.index[:0], True)
        given = {"labelled": none, "unlabelled": none, "class_counts": torch.zeros(3), **parts}
        return Client(CLIENT, ROUND, training=TRAINING, seed=SEED, **given)

    # ----- by plain PyTorch ----------------------------------------------------------------

    def module(self, *weights: Weights) -> Model:
        """Return the model with the given weights, the later ones over the earlier."""
        module = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, tensor in module.state_dict().items():
                tensor.copy_(next(w[name] for w in reversed(weights) if name in w))
        return module

    def fit(
        self,
        module: nn.Module,
        trained: list[nn.Module],
        purpose: str,
        *,
        epochs: int = EPOCHS,
        penalty: Callable[[], Tensor] = lambda: torch.tensor(0.0),
    ) -> float:
        """Train some parts of a module on cross-entropy plus a penalty; return the mean loss."""
        module.train()
        parameters = [p for part in trained for p in part.parameters()]
        optimiser = torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM)
        loader = Loader(self.federation, Statistics.of(self.federation), BATCH, "none")
        rng = generator(SEED, purpose, round=ROUND, client=CLIENT)
        steps = epochs * -(-len(self.examples) // BATCH)
        losses = []
        for batch, y in loader.batches(self.examples, rng, steps, False):
            loss = F.cross_entropy(module(batch.x), y) + penalty()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        return sum(losses) / len(losses)

    @torch.no_grad()
    def logits(self, module: nn.Module) -> Tensor:
        """Return the logits of the client's test examples, in evaluation mode."""
        source, statistics = self.federation.source, Statistics.of(self.federation)
        x = torch.tensor(source.x_test[self.federation.test(CLIENT)]).double()
        x = (x - statistics.mean[0]) / statistics.std[0]  # grey images: one channel
        return copy.deepcopy(module).eval()(x.float())

    # ----- comparisons ---------------------------------------------------------------------

    @staticmethod
    def assert_weights(found: Weights, expected: Weights) -> None:
        """Check that both have the same names, and values up to rounding."""
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor.detach(), rtol=1e-5, atol=1e-5)

    def assert_scores(self, scores: Scores, view: str, logits: Tensor) -> None:
        """Check a view's classes and losses against logits of the client's test examples."""
        y = torch.tensor(self.federation.source.y_test[self.federation.test(CLIENT)])
        predicted, loss = scores[view]
        assert len(y) > 3
        assert predicted.tolist() == logits.argmax(1).tolist()
        expected = F.cross_entropy(logits, y, reduction="none")
        torch.testing.assert_close(torch.from_numpy(loss), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def bench(federation: Federation) -> Iterator[Bench]:
    torch.manual_seed(0)
    with one_thread():  # as in a worker
        yield Bench(cnn((1, 4, 4), 3, channels=(6, 4), norm="batch"), federation)
