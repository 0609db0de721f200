"""Who rounds where: taps, the table of their names, and arithmetics as tables from names to roundings."""

from . import tables as tables  # registers the arithmetics, so that `get` knows their names
