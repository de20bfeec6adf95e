"""One behaviour suite for every regularizer and every rule that `conf/` holds: a new one is tested without edits."""

import functools
import inspect
from itertools import pairwise

import pytest
import torch
from conftest import ROOT, choices, layers, shipped_rule, slow
from omegaconf import OmegaConf

from sparsity import config, nodes, regularizers
from sparsity.pruning import unit
from sparsity.pruning.cut import in_order
from sparsity.pruning.unit import scores_of_entries
from sparsity.stages import regularizing
from sparsity.tensors import from_view, layouts, to_view

KINDS = list(layers())
REGULARIZERS = [
    name for name in choices("reg") if OmegaConf.load(ROOT / "conf" / "reg" / f"{name}.yaml").penalty is not None
]
SHRINKING = [name for name in choices("reg") if "shrink" in OmegaConf.load(ROOT / "conf" / "reg" / f"{name}.yaml")]
NOT_ALONE = ("entry", "filter_and_channel", "coupled", "head")  # entries, computed in one, and those across layers
OVER_UNITS = [f"hs/{name}" for name in choices("reg/unit") if name not in NOT_ALONE]
RULES = [name for name in choices("prune") if name != "n_of_m"]  # which never keeps all


@functools.cache
def regularizer(name):
    """The penalty of one view; name: a regularizer's, and after a / that of the unit that it is to be over."""
    chosen, _, over = name.partition("/")
    composed, _ = config.compose([f"reg={chosen}", *([f"reg/unit={over}"] if over else [])])
    node = config.check("reg", OmegaConf.to_container(composed.reg), nodes.Regularizer)
    penalty, parted = node.penalty, node.unit and node.unit.function
    if (in_one := regularizing.IN_ONE.get((penalty.function, parted and parted.function))) is not None:
        return in_one
    is_of_entries = parted is None or parted.function is unit.entry
    return penalty.partial() if is_of_entries else over_unit(penalty.partial(), parted.partial())


def over_unit(penalty, groups):
    """A penalty of one view over a unit, as it is where there is no faster way."""
    grouping = regularizing.Grouping(["w"], lambda views: groups(views["w"]))
    return lambda view: regularizing.penalty_of_groups(penalty, grouping, {"w": view})


def weight_of(kind, seed=0):
    module = layers()[kind]
    parameter = torch.randn(module.weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return parameter, layouts(module)["weight"]


def group_norms(parameter, layout):
    """Norms of all filters and of all channels, each written as an index loop over the parameter itself."""
    groups, transposed = layout.groups, layout.transposed
    num_first, per_group = parameter.shape[0], parameter.shape[1]
    filters, channels = {}, {}
    for first in range(num_first):
        group = first // (num_first // groups)
        for second in range(per_group):
            entry = parameter[first, second].pow(2).sum()
            output, input_ = (group * per_group + second, first) if transposed else (first, group * per_group + second)
            filters[output] = filters.get(output, 0) + entry
            channels[input_] = channels.get(input_, 0) + entry
    return torch.stack(list(filters.values())).sqrt(), torch.stack(list(channels.values())).sqrt()


def formula(name, parameter, layout):
    """The formulas again, as plainly as they can be written; None for a regularizer that has none here."""
    size, square = parameter.abs(), parameter.pow(2).sum()
    if name.startswith("group"):
        filters, channels = group_norms(parameter, layout)
        if name == "group_lasso":
            return filters.sum() + channels.sum()
        return (filters.sum() ** 2 + channels.sum() ** 2) / square
    return {
        "l1": lambda: size.sum(),
        "hoyer": lambda: size.sum() / square.sqrt(),
        "hs": lambda: size.sum() ** 2 / square,
        "transformed_l1": lambda: (2 * size / (1 + size)).sum(),
    }.get(name, lambda: None)()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*REGULARIZERS, *slow(*OVER_UNITS)])
class TestRegularizers:
    def test_value_and_gradient_are_the_formula(self, name, kind):
        parameter, layout = weight_of(kind)
        one, other = parameter.clone().requires_grad_(), parameter.clone().requires_grad_()
        value, expected = regularizer(name)(to_view(one, layout)), formula(name, other, layout)
        assert value.shape == ()
        if expected is None:
            pytest.skip("no formula of its own here; the gradient is checked below")
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        value.backward()
        expected.backward()
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("fast", [True, *slow(False)])  # fast: along a random direction
    def test_gradient_is_that_of_finite_differences(self, name, kind, fast):
        parameter, layout = weight_of(kind)
        penalty = regularizer(name)
        torch.autograd.gradcheck(lambda w: penalty(to_view(w, layout)), parameter.requires_grad_(), fast_mode=fast)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_zero_tensor_gives_zero_and_no_gradient(self, name, kind, dtype):
        parameter, layout = weight_of(kind)
        parameter = torch.zeros_like(parameter, dtype=dtype).requires_grad_()
        value = regularizer(name)(to_view(parameter, layout))
        value.backward()
        assert value.item() == 0
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))

    def test_zero_groups_give_finite_gradients(self, name, kind):
        parameter, layout = weight_of(kind)
        view = to_view(parameter, layout).clone()
        view[:, 0], view[:, :, 0] = 0, 0
        parameter = from_view(view, layout, parameter.shape).requires_grad_()
        value = regularizer(name)(to_view(parameter, layout))
        value.backward()
        assert value.isfinite() and value >= 0
        assert parameter.grad.isfinite().all()

    def test_maps_over_members(self, name, kind):
        members = torch.stack([weight_of(kind, seed)[0] for seed in range(3)])
        members[1] = 0
        layout, function = weight_of(kind)[1], regularizer(name)
        mapped = torch.func.vmap(lambda w: function(to_view(w, layout)))(members)
        alone = torch.stack([function(to_view(member, layout)) for member in members])
        torch.testing.assert_close(mapped, alone)

    def test_sign_does_not_matter_and_the_argument_stays(self, name, kind):
        parameter, layout = weight_of(kind)
        before = parameter.clone()
        value = regularizer(name)(to_view(parameter, layout))
        torch.testing.assert_close(value, regularizer(name)(to_view(-parameter, layout)))
        assert torch.equal(parameter, before)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_regularizer_takes_a_vector(name):
    vector = torch.tensor([0.5, 0.0, -2.0], requires_grad=True)
    layout = layouts(torch.nn.Linear(2, 3))["bias"]
    value = regularizer(name)(to_view(vector, layout))
    value.backward()
    assert value > 0 and vector.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["group_hs", "group_lasso"])
def test_what_is_computed_in_one_expression_is_the_penalty_over_its_units(name, kind):
    parameter, layout = weight_of(kind)
    (plain,) = (each for (each, _), one in regularizing.IN_ONE.items() if one.__name__ == name)
    one, other = (to_view(parameter.clone(), layout).requires_grad_() for _ in range(2))
    value, expected = getattr(regularizers, name)(one), over_unit(plain, unit.filter_and_channel)(other)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    for found, slope in zip(torch.autograd.grad(value, one), torch.autograd.grad(expected, other)):
        torch.testing.assert_close(found, slope, rtol=1e-10, atol=1e-12)


def test_penalties_over_units_are_of_the_norms_of_their_entries():
    view = torch.randn(2, 5, 7, 3, dtype=torch.float64)
    pairs = [(2 * row, 4 * column) for row in range(3) for column in range(2)]
    groups = {
        "filter": [view[group, row] for group in range(2) for row in range(5)],
        "channel": [view[group, :, column] for group in range(2) for column in range(7)],
        "kernel": [view[group, row, column] for group in range(2) for row in range(5) for column in range(7)],
        "block": [view[group, row : row + 2, column : column + 4] for group in range(2) for row, column in pairs],
    }
    for name, each in groups.items():
        norms = torch.stack([entries.square().sum().sqrt() for entries in each])
        given = {"rows": 2, "columns": 4} if name == "block" else {}
        parted = functools.partial(getattr(unit, name), **given)
        found = over_unit(regularizers.hs, parted)(view)
        torch.testing.assert_close(found, norms.sum() ** 2 / norms.square().sum())
        sizes = torch.tensor([float(entries.numel()) for entries in each]).double()
        torch.testing.assert_close(over_unit(regularizers.sized_lasso, parted)(view), (norms * sizes.sqrt()).sum())


@pytest.mark.parametrize("name", SHRINKING)
class TestShrinking:
    def shrink(self, name):
        node = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "reg" / f"{name}.yaml").shrink)
        return config.check("reg.shrink", node, nodes.Shrink).partial()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_norms_become_smaller_and_stay_finite_at_every_scale(self, name, dtype):
        limits = torch.finfo(dtype)
        norms = torch.tensor(
            [0.0, limits.tiny / 8, limits.tiny, 1e-30, 1e-10, 1.0, 1e10, 1e30, limits.max], dtype=dtype
        )
        for strength in (0.0, 1e-30, 0.1, 1e30):
            found = self.shrink(name)(norms, strength=torch.tensor(strength, dtype=dtype))
            assert found.isfinite().all() and (found >= 0).all() and (found <= norms).all()
            assert strength or torch.equal(found, norms)

    def test_formula(self, name):
        norms, strength = torch.rand(50, dtype=torch.float64) + 0.01, torch.tensor(0.2, dtype=torch.float64)
        expected = {"p_decay": norms / (1 + 0.2 / norms**1.5)}.get(name, torch.where(norms > 0.2, norms - 0.2, 0))
        torch.testing.assert_close(self.shrink(name)(norms, strength=strength), expected)


def masks_of(chosen, views, sensitivity, **computed):
    """The masks of a dict of views by a rule's three parts; computed: what the importance asks for, by view."""
    importance, unit, cut = (getattr(chosen, part).function for part in ("importance", "unit", "cut"))
    asked = {part.key: {*inspect.signature(part.function).parameters} for part in (importance, unit, cut)}
    given = {name: {key: each[name] for key, each in computed.items()} for name in views}
    scores = {name: importance.partial(**given[name])(view) for name, view in views.items()}
    if "unit_of_rows" in asked[unit.key]:
        units = scores_of_entries(unit.partial(**coupling(views))(scores))
    else:
        units = {name: scores_of_entries(unit.partial()(each)) for name, each in scores.items()}
    ordered = {name: in_order(each) for name, each in units.items()}
    if chosen.scope == "network":
        known = {"ordered": in_order(*units.values()), "ordered_each": ordered}
        more = {key: each for key, each in known.items() if key in asked[cut.key]}
        found = cut.partial(sensitivity=sensitivity, **more)(units)
        found = found if isinstance(found, dict) else dict.fromkeys(views, found)
    else:
        known = {
            name: {"signed": each.copysign(views[name]), "ordered": ordered[name]} for name, each in scores.items()
        }
        more = {name: {key: each[key] for key in each.keys() & asked[cut.key]} for name, each in known.items()}
        found = {name: cut.partial(sensitivity=sensitivity, **more[name])(each) for name, each in units.items()}
    return {name: each >= found[name] for name, each in units.items()}


def coupling(views):
    """Units of rows, as if each tensor had its own."""
    rows, count = {}, 1
    for name, view in views.items():
        rows[name] = count + torch.arange(view.shape[0] * view.shape[1])
        count += len(rows[name])
    return {"unit_of_rows": rows, "num_units": count}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RULES)
class TestRules:
    def sensitivities(self, chosen):
        high = nodes.sensitivity_range(chosen).high or 3.0
        return torch.linspace(0, high, 9, dtype=torch.float64)

    def views(self, kind, seed=0):
        parameter, layout = weight_of(kind, seed)
        small, _ = weight_of("linear", seed + 100)
        return {"a": to_view(parameter, layout), "b": to_view(small, layouts(layers()["linear"])["weight"]) / 3}

    def test_masks_are_boolean_and_of_the_shape(self, name, kind):
        sensitivity, chosen = shipped_rule(name)
        views = self.views(kind)
        for key, mask in masks_of(chosen, views, torch.tensor(sensitivity)).items():
            assert mask.dtype is torch.bool and mask.shape == views[key].shape

    def test_zero_keeps_all_and_more_sensitivity_keeps_less(self, name, kind):
        _, chosen = shipped_rule(name)
        views = self.views(kind)
        kept = [masks_of(chosen, views, sensitivity) for sensitivity in self.sensitivities(chosen)]
        assert all(mask.all() for mask in kept[0].values())
        for more, less in pairwise(kept):
            assert all((less[key] <= more[key]).all() for key in views)
        assert sum(int(mask.sum()) for mask in kept[-1].values()) < sum(view.numel() for view in views.values()) / 4

    def test_zero_tensors_are_finite(self, name, kind):
        sensitivity, chosen = shipped_rule(name)
        views = {key: torch.zeros_like(view) for key, view in self.views(kind).items()}
        assert all(mask.dtype is torch.bool for mask in masks_of(chosen, views, torch.tensor(sensitivity)).values())
        assert all(mask.all() for mask in masks_of(chosen, views, torch.tensor(0.0)).values())

    def test_maps_over_members_with_their_own_sensitivities(self, name, kind):
        _, chosen = shipped_rule(name)
        members = [self.views(kind, seed) for seed in range(3)]
        stacked = {key: torch.stack([views[key] for views in members]) for key in members[0]}
        sensitivities = self.sensitivities(chosen)[[1, 3, 5]]
        mapped = torch.func.vmap(lambda views, s: masks_of(chosen, views, s))(stacked, sensitivities)
        for member, (views, sensitivity) in enumerate(zip(members, sensitivities)):
            for key, mask in masks_of(chosen, views, sensitivity).items():
                assert torch.equal(mapped[key][member], mask)

    def test_structural_rules_take_whole_groups(self, name, kind):
        _, chosen = shipped_rule(name)
        if not chosen.structural:
            pytest.skip("takes single entries")
        for sensitivity in self.sensitivities(chosen):
            mask = masks_of(chosen, self.views(kind), sensitivity)["a"]
            filters, channels = mask.any(3).any(2), mask.any(3).any(1)
            assert torch.equal(mask, (filters[:, :, None, None] & channels[:, None, :, None]).expand_as(mask))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.9, 0.99, 1.0])
def test_percentile_removes_its_share_of_all_weights(share):
    views = {name: torch.randn(1, size, 10, 1) for name, size in (("a", 37), ("b", 63))}
    kept = sum(int(mask.sum()) for mask in masks_of(shipped_rule("percentile")[1], views, torch.tensor(share)).values())
    assert kept == 1000 - round(share * 1000)


def test_group_rules_measure_by_the_root_mean_square():
    weight = torch.tensor([[3.0, 0.0, 0.0], [0.1, 0.1, 0.1]])
    view, chosen = weight[None, :, :, None], shipped_rule("group_threshold")[1]
    # rows: 3/√3 = 1.73, 0.1; columns: √(9.01/2) = 2.12, 0.071, 0.071
    mask = masks_of(chosen, {"a": view}, torch.tensor(0.09))["a"][0, ..., 0]
    assert mask.tolist() == [[True, False, False], [True, False, False]]
    mask = masks_of(chosen, {"a": view}, torch.tensor(0.2))["a"][0, ..., 0]
    assert mask.tolist() == [[True, False, False], [False, False, False]]


@pytest.mark.parametrize("kind", KINDS)
def test_views_come_back(kind):
    parameter, layout = weight_of(kind)
    view = to_view(parameter, layout)
    assert torch.equal(from_view(view, layout, parameter.shape), parameter)
    module = layers()[kind]
    inputs, outputs = view.shape[0] * view.shape[2], view.shape[0] * view.shape[1]
    assert (inputs, outputs) == (
        getattr(module, "in_channels", None) or module.in_features,
        getattr(module, "out_channels", None) or module.out_features,
    )


SCALES = [2.0**-125, 1e-30, 1e-25, 1e-20, 1e-10, 1.0, 1e10, 1e19, 1e30, 1e38]
BOUNDS = {"hoyer": 120**0.5, "hs": 120, "group_hs": 22}  # of a linear layer from 12 to 10 units
HOMOGENEOUS = {"l1", "group_lasso", "sized_lasso"}  # twice the weights, twice the penalty


@pytest.fixture
def flushed():
    """Denormals are zeros, as where networks are trained."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", [*REGULARIZERS, *slow(*OVER_UNITS)])
def test_value_and_gradient_are_right_at_every_scale(name, scale, flushed):
    generator = torch.Generator().manual_seed(0)
    pattern = torch.rand(1, 10, 12, 1, generator=generator) * (torch.rand(1, 10, 12, 1, generator=generator) < 0.7) * 3
    for ones in (pattern, torch.ones_like(pattern)):
        one = (ones * scale).requires_grad_()
        value = regularizer(name)(one)
        (gradient,) = torch.autograd.grad(value, one)
        assert value.isfinite() and gradient.isfinite().all()
        other = one.detach().double().requires_grad_()
        expected = regularizer(name)(other)
        (slope,) = torch.autograd.grad(expected, other)
        is_norm = "/" in name or name == "sized_lasso"  # which may be no float where the entries are
        if expected < torch.finfo(torch.float32).max and (scale < 1e38 or not is_norm):
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
            close = slope.abs().max().item() * 1e-5 + value.item() / scale * 1e-6  # of ratios it is a difference
            torch.testing.assert_close(gradient.double(), slope, rtol=1e-5, atol=max(close, 1.2e-38))
        assert value <= BOUNDS.get(name, torch.inf) * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", REGULARIZERS)
def test_small_and_large_numbers_of_every_type(name, dtype):
    limits = torch.finfo(dtype)
    for scale in (0.0, limits.tiny / 8, limits.tiny * 2, limits.max**0.5, limits.max):
        members = torch.full((2, 1, 4, 5, 1), scale, dtype=dtype)
        members[1, 0, 0] = 0

        def value_and_gradient(weight):
            return torch.func.grad_and_value(regularizer(name))(weight)

        gradients, values = torch.func.vmap(value_and_gradient)(members)
        assert values.isfinite().all() and (values >= 0).all() and gradients.isfinite().all()


@pytest.mark.parametrize("name", REGULARIZERS)
def test_ordinary_scales_differ_by_a_power_of_two_alone(name):
    weight = torch.randn(1, 30, 40, 1, generator=torch.Generator().manual_seed(0)) * 0.05
    one, other = (regularizer(name)(weight * 2.0**power) for power in (0, 40))
    if name in BOUNDS:
        assert torch.equal(one, other)
    if name in HOMOGENEOUS:
        assert torch.equal(one * 2.0**40, other)


def test_tiny_entries_beside_large_ones_keep_their_direction(flushed):
    weight = torch.tensor([[[[3.0]], [[2e-38]], [[-2e-38]], [[0.0]]]], requires_grad=True)
    for name in ("l1", "hs", "hoyer", "transformed_l1"):
        (gradient,) = torch.autograd.grad(regularizer(name)(weight), weight)
        assert gradient.flatten()[1] > 0 > gradient.flatten()[2] and gradient.flatten()[3] == 0
