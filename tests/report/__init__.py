"""The page of `dynamics report`."""
