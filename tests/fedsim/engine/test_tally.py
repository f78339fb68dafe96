"""What is counted of pseudo-labels, by hand."""

import torch

from fedsim.engine.tally import audit


def test_of_the_groups_only_known_truths_count_and_of_nothing_padding():
    targets = {
        "pseudo_label": torch.tensor([0, 1, 2, 0, 1]),
        "kept": torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0]),
        "local": torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]),
    }
    truth = torch.tensor([0, 2, -1, -1, 1])  # nobody knows two of them
    mask = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    found = audit(torch.tensor([0, 1, 2]), targets, truth, mask)
    assert {name: float(count) for name, count in found.items()} == {
        "seen": 4,
        "kept": 3,
        "correct": 1,
        "local": 2,
        "kept_head": 1,
        "correct_head": 1,
        "kept_medium": 0,
        "correct_medium": 0,
        "kept_tail": 1,
        "correct_tail": 0,
    }
