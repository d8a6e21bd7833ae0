"""The version of the installed package, told in one place."""

from importlib.metadata import version

VERSION = version("nemoserve")
