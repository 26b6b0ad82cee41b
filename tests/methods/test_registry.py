from __future__ import annotations

import pytest

from hf_ssl_or import methods
from hf_ssl_or.errors import InputError
from hf_ssl_or.methods import available_methods, get_method
from hf_ssl_or.methods.base import SSLMethod


def test_the_file_name_is_the_name():
    assert {"barlow_twins", "vicreg", "simclr", "byol"} <= set(available_methods())
    assert not {"base", "base_methods", "functional", "heads", "teacher"} & set(available_methods())
    assert get_method("byol").__module__ == "hf_ssl_or.methods.byol"


def test_every_class_and_its_settings_can_be_imported_by_the_literatures_name():
    from hf_ssl_or.methods import BYOL, BarlowTwins, BarlowTwinsConfig

    assert BYOL is get_method("byol") and BarlowTwins.config_class is BarlowTwinsConfig
    for name in available_methods():
        method = get_method(name)
        assert method.__name__.lower() == name.replace("_", "") and getattr(methods, method.__name__) is method
        assert method.config_class.__name__ == f"{method.__name__}Config" in dir(methods)


@pytest.mark.parametrize("name", ["Byol", "BYOLConf", "Config", "Method", "Nothing"])
def test_there_are_no_other_names(name):
    with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
        getattr(methods, name)


def test_a_typo_is_answered_with_the_nearest_name():
    with pytest.raises(InputError, match="unknown method 'barlow_twin': did you mean 'barlow_twins'"):
        get_method("barlow_twin")


def test_shared_files_are_no_methods():
    with pytest.raises(InputError, match="unknown method 'heads'"):
        get_method("heads")


@pytest.fixture
def outside(tmp_path, monkeypatch):
    package = tmp_path / "outside_methods"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "good.py").write_text("from hf_ssl_or.methods import SimCLR\nclass Mine(SimCLR): citation = 'mine'\n")
    (package / "empty.py").write_text("from hf_ssl_or.methods import SimCLR\n")
    (package / "two.py").write_text(
        "from hf_ssl_or.methods import BYOL, DCL\nclass One(BYOL): ...\nclass Two(DCL): ...\n"
    )
    (package / "broken.py").write_text("import a_module_that_is_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_dotted_path_finds_a_method_of_somebody_else(outside):
    method = get_method("outside_methods.good")
    assert issubclass(method, SSLMethod) and method.citation == "mine"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("outside_methods.missing", "no module 'outside_methods.missing'"),
        ("nowhere.missing", "no module 'nowhere'"),
        ("outside_methods.empty", "must define one subclass of SSLMethod, not none"),
        ("outside_methods.two", "must define one subclass of SSLMethod, not One, Two"),
    ],
)
def test_a_wrong_dotted_path_is_one_clear_line(outside, name, message):
    with pytest.raises(InputError, match=message):
        get_method(name)


def test_a_method_whose_own_import_fails_says_which(outside):
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_installed"):
        get_method("outside_methods.broken")
