"""Pictures of runs: how they look, and the page that shows a whole run."""
