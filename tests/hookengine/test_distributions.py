"""What to do about a plugin that cannot be imported."""

from __future__ import annotations

from typing import Any

import pytest

from hookengine import PluginManager
from tests.fixtures import Install

IMPORTS = "import absent_library"
FITS = "install versions of 'json' and greeter-dist 1.5 that fit"


@pytest.mark.parametrize(
    ("broken", "message", "fix"),
    [
        (dict(source=None), "No module named 'greeter_package'", "reinstall greeter-dist"),
        (
            dict(source="import greeter_package.part"),
            "No module named 'greeter_package.part'",
            "reinstall greeter-dist",
        ),
        (dict(source="1 / 0"), "ZeroDivisionError", "repair or uninstall it"),
        (dict(source="def ("), "SyntaxError", "repair or uninstall it"),
        (dict(source="raise ImportError('no')"), "ImportError: no", "repair or uninstall it"),
        (dict(source="x = 1"), "AttributeError", "its module has no 'Greeter'"),
        (dict(source="from json import absent"), "cannot import name 'absent'", FITS),
        (
            dict(source=IMPORTS, points="greeter = greeter_package:Greeter [fast]"),
            "No module named 'absent_library'",
            "install the package that provides the module 'absent_library'",
        ),
        (dict(source=IMPORTS), "absent_library", "provides the module 'absent_library'"),
        (
            dict(
                source=IMPORTS,
                points="greeter = greeter_package:Greeter [fast]",
                requires=("absent_library>=2; extra == 'fast'", "torch"),
            ),
            "absent_library",
            'pip install "greeter-dist[fast]"',
        ),
        (
            dict(source=IMPORTS, requires=("Absent.Library>=2", "other-absent", "torch")),
            "absent_library",
            'pip install "Absent.Library>=2"',
        ),
        (
            dict(source=IMPORTS, requires=("python-absent==1.2", "torch")),  # another name
            "absent_library",
            'pip install "python-absent==1.2"',
        ),
        (
            dict(source="import absent.part", requires=("absent; python_version > '3'",)),
            "No module named 'absent'",
            'pip install "absent"',
        ),
        (
            dict(source=IMPORTS, requires=("absent-library; python_version < '3'",)),
            "absent_library",
            "provides the module 'absent_library'",
        ),
        (
            dict(source=IMPORTS, requires=("absent-library; extra == 'other'",)),
            "absent_library",
            "provides the module 'absent_library'",
        ),
        (
            dict(source="from torch.absent import x", requires=("torch", "absent-one")),
            "No module named 'torch.absent'",
            "install versions of 'torch' and greeter-dist 1.5 that fit",
        ),
        (
            dict(source="from hookengine.absent import x"),
            "No module named 'hookengine.absent'",
            "install versions of 'hookengine' and greeter-dist 1.5 that fit",
        ),
        (dict(source="None.absent"), "AttributeError", "repair or uninstall it"),
        (dict(source="from greeter_package import Greeter"), "circular", "repair or uninstall it"),
        (dict(source="raise SystemExit(3)"), "SystemExit: 3", "repair or uninstall it"),
        (dict(source="x = 1", requires=("hookengine>=99",)), "requires hookengine>=99", "compat"),
    ],
)
def test_the_error_names_the_distribution_and_what_to_install(
    install: Install, broken: Any, message: str, fix: str
) -> None:
    install(**broken)
    with pytest.raises(ImportError) as caught:
        PluginManager(["greeter"])
    text = str(caught.value)
    assert "the plugin 'greeter' of greeter-dist 1.5" in text
    assert message in text.partition("Fix: ")[0]
    assert fix in text.partition("Fix: ")[2]
