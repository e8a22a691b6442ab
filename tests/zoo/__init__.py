"""Models, tasks, runs and files that tests are tried on, by what they are."""
