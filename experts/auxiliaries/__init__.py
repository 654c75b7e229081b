"""Auxiliaries: losses and memories of an expert that help it to learn and are not exported."""
