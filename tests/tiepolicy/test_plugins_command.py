"""`tiepolicy plugins`: who has a say in plans, and who cannot be loaded."""

import json
import re
import sys

import pytest

from tiepolicy._cli import main
from tiepolicy._policy import default_policy


def test_plugins_are_listed_with_their_hooks_and_origin(capsys):
    assert 0 == main(["plugins", "--json"])
    plugins = {plugin["name"]: plugin for plugin in json.loads(capsys.readouterr().out)["plugins"]}
    assert ("tiepolicy_hf._plugin", ["tiepolicy_claims"], "tiepolicy") == (
        plugins["hf"]["module"],
        plugins["hf"]["hooks"],
        plugins["hf"]["distribution"],
    )
    assert {"tiepolicy_canonical", "tiepolicy_claims", "tiepolicy_decide"} <= set(plugins["built-in rules"]["hooks"])
    assert 0 == main(["plugins"])
    assert "hf" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("raise ImportError('no acme')", "ImportError: no acme"),
        (
            "tiepolicy_claim = hookimpl(lambda: [])",
            "PluginValidationError: unknown hook 'tiepolicy_claim' in plugin .*",
        ),
        ("tiepolicy_claims = hookimpl(lambda modle: [])", "PluginValidationError: .*'modle'.*"),
    ],
)
def test_an_installed_plugin_that_can_never_answer_is_named(tmp_path, capsys, monkeypatch, code, problem):
    (tmp_path / "acme.dist-info").mkdir()
    (tmp_path / "acme.dist-info" / "METADATA").write_text("Name: acme\nVersion: 1\n")
    (tmp_path / "acme.dist-info" / "entry_points.txt").write_text("[tiepolicy]\nloom = acme_ties\n")
    (tmp_path / "acme_ties.py").write_text(f"from tiepolicy import hookimpl\n{code}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "acme_ties", raising=False)
    default_policy.cache_clear()
    assert 1 == main(["plugins"])
    said = capsys.readouterr().err.replace("\n  ", " ")
    expected = (
        rf"tiepolicy: the installed plugin loom \(acme_ties\) cannot be loaded, {problem}\. Update or uninstall it\n"
    )
    assert re.fullmatch(expected, said)
    default_policy.cache_clear()
