import importlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.registry import Registry


@given(st.lists(st.text(), unique=True))
def test_choices_are_found_by_name_in_the_order_of_registration(names):
    registry: Registry[object] = Registry("policy")
    choices = {name: registry.register(name)(object()) for name in names}
    assert registry.names() == tuple(registry) == tuple(names)
    for name in names:
        assert registry.get(name) is choices[name]


def test_an_unknown_name_is_refused_with_the_valid_ones():
    registry: Registry[int] = Registry("scorer")
    registry.register("attention")(1)
    registry.register("position")(2)
    with pytest.raises(InvalidArgumentError) as caught:
        registry.get("Attention")
    assert caught.value.message == "unknown scorer 'Attention'; allowed: attention, position"


def test_a_name_taken_is_refused_and_keeps_its_choice():
    registry: Registry[int] = Registry("codec")
    registry.register("absmax")(1)
    with pytest.raises(ValueError, match="codec 'absmax' is registered twice"):
        registry.register("absmax")(2)
    assert registry.get("absmax") == 1


def test_a_package_registers_what_its_modules_define(tmp_path, monkeypatch):
    package = tmp_path / "a_package_of_choices"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from spectrumkv.common.registry import Registry, import_modules\n"
        "choices = Registry('choice')\n"
        "import_modules(__name__, __path__)\n"
    )
    for name in ("one", "two"):
        (package / f"{name}.py").write_text(
            f"from a_package_of_choices import choices\nchoices.register('{name}')('{name}')\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.import_module("a_package_of_choices").choices.names() == ("one", "two")
