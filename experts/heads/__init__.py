"""Heads: pooled features to class scores. Every head is built as (config, D, C, position of the expert from 0)."""
