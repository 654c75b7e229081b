"""All of Ray: workers, their places, their deaths."""
