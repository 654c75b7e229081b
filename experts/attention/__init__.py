"""Attention on an expert's last map, before the mean over its positions."""
