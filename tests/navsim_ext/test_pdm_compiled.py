"""Kernels on disk: keyed by all sources that they reach, and optional."""

from __future__ import annotations

import sys

import pytest

from navsim_ext.pdm import compiled


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of its own: a imports b and (as a name of the package) c; d stands alone."""
    folder = tmp_path / "kernelpkg"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "a.py").write_text(
        "from kernelpkg import c\nfrom kernelpkg.b import twice\nfrom navsim_ext.pdm.compiled import kernel\n\n\n"
        "@kernel\ndef work(x):\n    return twice(x) + c.ONE\n"
    )
    (folder / "b.py").write_text(
        "from navsim_ext.pdm.compiled import kernel\n\n\n@kernel\ndef twice(x):\n    return 2 * x\n"
    )
    (folder / "c.py").write_text("ONE = 1\n")
    (folder / "d.py").write_text("")
    monkeypatch.setattr(compiled, "PACKAGE", "kernelpkg")
    monkeypatch.setattr(compiled, "ROOT", tmp_path)
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    compiled.source_digest.cache_clear()
    yield folder
    compiled.source_digest.cache_clear()
    forget()


def forget():
    """Makes the next import read the files anew."""
    for name in [name for name in sys.modules if name.startswith("kernelpkg")]:
        del sys.modules[name]


def digest():
    compiled.source_digest.cache_clear()
    return compiled.source_digest("kernelpkg.a")


def test_digest_follows_imports_and_nothing_else(package):
    first = digest()
    assert digest() == first
    (package / "d.py").write_text("# not imported\n")
    assert digest() == first
    (package / "c.py").write_text("ONE = 10\n")
    second = digest()
    assert second != first
    (package / "b.py").write_text((package / "b.py").read_text() + "# touched\n")
    assert digest() not in (first, second)


def test_a_changed_callee_is_compiled_anew(package):
    """numba's own cache would go on giving the old answer: it looks at the caller's file only."""
    from kernelpkg import a

    assert a.work(5) == 11
    assert list((package.parent / "cache").rglob("*.nbi"))
    forget()
    (package / "b.py").write_text((package / "b.py").read_text().replace("2 * x", "3 * x"))
    compiled.source_digest.cache_clear()
    from kernelpkg import a as changed

    assert changed.work(5) == 16


def test_without_a_writable_cache_kernels_still_run(package, monkeypatch, caplog):
    blocked = package.parent / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked / "cache"))
    from kernelpkg import a

    assert a.work(5) == 11
    assert "compiled anew" in caplog.text
    assert "set NUMBA_CACHE_DIR" in caplog.text


def test_the_global_cache_setting_of_numba_is_left_alone(package):
    import numba

    before = numba.config.CACHE_DIR
    from kernelpkg import b

    assert b.twice(4) == 8
    assert numba.config.CACHE_DIR == before
