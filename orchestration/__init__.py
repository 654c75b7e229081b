"""Where and when: plan, mesh, actors, engines, checkpoints, tracking, command line."""

__version__ = "0.1.0"
