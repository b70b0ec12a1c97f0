"""Names are found among decorated objects, then entry points; the unknown is answered."""

from __future__ import annotations

import subprocess
import sys

import pytest
from torch import nn

from hookengine import MODEL_WRAPPERS, MODELS, PLUGINS, Registry


@pytest.fixture
def registry() -> Registry:
    return Registry("hookengine.nothing", "thing")


def test_a_class_is_registered_by_its_name_or_another(registry: Registry) -> None:
    @registry.register_module()
    class One: ...

    @registry.register_module("two")
    class Two: ...

    class Three: ...

    registry.register_module(name="three", module=Three)
    assert [registry.get(name) for name in ("One", "two", "three")] == [One, Two, Three]
    assert registry.names() == ["One", "three", "two"]
    assert "One" in registry
    assert "Two" not in registry


def test_a_taken_name_is_refused_but_the_same_object_replaces_itself(registry: Registry) -> None:
    def cell() -> type:
        @registry.register_module()
        class Model: ...

        return Model

    cell()
    again = cell()  # a notebook cell that is run again
    assert registry.get("Model") is again

    with pytest.raises(KeyError, match="already registered"):

        @registry.register_module("Model")
        class Other: ...

    forced = registry.register_module("Model", force=True, module=type("Forced", (), {}))
    assert registry.get("Model") is forced


def test_a_decorator_without_parentheses_is_answered(registry: Registry) -> None:
    with pytest.raises(TypeError, match="parentheses"):

        @registry.register_module
        class Model: ...  # type: ignore[call-overload]


def test_an_unknown_name_is_answered_with_the_known_and_the_nearest(registry: Registry) -> None:
    registry.register_module("Accuracy", module=object())
    with pytest.raises(KeyError, match=r"unknown thing 'Acuracy'. Did you mean 'Accuracy'\?"):
        registry.get("Acuracy")


def test_build_calls_what_type_names_or_is(registry: Registry) -> None:
    registry.register_module("linear", module=nn.Linear)
    layer = registry.build(dict(type="linear", in_features=2), in_features=9, out_features=3)
    assert (layer.in_features, layer.out_features) == (2, 3)
    assert isinstance(registry.build(dict(type=nn.ReLU)), nn.ReLU)


def test_build_refuses_what_is_no_configuration(registry: Registry) -> None:
    with pytest.raises(TypeError, match=r"dict\(type=\.\.\., \.\.\.\) for a thing"):
        registry.build(3)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="needs a 'type'"):
        registry.build(dict(size=3))


def test_an_error_in_building_keeps_its_type_and_says_what_was_built(registry: Registry) -> None:
    with pytest.raises(TypeError) as caught:
        registry.build(dict(type=nn.Linear, features=3))
    assert "while building the thing 'Linear' with {'features': 3}" in caught.value.__notes__


def test_our_own_names_come_through_entry_points() -> None:
    assert {"preprocess", "logging", "progress_bar"} <= set(PLUGINS.names())
    point = MODELS.entry_point("BaseDataPreprocessor")
    assert point is not None
    assert point.value == "hookengine_preprocess:BaseDataPreprocessor"
    assert MODELS.get("BaseDataPreprocessor").__name__ == "BaseDataPreprocessor"


def test_objects_are_those_of_all_names_each_loaded_once() -> None:
    wrappers = list(MODEL_WRAPPERS.objects())
    assert nn.parallel.DistributedDataParallel in wrappers
    assert len(wrappers) == len(MODEL_WRAPPERS.names())
    own = Registry("hookengine.model_wrappers", "model wrapper")
    own.register_module("DataParallel", module=int)  # hides the entry point's
    assert nn.DataParallel not in list(own.objects())


@pytest.mark.process
def test_listing_imports_no_plugin() -> None:
    code = (
        "import sys, hookengine\n"
        "names = hookengine.PLUGINS.names() + hookengine.MODELS.names()\n"
        "assert 'logging' in names and 'BaseDataPreprocessor' in names\n"
        "loaded = [m for m in sys.modules if m.startswith('hookengine_')]\n"
        "assert not loaded, loaded\n"
        "hookengine.PLUGINS.get('progress_bar')\n"
        "loaded = {m.partition('.')[0] for m in sys.modules if m.startswith('hookengine_')}\n"
        "assert loaded == {'hookengine_progress_bar'}, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
