"""Speed as ratios measured in one run; results, with date and machine, in RESULTS.md."""
