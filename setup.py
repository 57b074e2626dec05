"""Everything stands in pyproject.toml; this file is where native modules will be built."""

from setuptools import setup

setup()
