"""Exchange one quantity at one site between two training runs, take the step, measure what changed."""
