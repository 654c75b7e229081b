"""What is done to pixels before an expert sees them, in training and for test-time views."""
