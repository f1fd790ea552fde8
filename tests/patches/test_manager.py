"""The patch manager: refuses what does not fit, rebinds every name, takes everything back."""

import sys
import types

import pytest

from patches import manager
from patches.manager import Patch, PatchError, PatchManager


@pytest.fixture
def upstream(monkeypatch):
    """Two modules: one defines `answer` and a class, the other imported `answer` by another name."""
    owner, user = types.ModuleType("fake_upstream"), types.ModuleType("fake_user")
    exec(
        "def answer(question):\n    return 41\nclass Thing:\n    def method(self):\n        return 1\n"
        "    @staticmethod\n    def static(question):\n        return 41",
        owner.__dict__,
    )
    user.renamed = owner.answer
    replacements = types.ModuleType("fake_replacements")
    exec(
        "def plus_one(original):\n    def answer(question):\n        return original(question) + 1\n    return answer\n"
        "def ten(original):\n    return lambda self: 10 * original(self)",
        replacements.__dict__,
    )
    for module in (owner, user, replacements):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return owner, user


def declare(target="fake_upstream:answer", factory="fake_replacements:plus_one", **changes):
    fields = {"reason": "test", "package": "pytest", "versions": ">=1", "signatures": (("question",),)}
    return Patch(target=target, factory=factory, **{**fields, **changes})


def test_apply_rebinds_every_name_and_revert_takes_it_back(upstream):
    owner, user = upstream
    before = owner.answer
    manager = PatchManager()
    manager.apply([declare()])
    assert owner.answer(0) == user.renamed(0) == 42
    late = types.ModuleType("fake_late")
    late.answer = owner.answer
    sys.modules["fake_late"] = late
    try:
        manager.revert()
    finally:
        del sys.modules["fake_late"]
    assert owner.answer is user.renamed is late.answer is before


def test_applying_twice_does_it_once(upstream):
    owner, _ = upstream
    manager = PatchManager()
    manager.apply([declare()])
    manager.apply([declare()])
    assert owner.answer(0) == 42
    manager.revert()


def test_methods_of_classes(upstream):
    owner, _ = upstream
    before = owner.Thing.method
    manager = PatchManager()
    manager.apply([declare("fake_upstream:Thing.method", "fake_replacements:ten", signatures=(("self",),))])
    assert owner.Thing().method() == 10
    manager.revert()
    assert owner.Thing.method is before


def test_static_methods_of_classes(upstream):
    """Called on an object they get no `self`, patched or taken back."""
    owner, _ = upstream
    before = vars(owner.Thing)["static"]
    manager = PatchManager()
    manager.apply([declare("fake_upstream:Thing.static")])
    assert owner.Thing().static(0) == owner.Thing.static(0) == 42
    manager.revert()
    assert vars(owner.Thing)["static"] is before and owner.Thing().static(0) == 41


def test_a_missing_target_is_refused_and_not_created(upstream):
    """D11a: two of upstream's own targets were methods, not functions; the patch made an attribute nobody reads."""
    owner, _ = upstream
    with pytest.raises(PatchError, match="fake_upstream:finish_grad_sync: does not exist"):
        PatchManager().apply([declare("fake_upstream:finish_grad_sync")])
    assert not hasattr(owner, "finish_grad_sync")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"signatures": (("other",),)}, r"takes \('question',\).*checked with \('other',\)"),
        ({"versions": "<1"}, "checked on <1"),
        ({"package": "no-such-distribution"}, "no-such-distribution is not installed"),
    ],
)
def test_misfits_are_named_and_nothing_is_applied(upstream, change, message):
    owner, _ = upstream
    before = owner.answer
    good = declare("fake_upstream:Thing.method", "fake_replacements:ten", signatures=())
    with pytest.raises(PatchError, match=message):
        PatchManager().apply([good, declare(**change)])
    assert owner.answer is before and owner.Thing().method() == 1


def test_misfits_are_told_without_applying_anything(upstream):
    owner, _ = upstream
    before = owner.answer
    wrong = [declare(versions="<1"), declare("fake_upstream:gone"), declare()]
    assert [line.partition(": ")[0] for line in manager.misfits(wrong)] == [
        "fake_upstream:answer",
        "fake_upstream:gone",
    ]
    assert owner.answer is before


def test_the_version_is_that_of_the_megatron_that_would_be_imported(tmp_path, monkeypatch):
    """A checkout on the path has no entry among the installed packages, or hides one of another version."""
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "package_info.py").write_text('__version__ = "0.99.0"\n')
    manager._version.cache_clear()
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        assert "megatron-core is 0.99.0" in manager.misfits([declare(package="megatron-core", versions="<0.17")])[0]
    finally:
        manager._version.cache_clear()
