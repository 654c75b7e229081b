"""What happens between experts, and how results are measured."""
