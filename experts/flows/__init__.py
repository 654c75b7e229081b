"""Flows that several methods use."""
