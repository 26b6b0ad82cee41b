from __future__ import annotations

import pytest

from hf_ssl_or.errors import InputError
from hf_ssl_or.methods import available_methods, get_method
from hf_ssl_or.methods.base import SSLMethod


def test_the_file_name_is_the_name():
    assert {"barlow_twins", "vicreg", "simclr", "byol"} <= set(available_methods())
    assert not {"base", "heads", "terms", "teacher"} & set(available_methods())
    assert get_method("byol").__module__ == "hf_ssl_or.methods.byol"


def test_a_typo_is_answered_with_the_nearest_name():
    with pytest.raises(InputError, match="unknown method 'barlow_twin': did you mean 'barlow_twins'"):
        get_method("barlow_twin")


def test_shared_files_are_no_methods():
    with pytest.raises(InputError, match="unknown method 'terms'"):
        get_method("terms")


@pytest.fixture
def outside(tmp_path, monkeypatch):
    package = tmp_path / "outside_methods"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "good.py").write_text(
        "from hf_ssl_or.methods.simclr import Method as SimCLR\nclass Method(SimCLR): citation = 'mine'\n"
    )
    (package / "empty.py").write_text("")
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
        ("outside_methods.empty", r"must define a class Method\(SSLMethod\)"),
    ],
)
def test_a_wrong_dotted_path_is_one_clear_line(outside, name, message):
    with pytest.raises(InputError, match=message):
        get_method(name)


def test_a_method_whose_own_import_fails_says_which(outside):
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_installed"):
        get_method("outside_methods.broken")
