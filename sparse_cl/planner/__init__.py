"""What a sequence of domains costs before it is run: memory, FLOPs, hours and dollars, from stated assumptions."""
