"""The reference's values on fixed float64 tensors: penalties, standard deviations, thresholds, non-zeros."""

import json
from pathlib import Path

import pytest
import torch

from sparsity import models, regularizers
from sparsity.accounting import account, standard_deviation
from sparsity.graph import trace
from sparsity.pruning import cut
from sparsity.tensors import from_view, layouts, to_view

GOLDEN = json.loads((Path(__file__).parent / "reference" / "golden.json").read_text())
PENALTIES = ("l1", "hoyer", "hs", "transformed_l1", "group_lasso", "group_hs")
CASES = [(network, name) for network in GOLDEN for name in PENALTIES]
PRUNE_CASES = [(network, name) for network in GOLDEN for name in GOLDEN[network]["prune"]]


def network_of(name):
    module = models.build(getattr(models, name), (1, 28, 28), 10, seed=0)
    parameters = {}
    for number, (key, parameter) in enumerate(module.named_parameters()):
        entry = torch.arange(parameter.numel(), dtype=torch.float64)
        size = torch.where(entry % 7 == 0, torch.tensor(0.5).double(), torch.tensor(0.05, dtype=torch.float64))
        parameters[key] = (torch.sin(1 + number + 0.37 * entry) * size).reshape(parameter.shape)
    return module, parameters


@pytest.mark.parametrize(("network", "name"), CASES)
def test_penalties(network, name):
    module, parameters = network_of(network)
    layout, numbers = layouts(module), {"a": 1.0} if name == "transformed_l1" else {}
    total = sum(
        getattr(regularizers, name)(to_view(parameter, layout[key]), **numbers)
        for key, parameter in parameters.items()
        if not name.startswith("group") or layout[key].kind == "weight"
    )
    assert total.item() == pytest.approx(GOLDEN[network]["regularizers"][name], rel=1e-12)


@pytest.mark.parametrize(("network", "case"), PRUNE_CASES)
def test_pruning(network, case):
    module, parameters = network_of(network)
    expected = GOLDEN[network]["prune"][case]
    rule, number = case.split()
    sensitivity, layout = torch.tensor(float(number), dtype=torch.float64), layouts(module)
    pruned, cuts = {}, {}
    for key, parameter in parameters.items():
        view = to_view(parameter, layout[key])
        threshold = getattr(cut, rule)(
            view.abs(), sensitivity=sensitivity, **({"signed": view} if rule == "std" else {})
        )
        mask, cuts[key] = view.abs() >= threshold, threshold.item()
        pruned[key] = parameter * from_view(mask, layout[key], parameter.shape)
    report = account(pruned, layout, trace(module, torch.zeros(2, 1, 28, 28)))
    assert report.nonzero["parameters"] == expected["nonzero"]
    assert report.total["parameters"] == expected["total"]
    assert report.compression["parameters"] == pytest.approx(expected["compression"], rel=1e-12)
    for row in report.rows:
        layer = expected["layers"][row.name]
        assert (row.nonzero, row.total) == (layer["nonzero"], layer["total"])
        if "std" in layer:
            assert standard_deviation(parameters[row.name]) == pytest.approx(layer["std"], rel=1e-12)
            assert cuts[row.name] == pytest.approx(layer["threshold"], rel=1e-12)
        if "live_inputs" in layer:
            assert (row.live_inputs, row.live_outputs) == (layer["live_inputs"], layer["live_outputs"])
