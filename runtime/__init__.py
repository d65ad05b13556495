"""What every process of a job shares: errors, progress, settings, ranks, collectives."""
