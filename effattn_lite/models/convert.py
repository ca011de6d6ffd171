"""Weights of other implementations: read their names by a recipe's rules, miss none on either side."""

from collections.abc import Iterable, Mapping
from itertools import chain, count, takewhile

import torch

from effattn_lite.models.lm import LanguageModel
from effattn_lite.models.theirs import Rule


def translate(
    rules: Iterable[Rule], theirs: Mapping[str, torch.Tensor], depth: int
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Their weights under our names, and their names that no rule knows.

    Args:
        rules: of a recipe; those without a `*` come first.
        theirs: name -> tensor.
        depth: L.

    Raises:
        ValueError: a rule finds only some of its names.
    """
    ours, left = {}, dict.fromkeys(theirs)
    for rule in sorted((Rule(*rule) for rule in rules), key=lambda rule: "*" in _first(rule.theirs)):
        for i in range(depth) if "{i}" in _first(rule.theirs) else (0,):
            for names, targets in _matches(rule, i, left):
                groups = [_group(name, theirs) for name in names]
                missing = [name for name, group in zip(names, groups, strict=True) if not group]
                if missing:
                    there = [name for name in names if name not in missing]
                    raise ValueError(f"their weights have {there} but not {missing}")
                for name in chain(*groups):
                    left.pop(name, None)
                tensors = [_stacked(name, group, theirs) for name, group in zip(names, groups, strict=True)]
                out = rule.change(*tensors) if rule.change else tensors
                out = (out,) if isinstance(out, torch.Tensor) else out
                ours |= dict(zip(targets, out, strict=True)) if targets else {}
    return ours, list(left)


def load(model: LanguageModel, rules: Iterable[Rule], theirs: Mapping[str, torch.Tensor]) -> LanguageModel:
    """Copy their weights into our model.

    Args:
        model: ours, of the right configuration.
        rules: of its recipe.
        theirs: name -> tensor.

    Returns:
        The model.

    Raises:
        ValueError: names left over or missing on either side, or shapes that differ; the message lists all.
    """
    found, left = translate(rules, theirs, len(model.blocks))
    own = model.state_dict()
    # a weight under two names, as of a tied head, is one weight
    given = {own[name].data_ptr() for name in found if name in own}
    missing = [name for name, x in own.items() if name not in found and x.data_ptr() not in given]
    wrong = [
        f"{name}: {tuple(x.shape)}, expected {tuple(own[name].shape)}"
        for name, x in found.items()
        if name in own and x.shape != own[name].shape
    ]
    unknown = [name for name in found if name not in own]
    problems = {
        "their names that no rule knows": left,
        "our names that no rule gives": missing,
        "names that our model does not have": unknown,
        "shapes": wrong,
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items() if names)
        raise ValueError(f"{model.config.name}: {listed}")
    with torch.no_grad():
        for name, x in found.items():
            own[name].copy_(x)
    return model


def _matches(rule, i, left):
    """Every (their names, our names) that a rule means in layer i; none where it finds no name."""
    names = tuple(name.replace("{i}", str(i)) for name in _tuple(rule.theirs))
    targets = tuple(name.replace("{i}", str(i)) for name in _tuple(rule.ours))
    if not names[0].endswith("*"):
        if any(_group(name, left) for name in names):
            yield names, targets
        return
    start = names[0][:-1]
    for name in [name for name in left if name.startswith(start)]:
        yield (name,), tuple(target[:-1] + name.removeprefix(start) for target in targets)


def _group(name, theirs):
    """The names that one name means: itself, or one an expert; none where there is none."""
    if "{e}" not in name:
        return [name] if name in theirs else []
    return list(takewhile(theirs.__contains__, (name.replace("{e}", str(e)) for e in count())))


def _stacked(name, group, theirs):
    return torch.stack([theirs[one] for one in group]) if "{e}" in name else theirs[group[0]]


def _tuple(names):
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def _first(names):
    return _tuple(names)[0]
