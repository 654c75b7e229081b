"""What an expert computes: backbones, heads, objectives, samplers, data. Knows nothing of where it runs."""
