"""Who holds what: sources, long tails, partitions, partial labels and local test sets."""
