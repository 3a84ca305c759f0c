"""_core.pyi says what the module has: names, parameters, and that they are positional-only."""

import ast
import inspect
from pathlib import Path

import pytest

import kimi_linear
from kimi_linear import _core

STUB = ast.parse((Path(kimi_linear.__file__).parent / "_core.pyi").read_text())
FUNCTIONS = {n.name: n for n in STUB.body if isinstance(n, ast.FunctionDef)}
CLASSES = {n.name: n for n in STUB.body if isinstance(n, ast.ClassDef)}
VARIABLES = {n.target.id for n in STUB.body if isinstance(n, ast.AnnAssign)}
ONLY_WITH_FAULTS = {"fault_arm", "fault_count"}


def public(names):
    return {n for n in names if not n.startswith("_")}


def parameters(function):
    """(positional-only names, keyword-only names) of a function in the stub."""
    a = function.args
    assert not a.args or [x.arg for x in a.args] == ["self"], "only positional-only in the stub"
    return (
        [x.arg for x in a.posonlyargs if x.arg not in ("self", "cls")],
        [x.arg for x in a.kwonlyargs],
    )


def check_signature(function, real):
    positional, keywords = parameters(function)
    found = inspect.signature(real).parameters.values()
    kinds = inspect.Parameter
    got = [p.name for p in found if p.kind is kinds.POSITIONAL_ONLY and p.name != "self"]
    assert got == positional
    assert [p.name for p in found if p.kind is kinds.KEYWORD_ONLY] == keywords
    assert all(p.kind in (kinds.POSITIONAL_ONLY, kinds.KEYWORD_ONLY) for p in found)


def test_names():
    stub = public({*FUNCTIONS, *CLASSES, *VARIABLES})
    missing = set() if _core.FAULT_INJECTION else ONLY_WITH_FAULTS
    assert public(dir(_core)) == stub - missing


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_functions(name):
    if name in ONLY_WITH_FAULTS and not _core.FAULT_INJECTION:
        pytest.skip("built without -DKL_FAULT_INJECTION")
    check_signature(FUNCTIONS[name], getattr(_core, name))
    assert getattr(_core, name).__doc__


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_classes(name):
    node, cls = CLASSES[name], getattr(_core, name)
    if issubclass(cls, Exception):
        bases = [b.id for b in node.bases]
        assert [b.__name__ for b in cls.__bases__] == bases
        return
    methods = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
    attributes = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
    assert public(vars(cls)) == public({*methods, *attributes})
    for method, function in methods.items():
        check_signature(function, cls if method == "__new__" else getattr(cls, method))
    assert ("__new__" in methods) == (not cannot_be_made(cls))


def cannot_be_made(cls):
    try:
        cls()
    except TypeError as error:
        return "cannot create" in str(error)
    return False


def test_functions_refuse_keywords_and_wrong_counts():
    with pytest.raises(TypeError):
        _core.linear(backend=None)
    for name in set(FUNCTIONS) - ONLY_WITH_FAULTS - {"build_info", "device_of"}:
        with pytest.raises(TypeError, match=f"{name}.*positional"):
            getattr(_core, name)(None)


def test_backend_of_another_type():
    for name in set(FUNCTIONS) - ONLY_WITH_FAULTS - {"build_info", "device_of"}:
        n = len(parameters(FUNCTIONS[name])[0])
        with pytest.raises(TypeError, match="Backend"):
            getattr(_core, name)(*[None] * n)
