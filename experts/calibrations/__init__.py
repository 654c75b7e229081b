"""Calibrations: what changes a trained head's scores and can learn alone. Built as (config, D, C)."""
