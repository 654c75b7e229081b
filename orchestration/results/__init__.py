"""What a run found: evaluations of saved runs, tables, pictures."""
