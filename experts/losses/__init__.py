"""Losses as pure functions, which objectives share, and cross-entropy as an objective of its own."""
