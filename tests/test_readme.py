"""What the README shows of methods of one's own works as it stands."""

import re
from pathlib import Path

import pytest

import fedsim

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Return the module that the README's classes make together."""
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    classes = [block for block in blocks if "class " in block]
    folder = tmp_path_factory.mktemp("readme")
    imports = "import torch\nfrom strategies import FedAvg\n"
    (folder / "shown_in_readme.py").write_text("\n".join([imports, *classes]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield __import__("shown_in_readme")


@pytest.mark.parametrize(
    "method",
    [
        {"client": "FedProx", "mu": 0.1},
        {"client": "MeanTeacher", "threshold": 0.3},
        {"client": "FedPer"},
        {"client": "Proximal", "name": "Ramp"},
    ],
    ids=lambda method: method["client"],
)
def test_a_method_of_ones_own(shown, method):
    named = {key: getattr(shown, method[key]) for key in ("client", "name") if key in method}
    experiment = fedsim.Experiment(
        data={"imbalance": 0.1},
        clients={"count": 6, "partition": "dirichlet", "labelled": 0.4},
        method=method | named,
        training={"rounds": 8, "lr": 0.1, "local_epochs": 2},
        evaluation={"every": 8},
        engine={"backend": "inline"},
    )
    result = fedsim.simulate(experiment)
    assert result.rounds["failures"].sum() == 0
    assert result.rounds["personal_accuracy"].iloc[-1] > 0.4
    if method["client"] == "MeanTeacher":
        assert result.training["pseudo_kept"].sum() > 0
