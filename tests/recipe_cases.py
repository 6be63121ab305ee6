"""What the tests of the recipes share; imported before a recipe, it makes them importable as when one is a script."""

import sys
from pathlib import Path

import pytest


RECIPES = Path(__file__).resolve().parent.parent / "recipes"
sys.path.insert(0, str(RECIPES))


def requires(package: str) -> pytest.MarkDecorator:
    """Skip a test where an asset package is missing, with the command that installs it as the reason."""
    import assets

    try:
        assets.package_dir(package)
        missing = ""
    except assets.MissingPackageError as error:
        missing = str(error)
    return pytest.mark.skipif(bool(missing), reason=missing)
