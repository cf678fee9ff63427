"""The shape that the packages keep: layers, sizes, and families that do not name each other."""

import ast
import graphlib
import inspect
from importlib import import_module
from pathlib import Path

import pytest
import torch

from dflows.flow import DiscreteFlow
from dflows.orderings import Natural, Parity
from tests.dflows.small import make_flow

ROOT = Path(__file__).parents[1]
PACKAGES = ("dflows", "datamodules", "lightning_modules")
MOST_LINES, MOST_ARGUMENTS = 350, 8
# What belongs together, and may name each other's members.
FAMILIES = {
    "bijections": ["dflows.bijections"],
    "gradients": ["dflows.gradients"],
    "orderings": ["dflows.orderings"],
    "backbones": ["dflows.backbones"],
    "transforms": ["dflows.transforms"],
    "bases": ["dflows.bases"],
    "objectives": ["dflows.objectives"],
    "ngrams": ["dflows.ngrams", "dflows.experts"],
    "datamodules": ["datamodules"],
}
# What puts members of several families together.
ASSEMBLIES = {"dflows", "dflows.flows", "dflows.exact.tabular"}
# The concrete members of other families that the rest names: a default, or the only one there is.
NAMED = {
    "dflows.backbones.table": {"Natural"},
    "dflows.bases.ngram": {"NGrams"},
    "dflows.bijections.bijection": {"SoftmaxStraightThrough"},
    "dflows.checks.bijectivity": {"ConditionalTransform"},
    "dflows.checks.causality": {"Natural"},
    "dflows.checks.flow": {"Composition"},
    "dflows.cli.rows": {"Matrix"},
    "dflows.encoders": {"LSTM"},
    "dflows.exact.expectations": {"ConditionalTransform"},
    "dflows.flow": {"ConditionalTransform"},
    "dflows.latent.prior": {"LSTM", "SteppedLSTM"},
    "dflows.objectives.local": {"ConditionalTransform"},
    "lightning_modules.flow": {"EndToEnd", "Layerwise", "Local", "RandomOrderings"},
    "lightning_modules.language_model": {"AutoregressiveBase"},
    "lightning_modules.ngram": {"NGramBase"},
}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
CLASSES = {
    (module, node.name): node
    for module, tree in TREES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.ClassDef)
}


def is_for_types_alone(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(body):
    """The statements that are executed when a module is imported."""
    for node in body:
        if is_for_types_alone(node) or isinstance(node, ast.FunctionDef):
            continue
        yield node
        for part in ("body", "orelse", "handlers", "finalbody"):
            yield from statements(getattr(node, part, []))


def imported(module, nodes):
    """The modules of ours that statements import; of a package, those that names come from."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative imports hide the layers"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name in FILES:
                    yield name
                elif node.module in FILES:
                    yield node.module


def dependencies():
    return {
        module: {name for name in imported(module, statements(tree.body)) if name != module}
        for module, tree in TREES.items()
    }


class TestLayers:
    def test_imports_form_no_circle(self):
        try:
            list(graphlib.TopologicalSorter(dependencies()).static_order())
        except graphlib.CycleError as error:
            pytest.fail(" → ".join(error.args[1]))

    @pytest.mark.parametrize(
        ("lower", "upper"),
        [
            ("dflows.flow", "dflows.objectives"),
            ("dflows.conditioner", "dflows.ngrams"),
            ("dflows.conditioner", "dflows.transforms"),
            ("dflows.bijections", "dflows.conditioner"),
            ("dflows.gradients", "dflows.bijections"),
            ("dflows.backbones", "dflows.conditioner"),
            ("dflows.bases", "dflows.transforms"),
            ("dflows.transforms", "dflows.bases"),
            ("dflows.ngrams", "dflows.conditioner"),
            ("dflows.objectives", "lightning_modules"),
            ("dflows.flow", "lightning_modules"),
            ("dflows.flows", "lightning_modules"),
            ("datamodules", "lightning_modules"),
        ],
    )
    def test_what_lies_below_knows_nothing_of_what_lies_above(self, lower, upper):
        graph = dependencies()
        start = [name for name in graph if name == lower or name.startswith(f"{lower}.")]
        assert start
        seen, todo = set(start), list(start)
        while todo:
            for name in graph[todo.pop()] - seen:
                seen.add(name)
                todo.append(name)
        found = [name for name in seen if name == upper or name.startswith(f"{upper}.")]
        assert not found

    def test_the_flow_names_nothing_of_training(self):
        text = FILES["dflows.flow"].read_text()
        names = {node.id for node in ast.walk(TREES["dflows.flow"]) if isinstance(node, ast.Name)}
        objectives = {name for module, name in CLASSES if module.startswith("dflows.objectives")}
        assert not names & objectives
        for word in ("optimizer", "progress", "num_stages", "frozen", "lightning"):
            assert word not in text

    def test_a_function_imports_only_what_would_close_no_circle(self):
        # An import that is put off must be for its cost, and not to hide a circle.
        graph = dependencies()
        for module, tree in TREES.items():
            functions = [
                node
                for node in ast.walk(tree)
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            ]
            for function in functions:
                graph[module] |= set(imported(module, ast.walk(function))) - {module}
        try:
            list(graphlib.TopologicalSorter(graph).static_order())
        except graphlib.CycleError as error:
            pytest.fail(" → ".join(error.args[1]))


class TestSizes:
    def test_no_class_is_longer(self):
        lines = {
            f"{module}.{name}": node.end_lineno - node.lineno + 1
            for (module, name), node in CLASSES.items()
        }
        assert not {name: count for name, count in lines.items() if count > MOST_LINES}

    def test_no_constructor_takes_more_arguments(self):
        counts = {}
        for (module, name), node in CLASSES.items():
            if module.startswith("datamodules"):
                continue
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                    arguments = part.args
                    every = arguments.posonlyargs + arguments.args + arguments.kwonlyargs
                    counts[f"{module}.{name}"] = len(every) - 1
        assert not {name: count for name, count in counts.items() if count > MOST_ARGUMENTS}


def family_of(module):
    for family, prefixes in FAMILIES.items():
        if any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes):
            return family
    return None


def is_concrete_member_of_another_family(module, found):
    """Whether an object is a class of a family that a module is not of, and no interface."""
    if not inspect.isclass(found):
        return False
    family = family_of(found.__module__)
    is_interface = inspect.isabstract(found) or getattr(found, "_is_protocol", False)
    return family is not None and family != family_of(module) and not is_interface


MEMBERS = {
    name: getattr(import_module(module), name)
    for module, name in CLASSES
    if family_of(module) and not name.startswith("_")
}


def named(module, tree):
    """The concrete members of other families that a tree of a module names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.alias):
            name = node.name
        elif isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
        else:
            continue
        found = getattr(import_module(module), name, MEMBERS.get(name))
        if is_concrete_member_of_another_family(module, found):
            yield name


def test_families_name_no_concrete_members_of_others():
    found = {module: set(named(module, tree)) for module, tree in TREES.items()}
    assert {module: names for module, names in found.items() if names} == NAMED | {
        module: found[module] for module in ASSEMBLIES
    }


def questions(tree):
    """What an object is compared with: by isinstance, by its type, or by a pattern."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "isinstance",
            "issubclass",
        ):
            yield node.args[1]
        elif isinstance(node, ast.Compare | ast.MatchClass):
            yield node


@pytest.mark.parametrize("module", FILES)
def test_nothing_asks_for_a_concrete_member_of_another_family(module):
    found = [part for part in questions(TREES[module]) if any(named(module, part))]
    assert not [f"line {part.lineno}: {ast.unparse(part)}" for part in found]


def test_log_prob_climbs_down_once(monkeypatch):
    """Each transform is inverted once, in order, and the base asked once."""
    flow = make_flow(3, 4, [Natural(), Parity(), Natural()], "rank")
    calls = []
    for number, part in enumerate(flow.transforms):

        def inverse(y, context=None, number=number, plain=part.inverse):
            calls.append(number)
            return plain(y, context)

        monkeypatch.setattr(part, "inverse", inverse)
    log_prob = flow.base.log_prob
    monkeypatch.setattr(
        flow.base, "log_prob", lambda x, context=None: calls.append("base") or log_prob(x, context)
    )
    y = torch.randint(3, (5, 4))
    for mode in (torch.no_grad, torch.enable_grad):
        calls.clear()
        with mode():
            flow.log_prob(y)
        assert calls == [2, 1, 0, "base"]


def test_the_flow_has_few_methods_and_none_of_training():
    methods = [name for name in vars(DiscreteFlow) if callable(getattr(DiscreteFlow, name))]
    assert len(methods) < 30
    assert not {"objective", "at_step", "prepare", "frozen"} & set(dir(DiscreteFlow))
