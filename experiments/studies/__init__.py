"""Studies: scripts that run many experiments and print one table."""
