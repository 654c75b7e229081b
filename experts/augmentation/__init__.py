"""Random changes of images before an expert sees them: in training (`stack.py`) and at test time (`views.py`)."""
