"""The YAML groups that a run is composed from, shipped with the package."""
