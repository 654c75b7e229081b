"""Losses as pure functions, shared by the objectives; each file is named after what it computes."""
