"""Random changes of images before an expert sees them: in training (`augment.py`) and at test time (`views.py`)."""
