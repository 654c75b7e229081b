"""What an expert computes: methods, losses, heads, flows, samplers, backbones, data. Knows not where it runs."""
