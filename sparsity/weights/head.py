"""The last layer of a network: the one whose output is the network's, but for what has no matrix between."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def last_layer(module: nn.Module, images: Tensor) -> list[str]:
    """The names in a module's state_dict of the last layer: the nearest weight before the outputs, and what follows it.

    Read off the recorded backward pass of one forward pass, from the outputs on, along what depends on the images;
    vectors behind the weight count where they have one entry an output (a normalisation of the outputs).
    """
    parameters = {name: each.detach() for name, each in module.named_parameters() if each.is_floating_point()}
    parameters = {name: each.requires_grad_() for name, each in parameters.items()}
    images = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        outputs = functional_call(module.eval(), parameters, (images,))
    if not isinstance(outputs, Tensor) or outputs.grad_fn is None:
        return []
    names = {id(each): name for name, each in parameters.items()}
    reads_images = _leads_to(outputs.grad_fn, images)
    found: list[str] = []
    nodes, seen = [outputs.grad_fn], set()
    while nodes:
        node = nodes.pop(0)
        if node in seen or node not in reads_images:
            continue
        seen.add(node)
        before = [following for following, _ in node.next_functions if following is not None]
        leaves = [leaf for each in before if each not in reads_images for leaf in _leaves(each)]
        owns = [leaf for leaf in leaves if id(leaf) in names]
        is_last = any(leaf.ndim > 1 for leaf in owns)
        found += [names[id(leaf)] for leaf in owns if is_last or leaf.shape[:1] == outputs.shape[1:2]]
        nodes += [] if is_last else before
    return _with_the_layers_others(module, dict.fromkeys(found))


def _leads_to(start: Any, leaf: Tensor) -> set[Any]:
    """The nodes of a backward pass from which it comes to a leaf."""
    order, stack, seen = [], [start], {start}
    while stack:
        node = stack.pop()
        order.append(node)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    leading = {node for node in order if getattr(node, "variable", None) is leaf}
    before: dict[Any, list[Any]] = {}
    for node in order:
        for following, _ in node.next_functions:
            before.setdefault(following, []).append(node)
    stack = list(leading)
    while stack:
        for node in before.get(stack.pop(), ()):
            if node not in leading:
                leading.add(node)
                stack.append(node)
    return leading


def _leaves(start: Any) -> Iterator[Tensor]:
    """The leaves that a node of a backward pass comes to."""
    stack, seen = [start], {start}
    while stack:
        node = stack.pop()
        if hasattr(node, "variable"):
            yield node.variable
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)


def _with_the_layers_others(module: nn.Module, parameters: dict[str, None]) -> list[str]:
    """The parameters, and what else their layers keep, where those are layers and hold no others."""
    state = list(module.state_dict())
    names = dict(parameters)
    for parameter in parameters:
        owner = parameter.rpartition(".")[0].partition(".parametrizations.")[0].removesuffix(".parametrizations")
        inner = {name.partition(".")[0] for name, _ in module.get_submodule(owner).named_children()}
        if owner and not inner - {"parametrizations"}:
            names |= dict.fromkeys(name for name in state if name.startswith(f"{owner}."))
    return [name for name in state if name in names]
