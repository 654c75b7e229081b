"""Mixings, which blend the images of a step and give them two sets of labels; one file each."""
