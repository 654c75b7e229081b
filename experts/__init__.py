"""What an expert computes: methods, losses, heads, flows, samplers, backbones, data. It does not know where it runs."""
