"""Code that all packages share: errors, progress, settings, ranks, collectives."""
