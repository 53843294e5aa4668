"""Studies: the probes over domains, models and checkpoints, and the reports that show what they found."""
