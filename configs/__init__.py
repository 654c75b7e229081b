"""The YAML groups that a run is composed from, shipped with the package."""

VANILLA = "ce"
"""The recipe of plain cross-entropy, against which relative accuracy measures every other."""
