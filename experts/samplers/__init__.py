"""Samplers, which choose the images of an epoch, and the draws that they are built from."""
