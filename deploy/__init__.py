"""Files for launching on a cluster, shipped with the package."""
