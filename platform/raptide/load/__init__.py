"""Load on a deployed endpoint, and how it copes. Needs neither torch nor Ray."""
