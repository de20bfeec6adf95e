"""Which parameters are weights: by their layer, or by what a pass does with them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from sparsity.tensors import Layout, layouts, to_view


def kinds(module, *shape):
    return {name: layout.kind for name, layout in layouts(module, torch.zeros(2, *shape)).items()}


class Own(nn.Module):
    """A module of one's own: named parameters, and what it does with them."""

    def __init__(self, forward, **shapes):
        super().__init__()
        self.does = forward
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.register_buffer("places", torch.arange(4))

    def forward(self, images):
        return self.does(self, images)


def test_layers_of_torch_need_no_images():
    module = nn.ModuleDict({
        "conv": nn.Conv2d(4, 6, 3, groups=2), "up": nn.ConvTranspose1d(4, 6, 3), "fc": nn.Linear(1, 3),
        "both": nn.Bilinear(2, 3, 4), "norm": nn.BatchNorm2d(4), "layer": nn.LayerNorm([2, 3]), "act": nn.PReLU(4),
        "words": nn.Embedding(5, 3), "lstm": nn.LSTM(3, 4, proj_size=2), "cell": nn.GRUCell(3, 4),
        "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True),
        "cross": nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
    })  # fmt: skip
    found = {name: layout.kind for name, layout in layouts(module).items()}
    assert {name for name, kind in found.items() if kind == "weight"} == {
        "conv.weight", "up.weight", "fc.weight", "both.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0",
        "lstm.weight_hr_l0", "cell.weight_ih", "cell.weight_hh", "attention.in_proj_weight",
        "attention.out_proj.weight", *(f"cross.{name}_proj_weight" for name in "qkv"), "cross.out_proj.weight",
    }  # fmt: skip
    assert {name for name, kind in found.items() if kind == "bias"} == {
        "conv.bias", "up.bias", "fc.bias", "both.bias", "lstm.bias_ih_l0", "lstm.bias_hh_l0", "cell.bias_ih",
        "cell.bias_hh", "attention.in_proj_bias", "attention.out_proj.bias", "cross.in_proj_bias",
        "cross.out_proj.bias",
    }  # fmt: skip
    assert found["act.weight"] == "scale"
    assert found["words.weight"] == found["attention.bias_k"] == found["attention.bias_v"] == "other"
    assert {found[f"{name}.{part}"] for name in ("norm", "layer") for part in ("weight", "bias")} == {"normalization"}
    assert layouts(module)["conv.weight"] == Layout("weight", 2) and layouts(module)["up.weight"].transposed


def old(function, module):
    """A module under torch's older normalisations of weights, which warn that they are old."""
    with pytest.warns(FutureWarning):
        return function(module)


@pytest.mark.parametrize(
    ("module", "weights", "scales"),
    [
        (parametrizations.weight_norm(nn.Linear(6, 4)), ["original1"], ["original0"]),
        (parametrizations.weight_norm(nn.Conv2d(6, 4, 3, groups=2)), ["original1"], ["original0"]),
        (parametrizations.spectral_norm(nn.Linear(6, 4)), ["original"], []),
        (parametrizations.orthogonal(nn.Linear(4, 4)), ["original"], []),
        (nn.utils.spectral_norm(nn.Linear(6, 4)), ["weight_orig"], []),
    ],
    ids=["linear", "conv", "spectral", "orthogonal", "old_spectral"],
)
def test_normalised_weights(module, weights, scales):
    found = {name.rpartition(".")[2]: layout for name, layout in layouts(module).items()}
    assert [name for name, layout in found.items() if layout.kind == "weight"] == weights
    assert [name for name, layout in found.items() if layout.kind == "scale"] == scales
    assert found["bias"].kind == "bias" and found[weights[0]].groups == getattr(module, "groups", 1)


def test_old_weight_normalisation():
    found = layouts(old(nn.utils.weight_norm, nn.Linear(6, 4)))
    assert {name: layout.kind for name, layout in found.items()} == {
        "bias": "bias", "weight_g": "scale", "weight_v": "weight",
    }  # fmt: skip


def test_a_parametrization_of_ones_own():
    class Squared(nn.Module):
        def forward(self, weight):
            return weight.square()

    module = parametrize.register_parametrization(nn.Linear(3, 2), "weight", Squared())
    assert layouts(module)["parametrizations.weight.original"] == Layout("weight")


def attend(module, images):
    return F.multi_head_attention_forward(
        images, images, images, 4, 2, module.w, module.b, None, None, False, 0.0, module.out, module.c
    )[0]


PRODUCTS = {
    "linear": (lambda m, x: F.linear(x, m.w, m.b), {"w": (3, 6), "b": 3}, (6,), Layout("weight")),
    "one output": (lambda m, x: F.linear(x, m.w, m.b), {"w": (1, 6), "b": 1}, (6,), Layout("weight")),
    "matmul": (lambda m, x: x @ m.w + m.b, {"w": (6, 3), "b": 3}, (6,), Layout("weight", 1, True)),
    "from the left": (lambda m, x: m.w @ x.T, {"w": (3, 6)}, (6,), Layout("weight")),
    "transposed": (lambda m, x: torch.mm(x, m.w.t()), {"w": (3, 6)}, (6,), Layout("weight")),
    "permuted": (lambda m, x: x.matmul(m.w.permute(1, 0)), {"w": (3, 6)}, (6,), Layout("weight")),
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w), {"w": (6, 3), "b": 3}, (6,), Layout("weight", 1, True)),
    "einsum": (lambda m, x: torch.einsum("bi,oi->bo", x, m.w), {"w": (3, 6)}, (6,), Layout("weight")),
    "grouped": (
        lambda m, x: F.conv2d(x, m.w, m.b, groups=2), {"w": (4, 3, 3, 3), "b": 4}, (6, 5, 5), Layout("weight", 2),
    ),
    "transposed convolution": (
        lambda m, x: F.conv_transpose1d(x, m.w, bias=m.b), {"w": (6, 3, 2), "b": 3}, (6, 5), Layout("weight", 1, True),
    ),
    "standardised": (
        lambda m, x: F.conv2d(x, (m.w - m.w.mean(1, True)) / m.w.std()), {"w": (4, 6, 3, 3)}, (6, 5, 5),
        Layout("weight"),
    ),
    "binary": (lambda m, x: x @ torch.sign(m.w), {"w": (6, 3)}, (6,), Layout("weight", 1, True)),
    "sum of parts": (lambda m, x: x @ sum(m.w.unbind()), {"w": (2, 6, 3)}, (6,), Layout("weight")),
    "in a list": (lambda m, x: sum(F.linear(x, w) for w in [m.w]), {"w": (3, 6)}, (6,), Layout("weight")),
    "one by one": (lambda m, x: x * m.w, {"w": (5, 6)}, (5, 6), Layout("weight")),
    "attention": (attend, {"w": (12, 4), "b": 12, "out": (4, 4), "c": 4}, (3, 4), Layout("weight")),
}  # fmt: skip


@pytest.mark.parametrize("case", PRODUCTS)
def test_what_is_multiplied_is_a_weight_and_what_is_added_to_it_a_bias(case):
    forward, shapes, shape, layout = PRODUCTS[case]
    found = layouts(Own(forward, **shapes), torch.zeros(2, *shape))
    assert found["w"] == layout
    assert {found[name].kind for name in found if name in "bc"} <= {"bias"}
    assert to_view(torch.zeros(shapes["w"]), found["w"]).ndim == 4


OTHERS = {
    "layer scale": (lambda m, x: x + m.p * x, (6, 1, 1), (6, 5, 5), "scale"),
    "layer scale, last": (lambda m, x: x.mul(m.p), (1, 1, 6), (5, 6), "scale"),
    "in place": (lambda m, x: (x + 1).mul_(m.p), 6, (5, 6), "scale"),
    "temperature": (lambda m, x: x / m.p.exp(), (), (6,), "scale"),
    "heads": (lambda m, x: x * m.p.clamp(max=1), (6, 1, 1), (6, 5, 5), "scale"),
    "slope": (lambda m, x: F.prelu(x, m.p), 6, (6, 5), "scale"),
    "position embedding": (lambda m, x: x + m.p, (1, 5, 6), (5, 6), "other"),
    "part of one": (lambda m, x: x + m.p[:, :5], (1, 9, 6), (5, 6), "other"),
    "resized": (
        lambda m, x: x + F.interpolate(m.p, size=(5, 5), mode="bilinear"), (1, 6, 3, 3), (6, 5, 5), "other",
    ),
    "class token": (lambda m, x: torch.cat([m.p.expand(len(x), -1, -1), x], 1), (1, 1, 6), (5, 6), "other"),
    "added token": (lambda m, x: x + m.p[0, 0], (1, 1, 6), (6,), "other"),
    "relative positions": (lambda m, x: (x + m.p[m.places].T).softmax(-1), (9, 6), (6, 4), "other"),
    "looked up": (lambda m, x: F.embedding(x.long(), m.p), (9, 6), (5,), "other"),
    "mask token": (lambda m, x: torch.where(x > 0, x, m.p), 6, (5, 6), "other"),
    "set": (lambda m, x: x.clone().index_copy(1, m.places, m.p.expand(2, 4, 6)), (1, 4, 6), (5, 6), "other"),
    "no part in it": (lambda m, x: x, (6, 6), (6,), "other"),
    "offset": (lambda m, x: x + m.p, 6, (6,), "bias"),
    "normalisation": (lambda m, x: F.layer_norm(x, (6,), m.p), 6, (5, 6), "normalization"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_no_weight(case):
    forward, shape, images, kind = OTHERS[case]
    assert kinds(Own(forward, p=shape), *images) == {"p": kind}


def test_lengths_and_directions_of_a_normalisation_of_ones_own():
    module = Own(lambda m, x: F.linear(x, m.g * m.v / m.v.norm(dim=1, keepdim=True)), g=(3, 1), v=(3, 6))
    assert kinds(module, 6) == {"g": "scale", "v": "weight"}


def test_a_token_that_goes_through_a_layer_is_no_weight_and_low_rank_factors_are():
    module = Own(lambda m, x: x @ F.linear(m.token, m.w).T, token=(4, 5), w=(6, 5))
    assert kinds(module, 6) == {"token": "other", "w": "weight"}
    module = Own(lambda m, x: x @ (m.down @ m.up), down=(6, 2), up=(2, 3))
    assert kinds(module, 6) == {"down": "weight", "up": "weight"}


def test_a_table_that_is_multiplied_too_is_a_weight():
    module = Own(lambda m, x: F.linear(F.embedding(m.places[:2], m.p) + x, m.p), p=(9, 6))
    assert kinds(module, 6) == {"p": "weight"}


def test_without_images_shapes_decide():
    module = Own(None, w=(3, 6), token=(1, 1, 6), b=6)
    assert {name: layout.kind for name, layout in layouts(module).items()} == {
        "w": "weight", "token": "other", "b": "bias",
    }  # fmt: skip


def test_a_layer_that_adds_parameters_to_torchs_own():
    class Adapted(nn.Linear):
        def __init__(self):
            super().__init__(6, 3)
            self.down, self.up = nn.Parameter(torch.zeros(2, 6)), nn.Parameter(torch.zeros(3, 2))
            self.strength = nn.Parameter(torch.ones(3))

        def forward(self, images):
            return super().forward(images) + self.strength * F.linear(F.linear(images, self.down), self.up)

    assert kinds(Adapted(), 6) == {
        "weight": "weight", "bias": "bias", "down": "weight", "up": "weight", "strength": "scale",
    }  # fmt: skip
