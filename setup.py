"""Build script. The metadata is in pyproject.toml; compiled extensions are declared here.

The package is pure Python so far, so building it needs neither torch nor a compiler.
"""

from setuptools import setup


setup()
